"""LoRA arithmetic on peft's layers: what a layer adds, as a sum, as two factors, as one product.

A layer may hold several adapters; the active ones add up. All functions leave the layer as it is.

Shapes: N rows, D width of what is read, R rank, O width of the linear's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.errors import WireError
from dlora.formulas import adapter_flops
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import content_hash, encode

__all__ = [
    "FrozenModule",
    "active_names",
    "delta",
    "drops_out",
    "factors",
    "freeze",
    "layer_flops",
    "product_of",
    "wire_rank",
]


@dataclass(frozen=True)
class FrozenModule:
    """An idle module that the cloud applies: where, and what."""

    site: int
    module: int
    message: pb.FrozenModule
    hash: bytes


def active_names(layer: LoraLayer) -> list[str]:
    """The adapters of this layer that are in use."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def drops_out(layer: LoraLayer) -> bool:
    """Whether an adapter in use draws masks now."""
    return any(_drops(layer.lora_dropout[name]) for name in active_names(layer))


def delta(layer: LoraLayer, x_ND: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What the layer adds to its base output, [N, O]: sum of scaling * B(A(dropout(x))).

    Masks come from the `generator`; None: from that of the process, as in peft.
    """
    total: Tensor | None = None
    for name in active_names(layer):
        z_NR = _at_rank(layer, name, x_ND, generator)
        part_NO = layer.lora_B[name](z_NR) * layer.scaling[name]
        total = part_NO if total is None else total + part_NO
    if total is None:
        raise WireError("a site without an active adapter was asked for a delta")
    return total


def factors(
    layer: LoraLayer, x_ND: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The same as Z [N, R] and scaled B [O, R]: the delta is Z B^T, and R the sum of all ranks."""
    zs, bs = [], []
    for name in active_names(layer):
        lora_B = layer.lora_B[name]
        zs.append(_at_rank(layer, name, x_ND, generator))
        bs.append(lora_B.weight * layer.scaling[name])
        if lora_B.bias is not None:  # one column more, of ones
            zs.append(zs[-1].new_ones(len(x_ND), 1))
            bs.append(lora_B.bias[:, None] * layer.scaling[name])
    if not zs:
        raise WireError("a site without an active adapter was asked for a delta")
    return (zs[0], bs[0]) if len(zs) == 1 else (torch.cat(zs, dim=1), torch.cat(bs, dim=1))


def wire_rank(layer: LoraLayer) -> int:
    """R of `factors`, known before there is an x."""
    return sum(
        layer.lora_A[name].out_features + (layer.lora_B[name].bias is not None)
        for name in active_names(layer)
    )


def _at_rank(
    layer: LoraLayer, name: str, x_ND: Tensor, generator: torch.Generator | None
) -> Tensor:
    """A(dropout(x)) of one adapter: [N, R]."""
    lora_A, dropout = layer.lora_A[name], layer.lora_dropout[name]
    x_ND = x_ND.to(lora_A.weight.dtype)
    if generator is None or not _drops(dropout):
        x_ND = dropout(x_ND)
    else:
        kept_ND = torch.empty_like(x_ND).bernoulli_(1 - dropout.p, generator=generator)
        x_ND = x_ND * kept_ND.div_(1 - dropout.p)
    z_NR: Tensor = lora_A(x_ND)
    return z_NR


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def product_of(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A [R, D] and scaled B [O, R] of the sum of the active adapters, detached, float32."""
    names = active_names(layer)
    a = torch.cat([layer.lora_A[name].weight.detach().float() for name in names])
    b = torch.cat(
        [layer.lora_B[name].weight.detach().float() * layer.scaling[name] for name in names], dim=1
    )
    return a, b


def freeze(site: int, module: int, layer: LoraLayer) -> FrozenModule:
    """The sum of the active adapters as one frozen module, exact in float32."""
    a, b = product_of(layer)
    message = pb.FrozenModule(a=encode(a, pb.FP32), b=encode(b, pb.FP32))
    return FrozenModule(site, module, message, content_hash(message))


def layer_flops(
    layer: LoraLayer, rows: int, *, training: bool, input_grad: bool, factored: bool = False
) -> int:
    """FLOPs of the active adapters on this many rows."""
    return sum(
        adapter_flops(
            rows,
            layer.lora_A[name].in_features,
            layer.r[name],
            layer.lora_B[name].out_features,
            training=training,
            input_grad=input_grad,
            factored=factored,
        )
        for name in active_names(layer)
    )
