"""Coarse codecs: rotated int4, a codec for each kind of tensor, dropped input gradients."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_local, make_split
from helpers import assert_same_grads
from hypothesis import given, settings
from hypothesis import strategies as st

import dlora.server.stream
from dlora.cloud.model import CloudModel
from dlora.edge.link import RetryPolicy
from dlora.edge.micro_batch import MicroBatch
from dlora.edge.options import SplitOptions
from dlora.embedded import InProcessLink
from dlora.errors import PeerLost, UsageError, WireError
from dlora.formulas import step_traffic
from dlora.kill_revive.units import costs_of
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import MIXES, Codecs, begin_fields, codecs_of, name_of
from dlora.protocol.wire import decode, encode, payload_bytes
from dlora.server.stream import StreamPipe
from dlora.training.plan_settings import PlanSettings
from dlora.training.run import _build_model
from dlora.training.settings import TrainSettings

MIXED = Codecs(
    x=pb.INT8,
    dx=pb.ROTATED_INT4,
    deltas=pb.BF16,
    delta_grads=pb.FP16,
    ends=pb.FP32,
    factors=pb.INT4,
)
"""Another dtype for every kind."""


@pytest.fixture(scope="module")
def link(cloud_models: Callable[[str], CloudModel]) -> Iterator[InProcessLink]:
    """A tiny Llama in this process."""
    made = InProcessLink(cloud_models("llama"))
    yield made
    made.close()


# ----------------------------------------------------------------- rotated int4


def groups_of(values: torch.Tensor) -> torch.Tensor:
    """Norms of groups of 64 of every row, of which the last is filled up with zeros."""
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % 64)).view(-1, 64)
    return padded.double().norm(dim=1)


@given(
    width=st.integers(1, 200),
    exponents=st.lists(st.integers(-110, 110), min_size=1, max_size=4),
    outlier=st.floats(1, 1e4),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_a_groups_error_is_bounded_by_its_own_norm(
    width: int, exponents: list[int], outlier: float, seed: int
) -> None:
    """Whatever the width, the range of the rows and their outliers: each group of 64 is off by half
    a step in each value after the transform, and knows nothing of other groups.
    """
    rows = torch.randn(len(exponents), width, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] *= outlier
    rows *= torch.tensor([2.0**exponent for exponent in exponents])[:, None]
    got = decode(encode(rows, pb.ROTATED_INT4), rows.shape, "rows")
    # A step is at most a 7th of the group's norm, and a bfloat16 scale is off by 2^-9.
    assert (groups_of(got - rows) <= 4 / 7 * 1.01 * groups_of(rows)).all()


def test_the_transform_is_worth_it() -> None:
    """On rows with outliers, as activations have, the error is under that of int4 without it."""
    rows = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    rows[:, ::97] *= 12
    off = {
        name: (decode(encode(rows, dtype), rows.shape, "rows") - rows).norm() / rows.norm()
        for name, dtype in (("int4", pb.INT4), ("rotated", pb.ROTATED_INT4))
    }
    assert off["rotated"] < 0.8 * off["int4"]
    assert len(encode(rows, pb.ROTATED_INT4).data) == 64 * 576 * 4.25 / 8


def test_zeros_stay_zeros_and_no_number_is_refused() -> None:
    """A row of zeros comes back as that; values that are not finite never become a tensor."""
    zeros = torch.zeros(2, 70)
    assert torch.equal(decode(encode(zeros, pb.ROTATED_INT4), [2, 70], "zeros"), zeros)
    for wrong in (float("nan"), float("inf")):
        message = encode(torch.full((1, 64), wrong), pb.ROTATED_INT4)
        with pytest.raises(WireError, match="negative or not finite"):
            decode(message, [1, 64], "thing")


def test_the_transform_is_part_of_the_protocol() -> None:
    """Signs and order of the transform are fixed: another version reads the same bytes."""
    rows = torch.arange(128.0).view(2, 64) % 7 - 3
    digest = hashlib.sha256(encode(rows, pb.ROTATED_INT4).data).hexdigest()
    assert digest == "74d9f56b9d20a189acb9b753c5d80365adf854df0d267b12bede6616f1c7e552"


def test_autocast_does_not_reach_the_transform() -> None:
    """An edge that trains under autocast rounds as one that does not."""
    rows = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    calm = encode(rows, pb.ROTATED_INT4)
    with torch.autocast("cpu", torch.bfloat16):
        assert encode(rows, pb.ROTATED_INT4).data == calm.data
        under = decode(calm, [3, 100], "rows")
    assert torch.equal(under, decode(calm, [3, 100], "rows"))


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    """A shape of petabytes with few bytes is refused by its byte count."""
    message = pb.Tensor(dtype=pb.ROTATED_INT4, shape=[2**30, 2**20], data=b"x" * 34)
    with pytest.raises(WireError, match=f"in ROTATED_INT4 needs {2**30 * 2**14 * 34}"):
        decode(message, [2**30, 2**20], "thing")


# ----------------------------------------------------------------- one codec for each kind


@pytest.mark.parametrize("codecs", [*MIXES.values(), MIXED], ids=[*MIXES, "mixed"])
def test_a_begin_says_every_codec(codecs: Codecs) -> None:
    """What the edge says is what the cloud reads, through the bytes of the message."""
    begin = pb.Begin.FromString(pb.Begin(**begin_fields(codecs)).SerializeToString())
    assert codecs_of(begin) == codecs
    assert begin.HasField("codecs") == (len(codecs.dtypes) > 1)
    assert name_of(codecs) in (*MIXES, ", ".join(name_of(MIXED).split(", ")))


def test_what_is_small_keeps_16_bits() -> None:
    """In the coarse mixes factors are not rounded, and everything large is: hosted the ends, and
    with int4 the adapter.
    """
    for name in ("int8", "int4"):
        dtypes = asdict(MIXES[name])
        assert dtypes.pop("factors") == pb.FP16
        coarse = {kind: dtype for kind, dtype in dtypes.items() if kind != "ends"}
        assert not {pb.FP16, pb.FP32} & set(coarse.values())
        assert SplitOptions(wire_dtype=name).codecs == MIXES[name]
        hosted = SplitOptions(wire_dtype=name, wire="hosted", upload_consent=True).codecs
        factors = {"int8": pb.FP16, "int4": pb.ROTATED_INT4}[name]
        assert asdict(hosted) == asdict(MIXES[name]) | {"ends": MIXES[name].x, "factors": factors}
        assert name_of(hosted) == name_of(MIXES[name]) == name


class Recorded:
    """A link that keeps all frames of both directions."""

    def __init__(self, link: Any) -> None:
        self.link, self.description, self.address = link, link.description, link.address
        self.frames: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        stream = self.link.open()
        send, receive = stream.send, stream.receive

        def note(frame: Any) -> Any:
            self.frames.append(getattr(frame, frame.WhichOneof("kind")))
            return frame

        stream.send = lambda frame: send(note(frame))
        stream.receive = lambda: note(receive())
        return stream

    def kinds(self) -> list[str]:
        """The frames' names, in order."""
        return [type(frame).__name__ for frame in self.frames]


