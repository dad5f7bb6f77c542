"""The server against edges that are wrong, silent, slow, many, or gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, lora, make_base, make_split
from grpc_health.v1 import health_pb2, health_pb2_grpc

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.link import RetryPolicy
from dlora.errors import PeerError, PeerLost, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.wire import encode
from dlora.server.server import Server, ServerOptions

NO_PATIENCE = RetryPolicy(give_up_after_s=0.0)


@pytest.fixture(scope="module")
def server(cloud_models: Callable[[str], CloudModel]) -> Iterator[Server]:
    """A server that waits only a second for its edges."""
    with Server(
        cloud_models("llama"), options=ServerOptions(edge_timeout_s=1.0, max_streams=4, drain_s=0.0)
    ) as running:
        yield running


@pytest.fixture
def link(server: Server, tmp_path: Path) -> Iterator[GrpcLink]:
    """A connection to it."""
    made = dlora.connect(server.address, cache=tmp_path)
    yield made
    made.close()


def begin(link: GrpcLink, **changes: Any) -> pb.Begin:
    """A Begin of 2 x 4 tokens with the first site active."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "fingerprint": link.description.fingerprint,
        "wire_dtype": pb.FP32,
        "training": True,
        "batch": 2,
        "length": 4,
        "keep": [1, 5],
        "sites": [pb.ActiveSite(site=0, modules=[0, 1])],
        "embeddings": encode(torch.zeros(8, 64), pb.FP32),
    }
    return pb.Begin(**(fields | changes))


def deltas(*widths: int, rows: int = 8) -> pb.EdgeFrame:
    """Zero deltas of the given widths for site 0."""
    tensors = [encode(torch.zeros(rows, width), pb.FP32) for width in widths]
    return pb.EdgeFrame(deltas=pb.SiteDeltas(site=0, deltas=tensors))


BAD_BEGINS: dict[str, tuple[dict[str, Any], str]] = {
    "other protocol": ({"protocol_version": 99}, "protocol 99"),
    "other model": ({"fingerprint": "feed"}, "expects the model 'feed'"),
    "no tokens": ({"batch": 0}, "empty micro-batch"),
    "too long": ({"length": 4000}, "a sequence of 4000 tokens is over this server's limit of 256"),
    "too many": ({"batch": 1 << 20}, "lower the batch size"),
    "unknown dtype": ({"wire_dtype": 7}, "wire dtype number 7 is not known"),
    "short mask": ({"attention_mask": b"\x01"}, "attention mask: got 1 bytes, want 2 x 4"),
    "far position": ({"position_ids": [999] * 8}, "position_ids: want 8 values under 256"),
    "keep out of range": ({"keep": [8]}, "keep: want ascending positions under 8"),
    "keep not ascending": ({"keep": [3, 3]}, "keep: want ascending positions under 8"),
    "unknown site": (
        {"sites": [pb.ActiveSite(site=99, modules=[0])]},
        "sites: got 99 after .*, want ascending",
    ),
    "site without modules": (
        {"sites": [pb.ActiveSite(site=0)]},
        r"site 0: got modules \(\), want ascending, 1 to 3",
    ),
    "unknown module": (
        {"sites": [pb.ActiveSite(site=0, modules=[3])]},
        r"site 0: got modules \(3,\), want ascending",
    ),
    "embeddings too narrow": (
        {"embeddings": encode(torch.zeros(8, 63), pb.FP32)},
        r"embeddings: got shape \[8, 63\], want \[8, 64\]",
    ),
    "embeddings too few": (
        {"embeddings": encode(torch.zeros(7, 64), pb.FP32)},
        r"embeddings: got shape \[7, 64\], want \[8, 64\]",
    ),
}


@pytest.mark.parametrize("name", BAD_BEGINS)
def test_bad_first_frames_are_refused_with_a_reason(link: GrpcLink, name: str) -> None:
    """Every field of the first frame is checked; the edge gets one line and no retry."""
    changes, message = BAD_BEGINS[name]
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link, **changes)))
    with pytest.raises(PeerError, match=message):
        stream.receive()
    stream.close()


