"""The command line: the only place that prints, sets up logging, or turns errors into exit
codes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    set_parsing_settings,
)

from dlora.cli.settings import DemoSettings, MergeSettings
from dlora.edge.settings import EdgeSettings, InfoSettings
from dlora.errors import DLoRAError, UsageError
from dlora.files import write_json, write_private
from dlora.inference.settings import ApiSettings, ChatSettings, EvalSettings, GenerateSettings
from dlora.privacy.settings import AuditSettings
from dlora.protocol.address import is_loopback
from dlora.server.settings import KeysSettings, ServeSettings, StatusSettings
from dlora.training.settings import PlanSettings, ReportSettings, TrainSettings
from dlora.version import __version__

__all__ = ["main"]

_SWITCHES = (
    "--resume",
    "--use_rslora",
    "--upload_consent",
    "--chat",
    "--exact_match",
    "--check",
    "--tls",
    "--insecure",
    "--watch",
)  # may stand without true
_EPILOG = (
    "Every command: dlora COMMAND --help. Settings can also come from a YAML file with --config."
)


# Words without a flag: of which command, and what they are.
_POSITIONAL: dict[type, dict[str, dict[str, Any]]] = {
    ReportSettings: {
        "runs": {
            "nargs": "+",
            "type": Path,
            "help": "Folders of runs, as `dlora train` writes them; the first is compared with.",
        }
    },
    AuditSettings: {
        "run": {"type": Path, "help": "Folder of a run, made with `dlora train --record 24 ...`."},
    },
    KeysSettings: {
        "action": {
            "choices": ("init", "server", "tenant", "token", "certificate", "revoke", "list"),
            "help": "init: a new folder with authority and server certificate. "
            "server: a new server certificate. "
            "tenant: set a tenant's limits. token, certificate: give a tenant a new one. revoke: "
            "take back one, or all "
            "of a tenant. list: show what there is.",
        }
    },
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # The halves take turns: threads that spin while the other half works would steal its cores.
    # Read by OpenMP when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv[:1] == ["demo"]:  # both halves on one machine, see demo.SHARED_CORES
        os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("httpx", "httpcore", "httpx2", "httpcore2", "filelock", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A log writer's thread that meets a full disk: one line, the run itself decides what follows.
    threading.excepthook = lambda args: logging.getLogger("dlora").error(
        "%s: %s", args.exc_type.__name__, args.exc_value
    )
    if not sys.warnoptions:
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft and transformers talking to each other
    try:
        parsed = _parser().parse_args(_plain_flags(argv))
        name: str = parsed.subcommand
        values = parsed[name].as_dict()
        values.pop("config", None)
        return _COMMANDS[name][1](values)
    except DLoRAError as error:
        print(f"dlora: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("dlora: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        # torch's word for a write that failed, without the reason
        print(
            "dlora: cannot write: is the disk full? What was saved before is fine.", file=sys.stderr
        )
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else " while writing"
        print(f"dlora: {error.strerror}{where}. What was saved before is fine.", file=sys.stderr)
        return 1


def _plain_flags(argv: list[str]) -> list[str]:
    """Let flags be written with - for _, and switches alone for --switch=true."""
    flags = [
        re.sub(r"^--[^=]+", lambda match: "--" + match[0][2:].replace("-", "_"), word)
        for word in argv
    ]
    values = [*flags[1:], ""]
    return [
        f"{flag}=true" if flag in _SWITCHES and value not in ("true", "false") else flag
        for flag, value in zip(flags, values, strict=True)
    ]


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dlora",
        description="Fine-tune a model in the cloud with data that stays here.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"dlora {__version__}")
    commands = parser.add_subcommands(dest="subcommand")
    for name, (settings, _, text) in _COMMANDS.items():
        command = ArgumentParser(prog=f"dlora {name}", description=text)
        command.add_argument(
            "--config", action=ActionConfigFile, help="YAML file with any of these settings."
        )
        positional = _POSITIONAL.get(settings, {})
        command.add_class_arguments(settings, skip=set(positional))
        for word, options in positional.items():
            command.add_argument(word, **options)
        commands.add_subcommand(name, command, help=text)
    return parser


def _serve(values: dict[str, Any]) -> int:
    settings = ServeSettings(**values)
    # gRPC's own lines on stderr: strangers could write as many as they like. Read at its import.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _raise_descriptors()
    import torch
    from transformers.utils import logging as transformers_logging

    from dlora.cloud.load import load_cloud
    from dlora.cloud.model import Limits
    from dlora.cloud.quantize import weight_bytes
    from dlora.server.identities import Identities
    from dlora.server.server import Server

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.replicas:
        return _serve_replicas(settings)
    print(f"loading {settings.model} ...", flush=True)
    cloud, loaded = load_cloud(**_model(settings), limits=Limits(**_limits(settings)))
    protection = _protection(settings)
    tls, identities = protection["tls"], protection["identities"]
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: events.put(number))
    modules = [module for site in cloud.sites for module in site.modules if module.allowed]
    server = Server(
        cloud,
        loaded.tokenizer,
        host=settings.host,
        port=settings.port,
        options=_server_options(settings),
        tls=tls,
        identities=None if identities is None else Identities(identities),
        access_log=settings.access_log,
    )
    with ExitStack() as stack:
        if settings.metrics_port is not None:
            from dlora.server.metrics import serve_metrics

            stack.enter_context(serve_metrics(server, settings.metrics_port))
        stack.enter_context(server)
        precision = settings.dtype + (
            "" if settings.quantize == "none" else f", {settings.quantize} weights"
        )
        print(
            f"model      {loaded.model_id}, {precision} on {settings.device}, fingerprint "
            f"{cloud.fingerprint[:12]}"
        )
        print(f"adapters   {len(modules)} modules at {len(cloud.sites)} sites may be adapted")
        identity = "none: everybody may use it" if identities is None else str(identities)
        print(f"access     {'TLS' if tls else 'plaintext'}, identities: {identity}")
        print(
            f"memory     {weight_bytes(loaded.model) / 2**20:.0f} MiB of weights, "
            f"{cloud.bytes_per_token / 2**10:.0f} KiB of activations a training token"
        )
        print(f"ready      {server.address}", flush=True)
        while events.get() == signal.SIGHUP:
            server.reopen_log()
        print(f"stopping: streams in flight have {settings.drain_s:.0f} s", flush=True)
    return 0


def _raise_descriptors() -> None:
    """As many open files as the system lets us have: every connection is one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _limits(settings: ServeSettings) -> dict[str, int]:
    """Keyword arguments of `cloud.Limits`."""
    return {
        "max_tokens": settings.max_tokens,
        "max_length": settings.max_length,
        "max_message_bytes": settings.max_message_mib << 20,
        "max_inflight_bytes": settings.max_inflight_mib << 20,
        "edge_first": settings.edge_first,
        "edge_last": settings.edge_last,
    }


