"""Tensors, masks and hosted adapters as bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from dlora.cloud import hosted as cloud_half
from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.hosted_request import check_hosted
from dlora.edge import hosted as edge_half
from dlora.edge.frame_size import parse_frame
from dlora.edge.sites import ActiveSite
from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.message_parts import check_message
from dlora.protocol.sites import Module, Site
from dlora.protocol.wire import WIRE_DTYPES, decode, encode, pack_mask, payload_bytes, unpack_mask
from dlora.server.frames import Awaited, rules_of

# Largest relative error of one value: half a unit in the last place.
EPSILON = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.501 / 127, "int4": 0.51 / 7}
EPSILON["rotated_int4"] = 1 / 7  # the largest value after the transform may be a larger one


def test_every_wire_dtype_has_a_codec() -> None:
    """No dtype of the protocol lacks an encoder and decoder."""
    known = {value.number for value in pb.DType.DESCRIPTOR.values if value.number}
    assert set(WIRE_DTYPES.values()) == known
    for dtype in WIRE_DTYPES.values():
        assert decode(encode(torch.ones(2), dtype), [2], "ones").tolist() == pytest.approx(
            [1, 1], rel=0.005
        )


@pytest.mark.parametrize("name", WIRE_DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_round_trip(name: str, shape: tuple[int, ...], scale: float) -> None:
    """Any shape survives at any scale, off by at most the dtype's rounding of the largest value."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    got = decode(encode(values, WIRE_DTYPES[name]), shape, "values")
    assert got.shape == values.shape and got.dtype == torch.float32
    if values.numel():
        assert (got - values).abs().max() <= EPSILON[name] * values.abs().max()


@given(
    st.lists(
        st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), min_size=1, max_size=20
    )
)
@settings(max_examples=100, deadline=None)
def test_fp16_never_overflows(values: list[float]) -> None:
    """fp16 with its exponent holds every finite float32 to 2^-11 of the tensor's largest value."""
    tensor = torch.tensor(values)
    got = decode(encode(tensor, pb.FP16), [len(values)], "values")
    assert torch.isfinite(got).all()
    assert (got.double() - tensor.double()).abs().max() <= 2**-11 * tensor.double().abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 9}, "dtype number 9"),
        ({"dtype": 0}, "dtype number 0"),
        ({"shape": [3, 2]}, r"thing: got shape \[3, 2\], want \[2, 3\]"),
        ({"shape": [2**31, 2**31]}, r"got shape \[2147483648, 2147483648\], want"),
        ({"data": b"123"}, r"got 3 bytes, shape \[2, 3\] in FP32 needs 24"),
        ({"data": b""}, r"got 0 bytes, shape \[2, 3\] in FP32 needs 24"),
        ({"exponent": 1}, "got exponent 1, want 0"),
        (
            {"dtype": pb.FP16, "data": b"x" * 12, "exponent": 10_000},
            "got exponent 10000, want 0, or within 200",
        ),
    ],
)
def test_bytes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    """A tensor message whose fields do not fit together raises WireError and says which."""
    fields = {"dtype": pb.FP32, "shape": [2, 3], "exponent": 0, "data": b"x" * 24} | change
    with pytest.raises(WireError, match=message):
        decode(pb.Tensor(**fields), [2, 3], "thing")