# message -> field -> kind of codec; deltas are factors on the factored wire.
KINDS = {
    "Begin": {"embeddings": "ends"},
    "SiteInput": {"x": "x"},
    "SiteDeltas": {"deltas": "deltas", "factors": "factors"},
    "Hidden": {"hidden": "ends"},
    "HiddenGrad": {"grad": "ends"},
    "DeltaGrads": {"grads": "delta_grads", "factor_grads": "factors"},
    "InputGrad": {"grad": "dx"},
}


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_both_halves_use_the_codec_of_each_kind(link: InProcessLink, wire: Any) -> None:
    """Every tensor of a step travels in the dtype of its kind, and nothing in another."""
    recorded = Recorded(link)
    consent = wire == "hosted"
    split = make_split(recorded, lora(), wire=wire, wire_dtype=MIXED, upload_consent=consent)
    split(**batches()[0]).loss.backward()
    wanted, seen = asdict(MIXED), set()
    for frame in recorded.frames:
        for field, kind in KINDS.get(type(frame).__name__, {}).items():
            kind = "factors" if wire == "factored" and "delta" in kind else kind
            value = getattr(frame, field)
            for tensor in [value] if isinstance(value, pb.Tensor) else value:
                assert tensor.dtype == wanted[kind], (type(frame), field)
                seen.add(kind)
        hosted = [frame] if isinstance(frame, pb.HostedTensors) else []
        for tensors in [*hosted, *(frame.module_grads if isinstance(frame, pb.Done) else [])]:
            for module in tensors.modules:
                assert {module.a.dtype, module.b.dtype} == {wanted["factors"]}
                seen.add("factors")
    everything = {"plain": {"deltas", "delta_grads", "x", "dx"}, "factored": {"factors", "x", "dx"}}
    assert seen == everything.get(wire, {"factors"}) | {"ends"}


