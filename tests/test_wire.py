"""Tensors and masks as bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import WIRE_DTYPES, decode, encode, pack_mask, payload_bytes, unpack_mask

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
