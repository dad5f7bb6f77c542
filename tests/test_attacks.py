"""Hostile peers against a real server on loopback: written with raw bytes, bounded in time and
requests.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import NO_DRAIN, batches, lora, make_base, make_split
from google.protobuf.message import Message

import dlora
from dlora.cli.main import main
from dlora.cloud.frozen_store import MODULE_BYTES
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import Access, GrpcLink
from dlora.errors import PeerError, UsageError, WireError
from dlora.files import read_secret
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION, channel_options
from dlora.protocol.message_parts import check_message
from dlora.protocol.wire import encode
from dlora.server import keys
from dlora.server.frames import Awaited, rules_of
from dlora.server.identities import Identities, TenantLimits
from dlora.server.metrics import serve_metrics
from dlora.server.server import Server, ServerOptions
from dlora.server.sparse_log import SparseLog
from dlora.server.tenants import Busy, Tenancy

TIMEOUT_S = 1.0  # of the server for its edges
MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tenants alice and bob, each with a token in TOKEN_FILES."""
    keys.make_authority(tmp_path / "keys", ["localhost", "127.0.0.1"], 2)
    return tmp_path / "keys"


@pytest.fixture
def tokens(folder: Path) -> dict[str, str]:
    """A token for each of two tenants."""
    return {name: keys.add_token(folder, name, 1)[1] for name in ("alice", "bob")}


@pytest.fixture
def secured(
    folder: Path, tokens: dict[str, str], cloud_models: Callable[[str], CloudModel]
) -> Iterator[Server]:
    """A server of these two, on plaintext, since it is loopback."""
    with Server(
        cloud_models("llama"),
        identities=Identities(folder / "identities.json"),
        access_log=folder / "access.jsonl",
        options=ServerOptions(drain_s=0.0, edge_timeout_s=TIMEOUT_S),
    ) as server:
        yield server


class Peer:
    """A peer of raw bytes, which does with a call what it likes."""

    def __init__(self, server: Server, token: str | None = None) -> None:
        # Without probes HTTP/2's window stays at 64 KiB: more than that is there to be not read.
        options = [*channel_options(), ("grpc.http2.bdp_probe", 0)]
        self.channel = grpc.insecure_channel(server.address, options)
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    def call(
        self,
        name: str,
        *messages: bytes,
        service: str = "dlora.v1.DLoRA",
        half_open: bool = True,
        timeout_s: float = 20.0,
        **options: Any,
    ) -> Any:
        """Answers to these messages, as bytes; half open, the peer may say more and never does."""
        done = threading.Event()

        def requests() -> Iterator[bytes]:
            yield from messages
            if half_open:
                done.wait(timeout_s)

        made = self.channel.stream_stream(f"/{service}/{name}")(
            requests(), metadata=self.metadata, timeout=timeout_s, **options
        )
        made.add_callback(done.set)
        return made

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def stranger(secured: Server) -> Iterator[Peer]:
    """Somebody without a token."""
    peer = Peer(secured)
    yield peer
    peer.close()


@pytest.fixture
def alice(secured: Server, tokens: dict[str, str]) -> Iterator[Peer]:
    """A tenant that means harm."""
    peer = Peer(secured, tokens["alice"])
    yield peer
    peer.close()


@pytest.fixture
def bob(secured: Server, tokens: dict[str, str], tmp_path: Path) -> Iterator[GrpcLink]:
    """An honest tenant."""
    link = dlora.connect(secured.address, access=Access(token=tokens["bob"]), cache=tmp_path)
    yield link
    link.close()


def status(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ends, whatever comes before."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return caught.value.code(), caught.value.details()


def resident_mib() -> float:
    """Memory of this process, in which the server runs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB


def begin(server: Server, **changes: Any) -> pb.Begin:
    """A training step of one row of two tokens at the first site."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "fingerprint": server.description.fingerprint,
        "wire_dtype": pb.FP32,
        "training": True,
        "batch": 1,
        "length": 2,
        "keep": [1],
        "sites": [pb.ActiveSite(site=0, modules=[0])],
        "embeddings": encode(torch.zeros(2, 64), pb.FP32),
    }
    return pb.Begin(**(fields | changes))


