"""`dlora serve`: every setting reaches what the process is built from, alone and with replicas.

Both ways run through `main` in this process, with real servers, TLS and identities. Only the
model is a tiny one whatever is asked for, and Ray is a stand-in that makes its actors here.
"""

from __future__ import annotations

import inspect
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dlora
from dlora.cli.main import main
from dlora.cloud.load import load_cloud
from dlora.edge.grpc_link import Access
from dlora.errors import DLoRAError
from dlora.server import keys
from dlora.server.metrics import serve_metrics
from dlora.server.replicas import Front
from dlora.server.server import Server
from dlora.server.settings import ServeSettings

LOG = ("access_log", "access_log")  # the log of calls: as a setting, and as an argument of `Server`
REPLICAS = ("--replicas", "1")


class Seen:
    """What one `dlora serve` was built from, and whom it let in."""

    def __init__(self, visitors: dict[str, bool]) -> None:
        self.visitors = visitors
        self.load: dict[str, Any] = {}
        self.servers: list[dict[str, Any]] = []
        self.front: dict[str, Any] = {}
        self.ray: dict[str, Any] = {}
        self.actor: dict[str, Any] = {}
        self.metrics_port: int | None = None
        self.threads: int | None = None
        self.let_in: dict[str, dict[str, bool]] = {}

    @property
    def server(self) -> dict[str, Any]:
        """Arguments of the first server."""
        return self.servers[0]

    @property
    def outside(self) -> dict[str, Any]:
        """Arguments of what listens where edges connect: the front, or the only server."""
        return self.front or self.server