BAD_ANSWERS: dict[str, tuple[pb.EdgeFrame, str]] = {
    "one delta missing": (deltas(64), "1 deltas, want 2"),
    "delta too wide": (deltas(64, 64), r"delta at site 0: got shape \[8, 64\], want \[8, 32\]"),
    "too few rows": (
        deltas(64, 32, rows=7),
        r"delta at site 0: got shape \[7, 64\], want \[8, 64\]",
    ),
    "other site": (pb.EdgeFrame(deltas=pb.SiteDeltas(site=5)), "got an answer for site 5, want 0"),
    "other kind": (
        pb.EdgeFrame(hidden_grad=pb.HiddenGrad()),
        "got frame 'hidden_grad', want 'deltas'",
    ),
    "nothing": (pb.EdgeFrame(), "got frame None, want 'deltas'"),
}


def factored(*shapes: tuple[tuple[int, int], tuple[int, int]]) -> pb.EdgeFrame:
    """Zero factors of the given shapes for site 0."""
    zs = [encode(torch.zeros(*z), pb.FP32) for z, _ in shapes]
    bs = [encode(torch.zeros(*b), pb.FP32) for _, b in shapes]
    return pb.EdgeFrame(deltas=pb.SiteDeltas(site=0, deltas=zs, factors=bs))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (deltas(64, 32), "0 factors for 2 modules"),
        (factored(((8, 4), (64, 4))), "1 deltas, want 2"),
        (factored(((8, 4), (64, 3)), ((8, 4), (32, 4))), r"got shape \[64, 3\], want \[64, 4\]"),
        (factored(((8, 65), (64, 65)), ((8, 4), (32, 4))), "want a rank from 1 to 64"),
        (factored(((8, 0), (64, 0)), ((8, 4), (32, 4))), "want a rank from 1 to 64"),
        (factored(((7, 4), (64, 4)), ((8, 4), (32, 4))), r"got shape \[7, 4\], want \[8, 4\]"),
    ],
)
def test_bad_factors_end_the_stream_with_a_reason(
    link: GrpcLink, answer: pb.EdgeFrame, message: str
) -> None:
    """On the factored wire counts, ranks and shapes are checked before anything is multiplied."""
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link, factored=True)))
    assert stream.receive().WhichOneof("kind") == "input"
    stream.send(answer)
    with pytest.raises(PeerError, match=message):
        stream.receive()
    stream.close()


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_end_the_stream_with_a_reason(link: GrpcLink, name: str) -> None:
    """A malformed or misplaced answer is refused by name, and the server goes on serving."""
    frame, message = BAD_ANSWERS[name]
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    assert stream.receive().WhichOneof("kind") == "input"
    stream.send(frame)
    with pytest.raises(PeerError, match=message):
        stream.receive()
    make_split(link, lora())(**batches()[0]).loss.backward()