def _model(settings: ServeSettings) -> dict[str, Any]:
    return {
        "name": settings.model,
        "model_id": settings.model_id,
        "device": settings.device,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "allow_modules": settings.allow_modules,
    }


def _server_options(settings: ServeSettings) -> Any:
    from dlora.server.server import ServerOptions

    return ServerOptions(
        max_streams=settings.max_streams,
        compute_slots=settings.compute_slots,
        edge_timeout_s=settings.edge_timeout_s,
        drain_s=settings.drain_s,
    )


def _protection(settings: ServeSettings) -> dict[str, Any]:
    """TLS files and identities; a warning where there are none and the network can reach the
    server.
    """
    from dlora.server.server import TlsFiles

    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = TlsFiles(
            certificate=settings.tls_cert, key=settings.tls_key, client_ca=settings.client_ca
        )
    elif settings.keys is not None:
        pem, key = settings.keys / "server.pem", settings.keys / "server.key"
        tls = TlsFiles(certificate=pem, key=key, client_ca=settings.client_ca)
    if not is_loopback(settings.host) and settings.insecure:
        print(
            f"warning: {settings.host} is not loopback: anybody who reaches it can use this server"
            + ("" if tls else ", and read and change what travels"),
            file=sys.stderr,
        )
    return {
        "tls": tls,
        "identities": settings.identities or (settings.keys and settings.keys / "identities.json"),
    }