def test_a_server_that_lacks_a_codec_is_named(
    cloud_models: Callable[[str], CloudModel],
) -> None:
    """An edge asks for nothing that `Describe` does not list, and says what there is."""
    link = InProcessLink(cloud_models("llama"))
    link.description.wire_dtypes.remove(pb.ROTATED_INT4)
    with pytest.raises(UsageError, match="does not know 'int8', only fp32, fp16, bf16$"):
        make_split(link, lora(), wire_dtype="int8")
    with pytest.raises(UsageError, match="wire dtype: got 'fp8', want one of fp32"):
        SplitOptions(wire_dtype="fp8")
    link.close()


@pytest.mark.parametrize("wire", ["plain", "factored"])
def test_kill_and_revive_counts_what_codecs_take(link: InProcessLink, wire: Any) -> None:
    """The share of a set of sites is that of the bytes of a step, whatever the codecs."""
    split = make_split(link, lora(r=8, target_modules="all-linear"), wire=wire)
    few, rows, kept = split.sites[1::3], 512, 128

    def traffic(sites: Any, mix: str, *, drop: bool) -> int:
        shapes = [(site.in_features, [(m.out_features, 8) for m in site.layers]) for site in sites]
        sizes = (rows, kept, 64, 64, shapes, mix)
        return sum(step_traffic(*sizes, factored=wire == "factored", drop_input_grads=drop))

    for mix in MIXES:
        for drop in (False, True):
            split.set_options(wire_dtype=mix, input_grad="drop" if drop else "exact")
            x, dx = (payload_bytes(kind, 1, 6400) for kind in (MIXES[mix].x, MIXES[mix].dx))
            assert costs_of(split).input_grad == pytest.approx(0 if drop else dx / x, rel=0.01)
            share = costs_of(split).share([name for site in few for name in site.names])
            want = traffic(few, mix, drop=drop) / traffic(split.sites, mix, drop=drop)
            # Narrow rows: scales, and groups that are filled up, weigh more than in a real model.
            assert share == pytest.approx(want, rel=0.06), (mix, drop)


# ----------------------------------------------------------------- dropped input gradients


@pytest.mark.parametrize("wire", ["plain", "factored"])
def test_dropped_means_that_adapters_do_not_reach_below(
    links: Callable[[str], Any], wire: Any
) -> None:
    """Gradients are those of local peft whose LoRA layers read inputs that are cut off from
    autograd: nothing else is left out.
    """
    config = lora(target_modules="all-linear")
    local, split = make_local("llama", config), make_split(links("llama"), config, wire=wire)
    split.set_options(input_grad="drop")
    for name, module in local.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    for model in (local, split):
        model(**batches()[0]).loss.backward()
    assert_same_grads(local, split)


def test_backward_goes_one_way(link: InProcessLink) -> None:
    """S + 2 round trips, and no site's input gradient is asked for or sent."""
    recorded = Recorded(link)
    split = make_split(recorded, lora(target_modules="all-linear"), input_grad="drop")
    split(**batches()[0]).loss.backward()
    kinds = recorded.kinds()
    assert kinds.count("SiteInput") == kinds.count("DeltaGrads") == 12
    assert "InputGrad" not in kinds and not any(
        frame.wants_input_grad for frame in recorded.frames if isinstance(frame, pb.SiteInput)
    )
    assert split.meter.round_trips == 12 + 2
    split.eval()
    with torch.no_grad():
        split(**batches()[0])
    assert split.meter.round_trips == 12 + 2 + 12 + 1
    assert not recorded.frames[-1].backward_flops


