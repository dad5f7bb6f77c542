"""Tensors as messages, and back.

Shapes: N rows (attended tokens), D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb

WIRE_DTYPES: Final[dict[str, pb.DType]] = {
    "fp32": pb.FP32,
    "fp16": pb.FP16,
    "bf16": pb.BF16,
    "int8": pb.INT8,
    "int4": pb.INT4,
    "rotated_int4": pb.ROTATED_INT4,
}
_TORCH_DTYPES: Final[dict[int, torch.dtype]] = {
    pb.FP32: torch.float32,
    pb.FP16: torch.float16,
    pb.BF16: torch.bfloat16,
}
# Integers with a scale for each group: (values of a group, 0 for a whole row; largest value; dtype
# of the scale).
_GROUPED: Final[dict[int, tuple[int, int, torch.dtype]]] = {
    pb.INT8: (0, 127, torch.float32),
    pb.INT4: (32, 7, torch.bfloat16),
    pb.ROTATED_INT4: (64, 7, torch.bfloat16),
}


def _rotation() -> Tensor:
    """[64, 64], orthogonal: fixed random signs, then a Hadamard transform.

    It spreads a group's largest values over all of the group, so that few bits are enough.
    Source: arxiv.org/abs/2404.00456 (QuaRot), arxiv.org/abs/2506.01352 (TAH-Quant).
    """
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    bits = int.from_bytes(hashlib.sha256(b"rotated int4").digest()[:8], "little")
    signs = torch.tensor([1.0 - 2.0 * (bits >> place & 1) for place in range(64)])
    return signs[:, None] * hadamard / 8


_ROTATION: Final = _rotation()
# fp16 holds 2^-24 .. 2^16. Tensors are scaled so that their largest value lies just under 2^15:
# gradients of a mean loss would otherwise vanish, and rare activations overflow.
_FP16_TOP: Final = 15


def encode(tensor: Tensor, dtype: pb.DType) -> pb.Tensor:
    """Turn a tensor of any shape and device into its wire form; `decode` is the inverse.

    Exact for FP32; FP16 keeps 11 significant bits (a power of two is factored out per
    tensor, so neither overflow nor small gradients are lost), BF16 keeps 8. INT8 rounds to
    127 steps of a row's largest value, INT4 to 7 steps of the largest of 32 neighbours.
    ROTATED_INT4 does so after an orthogonal transform of 64 neighbours.
    """
    tensor = tensor.detach()
    if dtype in _GROUPED:
        return pb.Tensor(dtype=dtype, shape=list(tensor.shape), data=_encode_grouped(tensor, dtype))
    exponent = 0
    if dtype == pb.FP16 and (exponent := _fp16_exponent(tensor)):
        tensor = tensor.float() * 2.0**-exponent
    values = tensor.to(device="cpu", dtype=_TORCH_DTYPES[dtype]).contiguous()
    if dtype != pb.FP32:
        values = values.view(torch.int16)
    return pb.Tensor(
        dtype=dtype, shape=list(tensor.shape), exponent=exponent, data=values.numpy().tobytes()
    )


def content_hash(module: pb.FrozenModule | pb.ModuleTensors) -> bytes:
    """SHA-256 of a module's tensors: equal on both halves for equal content."""
    digest = hashlib.sha256()
    tensors = [module.a, module.b]
    if isinstance(module, pb.ModuleTensors):  # an absent bias is an empty tensor
        tensors += [module.a_bias, module.b_bias]
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} {tensor.exponent} ".encode())
        digest.update(tensor.data)
    return digest.digest()