def first(server: Server, **changes: Any) -> bytes:
    """That as the first frame."""
    return pb.EdgeFrame(begin=begin(server, **changes)).SerializeToString()


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Within so many seconds."""
    deadline = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_true()


# ----------------------------------------------------------------- strangers


def test_a_stranger_costs_no_memory_and_is_heard_by_nobody(
    secured: Server, stranger: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Millions of submessages, compressed or not, half-open calls, watches and unknown calls of a
    stranger end with the same refusal before they are read; there is one line in the log for them.
    """
    bomb = b"\x12\x00" * 4_000_000  # 8 MB on the wire, 200 MB when it is parsed
    before = resident_mib()
    seen = [
        status(stranger.call("PutAdapter", bomb)),
        status(stranger.call("Describe")),
        status(stranger.call("Nothing", b"x")),
        status(stranger.call("Watch", b"\n" + b"x" * 100, service="grpc.health.v1.Health")),
        status(stranger.call("Step", bomb)),
    ]
    inflated = status(stranger.call("PutAdapter", bomb, compression=grpc.Compression.Gzip))
    assert inflated[0] == grpc.StatusCode.UNIMPLEMENTED  # gRPC's own refusal, before ours
    assert {code for code, _ in seen} == {grpc.StatusCode.UNAUTHENTICATED}
    assert {text for _, text in seen} == {"no valid token or client certificate"}
    assert resident_mib() - before < 40  # what this peer itself holds of its bombs
    assert secured.tenancy.failed_logins >= len(seen)
    assert caplog.text.count("call of nobody known") == 1


def test_health_answers_without_reading(secured: Server, stranger: Peer) -> None:
    """A health check is answered before its message is there, so that no message of any size is
    ever taken from a stranger.
    """
    call = stranger.call("Check", service="grpc.health.v1.Health", timeout_s=5.0)
    assert next(call) == b"\x08\x01"
    assert next(iter(stranger.call("Check", b"x" * 8 * MIB, service="grpc.health.v1.Health")), b"")


def test_compressed_messages_are_refused(secured: Server, alice: Peer) -> None:
    """A tenant's few bytes are not inflated to many."""
    before = resident_mib()
    call = alice.call("PutAdapter", b"\x00" * 64 * MIB, compression=grpc.Compression.Gzip)
    assert status(call)[0] in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)
    assert resident_mib() - before < 100  # the 64 MiB themselves are this peer's