def _serve_replicas(settings: ServeSettings) -> int:
    from dlora.server.replica import ReplicaSettings
    from dlora.server.replicas import Front
    from dlora.server.scaling import Scaling

    replica = ReplicaSettings(
        load=_model(settings),
        limits=_limits(settings),
        options=_server_options(settings),
        host=settings.host,
        ports=settings.ports,
        access_log=settings.access_log,
        threads=settings.threads,
        num_cpus=settings.replica_cpus,
        num_gpus=settings.replica_gpus,
        **_protection(settings),
    )
    scaling = Scaling(least=settings.replicas, most=settings.max_replicas or settings.replicas)
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: events.put(number))
    with Front(
        replica, scaling, host=settings.host, port=settings.port, ray_address=settings.ray_address
    ) as front:
        print(
            f"model      {front.description.model_id}, fingerprint "
            f"{front.description.fingerprint[:12]}"
        )
        for one in front.replicas:
            print(f"replica    {one.address}")
        print(f"ready      {front.address}", flush=True)
        while events.get() == signal.SIGHUP:
            print("replacing the replicas one by one", flush=True)
            front.replace()
            print("replaced", flush=True)
        print(f"stopping: streams in flight have {settings.drain_s:.0f} s", flush=True)
    return 0


def _train(values: dict[str, Any]) -> int:
    settings = TrainSettings(**values)
    from transformers.utils import logging as transformers_logging

    from dlora.edge.grpc_link import Access, connect
    from dlora.training.run import train

    transformers_logging.set_verbosity_error()
    link = connect(settings.server, access=Access(**settings.access))
    try:
        record = train(settings, link)
    finally:
        link.close()
    print_result(record, settings.output)
    return 0 if record["status"] == "finished" else 130


def print_result(record: dict[str, Any], output: Path) -> None:
    """What a person wants to know after a run."""
    cost = record["cost"]
    loss = f"loss {record['train_loss']:.4f}" if record["train_loss"] is not None else "no loss yet"
    if record["eval_loss"] is not None:
        best = record["best_eval_loss"] or record["eval_loss"]
        loss += f", eval loss {record['eval_loss']:.4f} (best {best:.4f})"
    edge = (
        cost["adapter_flops"]
        + cost["head_flops"]
        + cost["embedding_flops"]
        + cost["edge_layer_flops"]
    )
    cloud = cost["cloud_forward_flops"] + cost["cloud_backward_flops"]
    print(f"{record['status']} after {record['steps']} steps and {record['seconds']:.0f} s: {loss}")
    print(
        f"traffic    {cost['sent_bytes'] / 1e6:.1f} MB up, {cost['received_bytes'] / 1e6:.1f} MB "
        "down, ",
        end="",
    )
    print(f"{cost['round_trips']} round trips, {cost['retries']} retries")
    adapters = cost["adapter_flops"]
    print(
        f"compute    edge {edge / 1e9:.1f} GFLOP (adapters {adapters / 1e9:.1f}), cloud "
        f"{cloud / 1e9:.1f} GFLOP"
    )
    print(f"adapter    {output}")
    if kr := record.get("kill_revive"):
        print(
            f"active     {len(kr['active'])} units at the end; on average {kr['cost_share']:.1%} "
            "of FT's cost"
        )
    if record["status"] == "interrupted":
        print("continue   the same command with --resume")


def _merge(values: dict[str, Any]) -> int:
    settings = MergeSettings(**values)
    from dlora.cli.merge import merge

    model_id, named = merge(settings)
    if model_id != named:
        print(f"warning: the adapter was made for {named}, this is {model_id}", file=sys.stderr)
    print(f"merged model in {settings.output}")
    return 0


def _demo(values: dict[str, Any]) -> int:
    from dlora.cli.demo import run_demo

    return run_demo(DemoSettings(**values))


# ----------------------------------------------------------------- using an adapter