def test_garbage_bytes_are_refused(server: Server, link: GrpcLink) -> None:
    """Bytes that are no protobuf end the call and nothing else."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream("/dlora.v1.DLoRA/Step")(iter([b"\xff" * 100]))
        with pytest.raises(grpc.RpcError):
            next(call)
    make_split(link, lora())(**batches()[0]).loss.backward()


def test_flood_is_cut_off(link: GrpcLink, server: Server) -> None:
    """An edge that sends without reading is dropped before its frames pile up."""
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    for _ in range(50):
        stream.send(deltas(1))
    with pytest.raises((PeerError, PeerLost)):
        while True:
            stream.receive()
    assert_idle(server)


def assert_idle(server: Server) -> None:
    """Within seconds no stream, no held activation, no taken slot is left."""
    service = server._service
    deadline = time.monotonic() + 10
    while (service.pipes or service.tenancy.inflight_bytes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not service.pipes and service.tenancy.inflight_bytes == 0
    assert service.slots.free == service.options.compute_slots


def test_silent_edge_is_dropped(link: GrpcLink, server: Server) -> None:
    """A micro-batch whose edge says nothing ends at the deadline and frees what it held."""
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    stream.receive()
    with pytest.raises(PeerLost, match="sent nothing for 1 s"):
        stream.receive()
    assert_idle(server)


@pytest.mark.parametrize("after", [0, 1])
def test_vanished_edge_frees_everything(link: GrpcLink, server: Server, after: int) -> None:
    """Cancel wakes the worker wherever it waits, before the deadline."""
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    for _ in range(after):
        stream.receive()
    stream.close()
    assert_idle(server)


def test_forward_without_backward_frees_everything(link: GrpcLink, server: Server) -> None:
    """A loss that is dropped without backward does not stay in the cloud."""
    split = make_split(link, lora())
    loss = split(**batches()[0]).loss
    del loss
    assert_idle(server)


def test_late_backward_runs_the_micro_batch_again(link: GrpcLink, server: Server) -> None:
    """A backward after the cloud has given up gives the same gradients, by a second run."""
    grads = []
    for pause in (0.0, 1.5):
        split = make_split(link, lora(lora_dropout=0.2))
        torch.manual_seed(9)
        loss = split(**batches()[0]).loss
        time.sleep(pause)
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in adapter(split).items()})
        assert split.meter.retries == (1 if pause else 0)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_full_server_gives_a_retry_hint(link: GrpcLink, server: Server) -> None:
    """Over the stream limit an edge is told when to ask again, and succeeds when there is room."""
    split = make_split(link, lora())
    taken = [link.open() for _ in range(4)]
    for stream in taken:
        stream.send(pb.EdgeFrame(begin=begin(link)))
        stream.receive()
    extra = link.open()
    with pytest.raises(PeerLost, match="streams are taken") as caught:
        extra.receive()
    assert caught.value.retry_after_s == 1.0
    threading.Timer(0.3, lambda: [stream.close() for stream in taken]).start()
    split(**batches()[0]).loss.backward()
    assert split.meter.retries >= 1


def test_memory_limit_is_known_before_computing(tmp_path: Path) -> None:
    """A micro-batch over all the memory is refused for good; one over what is free now is told to
    wait.
    """
    cloud = CloudModel(
        make_base("llama"), model_id="x/y", limits=Limits(max_inflight_bytes=1 << 20)
    )
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = dlora.get_peft_model(link, lora(), wire_dtype="fp32", retry=NO_PATIENCE)
        with pytest.raises(PeerError, match="lower the batch size"):
            split(**batches(rows=64, length=64)[0])
        held = link.open()
        tokens = int(0.9 * (1 << 20) / cloud.memory.bytes_per_token)
        held.send(
            pb.EdgeFrame(
                begin=begin(
                    link,
                    batch=1,
                    length=tokens,
                    keep=[],
                    embeddings=encode(torch.zeros(tokens, 64), pb.FP32),
                )
            )
        )
        held.receive()
        with pytest.raises(PeerLost, match="no room now"):
            split(**batches(rows=4, length=16)[0])
        link.close()


def test_message_over_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """An edge knows the server's message limit and says what to do, instead of a broken stream."""
    cloud = CloudModel(make_base("llama"), model_id="x/y", limits=Limits(max_message_bytes=50_000))
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora())
        with pytest.raises(
            PeerError, match="over the server's limit of 0 MiB: use a smaller batch"
        ):
            split(**batches(rows=16, length=40)[0])
        split(**batches()[0]).loss.backward()
        link.close()