def test_a_slow_edge_is_not_flooded(
    links: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward that is ahead of its edge waits for it: a slow edge gets the same gradients."""
    config = lora(target_modules="all-linear")
    fast = make_split(links("llama"), config, input_grad="drop")
    fast(**batches()[0]).loss.backward()
    answer = MicroBatch._answer_backward

    def slowly(self: MicroBatch, *args: Any) -> None:
        time.sleep(0.03)
        answer(self, *args)

    monkeypatch.setattr(MicroBatch, "_answer_backward", slowly)
    slow = make_split(links("llama"), config, input_grad="drop")
    slow(**batches()[0]).loss.backward()
    assert slow.meter.retries == 0
    for name, parameter in adapter(fast).items():
        assert torch.equal(adapter(slow)[name].grad, parameter.grad)


def test_a_server_holds_few_frames_for_an_edge_that_does_not_read() -> None:
    """A pass that is ahead of its edge waits, without a compute slot, and ends with the call."""
    slots: list[str] = []
    place = SimpleNamespace(
        release_slot=lambda: slots.append("given"), take_slot=lambda: slots.append("taken")
    )
    call = SimpleNamespace(closed=None, timeout_s=20.0, then=[])
    call.on_close = call.then.append
    sent: list[int] = []

    async def wait(future: Any, _timeout_s: Any, _what: str) -> Any:
        return await future

    call.wait = wait

    async def story() -> None:
        pipe = StreamPipe(place, call, SimpleNamespace(sent=lambda _: None), {})

        def work() -> None:
            with pytest.raises(PeerLost, match="over"):
                for number in range(99):
                    pipe.send(pb.CloudFrame(input=pb.SiteInput(site=number)))
                    sent.append(number)

        worker = threading.Thread(target=work)
        worker.start()
        most = dlora.server.stream._MAX_UNSENT
        for read in range(4):
            end = time.monotonic() + 10
            while slots.count("given") <= read and time.monotonic() < end:
                await asyncio.sleep(0.001)
            assert len(sent) == most + read  # one more for each that was read
            assert (await pipe.next_frame()).input.site == read
        while slots.count("given") <= 4:
            await asyncio.sleep(0.001)

        call.closed = "the story is over"
        for then in call.then:
            then()
        await asyncio.to_thread(worker.join, 10)
        assert not worker.is_alive()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_lost_stream_changes_no_bit(link: InProcessLink) -> None:
    """With rotated int4 and dropped gradients too, a micro-batch that runs again in the middle of
    backward ends with the same bits.
    """
    config = lora(target_modules="all-linear", lora_dropout=0.3)
    options: Any = {"wire": "factored", "wire_dtype": "int4", "input_grad": "drop"}
    options["retry"] = RetryPolicy(sleep=lambda _: None)
    found = []
    for lost_at in (None, 18):
        recorded = Recorded(link)
        split = make_split(recorded, config, **options)
        opened = recorded.open

        def open_once(opened: Any = opened, lost_at: Any = lost_at, to: Any = recorded) -> Any:
            stream = opened()
            receive, count = stream.receive, iter(range(10**6))

            def receive_until() -> Any:
                if next(count) == lost_at:
                    to.open = opened
                    raise PeerLost("the stream is gone")
                return receive()

            stream.receive = receive_until
            return stream

        recorded.open = open_once  # type: ignore[method-assign]
        torch.manual_seed(3)
        split(**batches()[0]).loss.backward()
        assert split.meter.retries == (lost_at is not None)
        found.append([parameter.grad for parameter in adapter(split).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("mix", ["int8", "int4"])
@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_training_learns_over_coarse_wires(link: InProcessLink, wire: Any, mix: str) -> None:
    """Ten steps on one batch lower its loss, with input gradients dropped where they may be."""
    dropped: Any = "exact" if wire == "hosted" else "drop"
    split = make_split(
        link,
        lora(),
        wire=wire,
        wire_dtype=mix,
        input_grad=dropped,
        upload_consent=wire == "hosted",
    )
    optimizer = torch.optim.AdamW(adapter(split).values(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(split(**batches()[0]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


# ----------------------------------------------------------------- settings


def test_dropping_is_chosen_by_name(link: InProcessLink, tmp_path: Any) -> None:
    """The setting reaches the model, run.json has it, and the hosted wire refuses it by name."""
    common: dict[str, Any] = {"server": "x:1", "data": "x", "output": tmp_path / "run"}
    chosen = TrainSettings(**common, input_grad="drop", target_modules=["q_proj"])
    assert chosen.as_dict()["input_grad"] == "drop"
    assert _build_model(chosen, link).options.input_grad == "drop"

    hosted: dict[str, Any] = {"wire": "hosted", "upload_consent": True, "input_grad": "drop"}
    for refused in (
        lambda: TrainSettings(**common, **hosted),
        lambda: PlanSettings(server="x:1", **hosted),
        lambda: SplitOptions(**hosted),
    ):
        with pytest.raises(UsageError, match="input_grad=drop: on the hosted wire"):
            refused()
    with pytest.raises(UsageError, match="got 'some', want exact or drop"):
        SplitOptions(input_grad="some")  # type: ignore[arg-type]