def test_a_flood_of_calls_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Of each kind of refusal a few lines a minute are logged, and then how many were not."""
    now = 0.0
    lines = SparseLog(logging.getLogger("dlora.test"), logging.WARNING, 2, clock=lambda: now)
    for number in range(500):
        lines.note("Step", f"Step {number}")
    lines.note("Describe", "Describe 0")
    now = 61.0
    lines.note("Step", "Step 500")
    assert caplog.messages == [
        "Step 0",
        "Step 1",
        "Describe 0",
        "Step 500 (and 498 more that are not shown)",
    ]


# ----------------------------------------------------------------- tenants: what is in a message

TOO_MUCH: dict[str, tuple[str, Callable[[Server], bytes], str]] = {
    "empty modules by the million": (
        "PutAdapter",
        lambda server: b"\x12\x00" * 4_000_000,
        "PutAdapter: got more than",
    ),
    "shapes by the million": (
        "PutAdapter",
        lambda server: _field(2, _field(1, b"\x10\x01" * 1_000_000)),
        "got more than 8 of field 2",
    ),
    "module numbers by the million": (
        "Step",
        lambda server: first(server, sites=[pb.ActiveSite(site=0, modules=[0] * 4_000_000)]),
        "bytes",
    ),
    "sites by the thousand": (
        "Step",
        lambda server: first(server, sites=[pb.ActiveSite(site=0, modules=[0])] * 5_000),
        "got more than .* of field 11",
    ),
    "probes by the thousand": (
        "Step",
        lambda server: first(server, probe=[pb.ActiveSite()] * 5_000),
        "got more than .* of field 17",
    ),
    "deltas by the thousand": (
        "Step",
        lambda server: _field(2, b"\x12\x00" * 5_000),
        "got more than 3 of field 2",
    ),
    "200 tokens' bytes for two": (
        "Step",
        lambda server: first(server, embeddings=encode(torch.zeros(400, 64), pb.FP32)),
        "for 2 tokens, want at most",
    ),
    "more than any first frame": (
        "Step",
        lambda server: first(server, embeddings=encode(torch.zeros(90_000, 64), pb.FP32)),
        "want at most .* here",
    ),
    "a group": ("Step", lambda server: b"\x0b\x0c", "without groups"),
    "half a field": ("Step", lambda server: b"\x0a\x05a", "behind its message"),
    "a number without end": ("Step", lambda server: b"\xff" * 100, "a number without end"),
    "no protobuf": ("Step", lambda server: _field(1, _field(2, b"\xff")), "no frame"),
    "nothing": ("PutAdapter", lambda server: b"", "the served model has changed"),
}


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_holds_more_than_it_may_is_refused_unparsed(
    secured: Server, alice: Peer, name: str
) -> None:
    """No message grows in memory, and none is walked through: it is refused by what it holds."""
    method, make, words = TOO_MUCH[name]
    message = make(secured)
    before, start = resident_mib(), time.monotonic()
    code, text = status(alice.call(method, message))
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert re.search(words, text), text
    assert time.monotonic() - start < 5 and resident_mib() - before < 120
    wait_until(lambda: secured.tenancy.streams == secured.tenancy.inflight_bytes == 0)


def test_every_honest_message_is_within_its_rules(secured: Server) -> None:
    """The largest messages that edges have a reason to send pass the look at what they hold."""
    description = secured.description
    rules, widest = rules_of(description), [pb.ActiveSite(site=s, modules=[0]) for s in range(27)]
    tokens = description.limits.max_tokens
    full = begin(
        secured,
        sites=widest,
        probe=widest,
        idle=[pb.IdleModule(site=s, module=m, hash=b"h" * 32) for s in range(6) for m in range(3)],
        position_ids=[255] * tokens,
        keep=range(tokens),
        attention_mask=b"\x01" * tokens,
    )
    extend = pb.Extend(order=range(tokens), keep=range(tokens), position_ids=[1] * tokens)
    deltas = pb.SiteDeltas(deltas=[encode(torch.zeros(2, 2), pb.FP32)] * 3)
    frames: list[Message] = [
        pb.EdgeFrame(begin=full),
        pb.EdgeFrame(extend=extend),
        pb.EdgeFrame(deltas=deltas),
        pb.EdgeFrame(hidden_grad=pb.HiddenGrad(grad=encode(torch.zeros(2, 2), pb.INT4))),
    ]
    for frame in frames:
        check_message(frame.SerializeToString(), rules.frame, "frame")
    assert len(frames[0].SerializeToString()) < Awaited(description).most


# ----------------------------------------------------------------- tenants: who does not read


def big(server: Server) -> bytes:
    """A first frame whose answers are over HTTP/2's window of 64 KiB."""
    return first(
        server, batch=8, length=64, keep=[1], embeddings=encode(torch.zeros(512, 64), pb.FP32)
    )


def test_a_stream_that_is_never_read_ends_at_the_timeout(secured: Server, alice: Peer) -> None:
    """Its worker, activations and place are free again; what gRPC cannot get rid of counts as its
    tenant's until the peer is gone.
    """
    calls = [alice.call("Step", big(secured)) for _ in range(3)]
    wait_until(lambda: len(secured._service.pipes) == 3)
    wait_until(lambda: not secured._service.pipes and secured.tenancy.streams == 0)
    unread = secured.tenancy.tenants["alice"].inflight_bytes
    assert 3 * 512 * 64 * 4 <= unread < 3 * 512 * 64 * 4 + 10_000
    assert secured._service.slots.free == 1
    for call in calls:
        call.cancel()
    wait_until(lambda: secured.tenancy.inflight_bytes == 0)