@pytest.mark.parametrize("name", ["int8", "int4", "rotated_int4"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_refused(name: str, scale: float) -> None:
    """A scale that is negative or not finite never becomes a tensor."""
    message = encode(torch.ones(2, 32), WIRE_DTYPES[name])
    dtype = torch.float32 if name == "int8" else torch.bfloat16
    wrong = torch.tensor([scale], dtype=dtype).view(torch.uint8).numpy().tobytes()
    message.data = wrong + message.data[len(wrong) :]
    with pytest.raises(WireError, match="thing: got a scale that is negative or not finite"):
        decode(message, [2, 32], "thing")


@pytest.mark.parametrize("name", WIRE_DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (5, 64), (0, 4)])
def test_payload_bytes_are_those_of_the_codec(name: str, shape: tuple[int, int]) -> None:
    """What the planner and the size checks count is what the encoder writes."""
    assert payload_bytes(WIRE_DTYPES[name], *shape) == len(
        encode(torch.randn(shape), WIRE_DTYPES[name]).data
    )


def test_decoded_tensor_owns_its_memory() -> None:
    """Writing to a decoded tensor does not write into the message's bytes."""
    message = encode(torch.zeros(4), pb.FP32)
    decode(message, [4], "zeros").fill_(7)
    assert message.data == bytes(16)


def test_mask_round_trip_and_refusals() -> None:
    """Masks survive; a wrong length or value is refused."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(unpack_mask(pack_mask(mask), 2, 3), mask)
    assert unpack_mask(pack_mask(None), 2, 3) is None
    with pytest.raises(WireError, match="want 2 x 4"):
        unpack_mask(pack_mask(mask), 2, 4)
    with pytest.raises(WireError, match="attention mask: got a value 2, want 0 or 1"):
        unpack_mask(b"\x02\x00\x01", 1, 3)


# ----------------------------------------------------------------- hosted adapters

FIELDS = ("a", "b", "a_bias", "b_bias")
STORE = FrozenStore(0, torch.device("cpu"))
UINT32 = st.integers(0, 12) | st.integers(0, 2**32 - 1)
UNHURRIED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def layer(width: int, out: int, rank: int, biased: bool) -> Linear:
    """peft's LoRA layer, or one with the biases of a bottleneck."""
    made = Linear(nn.Linear(width, out), "default", LoraConfig(), r=rank, lora_alpha=3)
    if biased:
        made.lora_A["default"], made.lora_B["default"] = (
            nn.Linear(width, rank),
            nn.Linear(rank, out),
        )
    else:
        nn.init.normal_(made.lora_B["default"].weight)
    return made


@dataclass
class Travelling:
    """An adapter as the edge sends it, and the sites that it is for."""

    layers: list[Linear]
    sites: list[Site]
    edge: edge_half.HostedAdapter
    begin: pb.Begin
    frames: list[pb.EdgeFrame]

    def arrive(self) -> cloud_half.HostedAdapter:
        """The cloud's half, that knows the first frame."""
        active = [(site, tuple(range(len(site.modules)))) for site in self.sites]
        request = check_hosted(self.begin, active, STORE, "local", None)
        assert request is not None
        return cloud_half.HostedAdapter(request, STORE, training=True)

    @property
    def parameters(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter, and what it is multiplied by before it travels."""
        found = []
        for one in self.layers:
            down, up, scale = one.lora_A["default"], one.lora_B["default"], one.scaling["default"]
            found += [(down.weight, 1.0), (up.weight, scale)]
            if down.bias is not None:
                found += [(down.bias, 1.0), (up.bias, scale)]
        return found


@st.composite
def travelling(draw: Any, dtypes: tuple[pb.DType, ...]) -> Travelling:
    """Adapters of any widths and ranks, with and without biases, cut into frames at any size."""
    torch.manual_seed(draw(st.integers(0, 99)))
    widths, layers, sites, active = st.integers(1, 70), [], [], []
    for index in range(draw(st.integers(1, 4))):
        width, outs = draw(widths), draw(st.lists(widths, min_size=1, max_size=3))
        names = [f"layers.{index}.{number}" for number in range(len(outs))]
        modules = tuple(
            Module(name=name, out_features=out) for name, out in zip(names, outs, strict=True)
        )
        sites.append(Site(index=index, in_features=width, modules=modules))
        here = [
            layer(width, out, draw(st.integers(1, max(width, out))), draw(st.booleans()))
            for out in outs
        ]
        layers += here
        active.append(
            ActiveSite(
                index=index,
                in_features=width,
                modules=tuple(range(len(outs))),
                layers=tuple(here),
                names=tuple(names),
                depth=index,
            )
        )
    versions, most_bytes = edge_half.KeptVersions(), draw(st.integers(1, 100_000))
    edge = edge_half.HostedAdapter(active, draw(st.sampled_from(dtypes)), versions, most_bytes)
    begin = pb.Begin(batch=1, length=1, training=True, **edge.fields(training=True))
    return Travelling(layers, sites, edge, begin, list(edge.frames()))


def described(sites: list[Site]) -> pb.Description:
    """A server with these sites."""
    infos = [
        pb.SiteInfo(
            in_features=site.in_features,
            modules=[pb.ModuleInfo(out_features=module.out_features) for module in site.modules],
        )
        for site in sites
    ]
    return pb.Description(
        sites=infos, embedding_width=8, hidden_width=8, limits=pb.Limits(max_tokens=8)
    )


@given(sent=travelling(tuple(WIRE_DTYPES.values())), data=st.data())
@UNHURRIED
def test_a_hosted_adapter_and_its_gradients_travel(sent: Travelling, data: st.DataObject) -> None:
    """The cloud has every A, scaled B and bias of the edge, as the codec rounds them, from frames
    that a server lets pass; the edge has its parameters' gradients from the cloud's frames in any
    order, and refuses them if one is missing or comes twice.
    """
    cloud, description = sent.arrive(), described(sent.sites)
    awaited, rules = Awaited(description), rules_of(description).frame
    assert len(sent.frames) == sent.begin.module_frames
    for frame in (pb.EdgeFrame(begin=sent.begin), *sent.frames):
        message = frame.SerializeToString()
        awaited.check(len(message))
        check_message(message, rules, "frame")
        awaited.received(frame, len(message))
        if frame.WhichOneof("kind") == "modules":
            cloud.take(pb.EdgeFrame.FromString(message).modules)

    def as_sent(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
        whole = tensor.T if turned else tensor
        found = decode(encode(whole, sent.edge.dtype), whole.shape, "thing")
        return found.T if turned else found

    leaves = [leaf for module in cloud.modules for leaf in module.leaves]
    turned = [number == 1 for module in cloud.modules for number, _ in enumerate(module.leaves)]
    for leaf, is_b, (parameter, scale) in zip(leaves, turned, sent.parameters, strict=True):
        assert torch.equal(leaf, as_sent(parameter.detach() * scale, is_b))
        leaf.grad = torch.randn(leaf.shape)
    each = zip(leaves, turned, sent.parameters, strict=True)
    want = [as_sent(leaf.grad, is_b) * scale for leaf, is_b, (_, scale) in each]

    codecs: Any = SimpleNamespace(factors=sent.edge.dtype)
    exchange: Any = SimpleNamespace(request=SimpleNamespace(codecs=codecs))
    frames = [pb.CloudFrame(module_grads=grads) for grads in cloud.rest(exchange)]
    parts = [parse_frame(frame.SerializeToString()).module_grads for frame in frames]
    parts = data.draw(st.permutations(parts))
    grads = sent.edge.gradients(parts, decode)
    for (parameter, _), grad in zip(sent.parameters, want, strict=True):
        torch.testing.assert_close(grads[parameter], grad)
    for others in (parts[1:], [*parts, parts[-1]]):
        with pytest.raises(WireError, match=r"gradients, want|gradients of module .* twice"):
            sent.edge.gradients(others, decode)


# What may be wrong with a tensor; each changes it so that it does not fit any more.


def other_shape(draw: Any, tensor: pb.Tensor) -> None:
    """Another shape, of which all bytes are there unless they are many."""
    near = [[*tensor.shape, 1], list(tensor.shape[::-1]), [one + 1 for one in tensor.shape]]
    shapes = st.lists(UINT32, max_size=9) | st.sampled_from(near)
    shape = draw(shapes.filter(lambda shape: shape != list(tensor.shape)))
    if (numel := math.prod(shape)) < 10_000:
        tensor.data = bytes(payload_bytes(tensor.dtype, numel, 1))
    tensor.ClearField("shape")
    tensor.shape.extend(shape)


def other_size(draw: Any, tensor: pb.Tensor) -> None:
    """More bytes, or fewer."""
    size = len(tensor.data)
    tensor.data = bytes(draw(st.integers(0, 2 * size).filter(lambda other: other != size)))


def other_dtype(draw: Any, tensor: pb.Tensor) -> None:
    """A dtype that takes other bytes, or that there is not."""
    size, (*_, width) = len(tensor.data), tensor.shape
    rows = math.prod(tensor.shape) // width
    same = {one for one in WIRE_DTYPES.values() if payload_bytes(one, rows, width) == size}
    known = st.sampled_from(sorted(WIRE_DTYPES.values())) | st.integers(-(2**31), 2**31 - 1)
    tensor.dtype = draw(known.filter(lambda dtype: dtype not in same))


def other_exponent(draw: Any, tensor: pb.Tensor) -> None:
    """One that no sender needs."""
    least = 201 if tensor.dtype == pb.FP16 else 1
    tensor.exponent = draw(st.integers(least, 2**31 - 1)) * draw(st.sampled_from([1, -1]))


@given(sent=travelling((pb.FP32, pb.FP16, pb.BF16)), data=st.data())
@UNHURRIED
@pytest.mark.parametrize("change", [other_shape, other_size, other_dtype, other_exponent])
def test_a_tensor_of_a_hosted_adapter_that_does_not_fit_is_never_made(
    change: Callable[..., None], sent: Travelling, data: st.DataObject
) -> None:
    """Whatever a tensor of whichever module says of itself beside what was announced ends the
    stream, and of the bytes nothing is made but the tensors before it.
    """
    modules = [module for frame in sent.frames for module in frame.modules.modules]
    tensors = [getattr(one, name) for one in modules for name in FIELDS if one.HasField(name)]
    number = data.draw(st.integers(0, len(tensors) - 1))
    before = [len(tensor.data) for tensor in tensors[:number]]
    change(data.draw, tensors[number])
    assert take(sent.arrive(), sent.frames) == before


def take(cloud: cloud_half.HostedAdapter, frames: list[pb.EdgeFrame]) -> list[int]:
    """Give the cloud frames that it has to refuse; the bytes of each tensor that was made."""
    made, make = [], torch.frombuffer

    def noted(buffer: bytearray, **options: Any) -> torch.Tensor:
        made.append(len(buffer))
        return make(buffer, **options)

    with mock.patch.object(torch, "frombuffer", noted), pytest.raises(WireError):
        for frame in frames:
            cloud.take(pb.EdgeFrame.FromString(frame.SerializeToString()).modules)
    return made


@given(sent=travelling((pb.FP32,)), data=st.data())
@UNHURRIED
def test_parts_of_a_hosted_adapter_that_do_not_fit_together_are_refused(
    sent: Travelling, data: st.DataObject
) -> None:
    """Tensors that are missing or were not announced, modules from another place, too many, too few
    or none, and frames in other numbers than announced end the stream.
    """
    numbers = [len(frame.modules.modules) for frame in sent.frames]
    starts = list(accumulate(numbers, initial=0))
    at = data.draw(st.integers(0, len(numbers) - 1))
    frame = sent.frames[at].modules
    (module, *_), draw = frame.modules, data.draw

    def other_tensors() -> None:
        name = draw(st.sampled_from(FIELDS))
        if module.HasField(name):
            module.ClearField(name)
        else:
            getattr(module, name).CopyFrom(module.a)

    def other_place() -> None:
        frame.first = draw(UINT32.filter(lambda first: first != starts[at]))

    def more_modules() -> None:
        left = len(sent.begin.modules) - starts[at]
        frame.modules.extend([module] * draw(st.integers(left, 2 * left)))

    def no_modules() -> None:
        frame.ClearField("modules")

    def frames_joined() -> None:
        modules = [one for part in sent.frames for one in part.modules.modules]
        sent.frames[:] = [pb.EdgeFrame(modules=pb.HostedTensors(modules=modules))]
        sent.begin.module_frames += len(numbers) == 1

    changes = [other_tensors, other_place, more_modules, no_modules]
    change = draw(st.sampled_from(changes + [frames_joined] * (len(sent.begin.modules) > 1)))
    change()
    made = take(sent.arrive(), sent.frames)
    assert len(made) <= 4 * (len(sent.begin.modules) if change is frames_joined else starts[at])


PLACES = [(0, 0), (0, 1), (1, 0)]


@given(
    ranks=st.tuples(*(st.integers(1, most) | UINT32 for most in (5, 7, 6))),
    frames=st.integers(1, 3) | UINT32,
    named=st.just(PLACES) | st.lists(st.tuples(UINT32, UINT32), max_size=4),
)
@example(ranks=(5, 7, 6), frames=3, named=PLACES)
@example(ranks=(5, 7, 7), frames=3, named=PLACES)
@settings(max_examples=100, deadline=None)
def test_an_announced_adapter_fits_what_it_sits_on(
    ranks: tuple[int, int, int], frames: int, named: list[tuple[int, int]]
) -> None:
    """A first frame is taken exactly if no rank is 0 or over both widths, the modules are the
    active ones in order, and none of the frames would be empty.
    """
    modules = [Module(name=f"0.{out}", out_features=out) for out in (3, 7)]
    fused = Module(name="0.experts", out_features=4)
    sites = [
        Site(index=0, in_features=5, modules=tuple(modules)),
        Site(index=1, in_features=6, modules=(fused,), experts=3),
    ]
    entries = [
        pb.HostedModule(site=site, module=module, rank=rank)
        for (site, module), rank in zip(named, [*ranks, 1], strict=False)
    ]
    begin = pb.Begin(hosted=True, modules=entries, module_frames=frames)
    fits = named == PLACES and 1 <= frames <= 3
    fits &= all(1 <= rank <= most for rank, most in zip(ranks, (5, 7, 6), strict=True))
    try:
        request = check_hosted(begin, [(sites[0], (0, 1)), (sites[1], (0,))], STORE, "x", None)
    except WireError:
        request = None
    assert (request is not None) == fits
    # Numbers for memory are of what was announced: three experts, each of the rank.
    if request is not None:
        one, other, of_experts = ranks
        assert sum(module.numel for module in request.modules) == (
            one * (5 + 3) + other * (5 + 7) + 3 * of_experts * (6 + 4)
        )


@given(
    entries=st.lists(st.tuples(UINT32, UINT32, UINT32), max_size=20),
    frames=UINT32,
)
@settings(max_examples=100, deadline=None)
def test_room_for_announced_frames_is_bounded(
    entries: list[tuple[int, int, int]], frames: int
) -> None:
    """Before anything is checked: whatever sites, modules and ranks a first frame names, the room
    that is kept for what comes behind is no more than modules of that number can take.
    """
    site = Site(index=0, in_features=5, modules=(Module(name="0", out_features=7),))
    description = described([site])
    description.experts.add(experts=3, in_features=6, out_features=4)
    awaited = Awaited(description)
    modules = [pb.HostedModule(site=one, module=two, rank=three) for one, two, three in entries]
    begin = pb.Begin(hosted=True, module_frames=frames, modules=modules, batch=1, length=1)
    awaited.received(pb.EdgeFrame(begin=begin), begin.ByteSize())
    # Of 3 experts with rank 6, in float32, and what a message needs beside numbers.
    assert awaited.room <= max(1000, len(entries) * 3 * (4 * 7 * 10 + 4 * 128 + 34 * 12))
    if frames and entries:
        with pytest.raises(WireError, match="got a frame of"):
            awaited.check(awaited.room + 1)