@contextmanager
def _loaded(settings: EdgeSettings, adapter: Path | None) -> Iterator[tuple[Any, Any]]:
    """Connect and load: (split model, tokenizer). Ends the connection afterwards."""
    from transformers.utils import logging as transformers_logging

    from dlora.edge.grpc_link import Access, connect
    from dlora.edge.model import load_tokenizer
    from dlora.edge.noise import Noise
    from dlora.inference.answer import load_for_inference

    transformers_logging.set_verbosity_error()
    link = connect(settings.server, access=Access(**settings.access))
    try:
        tokenizer = load_tokenizer(link)
        model = load_for_inference(
            link,
            adapter,
            wire_dtype=settings.wire_dtype,
            give_up_after_s=settings.give_up_after_s,
            device=settings.device,
            edge_layers=settings.edge_layers,
        )
        model.noise = Noise(entry=settings.noise_entry, clip=settings.noise_clip)
        yield model, tokenizer
    finally:
        link.close()


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _generate(values: dict[str, Any]) -> int:
    settings = GenerateSettings(**values)
    from transformers import set_seed

    from dlora.inference.answer import Pieces, complete, continued, cost_line, load_prompts

    prompts = None if settings.prompts is None else load_prompts(settings.prompts)
    prompt = settings.prompt
    if prompts is None and prompt is None:
        if sys.stdin.isatty():
            print("reading the prompt from standard input, up to Ctrl-D", file=sys.stderr)
        prompt = sys.stdin.read()
    with _loaded(settings, settings.adapter) as (model, tokenizer):
        set_seed(settings.seed)
        before, started = model.meter.copy(), time.monotonic()
        if prompts is None:
            pieces = Pieces(tokenizer, _write)
            options = settings.options
            texts, num_tokens = complete(
                model, tokenizer, [prompt or ""], chat=settings.chat, streamer=pieces, **options
            )
            print("" if pieces.num_tokens else texts[0])
        else:
            start = continued(settings.output, prompts) if settings.output else 0
            num_tokens = _generate_file(settings, model, tokenizer, prompts[start:], start)
        print(
            f"dlora: {cost_line(model.meter - before, num_tokens, time.monotonic() - started)}",
            file=sys.stderr,
        )
    return 0


def _generate_file(
    settings: GenerateSettings, model: Any, tokenizer: Any, prompts: list[Any], start: int
) -> int:
    """Answers to a file of prompts, each batch written as soon as it is there; return the number of
    tokens.
    """
    from tqdm.auto import tqdm

    from dlora.inference.answer import complete_file

    total = 0
    batch_size = 1 if settings.prompt_lookup else settings.batch_size
    batches = complete_file(
        model, tokenizer, prompts, batch_size=batch_size, chat=settings.chat, **settings.options
    )
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=start + len(prompts), initial=start, desc="answers", unit="prompt")
        )
        out = (
            sys.stdout
            if settings.output is None
            else stack.enter_context(settings.output.open("a"))
        )
        for answers, num_tokens in batches:
            for prompt, text in answers:
                print(
                    json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False), file=out
                )
            out.flush()
            bar.update(len(answers))
            total += num_tokens
    return total


def _chat(values: dict[str, Any]) -> int:
    settings = ChatSettings(**values)
    from transformers import set_seed

    from dlora.inference.answer import cost_line
    from dlora.inference.chat import Chat

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    with _loaded(settings, settings.adapter) as (model, tokenizer):
        set_seed(settings.seed)
        chat = Chat(model, tokenizer, system=settings.system, **settings.options)
        print(f"{model.link.description.model_id} with {settings.adapter or 'no adapter'}.")
        print("Ctrl-C stops an answer, /new begins anew, /quit or Ctrl-D leaves.")
        while True:
            try:
                text = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if text == "/quit":
                return 0
            if text == "/new":
                chat.forget()
                print("a new chat")
            elif text:
                before, started = model.meter.copy(), time.monotonic()
                try:
                    chat.say(text, _write)
                    print()
                except KeyboardInterrupt:
                    print(" [stopped]")
                except DLoRAError as error:
                    print(f"dlora: {error} (say it again, or /new begins anew)", file=sys.stderr)
                    continue
                cost = cost_line(model.meter - before, chat.num_tokens, time.monotonic() - started)
                print(f"dlora: {cost}", file=sys.stderr)


