"""`dlora serve`: every setting reaches what the process is built from, alone and with replicas.

Both ways run through `main` in this process: real servers with real TLS and identities. Only the
model is a tiny one whatever is asked for, and Ray is a stand-in that makes its actors here.
"""

from __future__ import annotations

import inspect
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dlora
import dlora.cloud.load
import dlora.server.metrics
import dlora.server.replicas
import dlora.server.server
from dlora.cli.main import main
from dlora.cloud.load import LoadedModel
from dlora.edge.grpc_link import Access
from dlora.errors import DLoRAError
from dlora.server import keys
from dlora.server.settings import ServeSettings

LOG = "audit_log"  # the setting that names the server's log of calls
LOG_ARGUMENT = "audit"  # the same as an argument of `Server`


class Seen:
    """What one `dlora serve` was built from, and whom it let in."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.load: dict[str, Any] = {}
        self.servers: list[dict[str, Any]] = []
        self.front: dict[str, Any] = {}
        self.ray: dict[str, Any] = {}
        self.actors: dict[str, Any] = {}
        self.metrics: list[int] = []
        self.threads: list[int] = []
        self.visits: dict[str, list[str]] = {}

    @property
    def server(self) -> dict[str, Any]:
        """Arguments of the first server."""
        return self.servers[0]


def arguments(function: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """What a call gives to a function, by the names of its parameters."""
    found = dict(inspect.signature(function).bind(*args, **options).arguments)
    return found | found.pop("options", {}) if "model_id" not in found else found


class FakeRay:
    """As much of Ray as the front asks for; actors live in this process."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.seen.ray |= options

    def shutdown(self) -> None:
        """Nothing was started."""

    def remote(self, made: type) -> Any:
        def options(**values: Any) -> Any:
            self.seen.actors |= values
            return SimpleNamespace(remote=lambda *args: Actor(made(*args)))

        return SimpleNamespace(options=options)

    def get(self, value: Any, timeout: float | None = None) -> Any:
        return value

    def kill(self, actor: Any, no_restart: bool = True) -> None:
        """Drained before."""


class Actor:
    """A handle whose calls are made at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two folders of keys with a tenant each, and free ports."""
    root = tmp_path_factory.mktemp("serve")
    found = SimpleNamespace(root=root, mine=root / "mine", other=root / "other", tokens={})
    for name in ("mine", "other"):
        keys.make_authority(root / name, ["localhost", "127.0.0.1"], 2)
        found.tokens[name] = keys.add_token(root / name, name, 1)[1]
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    found.port, found.metrics_port = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    return found


@pytest.fixture(scope="module")
def serve(cloud_models: Callable[[str], Any], places: Any) -> Iterator[Callable[..., Seen]]:
    """Run `dlora serve` with flags until it is ready, have visitors call, and stop it by a signal.

    Runs with the same flags are made once.
    """
    made: dict[tuple[str, ...], Seen] = {}
    cloud = cloud_models("llama")

    def run(*flags: str) -> Seen:
        seen = made[flags] = Seen()
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, seen, cloud, places)
            before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
            try:
                seen.code = main(["serve", "--model", "tiny/model", *flags])
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        assert seen.code == 0
        return seen

    yield lambda *flags: made.get(flags) or run(*flags)


def _watch(patch: pytest.MonkeyPatch, seen: Seen, cloud: Any, places: Any) -> None:
    """Note what a `dlora serve` in this process is built from."""
    load, server = dlora.cloud.load.load_cloud, dlora.server.server.Server
    front, metrics = dlora.server.replicas.Front, dlora.server.metrics.serve_metrics

    def noted_load(*args: Any, **options: Any) -> Any:
        seen.load |= arguments(load, *args, **options)
        return cloud, LoadedModel(cloud.model, None, "example-org/llama")

    def noted_metrics(*args: Any, **options: Any) -> Any:
        seen.metrics.append(arguments(metrics, *args, **options)["port"])
        return nullcontext()

    class NotedServer(server):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            seen.servers.append(arguments(server, *args, **options))
            super().__init__(*args, **options)

        def start(self) -> int:
            port = super().start()
            seen.visits["server"] = visit(port, places)
            if not seen.ray:
                signal.raise_signal(signal.SIGINT)
            return port

    class NotedFront(front):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            seen.front |= arguments(front, *args, **options)
            super().__init__(*args, **options)

        def __enter__(self) -> Any:
            super().__enter__()
            seen.visits["front"] = visit(self.port, places)
            signal.raise_signal(signal.SIGINT)
            return self

    patch.setattr(dlora.cloud.load, "load_cloud", noted_load)
    patch.setattr(dlora.server.server, "Server", NotedServer)
    patch.setattr(dlora.server.replicas, "Front", NotedFront)
    patch.setattr(dlora.server.metrics, "serve_metrics", noted_metrics)
    patch.setattr(torch, "set_num_threads", seen.threads.append)
    patch.setitem(sys.modules, "ray", FakeRay(seen))


def visit(port: int, places: Any) -> list[str]:
    """Who is let in: "plain", or the tenants of `mine` and `other` over TLS of either folder."""
    found = []
    for trusted in ("mine", "other", None):
        for tenant in ("mine", "other", None):
            if (trusted is None) != (tenant is None):
                continue
            access = Access(
                ca=places.root / trusted / "ca.pem" if trusted else None,
                token=places.tokens[tenant] if tenant else None,
            )
            try:
                dlora.connect(
                    f"127.0.0.1:{port}", access=access, cache=places.root, timeout_s=0.5
                ).close()
            except DLoRAError:
                continue
            found.append(f"{tenant} over {trusted}" if trusted else "plain")
    return found