def test_measured_cost_covers_what_autograd_saves(
    cloud_models: Callable[[str], CloudModel],
) -> None:
    """The cost known beforehand is the memory that a training step really saves, within 10 %."""
    from dlora.cloud.zero_edge import probe_request, run_with_zeros, sample_ids

    cloud = cloud_models("llama")
    ids = sample_ids(cloud.model, 4, 100)
    weights = {p.untyped_storage().data_ptr() for p in cloud.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_with_zeros(cloud.parts, probe_request(cloud.parts, cloud.sites, ids, training=True))
    assert cloud.memory.of_pass(4, 100, training=True) == pytest.approx(
        sum(saved.values()), rel=0.1
    )


def test_shutdown_ends_streams_with_a_clear_status(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """Streams in flight end with UNAVAILABLE and the reason; the edge may try elsewhere or
    later.
    """
    server = Server(cloud_models("llama"), options=NO_DRAIN)
    server.start()
    link = dlora.connect(server.address, cache=tmp_path)
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    stream.receive()
    server.stop()
    with pytest.raises(PeerLost, match="shutting down"):
        stream.receive()
    link.close()


def test_health_check_answers(server: Server) -> None:
    """The standard gRPC health check says SERVING for the server and the service."""
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "dlora.v1.DLoRA"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_taken_port_is_a_clear_error(
    server: Server, cloud_models: Callable[[str], CloudModel]
) -> None:
    """A second server on the port is refused instead of sharing it unnoticed."""
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        Server(cloud_models("llama"), port=server.port, options=NO_DRAIN).start()


def test_two_edges_at_once_get_what_they_get_alone(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """Two edges whose micro-batches interleave each end with the very bits of their run alone."""

    def run(split: Any, seed: int, turn: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW(adapter(split).values(), lr=1e-2)
        for batch in batches(6, seed=seed):
            loss = split(**batch).loss
            turn()  # both are between forward and backward: two micro-batches are in the cloud
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in adapter(split).values()]

    with Server(
        cloud_models("llama"), options=ServerOptions(compute_slots=2, drain_s=0.0)
    ) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        alone = [run(make_split(link, lora(), seed=seed), seed) for seed in (1, 2)]
        links = [link, dlora.connect(server.address, cache=tmp_path)]
        splits = [
            make_split(one, lora(), seed=seed) for one, seed in zip(links, (1, 2), strict=True)
        ]
        barrier = threading.Barrier(2, timeout=30)
        with futures.ThreadPoolExecutor() as pool:
            running = [
                pool.submit(run, split, seed, barrier.wait)
                for split, seed in zip(splits, (1, 2), strict=True)
            ]
            together = [one.result() for one in running]
        for one in links:
            one.close()
    assert not torch.equal(alone[0][0], alone[1][0])
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class _OtherService(rpc.DLoRAServicer):
    """A server of a later protocol."""

    def Describe(self, request: Any, context: Any) -> pb.Description:
        return pb.Description(protocol_version=PROTOCOL_VERSION + 1)


def test_other_protocol_version_is_refused_with_both(tmp_path: Path) -> None:
    """An edge names both versions when it meets a cloud of another protocol."""
    other = grpc.server(futures.ThreadPoolExecutor(1))
    rpc.add_DLoRAServicer_to_server(_OtherService(), other)
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(
        PeerError, match=f"protocol {PROTOCOL_VERSION + 1}, this edge {PROTOCOL_VERSION}"
    ):
        dlora.connect(f"127.0.0.1:{port}", cache=tmp_path)
    other.stop(None)


def test_server_that_is_not_there() -> None:
    """A wrong port gives one line that says what to check."""
    with pytest.raises(PeerLost, match="no DLoRA server answers at 127.0.0.1:1:"):
        dlora.connect("127.0.0.1:1", timeout_s=0.5)
    with pytest.raises(UsageError, match="want host:port"):
        dlora.connect("nonsense")


class _Hostile(rpc.DLoRAServicer):
    """A cloud whose answers the test writes."""

    def __init__(self, description: pb.Description) -> None:
        self.description = description
        self.frames: list[pb.CloudFrame] = []
        self.chunks: list[pb.FileChunk] = []

    def Describe(self, request: Any, context: Any) -> pb.Description:
        return self.description

    def FetchEdgeFiles(self, request: Any, context: Any) -> Iterator[pb.FileChunk]:
        yield from self.chunks

    def Step(self, requests: Any, context: Any) -> Iterator[pb.CloudFrame]:
        next(requests)
        yield from self.frames


@pytest.fixture
def hostile(link: GrpcLink, tmp_path: Path) -> Iterator[tuple[_Hostile, Callable[[], GrpcLink]]]:
    """A hostile cloud, and a way to connect to it with the real edge files already cached."""
    description = pb.Description()
    description.CopyFrom(link.description)
    servicer = _Hostile(description)
    running = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_DLoRAServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield servicer, lambda: dlora.connect(f"127.0.0.1:{port}", cache=tmp_path)
    running.stop(None)


def site_input(
    site: int = 0, shape: tuple[int, int] = (24, 64), value: float = 0.0
) -> pb.CloudFrame:
    """An input frame for a batch of 24 tokens."""
    return pb.CloudFrame(input=pb.SiteInput(site=site, x=encode(torch.full(shape, value), pb.FP32)))


HOSTILE_FRAMES: dict[str, tuple[list[pb.CloudFrame], str]] = {
    "wrong shape": (
        [site_input(shape=(24, 63))],
        r"input of site 0: got shape \[24, 63\], want \[24, 64\]",
    ),
    "not finite": (
        [site_input(value=float("nan"))],
        "input of site 0: .* values that are not finite",
    ),
    "site not asked for": ([site_input(site=3)], "the cloud asked for site 3, which is not active"),
    "site asked twice": ([site_input(), site_input()], "the cloud asked for site 0, which is done"),
    "backward in forward": (
        [pb.CloudFrame(delta_grads=pb.DeltaGrads())],
        "frame 'delta_grads' in forward",
    ),
    "empty frame": ([pb.CloudFrame()], "the cloud sent frame None in forward"),
}


@pytest.mark.parametrize("name", HOSTILE_FRAMES)
def test_hostile_cloud_is_stopped_by_name(
    link: GrpcLink, hostile: tuple[_Hostile, Callable[[], GrpcLink]], name: str
) -> None:
    """Whatever a cloud sends, the edge stops with a clear error and its adapter is unchanged."""
    make_split(link, lora())  # fills the cache of edge files
    servicer, connect = hostile
    servicer.frames, message = HOSTILE_FRAMES[name]
    split = make_split(connect(), lora())
    before = {key: parameter.detach().clone() for key, parameter in adapter(split).items()}
    with pytest.raises((WireError, PeerError), match=message):
        split(
            **batches(rows=4, length=6)[0] | {"attention_mask": torch.ones(4, 6, dtype=torch.long)}
        )
    assert all(torch.equal(before[key], parameter) for key, parameter in adapter(split).items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.py", "not on the list"),
        ("modeling_evil.py", "not on the list"),
        ("tokenizer.json", "3 of 3 bytes, SHA-256 does not"),
    ],
)
def test_edge_files_with_code_paths_or_other_bytes_are_refused(
    hostile: tuple[_Hostile, Callable[[], GrpcLink]], tmp_path: Path, name: str, message: str
) -> None:
    """Only listed data files with the announced content are ever written."""
    servicer, connect = hostile
    del servicer.description.edge_files[:]
    servicer.description.edge_files.append(pb.FileInfo(name=name, size=3, sha256="00"))
    servicer.chunks = [pb.FileChunk(name=name, data=b"abc")]
    with pytest.raises(WireError, match=message):
        connect().edge_files()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_forbidden_and_unknown_targets_are_named(tmp_path: Path) -> None:
    """A module that the provider withholds, or that does not exist, is refused with what there
    is.
    """
    cloud = CloudModel(
        make_base("llama"), model_id="x/y", allowed=lambda name: name.endswith(("q_proj", "v_proj"))
    )
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        make_split(link, lora(target_modules=["q_proj", "v_proj"]))(**batches()[0]).loss.backward()
        with pytest.raises(UsageError, match=r"k_proj\. It allows: q_proj, v_proj"):
            make_split(link, lora())
        with pytest.raises(UsageError, match="This server allows: q_proj, v_proj"):
            make_split(link, lora(target_modules=["qkv"]))
        stream = link.open()  # an edge that does not check for itself
        stream.send(pb.EdgeFrame(begin=begin(link)))
        with pytest.raises(
            PeerError, match="does not allow adapters on model.layers.0.self_attn.k_proj"
        ):
            stream.receive()
        link.close()
