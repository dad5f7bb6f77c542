"""The command line: the only place that prints, sets up logging, or turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from dlora.errors import DLoRAError, UsageError
from dlora.settings import DemoSettings, MergeSettings, ServeSettings, TrainSettings
from dlora.version import __version__

__all__ = ["main"]

_EPILOG = "Every command: dlora COMMAND --help. Settings can also come from a YAML file with --config."


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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpcore", "httpx2", "httpcore2", "filelock", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A log writer's thread that meets a full disk: one line, the run itself decides what follows.
    threading.excepthook = lambda args: logging.getLogger("dlora").error(
        "%s: %s", args.exc_type.__name__, args.exc_value
    )
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers talking to each other
    try:
        parsed = _parser().parse_args(_plain_flags(argv))
        name: str = parsed.subcommand
        values = parsed[name].as_dict()
        values.pop("config", None)
        return {"serve": _serve, "train": _train, "merge": _merge, "demo": _demo}[name](values)
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
        print("dlora: cannot write: is the disk full? What was saved before is fine.", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else " while writing"
        print(f"dlora: {error.strerror}{where}. What was saved before is fine.", file=sys.stderr)
        return 1


def _plain_flags(argv: list[str]) -> list[str]:
    """Let flags be written with - for _, and --resume alone for --resume=true."""
    flags = [re.sub(r"^--[^=]+", lambda match: "--" + match[0][2:].replace("-", "_"), word) for word in argv]
    values = [*flags[1:], ""]
    return [
        f"{flag}=true" if flag in ("--resume", "--use_rslora") and value not in ("true", "false") else flag
        for flag, value in zip(flags, values, strict=True)
    ]


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dlora", description="Fine-tune a model in the cloud with data that stays here.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"dlora {__version__}")
    commands = parser.add_subcommands(dest="subcommand")
    for name, settings, text in (
        ("serve", ServeSettings, "Cloud: load a model, freeze it, and serve edges until Ctrl-C."),
        ("train", TrainSettings, "Edge: train an adapter with private data against a server."),
        ("merge", MergeSettings, "Write base model plus adapter as one full model, where the base is at hand."),
        ("demo", DemoSettings, "Server and edge in two processes on this machine: train, compare before and after."),
    ):
        command = ArgumentParser(prog=f"dlora {name}", description=text)
        command.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings.")
        command.add_class_arguments(settings)
        commands.add_subcommand(name, command, help=text)
    return parser


def _serve(values: dict[str, Any]) -> int:
    settings = ServeSettings(**values)
    import torch
    from transformers.utils import logging as transformers_logging

    from dlora.cloud import CloudModel, Limits
    from dlora.load import load_model
    from dlora.server import Server, ServerOptions

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        allowed = re.compile(settings.allow_modules)
    except re.error as error:
        raise UsageError(f"allow_modules: {settings.allow_modules!r} is no regular expression: {error}") from error
    print(f"loading {settings.model} ...", flush=True)
    loaded = load_model(settings.model, model_id=settings.model_id, device=settings.device, dtype=settings.dtype)
    cloud = CloudModel(
        loaded.model,
        model_id=loaded.model_id,
        allowed=lambda name: allowed.search(name) is not None,
        limits=Limits(
            max_tokens=settings.max_tokens,
            max_length=settings.max_length,
            max_message_bytes=settings.max_message_mib << 20,
            max_inflight_bytes=settings.max_inflight_mib << 20,
        ),
    )
    options = ServerOptions(
        max_streams=settings.max_streams,
        compute_slots=settings.compute_slots,
        edge_timeout_s=settings.edge_timeout_s,
    )
    if settings.host not in ("127.0.0.1", "localhost", "::1", "[::1]"):
        print(
            f"warning: {settings.host} is not loopback, and nothing is encrypted or authenticated yet", file=sys.stderr
        )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    modules = [module for site in cloud.sites for module in site.modules if module.allowed]
    with Server(cloud, loaded.tokenizer, host=settings.host, port=settings.port, options=options) as server:
        print(
            f"model      {loaded.model_id}, {settings.dtype} on {settings.device}, fingerprint {cloud.fingerprint[:12]}"
        )
        print(f"adapters   {len(modules)} modules at {len(cloud.sites)} sites may be adapted")
        print(f"memory     {cloud.bytes_per_token / 2**10:.0f} KiB of activations a training token")
        print(f"ready      {server.address}", flush=True)
        stop.wait()
        print("stopping", flush=True)
    return 0


def _train(values: dict[str, Any]) -> int:
    settings = TrainSettings(**values)
    from transformers.utils import logging as transformers_logging

    from dlora.client import connect
    from dlora.training import train

    transformers_logging.set_verbosity_error()
    link = connect(settings.server)
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
        loss += f", eval loss {record['eval_loss']:.4f} (best {record['best_eval_loss'] or record['eval_loss']:.4f})"
    edge = cost["adapter_flops"] + cost["head_flops"] + cost["embedding_flops"]
    cloud = cost["cloud_forward_flops"] + cost["cloud_backward_flops"]
    print(f"{record['status']} after {record['steps']} steps and {record['seconds']:.0f} s: {loss}")
    print(f"traffic    {cost['sent_bytes'] / 1e6:.1f} MB up, {cost['received_bytes'] / 1e6:.1f} MB down, ", end="")
    print(f"{cost['round_trips']} round trips, {cost['retries']} retries")
    adapters = cost["adapter_flops"]
    print(f"compute    edge {edge / 1e9:.1f} GFLOP (adapters {adapters / 1e9:.1f}), cloud {cloud / 1e9:.1f} GFLOP")
    print(f"adapter    {output}")
    if record["status"] == "interrupted":
        print("continue   the same command with --resume")


def _merge(values: dict[str, Any]) -> int:
    settings = MergeSettings(**values)
    from dlora.merge import merge

    model_id, named = merge(settings)
    if model_id != named:
        print(f"warning: the adapter was made for {named}, this is {model_id}", file=sys.stderr)
    print(f"merged model in {settings.output}")
    return 0


def _demo(values: dict[str, Any]) -> int:
    from dlora.demo import run_demo

    return run_demo(DemoSettings(**values))


if __name__ == "__main__":
    raise SystemExit(main())