def largest(tensor: Tensor) -> float:
    """The largest absolute value; 0 for an empty tensor, NaN or infinity where there is one."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)  # one pass and no copy, unlike isfinite or abs
    return max(-low.item(), high.item())


def _fp16_exponent(tensor: Tensor) -> int:
    top = largest(tensor)
    # Well inside fp16's range scaling gains nothing. Not finite: let the receiver see it.
    if 1.0 <= top < 2.0**_FP16_TOP or top == 0.0 or not math.isfinite(top):
        return 0
    return max(-120, math.frexp(top)[1] - _FP16_TOP)  # 2^120 is still a float32


def decode(message: pb.Tensor, shape: Sequence[int], what: str) -> Tensor:
    """Rebuild a tensor as float32 on the CPU.

    `shape` is what the receiver expects; `what` names the tensor in errors. Raises
    WireError if dtype, shape, byte count or exponent do not fit, before anything is copied.
    """
    if message.dtype not in _TORCH_DTYPES and message.dtype not in _GROUPED:
        raise WireError(
            f"{what}: got dtype number {message.dtype}, want one of {sorted(WIRE_DTYPES)}"
        )
    if list(message.shape) != list(shape):
        raise WireError(f"{what}: got shape {list(message.shape)[:8]}, want {list(shape)}")

    width = shape[-1] if shape else 1
    need = payload_bytes(message.dtype, math.prod(shape) // max(1, width), width)
    data = message.data  # a copy, each time it is asked for
    if len(data) != need:
        name = pb.DType.Name(message.dtype)
        raise WireError(
            f"{what}: got {len(data)} bytes, shape {list(shape)} in {name} needs {need}"
        )
    if message.exponent and (message.dtype != pb.FP16 or abs(message.exponent) > 200):
        raise WireError(f"{what}: got exponent {message.exponent}, want 0, or within 200 for fp16")

    if need == 0:
        return torch.zeros(*shape)
    if message.dtype in _GROUPED:
        return _decode_grouped(data, message.dtype, width, what).view(*shape)
    values = (
        torch.frombuffer(bytearray(data), dtype=_TORCH_DTYPES[message.dtype]).view(*shape).float()
    )
    return values.mul_(2.0**message.exponent) if message.exponent else values


def payload_bytes(dtype: pb.DType, rows: int, width: int) -> int:
    """Bytes of a [rows, width] tensor's data."""
    if dtype not in _GROUPED:
        return rows * width * _TORCH_DTYPES[dtype].itemsize
    group, _, scale = _GROUPED[dtype]
    if not group:
        return rows * (scale.itemsize + width)
    return rows * -(-width // group) * (scale.itemsize + group // 2)


def _encode_grouped(tensor: Tensor, dtype: pb.DType) -> bytes:
    group, top, scale_dtype = _GROUPED[dtype]
    width = tensor.shape[-1] if tensor.dim() else 1
    if not tensor.numel():
        return b""
    rows = tensor.to("cpu", torch.float32).reshape(-1, width)
    if group:
        rows = torch.nn.functional.pad(rows, (0, -width % group)).reshape(-1, group)
    if dtype == pb.ROTATED_INT4:
        rows = _exact_product(rows, _ROTATION)
    scales = (rows.abs().amax(dim=1) / top).to(scale_dtype)
    steps = rows / torch.where(scales > 0, scales, torch.ones_like(scales)).float()[:, None]
    values = steps.round_().nan_to_num_().clamp_(-top, top).to(torch.int8)
    if group:
        halves = (values + 8).to(torch.uint8)
        values = (halves[:, 0::2] | halves[:, 1::2] << 4).view(torch.int8)
    return scales.view(torch.uint8).numpy().tobytes() + values.numpy().tobytes()


def _decode_grouped(data: bytes, dtype: pb.DType, width: int, what: str) -> Tensor:
    """[rows, width], of data whose length was checked. Raises WireError for impossible scales."""
    group, _, scale_dtype = _GROUPED[dtype]
    count = len(data) // (scale_dtype.itemsize + (group // 2 if group else width))
    buffer = bytearray(data)
    scales = torch.frombuffer(buffer, dtype=scale_dtype, count=count).float()
    if not (bool(torch.isfinite(scales).all()) and bool((scales >= 0).all())):
        raise WireError(f"{what}: got a scale that is negative or not finite")

    values = torch.frombuffer(buffer, dtype=torch.uint8, offset=count * scale_dtype.itemsize)
    if not group:
        return values.view(torch.int8).view(count, width).float() * scales[:, None]
    halves = values.view(count, -1)
    steps = torch.stack([halves & 15, halves >> 4], dim=2).view(count, group).float() - 8
    if dtype == pb.ROTATED_INT4:
        steps = _exact_product(steps, _ROTATION.T)
    groups = -(-width // group)
    return (steps * scales[:, None]).view(-1, groups * group)[:, :width].contiguous()


def _exact_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Of float32 matrices, also where the caller computes under autocast."""
    with torch.autocast("cpu", enabled=False):
        return rows @ matrix


def pack_mask(mask_BT: Tensor | None) -> bytes:
    """One byte a token; empty for None."""
    return b"" if mask_BT is None else mask_BT.to("cpu", torch.uint8).numpy().tobytes()


def unpack_mask(data: bytes, batch: int, length: int) -> Tensor | None:
    """The inverse of `pack_mask`: [batch, length] of int64, or None. Raises WireError."""
    if not data:
        return None
    if len(data) != batch * length:
        raise WireError(f"attention mask: got {len(data)} bytes, want {batch} x {length}")
    values = np.frombuffer(data, dtype=np.uint8)
    if values.max() > 1:
        raise WireError(f"attention mask: got a value {values.max()}, want 0 or 1")
    return torch.from_numpy(values.astype(np.int64)).view(batch, length)