@pytest.mark.parametrize("name", ["Step", "FetchEdgeFiles"])
def test_a_revoked_tenant_that_does_not_read_is_cut(
    folder: Path,
    tokens: dict[str, str],
    cloud_models: Callable[[str], CloudModel],
    name: str,
) -> None:
    """Revoking ends streams and downloads within seconds, long before any timeout."""
    identities = Identities(folder / "identities.json")
    options = ServerOptions(drain_s=0.0, edge_timeout_s=60.0)
    with Server(cloud_models("llama"), identities=identities, options=options) as server:
        peer = Peer(server, tokens["alice"])
        fetch = pb.FetchEdgeFilesRequest(fingerprint=server.description.fingerprint)
        message = big(server) if name == "Step" else fetch.SerializeToString()
        calls = [peer.call(name, message) for _ in range(3)]
        wait_until(lambda: server.tenancy.streams == 3)
        keys.revoke(folder, "alice")
        wait_until(lambda: server.tenancy.streams == 0, 5.0)
        assert {status(call)[0] for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
        peer.close()


def test_downloads_and_uploads_count_as_streams(
    secured: Server, alice: Peer, bob: GrpcLink
) -> None:
    """Fetches that are not read and uploads that do not come take places of their own tenant: over
    its quota they are refused or wait, and another tenant connects and trains meanwhile.
    """
    request = pb.FetchEdgeFilesRequest(fingerprint=secured.description.fingerprint)
    calls = [alice.call("FetchEdgeFiles", request.SerializeToString()) for _ in range(40)]
    calls += [alice.call("PutAdapter") for _ in range(10)]
    wait_until(lambda: secured.tenancy.tenants["alice"].streams == TenantLimits().max_streams)
    descriptors = len(os.listdir("/proc/self/fd"))
    make_split(bob, lora())(**batches()[0]).loss.backward()
    assert len(os.listdir("/proc/self/fd")) < descriptors + 10
    assert secured.tenancy.tenants["alice"].streams <= TenantLimits().max_streams
    wait_until(lambda: secured.tenancy.tenants["alice"].streams == 0)
    for call in calls:
        call.cancel()


def test_edge_files_wait_for_room(secured: Server, alice: Peer, tokens: dict[str, str]) -> None:
    """A download that finds all places taken begins when there is one: edges ask for it once."""
    taken = [alice.call("PutAdapter") for _ in range(TenantLimits().max_streams)]
    wait_until(lambda: secured.tenancy.tenants["alice"].streams == len(taken))
    request = pb.FetchEdgeFilesRequest(fingerprint=secured.description.fingerprint)
    fetch = alice.call("FetchEdgeFiles", request.SerializeToString())
    taken[0].cancel()
    assert next(fetch)
    for call in (fetch, *taken):
        call.cancel()


def test_hourly_traffic_is_asked_at_every_frame(
    folder: Path, tokens: dict[str, str], cloud_models: Callable[[str], CloudModel]
) -> None:
    """A download is cut when it has used an hour's worth and one more in advance, and then neither
    streams nor uploads are taken.
    """
    keys.set_tenant(folder, "alice", {"mib_per_hour": 0.05})
    identities = Identities(folder / "identities.json")
    with Server(cloud_models("llama"), identities=identities, options=NO_DRAIN) as server:
        peer = Peer(server, tokens["alice"])
        fetch = pb.FetchEdgeFilesRequest(fingerprint=server.description.fingerprint)
        for name, message in (
            ("FetchEdgeFiles", fetch.SerializeToString()),
            ("Step", first(server)),
            ("PutAdapter", b""),
        ):
            code, text = status(peer.call(name, message))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "MiB an hour" in text
        peer.close()


def test_frames_nobody_asked_for_stay_with_the_peer(secured: Server, alice: Peer) -> None:
    """Of many large frames the server takes the one that it waits for, and refuses it by its size
    where it is larger than that.
    """
    junk = _field(2, _field(2, _field(4, b"\x00" * 3 * MIB)))
    slot, slots = object(), secured._service.slots
    assert slots.acquire("alice", 1.0, slot, 1.0, lambda: False)
    before = resident_mib()
    call = alice.call("Step", first(secured), *[junk] * 4)
    wait_until(lambda: secured.tenancy.inflight_bytes > 0)
    time.sleep(0.3)  # the worker waits for the slot; what follows the first frame could be here
    alices = secured.tenancy.tenants["alice"]
    assert alices.received_bytes < MIB and alices.inflight_bytes < MIB

    slots.release(slot)
    code, text = status(call)
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "want at most" in text
    assert resident_mib() - before < 60  # 4 x 3 MiB are this peer's own
    assert alices.received_bytes < MIB


def test_no_message_is_read_that_nobody_has_a_reason_to_send(
    secured: Server, alice: Peer, bob: GrpcLink
) -> None:
    """What is larger than any honest message of this model is refused from its length: its bytes
    stay with the peer. Edges learn the limit, and send what is under it.
    """
    limit = bob.description.limits.max_message_bytes
    message = bytes(limit + 1)
    before = resident_mib()
    for name in ("Step", "PutAdapter"):
        code, text = status(alice.call(name, message))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text, text
    assert limit < 32 * MIB and resident_mib() - before < 60  # the copies of this peer


def test_announced_frames_share_what_was_announced(secured: Server) -> None:
    """Frames that come without being asked for hold together no more than the modules that they
    were announced for: a stream cannot fill memory with padding.
    """
    awaited = Awaited(secured.description)
    modules = [pb.HostedModule(site=0, module=m, rank=4) for m in range(3)]
    announced = begin(secured, hosted=True, modules=modules, module_frames=3)
    awaited.received(pb.EdgeFrame(begin=announced), 1000)
    honest = 3 * 4 * 4 * (64 + 64)
    assert honest < awaited.room < 2 * honest + 10_000
    awaited.check(awaited.room - 100)
    awaited.check(50)
    with pytest.raises(WireError, match="want at most 50 here"):
        awaited.check(51)


def test_memory_of_frames_counts(folder: Path, tokens: dict[str, str]) -> None:
    """First frames that wait for a compute slot hold memory of their tenant and of the server: over
    either they are refused with a hint, before they are parsed.
    """
    keys.set_tenant(folder, "alice", {"max_inflight_mib": 1})
    cloud = CloudModel(make_base("llama"), model_id="x/y", limits=Limits(max_tokens=16_384))
    identities = Identities(folder / "identities.json")
    with Server(cloud, identities=identities, options=NO_DRAIN) as server:
        slot = object()
        assert server._service.slots.acquire("alice", 1.0, slot, 1.0, lambda: False)
        peer = Peer(server, tokens["alice"])
        rows = 10 * 256
        message = first(
            server, batch=10, length=256, embeddings=encode(torch.zeros(rows, 64), pb.FP32)
        )
        held = peer.call("Step", message)
        wait_until(lambda: server.tenancy.inflight_bytes > rows * 256)
        code, text = status(peer.call("Step", message))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "your quota of 1 MiB" in text
        held.cancel()
        server._service.slots.release(slot)
        wait_until(lambda: server.tenancy.inflight_bytes == 0)
        peer.close()


def test_out_of_memory_is_a_pause_and_of_one_stream(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine had no memory left an edge waits and asks again, with the same result."""
    cloud = cloud_models("llama")
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        want = make_split(link, lora())(**batches()[0]).loss
        run, failures = cloud.run, [MemoryError(), RuntimeError("x: can't allocate memory: y")]

        def fail(*args: Any) -> None:
            if failures:
                raise failures.pop()
            run(*args)

        monkeypatch.setattr("dlora.server.refusals._OUT_OF_MEMORY_S", 0.05)
        monkeypatch.setattr(cloud, "run", fail)
        split = make_split(link, lora())
        assert torch.equal(split(**batches()[0]).loss, want) and split.meter.retries == 2
        link.close()


# ----------------------------------------------------------------- tenants: what stays


def module(rank: int = 2, inputs: int = 64, outputs: int = 64) -> pb.FrozenModule:
    """A frozen module of these sizes; other numbers, and so another hash, for every rank."""
    a, b = torch.full((rank, inputs), 0.5), torch.full((outputs, rank), 0.5)
    return pb.FrozenModule(a=encode(a, pb.FP32), b=encode(b, pb.FP32))


def test_modules_take_what_they_take_and_go_with_their_owner(
    secured: Server, folder: Path, tokens: dict[str, str], tmp_path: Path
) -> None:
    """Modules of no size, and of no linear of this model, are refused; small ones count with what
    each of them takes beside its numbers; all go with the last identity of their tenant.
    """
    store = secured._service.cloud.frozen_store
    link = dlora.connect(secured.address, access=Access(token=tokens["alice"]), cache=tmp_path)
    for wrong in (module(0), module(65), module(2, 64, 65), module(2, 63)):
        with pytest.raises(PeerError, match="of a module that is served"):
            link.put_adapter([wrong])
    before = store.stored_bytes
    link.put_adapter([module(1), module(2)])
    assert store.stored_bytes - before == 2 * MODULE_BYTES + 4 * 3 * 128
    keys.revoke(folder, "alice")
    wait_until(lambda: store.stored_bytes <= before)
    assert "alice" not in store.owned_bytes()
    link.close()


def test_checks_are_charged_as_compute(secured: Server, alice: Peer) -> None:
    """Looking at what a tenant sends takes a compute slot and counts as its seconds."""
    used = []
    for name, message in (("Step", first(secured, length=0)), ("PutAdapter", b"\x0a\x00")):
        before = secured.tenancy.tenant("alice").compute_s
        status(alice.call(name, message))
        wait_until(lambda: secured.tenancy.streams == 0)
        used.append(secured.tenancy.tenant("alice").compute_s - before)
    assert min(used) > 0


def test_each_known_tenant_has_a_minimum() -> None:
    """Half of the streams and of the memory is kept for known tenants in equal parts: whoever is
    idle finds his own, however many others ask, and the rest is for everybody.
    """
    names = ["a", "b", "c", "d"]
    tenancy = Tenancy(16, 16 * MIB, lambda _: TenantLimits(), known=lambda: names)
    tenants = [tenancy.tenant(name) for name in names]
    for _ in range(10):  # 2 of its own, 8 of nobody's
        tenancy.open_stream(tenants[0])
    with pytest.raises(Busy, match="all streams are taken"):
        tenancy.open_stream(tenants[0])
    for tenant in tenants[1:]:
        tenancy.open_stream(tenant)
        tenancy.open_stream(tenant)
        assert not tenancy.has_room(tenant)

    with pytest.raises(UsageError, match="one tenant may have 10 MiB here"):
        tenancy.reserve(tenants[0], 0, 11 * MIB)
    tenancy.reserve(tenants[0], 0, 10 * MIB)
    with pytest.raises(Busy, match="no room now"):
        tenancy.reserve(tenants[1], 0, 3 * MIB)
    for tenant in tenants[1:]:
        tenancy.reserve(tenant, 0, 2 * MIB)
    assert tenancy.inflight_bytes == 16 * MIB and tenancy.streams == 16


# ----------------------------------------------------------------- identities


def test_identities_that_cannot_be_read_let_nobody_in(
    secured: Server,
    folder: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While the file is gone calls and streams go on for a while; then new ones are refused and
    those in flight are ended, both to be tried again, with the reason in the server's log; when it
    is back, so is everybody.
    """
    monkeypatch.setattr("dlora.server.identities._STALE_S", 3.0)
    link = dlora.connect(secured.address, access=Access(token=tokens["alice"]), cache=tmp_path)
    split, file = make_split(link, lora()), folder / "identities.json"
    file.rename(folder / "away")
    split(**batches()[0]).loss.backward()
    peer = Peer(secured, tokens["alice"])
    wait_until(lambda: secured._service.identities.is_stale)
    code, text = status(peer.call("Step", first(secured)))
    assert code == grpc.StatusCode.UNAVAILABLE and "at the moment" in text
    assert caplog.text.count("identities are as they were: ") == 1
    (folder / "away").rename(file)
    split(**batches()[0]).loss.backward()
    peer.close()
    link.close()


def test_a_revoked_certificate_lets_nobody_in_with_a_token(folder: Path) -> None:
    """Where a certificate and a token are shown both have to be valid and of one tenant, when they
    are shown and as long as the stream lives.
    """
    (_, token), (_, bobs) = (keys.add_token(folder, name, 1) for name in ("alice", "bob"))
    name, file = keys.add_certificate(folder, "alice", 1)
    pem = file.with_name(f"{file.name}.pem").read_bytes()
    identities = Identities(folder / "identities.json")
    found = identities.authenticate(token, pem)
    assert found is not None and found.tenant == "alice" and identities.is_valid(found)
    assert identities.authenticate(bobs, pem) is None
    assert identities.authenticate("wrong", pem) is None
    keys.revoke(folder, name)
    identities.refresh()
    assert identities.authenticate(token, pem) is None and not identities.is_valid(found)
    assert identities.authenticate(token, None) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "4", 1e300])
