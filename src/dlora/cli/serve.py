"""`dlora serve`, `keys` and `status`: the commands of whoever has the model.

`serve` first refuses what can be refused cheaply (a taken port, files that cannot be read, a
model that is not there) and only then loads torch and the model.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dlora.cli.checks import check_model, check_pattern, check_port
from dlora.errors import UsageError
from dlora.extras import check_extra, missing_extra
from dlora.files import check_private, write_private
from dlora.protocol.address import LOOPBACK_ADDRESS, is_loopback
from dlora.protocol.device import check_device_name, try_device
from dlora.server.settings import KeysSettings, ServeSettings, StatusSettings

__all__ = ["check_keys", "check_serve", "check_status", "keys", "serve", "status"]


def serve(settings: ServeSettings) -> int:
    """Cloud: load a model, freeze it, and serve edges until Ctrl-C."""
    # gRPC's own lines on stderr: strangers could write as many as they like. Read at its import.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _raise_descriptors()

    import torch
    from transformers.utils import logging as transformers_logging

    if settings.ray_address is None:  # else the device is of a machine of the cluster
        try_device(settings.device)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if settings.threads:
        torch.set_num_threads(settings.threads)

    _warn_if_open(settings)
    return _serve_replicas(settings) if settings.replicas else _serve_one(settings)


def _serve_one(settings: ServeSettings) -> int:
    """A server in this process."""
    from dlora.cloud.limits import Limits
    from dlora.cloud.load import load_cloud
    from dlora.server.identities import Identities
    from dlora.server.metrics import serve_metrics
    from dlora.server.server import Server

    print(f"loading {settings.model} ...", flush=True)
    cloud, loaded = load_cloud(**_model(settings), limits=Limits(**_limits(settings)))
    identities = _identities(settings)

    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: events.put(number))

    server = Server(
        cloud,
        loaded.tokenizer,
        host=settings.host,
        port=settings.port,
        options=_server_options(settings),
        tls=_tls(settings),
        identities=None if identities is None else Identities(identities),
        access_log=settings.access_log,
    )
    with ExitStack() as stack:
        if settings.metrics_port is not None:
            stack.enter_context(serve_metrics(server, settings.metrics_port))
        stack.enter_context(server)
        _print_served(settings, cloud, loaded)
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


def _print_served(settings: ServeSettings, cloud: Any, loaded: Any) -> None:
    """What is served, to whom, and what it takes."""
    from dlora.cloud.placement import places
    from dlora.cloud.quantize import weight_bytes

    weights = "" if settings.quantize == "none" else f", {settings.quantize} weights"
    on = places(loaded.model) or settings.device
    print(
        f"model      {loaded.model_id}, {settings.dtype}{weights} on {on}, "
        f"fingerprint {cloud.fingerprint[:12]}"
    )

    num_modules = sum(module.allowed for site in cloud.sites for module in site.modules)
    num_fused = sum(module.allowed for site in cloud.experts for module in site.modules)
    fused = f", and {num_fused} fused weights of experts (hosted wire)" if num_fused else ""
    print(f"adapters   {num_modules} modules at {len(cloud.sites)} sites may be adapted{fused}")

    identities = _identities(settings)
    who = "none: everybody may use it" if identities is None else str(identities)
    print(f"access     {'TLS' if _tls_files(settings) else 'plaintext'}, identities: {who}")
    beside = ", beside what its edge answers" if settings.recompute else ""
    print(
        f"memory     {weight_bytes(loaded.model) / 2**20:.0f} MiB of weights, "
        f"{cloud.memory.training[0] / 2**10:.0f} KiB of activations a training token{beside}"
    )


def _serve_replicas(settings: ServeSettings) -> int:
    """Servers that Ray places, behind this address; SIGHUP replaces them one by one."""
    from dlora.server.replica import ReplicaSettings
    from dlora.server.replicas import Front
    from dlora.server.scaling import Scaling

    replica = ReplicaSettings(
        load=_model(settings),
        limits=_limits(settings),
        options=_server_options(settings),
        host=settings.host,
        ports=settings.ports,
        tls=_tls(settings),
        identities=_identities(settings),
        access_log=settings.access_log,
        threads=settings.threads,
        num_cpus=settings.replica_cpus,
        num_gpus=settings.replica_gpus,
    )
    scaling = Scaling(least=settings.replicas, most=settings.max_replicas or settings.replicas)

    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: events.put(number))

    with Front(
        replica, scaling, host=settings.host, port=settings.port, ray_address=settings.ray_address
    ) as front:
        description = front.description
        print(f"model      {description.model_id}, fingerprint {description.fingerprint[:12]}")
        for running in front.replicas:
            print(f"replica    {running.address}")
        print(f"ready      {front.address}", flush=True)

        while events.get() == signal.SIGHUP:
            print("replacing the replicas one by one", flush=True)
            front.replace()
            print("replaced", flush=True)
        print(f"stopping: streams in flight have {settings.drain_s:.0f} s", flush=True)
    return 0


# ----------------------------------------------------------------- settings as the parts take them


def _model(settings: ServeSettings) -> dict[str, Any]:
    """Keyword arguments of `load_cloud`, but for the limits."""
    from dlora.embedded import try_in_process

    return {
        "trial": try_in_process,
        "name": settings.model,
        "model_id": settings.model_id,
        "device": settings.device,
        "device_map": settings.device_map,
        "max_memory": settings.max_memory,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "allow_modules": settings.allow_modules,
    }


def _limits(settings: ServeSettings) -> dict[str, Any]:
    """Keyword arguments of `cloud.Limits`."""
    return {
        "max_tokens": settings.max_tokens,
        "max_length": settings.max_length,
        "max_message_bytes": settings.max_message_mib << 20,
        "max_inflight_bytes": settings.max_inflight_mib << 20,
        "edge_first": settings.edge_first,
        "edge_last": settings.edge_last,
        "recompute": settings.recompute,
    }


def _server_options(settings: ServeSettings) -> Any:
    from dlora.server.server import ServerOptions

    return ServerOptions(
        max_streams=settings.max_streams,
        compute_slots=settings.compute_slots,
        edge_timeout_s=settings.edge_timeout_s,
        drain_s=settings.drain_s,
    )


def _tls_files(settings: ServeSettings) -> tuple[Path, Path] | None:
    """(certificate, key) of the server; None: plaintext."""
    if settings.tls_cert is not None and settings.tls_key is not None:
        return settings.tls_cert, settings.tls_key
    if settings.keys is not None:
        return settings.keys / "server.pem", settings.keys / "server.key"
    return None


def _tls(settings: ServeSettings) -> Any:
    """`TlsFiles` of the server; None: plaintext."""
    from dlora.server.server import TlsFiles

    files = _tls_files(settings)
    if files is None:
        return None
    return TlsFiles(certificate=files[0], key=files[1], client_ca=settings.client_ca)


def _identities(settings: ServeSettings) -> Path | None:
    """The file of tenants, tokens and certificates; None: everybody may use the server."""
    return settings.identities or (settings.keys and settings.keys / "identities.json")


# ----------------------------------------------------------------- before the model is loaded


def check_serve(settings: ServeSettings) -> None:
    """Raises UsageError for what would fail after the model was loaded, or in loading it."""
    check_pattern("allow_modules", settings.allow_modules)
    check_device_name(settings.device)
    if settings.ray_address is None:  # else the model is on the machines of the cluster
        check_model("model", settings.model)
    _check_files(settings)
    _check_packages(settings)

    check_port("port", settings.host, settings.port)
    if settings.metrics_port is not None:
        check_port("metrics_port", LOOPBACK_ADDRESS, settings.metrics_port)


def _check_packages(settings: ServeSettings) -> None:
    """What single settings need is installed."""
    if settings.quantize in ("int8", "nf4"):
        check_extra("quantize", f"quantize: {settings.quantize}")
    if settings.replicas and settings.ray_address is None:
        check_extra("ray", "replicas: Ray places them, which")
    if settings.metrics_port is not None:
        check_extra("server", "metrics_port")


def check_keys(settings: KeysSettings) -> None:
    """Raises UsageError where nothing is installed that makes certificates."""
    check_extra("server", f"`dlora keys {settings.action}`")


def check_status(settings: StatusSettings) -> None:
    """Raises UsageError where nothing is installed that reads metrics."""
    check_extra("server", "`dlora status`")


def _check_files(settings: ServeSettings) -> None:
    """Certificate, key, authority and identities are there and can be read."""
    from dlora.server.identities import Identities

    files = _tls_files(settings)
    if files is not None:
        check_private(files[1])
        for file in (*files, *filter(None, [settings.client_ca])):
            try:
                file.read_bytes()
            except OSError as error:
                raise UsageError(f"{file}: {error.strerror}") from error

    identities = _identities(settings)
    if identities is not None:
        Identities(identities)


def _warn_if_open(settings: ServeSettings) -> None:
    """A warning where the network reaches a server that does not ask who calls, or does not
    encrypt.
    """
    if is_loopback(settings.host) or not settings.insecure:
        return
    risk = f"{settings.host} is not loopback: anybody who reaches it can use this server"
    if _tls_files(settings) is None:
        risk += ", and read and change what travels"
    print(f"warning: {risk}", file=sys.stderr)


# ----------------------------------------------------------------- keys and status


def keys(settings: KeysSettings) -> int:
    """Cloud: certificates, tenants and tokens for a server of one's own."""
    try:
        from dlora.server import keys
    except ImportError as error:
        raise missing_extra("server", "`dlora keys`") from error

    folder, tenant, days = settings.folder, settings.tenant or "", settings.days
    hosts = [host.strip() for host in settings.hosts.split(",")]
    match settings.action:
        case "init":
            keys.make_authority(folder, hosts, days)
            print(f"{folder}/ca.pem    give this to edges: --tls_ca ca.pem")
            print(f"serve      dlora serve --keys {folder} --host 0.0.0.0 ...")
            print(
                f"next       dlora keys token --folder {folder} --tenant NAME --output NAME.token"
            )

        case "server":
            keys.make_server_certificate(folder, hosts, days)
            print(f"{folder}/server.pem    for {', '.join(hosts)}; a running server takes it up")

        case "tenant":
            keys.set_tenant(folder, tenant, settings.limits)
            print(f"tenant     {tenant}")

        case "token":
            # The token alone on standard output; a file of --output is open to its user alone.
            name, token = keys.add_token(folder, tenant, days)
            where = "Shown once" if settings.output is None else f"Written to {settings.output}"
            note = f"id {name} for {tenant}, {days} days. {where}, kept as a hash only."
            print(note, file=sys.stderr)
            if settings.output is None:
                print(token)
            else:
                write_private(settings.output, f"{token}\n".encode())

        case "certificate":
            name, file = keys.add_certificate(folder, tenant, days)
            print(f"{file}.pem, {file}.key    hand both to {tenant}, then delete the key here")
            print(f"id         {name}")

        case "revoke":
            count = keys.revoke(folder, settings.id or tenant)
            print(f"revoked {count}; running servers refuse them within seconds")

        case "list":
            for kind, owner, name, expires in keys.listing(folder):
                print(f"{kind:12} {owner:20} {name[:16]:18} until {expires[:10]}")
    return 0


def status(settings: StatusSettings) -> int:
    """Cloud: who uses a server on this machine, and how much."""
    from dlora.server.metrics import read_status

    while True:
        text = "\n".join(read_status(settings.metrics_port))
        if not settings.watch:
            print(text)
            return 0
        print(f"\033[2J\033[H{text}", flush=True)
        time.sleep(2)