def _eval(values: dict[str, Any]) -> int:
    settings = EvalSettings(**values)
    from dlora.inference.evaluate import evaluate

    with _loaded(settings, settings.adapter) as (model, tokenizer):
        found = evaluate(settings, model, tokenizer)
    found = {"adapter": None if settings.adapter is None else str(settings.adapter), **found}
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.output, found)
    for name, value in found.items():
        if name == "cost" or name.endswith("_95"):
            continue
        interval = found.get(f"{name}_95")
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(
            f"{name:18} {shown}"
            + (f"  (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
        )
    return 0


def _api(values: dict[str, Any]) -> int:
    settings = ApiSettings(**values)
    from dlora.inference.api import ApiServer, build_app

    with _loaded(settings, settings.adapter) as (model, tokenizer):
        name = settings.name or (settings.adapter.resolve().name if settings.adapter else None)
        name = name or model.link.description.model_id
        local = is_loopback(settings.host)
        if not local:
            print(
                f"warning: {settings.host} is not loopback: others may use the adapter",
                file=sys.stderr,
            )
        app = build_app(
            model,
            tokenizer,
            name=name,
            api_key=settings.api_key or os.environ.get("DLORA_API_KEY"),
            max_new_tokens=settings.max_new_tokens,
            prompt_lookup=settings.prompt_lookup,
            **({} if local else {"hosts": ("*",)}),
        )
        server = ApiServer(app, settings.host, settings.port)
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # the server's own handlers hand on what they got
            signal.signal(number, lambda *_: None)
        print(f"model      {name}")
        print(f"ready      {server.url}", flush=True)
        server.run()
    return 0


def _info(values: dict[str, Any]) -> int:
    settings = InfoSettings(**values)
    from dlora.edge.describe import describe_adapter, describe_server
    from dlora.edge.grpc_link import Access, connect

    description = None
    if settings.server is not None:
        link = connect(settings.server, access=Access(**settings.access))
        description = link.description
        link.close()
        for name, value in describe_server(settings.server, description):
            print(f"{name:12} {value}")
    if settings.adapter is not None:
        for name, value in describe_adapter(settings.adapter, description):
            print(f"{name:12} {value}")
    return 0


def _plan(values: dict[str, Any]) -> int:
    settings = PlanSettings(**values)
    from dlora.edge.grpc_link import Access, connect
    from dlora.training.planner import check, plan

    link = connect(settings.server, access=Access(**settings.access))
    try:
        model, found = plan(settings, link)
        traffic = found.sent_bytes + found.received_bytes
        print(
            f"model        {link.description.model_id}, {found.active_sites} active sites, "
            f"{settings.wire} wire"
        )
        print(f"a step       {settings.batch_size} x {settings.length} tokens")
        print(
            f"bytes        {found.sent_bytes / 1e6:.2f} MB up, {found.received_bytes / 1e6:.2f} MB "
            "down"
        )
        print(f"round trips  {found.round_trips}")
        parts = f"cloud {found.cloud_s:.2f}, edge {found.edge_s:.2f}, "
        parts += f"messages {found.wire_s:.2f}, link {found.link_s:.2f}"
        print(f"seconds      {found.seconds:.2f}: {parts}")
        hours = settings.steps * found.seconds / 3600
        print(f"{settings.steps} steps   {settings.steps * traffic / 1e9:.2f} GB, {hours:.2f} h")
        if settings.check:
            cost, seconds = check(settings, model)
            error = traffic / (cost.sent_bytes + cost.received_bytes) - 1
            print(
                f"checked      bytes off by {error:+.2%}, round trips {cost.round_trips}, ", end=""
            )
            if settings.rtt_ms is None and settings.up_mbit is None and settings.down_mbit is None:
                print(f"seconds {seconds:.2f}, off by {found.seconds / seconds - 1:+.0%}")
            else:
                print("seconds not compared: the link here is not the one that was given")
    finally:
        link.close()
    return 0


def _keys(values: dict[str, Any]) -> int:
    settings = KeysSettings(**values)
    try:
        from dlora.server import keys
    except ImportError as error:
        raise UsageError(
            '`dlora keys` makes certificates with cryptography: pip install "dlora[server]"'
        ) from error
    folder, tenant, hosts = (
        settings.folder,
        settings.tenant or "",
        [h.strip() for h in settings.hosts.split(",")],
    )
    if settings.action == "init":
        keys.make_authority(folder, hosts, settings.days)
        print(f"{folder}/ca.pem    give this to edges: --tls_ca ca.pem")
        print(f"serve      dlora serve --keys {folder} --host 0.0.0.0 ...")
        print(f"next       dlora keys token --folder {folder} --tenant NAME --output NAME.token")
    elif settings.action == "server":
        keys.make_server_certificate(folder, hosts, settings.days)
        print(f"{folder}/server.pem    for {', '.join(hosts)}; a running server takes it up")
    elif settings.action == "tenant":
        keys.set_tenant(folder, tenant, settings.limits)
        print(f"tenant     {tenant}")
    elif settings.action == "token":
        name, token = keys.add_token(folder, tenant, settings.days)
        where = "Shown once" if settings.output is None else f"Written to {settings.output}"
        print(
            f"id {name} for {tenant}, {settings.days} days. {where}, kept as a hash only.",
            file=sys.stderr,
        )
        if settings.output is None:
            print(token)
        else:
            write_private(settings.output, f"{token}\n".encode())
    elif settings.action == "certificate":
        name, file = keys.add_certificate(folder, tenant, settings.days)
        print(f"{file}.pem, {file}.key    hand both to {tenant}, then delete the key here")
        print(f"id         {name}")
    elif settings.action == "revoke":
        count = keys.revoke(folder, settings.id or tenant)
        print(f"revoked {count}; running servers refuse them within seconds")
    else:
        for kind, owner, name, expires in keys.listing(folder):
            print(f"{kind:12} {owner:20} {name[:16]:18} until {expires[:10]}")
    return 0


def _status(values: dict[str, Any]) -> int:
    settings = StatusSettings(**values)
    from dlora.server.metrics import read_status

    while True:
        text = "\n".join(read_status(settings.metrics_port))
        if not settings.watch:
            print(text)
            return 0
        print(f"\033[2J\033[H{text}", flush=True)
        time.sleep(2)


def _report(values: dict[str, Any]) -> int:
    settings = ReportSettings(**values)
    from dlora.training.report import write_report

    for file in write_report(settings.runs, settings.output):
        print(file)
    return 0


def _audit(values: dict[str, Any]) -> int:
    settings = AuditSettings(**values)
    from transformers.utils import logging as transformers_logging

    from dlora.edge.grpc_link import Access, connect
    from dlora.privacy.audit import audit, check_drawing, write_audit

    transformers_logging.set_verbosity_error()
    check_drawing()
    link = connect(settings.server, access=Access(**settings.access))
    try:
        found = audit(settings, link)
    finally:
        link.close()
    for finding in found["attacks"]:
        print(f"{finding['where']:28} {finding['says']}")
    for file in write_audit(found, settings.output):
        print(file)
    return 0


_COMMANDS: dict[str, tuple[type, Callable[[dict[str, Any]], int], str]] = {
    "serve": (
        ServeSettings,
        _serve,
        "Cloud: load a model, freeze it, and serve edges until Ctrl-C.",
    ),
    "keys": (
        KeysSettings,
        _keys,
        "Cloud: certificates, tenants and tokens for a server of one's own.",
    ),
    "status": (StatusSettings, _status, "Cloud: who uses a server on this machine, and how much."),
    "train": (TrainSettings, _train, "Edge: train an adapter with private data against a server."),
    "generate": (
        GenerateSettings,
        _generate,
        "Edge: answer a prompt, standard input, or a file of prompts.",
    ),
    "chat": (ChatSettings, _chat, "Edge: talk with the model and a private adapter."),
    "eval": (
        EvalSettings,
        _eval,
        "Edge: loss and perplexity, exact match, or choice accuracy on a data file.",
    ),
    "api": (
        ApiSettings,
        _api,
        "Edge: an OpenAI-compatible server on loopback, over a private adapter.",
    ),
    "info": (InfoSettings, _info, "What a server serves, and what an adapter folder holds."),
    "plan": (
        PlanSettings,
        _plan,
        "Edge: bytes, round trips and seconds of a training step, before anything is run.",
    ),
    "report": (ReportSettings, _report, "Figures of one or several runs: one HTML file, and PNGs."),
    "audit": (
        AuditSettings,
        _audit,
        "Edge: how much a curious cloud could recover from a recorded run.",
    ),
    "merge": (
        MergeSettings,
        _merge,
        "Write base model plus adapter as one full model, where the base is at hand.",
    ),
    "demo": (
        DemoSettings,
        _demo,
        "Server and edge in two processes on this machine: train, compare before and after.",
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
