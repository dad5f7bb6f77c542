"""A low-bit base: the decoder's linear weights in 8 or 4 bits, for less memory in the cloud.

Weights are dequantised for each product, forward and again backward, and thrown away: a micro-batch
in flight holds no copy of them. What is computed is exactly the plain model with the dequantised
weights, so everything that holds for a full-precision base (row by row equal results, gradients of
the input) holds here.

Formats: int8 is one scale a row (LLM.int8's weights, arXiv:2208.07339; activations are not
quantised), nf4 one scale for 64 weights (QLoRA, arXiv:2305.14314, without its second quantisation),
int4 one for 32 (GGUF's Q4_0).
"""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dlora.errors import ModelError, UsageError
from dlora.extras import missing_extra
from dlora.protocol.decoder import decoder_of

__all__ = [
    "KINDS",
    "QuantizedLinear",
    "check",
    "give_back",
    "quantization",
    "quantize",
    "weight_bytes",
]

log = logging.getLogger(__name__)

KINDS: Final = ("int8", "int4", "nf4")
_GROUP: Final = {"int4": 32, "nf4": 64}  # weights to a scale


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear in `kind`: its `weight` is made anew at each access, in compute dtype."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype = kind, linear.weight.dtype
        codes, scales = _encode(linear.weight.detach(), kind)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [out, in] that `codes` and `scales` stand for."""
        shape = self.out_features, self.in_features
        return _decode(self.codes, self.scales, self.kind, shape, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + bias."""
        result: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """What the module says of itself when it is shown."""
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """Autograd by itself would keep every dequantised weight until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.weight, None


def quantize(model: PreTrainedModel, kind: str) -> None:
    """Replace the linears of the model's decoder, in place; everything else stays as it is.

    Raises UsageError for an unknown kind or a missing package, ModelError for a model that this
    does not fit.
    """
    if kind not in KINDS:
        raise UsageError(f"quantize: got {kind!r}, want none or one of {', '.join(KINDS)}")
    name = type(model).__name__
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantised already: serve it without quantize")

    decoder = decoder_of(model)
    if any(isinstance(module, Conv1D) for module in decoder.modules()):
        raise ModelError(
            f"{name} has Conv1D modules in place of linear ones: it can be served in full "
            "precision only"
        )

    # Few of the decoder's weights in linears would save little memory: such a model is refused.
    kept = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    linears = [
        (path, module)
        for path, module in decoder.named_modules()
        if type(module) is nn.Linear and id(module) not in kept
    ]
    matrices = (
        sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
        - model.get_input_embeddings().weight.numel()
    )
    if not linears or 2 * sum(module.weight.numel() for _, module in linears) < matrices:
        raise ModelError(
            f"{name} keeps most of its weights outside of linear modules (fused experts?): it can "
            "be served in full precision only"
        )

    before = weight_bytes(model)
    while linears:  # one after the other, so that what is replaced is free for what comes
        path, module = linears.pop()
        decoder.set_submodule(path, QuantizedLinear(module, kind))
    log.info(
        "weights in %s: %.1f MiB in place of %.1f",
        kind,
        weight_bytes(model) / 2**20,
        before / 2**20,
    )


def quantization(model: nn.Module) -> str | None:
    """The kind that `quantize` put into a model; None for one in full precision."""
    return next(
        (module.kind for module in model.modules() if isinstance(module, QuantizedLinear)), None
    )


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps pieces of a weight's size for itself: in a small model more than low bits save.
    """
    with suppress(OSError, AttributeError, TypeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def check(model: nn.Module) -> None:
    """Use one low-bit linear where it is. Raises RuntimeError if this device cannot."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight  # noqa: B018
            return


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once; those that are offloaded count nothing."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def _encode(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight [out, in]."""
    if kind == "int8":
        codes, scales, _ = _bitsandbytes().int8_vectorwise_quant(weight.half())
        return codes, scales
    size = _GROUP[kind]
    flat = weight.float().flatten()
    groups = functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    if kind == "nf4":
        codes, state = _bitsandbytes().quantize_4bit(groups, blocksize=size, quant_type="nf4")
        return codes, state.absmax
    peaks = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scales = (peaks / -8).half()  # the largest value becomes -8
    steps = torch.where(scales == 0, 1, scales.float())
    codes = ((groups / steps).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = codes.chunk(2, dim=1)
    return low | high << 4, scales


def _decode(
    codes: Tensor, scales: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The inverse of `_encode`, to what rounding has lost."""
    if kind == "int8":
        return _bitsandbytes().int8_vectorwise_dequant(codes, scales).to(dtype)
    if kind == "nf4":
        library = _bitsandbytes()
        # As rows of one block each: the CPU kernel is wrong where a block goes over a row's end.
        rows = torch.Size((len(scales), _GROUP[kind]))
        state = library.QuantState(
            scales, rows, blocksize=_GROUP[kind], quant_type="nf4", dtype=dtype
        )
        values = library.dequantize_4bit(codes, state)
    else:
        values = torch.cat([codes & 15, codes >> 4], dim=1).to(dtype).sub_(8).mul_(scales.to(dtype))
    return values.flatten()[: shape[0] * shape[1]].view(shape)


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes' functions. Its modules are not used: see docs/decisions.md."""
    # It warns of kernels that only its modules would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as library
    except ImportError as error:
        raise missing_extra("quantize", f"quantize: int8 and nf4 ({error})") from error
    return library