def arguments(function: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """What a call gives to a function, by the names of its parameters."""
    signature = inspect.signature(function)
    found = dict(signature.bind(*args, **options).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


class FakeRay:
    """As much of Ray as the front asks for; actors live in this process."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.seen.ray = options

    def shutdown(self) -> None:
        """Nothing was started."""

    def remote(self, made: type) -> Any:
        def options(**values: Any) -> Any:
            self.seen.actor = values
            return SimpleNamespace(remote=lambda *args: FakeActor(made(*args)))

        return SimpleNamespace(options=options)

    def get(self, value: Any, timeout: float | None = None) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        """It was drained before."""


class FakeActor:
    """A handle whose calls are made at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


# ----------------------------------------------------------------- a run of the command


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> SimpleNamespace:
    """Two folders of keys with a tenant each, a model under two names, and free ports."""
    root = tmp_path_factory.mktemp("serve")
    for name in ("mine", "other"):
        keys.make_authority(root / name, ["localhost", "127.0.0.1"], 2)
    tokens = {name: keys.add_token(root / name, name, 1)[1] for name in ("mine", "other")}
    certificate = keys.add_certificate(root / "mine", "mine", 1)[1]
    (root / "same-model").symlink_to(model_folder)

    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return SimpleNamespace(
        root=root, tokens=tokens, certificate=certificate, ports=ports, model=model_folder
    )


def visitor(name: str, places: SimpleNamespace) -> Access:
    """How somebody shows who it is: "plain", or the authority it trusts and what it has."""
    if name == "plain":
        return Access()
    authority, _, has = name.partition(" with ")
    ca = places.root / authority / "ca.pem"
    if has == "certificate":
        file = str(places.certificate)
        return Access(ca=ca, certificate=Path(f"{file}.pem"), key=Path(f"{file}.key"))
    return Access(ca=ca, token=places.tokens.get(has))


def knock(port: int, seen: Seen, places: SimpleNamespace) -> dict[str, bool]:
    """Which of the run's visitors are let in at a port."""
    found = {}
    for name, welcome in seen.visitors.items():
        access = visitor(name, places)
        # Who is refused by TLS alone is refused by silence.
        timeout_s = 20.0 if welcome else 1.0
        try:
            dlora.connect(
                f"127.0.0.1:{port}", access=access, cache=places.root, timeout_s=timeout_s
            ).close()
        except DLoRAError:
            found[name] = False
        else:
            found[name] = True
    return found


@pytest.fixture(scope="module")
def serve(cloud_models: Callable[[str], Any], places: SimpleNamespace) -> Callable[..., Seen]:
    """Run `dlora serve` with flags until it is ready, let visitors knock, stop it by a signal.

    Runs with the same flags are made once.
    """
    made: dict[tuple[str, ...], Seen] = {}
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def run(*flags: str, **visitors: bool) -> Seen:
        if flags in made:
            return made[flags]
        seen = Seen(visitors)
        before = {number: signal.getsignal(number) for number in numbers}
        needed = {"--model": str(places.model), "--port": "0"}
        words = [word for flag in needed.items() if flag[0] not in flags for word in flag]
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, seen, cloud_models("llama"), places)
            try:
                assert main(["serve", *words, *flags]) == 0
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        made[flags] = seen
        return seen

    return run


def watch(patch: pytest.MonkeyPatch, seen: Seen, cloud: Any, places: SimpleNamespace) -> None:
    """Note what a `dlora serve` in this process is built from, and stop it when it is ready."""

    def noted_load(*args: Any, **options: Any) -> Any:
        seen.load = arguments(load_cloud, *args, **options)
        return cloud, SimpleNamespace(model=cloud.model, tokenizer=None, model_id=cloud.model_id)

    def noted_metrics(*args: Any, **options: Any) -> Any:
        seen.metrics_port = arguments(serve_metrics, *args, **options)["port"]
        return nullcontext()

    def noted_threads(number: int) -> None:
        seen.threads = number

    make_server, start, make_front, enter = (
        Server.__init__,
        Server.start,
        Front.__init__,
        Front.__enter__,
    )

    def noted_server(self: Server, *args: Any, **options: Any) -> None:
        seen.servers.append(arguments(make_server, self, *args, **options))
        make_server(self, *args, **options)

    def started(self: Server) -> int:
        port = start(self)
        seen.let_in["server"] = knock(port, seen, places)
        if not seen.front:
            signal.raise_signal(signal.SIGINT)
        return port

    def noted_front(self: Front, *args: Any, **options: Any) -> None:
        seen.front = arguments(make_front, self, *args, **options)
        make_front(self, *args, **options)

    def entered(self: Front) -> Front:
        enter(self)
        seen.let_in["front"] = knock(self.port, seen, places)
        signal.raise_signal(signal.SIGINT)
        return self

    for name, module in list(sys.modules.items()):
        if name.startswith("dlora"):  # wherever it was imported to
            for attribute, noted in (("load_cloud", noted_load), ("serve_metrics", noted_metrics)):
                if hasattr(module, attribute):
                    patch.setattr(module, attribute, noted)
    patch.setattr(Server, "__init__", noted_server)
    patch.setattr(Server, "start", started)
    patch.setattr(Front, "__init__", noted_front)
    patch.setattr(Front, "__enter__", entered)
    patch.setattr(torch, "set_num_threads", noted_threads)
    patch.setitem(sys.modules, "ray", FakeRay(seen))


# ----------------------------------------------------------------- values

Read = Callable[[Seen], Any]

# Setting -> (value on the command line, where it has to arrive, as what).
EVERYWHERE: dict[str, tuple[str, Read, Any]] = {
    "model": ("{root}/same-model", lambda seen: Path(seen.load["name"]).name, "same-model"),
    "model_id": ("me/mine", lambda seen: seen.load["model_id"], "me/mine"),
    "device": ("cpu:0", lambda seen: seen.load["device"], "cpu:0"),
    "device_map": ("auto", lambda seen: seen.load["device_map"], "auto"),
    "max_memory": ("{{cpu: 9GiB}}", lambda seen: seen.load["max_memory"], {"cpu": "9GiB"}),
    "dtype": ("bf16", lambda seen: seen.load["dtype"], "bf16"),
    "quantize": ("int4", lambda seen: seen.load["quantize"], "int4"),
    "allow_modules": ("q_proj$", lambda seen: seen.load["allow_modules"], "q_proj$"),
    "edge_first": ("1", lambda seen: seen.load["limits"].edge_first, 1),
    "edge_last": ("2", lambda seen: seen.load["limits"].edge_last, 2),
    "max_tokens": ("999", lambda seen: seen.load["limits"].max_tokens, 999),
    "max_length": ("99", lambda seen: seen.load["limits"].max_length, 99),
    "max_message_mib": ("7", lambda seen: seen.load["limits"].max_message_bytes, 7 * 2**20),
    "max_inflight_mib": ("8", lambda seen: seen.load["limits"].max_inflight_bytes, 8 * 2**20),
    "recompute": ("true", lambda seen: seen.load["limits"].recompute, True),
    "prefix_mib": ("9", lambda seen: seen.load["limits"].max_prefix_bytes, 9 * 2**20),
    "max_streams": ("5", lambda seen: seen.server["options"].max_streams, 5),
    "compute_slots": ("3", lambda seen: seen.server["options"].compute_slots, 3),
    "edge_timeout_s": ("11.5", lambda seen: seen.server["options"].edge_timeout_s, 11.5),
    "drain_s": ("0.25", lambda seen: seen.server["options"].drain_s, 0.25),
    "threads": ("3", lambda seen: seen.threads, 3),
    LOG[0]: ("{root}/calls", lambda seen: Path(seen.server[LOG[1]] or "").name, "calls"),
    "host": ("localhost", lambda seen: {seen.server["host"], seen.outside["host"]}, {"localhost"}),
    "port": ("{ports[0]}", lambda seen: seen.outside["port"], ...),
}
ALONE: dict[str, tuple[str, Read, Any]] = {
    "metrics_port": ("{ports[1]}", lambda seen: seen.metrics_port, ...),
}
BEHIND_A_FRONT: dict[str, tuple[str, Read, Any]] = {
    "replicas": ("2", lambda seen: seen.front["scaling"].least, 2),
    "max_replicas": ("4", lambda seen: seen.front["scaling"].most, 4),
    "replica_ports": ("{ports[2]}-65535", lambda seen: seen.server["port"], ...),
    "ray_address": ("somewhere:6379", lambda seen: seen.ray["address"], "somewhere:6379"),
    "replica_cpus": ("0.5", lambda seen: seen.actor["num_cpus"], 0.5),
    "replica_gpus": ("2.0", lambda seen: seen.actor["num_gpus"], 2.0),
}
VALUES = [
    *((name, False, row) for name, row in (EVERYWHERE | ALONE).items()),
    *((name, True, row) for name, row in (EVERYWHERE | BEHIND_A_FRONT).items()),
]


def flags_of(rows: dict[str, tuple[str, Read, Any]], places: SimpleNamespace) -> list[str]:
    """All settings of some rows, as they stand on a command line."""
    return [
        word
        for name, (value, _, _) in rows.items()
        for word in (f"--{name}", value.format(root=places.root, ports=places.ports))
    ]


@pytest.mark.parametrize(
    ("name", "front", "row"), VALUES, ids=[f"{n}{'-replicas' * f}" for n, f, _ in VALUES]
)
def test_a_value_arrives(
    serve: Any, places: SimpleNamespace, name: str, front: bool, row: tuple[str, Read, Any]
) -> None:
    """A setting that is given, beside all others, is what the process works with; its default is
    something else.
    """
    value, read, want = row
    if want is ...:  # a port that was free
        want = int(value.format(ports=places.ports).partition("-")[0])
    rows = EVERYWHERE | (BEHIND_A_FRONT if front else ALONE)
    assert read(serve(*flags_of(rows, places))) == want
    assert read(serve(*(REPLICAS if front else ()))) != want


# ----------------------------------------------------------------- who is let in

# Settings -> (their values, visitor -> whether it is let in).
GUARDS: dict[tuple[str, ...], tuple[tuple[str, ...], dict[str, bool]]] = {
    (): ((), {"plain": True}),
    ("keys",): (
        ("{root}/mine",),
        {"mine with mine": True, "mine with nothing": False, "plain": False},
    ),
    ("keys", "identities"): (
        ("{root}/mine", "{root}/other/identities.json"),
        {"mine with other": True, "mine with mine": False},
    ),
    ("keys", "tls_cert", "tls_key"): (
        ("{root}/mine", "{root}/other/server.pem", "{root}/other/server.key"),
        {"other with mine": True, "mine with mine": False},
    ),
    ("tls_cert", "tls_key", "identities"): (
        ("{root}/other/server.pem", "{root}/other/server.key", "{root}/mine/identities.json"),
        {"other with mine": True, "other with other": False},
    ),
    ("keys", "client_ca"): (
        ("{root}/mine", "{root}/mine/ca.pem"),
        {"mine with certificate": True, "mine with mine": False},
    ),
}


@pytest.mark.parametrize("names", GUARDS, ids="+".join)
@pytest.mark.parametrize("front", [False, True], ids=["alone", "replicas"])
def test_who_is_let_in(
    serve: Any, places: SimpleNamespace, front: bool, names: tuple[str, ...]
) -> None:
    """Whom `keys`, `identities`, certificates and `client_ca` shut out is not let in, by no server
    and no front; the others are.
    """
    values, visitors = GUARDS[names]
    rows = {name: (value, str, ...) for name, value in zip(names, values, strict=True)}
    flags = flags_of(rows, places) + list(REPLICAS if front else ())
    # What serves the tests of values is run anew: nobody knocked there.
    seen = serve(*flags, "--drain_s", "1", **visitors)
    assert seen.let_in["server"] == visitors
    assert seen.let_in.get("front", visitors) == visitors and front == ("front" in seen.let_in)


@pytest.mark.parametrize("front", [False, True], ids=["alone", "replicas"])
def test_insecure_is_asked_for(
    serve: Any, places: SimpleNamespace, front: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond loopback an open server starts with --insecure only, and then with a warning."""
    open_to_all = ["--host", "0.0.0.0", *(REPLICAS if front else ())]
    assert main(["serve", "--model", str(places.model), *open_to_all]) == 2
    assert "agree with --insecure" in capsys.readouterr().err
    seen = serve(*open_to_all, "--insecure")
    assert seen.outside["host"] == "0.0.0.0"
    assert "warning: 0.0.0.0 is not loopback" in capsys.readouterr().err


def test_every_setting_has_a_row() -> None:
    """A new setting of `dlora serve` without a test here is noticed."""
    guarded = {name for names in GUARDS for name in names} | {"insecure"}
    rows = EVERYWHERE.keys() | ALONE.keys() | BEHIND_A_FRONT.keys() | guarded
    assert {field.name for field in fields(ServeSettings)} == rows