def test_limits_are_numbers(value: Any) -> None:
    """No limit of a tenant, and no time of a server, is infinite, negative or no number."""
    with pytest.raises(UsageError, match="want"):
        TenantLimits(mib_per_hour=value)
    if isinstance(value, float) or value == -1:
        with pytest.raises(UsageError, match="want"):
            ServerOptions(edge_timeout_s=value)


# ----------------------------------------------------------------- files, metrics, signals


def test_the_access_log_is_private_and_can_be_rotated(
    tmp_path: Path, cloud_models: Callable[[str], CloudModel]
) -> None:
    """A log that others can write or read, or that is a link or a pipe, is refused; when it was
    moved away a new one is begun; lines that find no room are counted.
    """
    file = tmp_path / "access.jsonl"
    file.touch(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for wrong in (file, tmp_path / "link", tmp_path / "pipe"):
        with pytest.raises(UsageError, match="access log"):
            Server(cloud_models("llama"), access_log=wrong)
    assert not (tmp_path / "other").exists()

    file.chmod(0o600)
    with Server(cloud_models("llama"), access_log=file, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        link.edge_files()
        wait_until(lambda: '"FetchEdgeFiles"' in file.read_text())
        file.rename(tmp_path / "access.jsonl.1")
        server.reopen_log()
        wait_until(file.exists)
        with serve_metrics(server, 0) as port:
            os.close(server._service.access_log._descriptor)
            server._service.access_log._descriptor = os.open("/dev/full", os.O_WRONLY)
            make_split(link, lora())(**batches()[0]).loss.backward()
            wait_until(lambda: server.lost_log_lines > 0)
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            assert "dlora_lost_log_lines_total 1.0" in text
        link.close()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_silent_connection_does_not_block_metrics(secured: Server, stranger: Peer) -> None:
    """Health and metrics answer beside connections that say nothing; failed logins are there."""
    status(stranger.call("Describe"))
    with serve_metrics(secured, 0) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for path in ("healthz", "metrics"):
            answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5)
            text = answer.read().decode()
        assert "dlora_failed_logins_total 1.0" in text
        for one in silent:
            one.close()


def test_a_token_is_written_privately(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dlora keys token --output` makes a file that edges take, and shows the token nowhere."""
    where = ["--folder", str(tmp_path / "keys")]
    assert main(["keys", "init", *where]) == 0
    capsys.readouterr()
    file = tmp_path / "alice.token"
    assert main(["keys", "token", *where, "--tenant", "alice", "--output", str(file)]) == 0
    token, shown = read_secret(file), capsys.readouterr()
    assert token and token not in shown.out + shown.err
    identities = Identities(tmp_path / "keys" / "identities.json")
    assert identities.authenticate(token, None) is not None


@pytest.mark.slow
def test_serve_by_command_lives_through_sighup(model_folder: Path, tmp_path: Path) -> None:
    """`dlora serve` takes all descriptors that it may have, and SIGHUP opens its access log anew
    instead of ending it.
    """
    file = tmp_path / "access.jsonl"
    command = [sys.executable, "-m", "dlora", "serve", "--model", str(model_folder), "--port", "0"]
    serving = subprocess.Popen(
        [*command, "--threads", "1", "--access_log", str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert serving.stdout is not None
        assert any(line.startswith("ready") for line in serving.stdout)
        limits = Path(f"/proc/{serving.pid}/limits").read_text()
        soft, hard = next(
            line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")
        )
        assert soft == hard
        file.unlink()
        serving.send_signal(signal.SIGHUP)
        wait_until(file.exists)
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0
    finally:
        serving.kill()
        serving.wait()
        serving.stdout.close()
