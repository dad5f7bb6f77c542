"""A spectral start: LoRA's A begins with the directions in which a first batch wants change.

The gradient of a module's weight would be g^T x, of what the module reads and of the gradient of
what it gives. The edge has both after one exchange, and the product is never formed. The directions
are LoRA-GA's (arXiv:2407.05000). That also begins with a B, and takes B A off the base weights,
which are elsewhere here: B begins with zero, so that the function does not change, as usual.

Shapes: N rows, D width of what a module reads, O of what it gives, R rank, Q directions looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.labels import IGNORE
from dlora.edge.lora import active_names
from dlora.edge.model import SplitModel
from dlora.errors import UsageError

__all__ = ["check_spectral", "initialize_spectral"]

_MORE: Final = 8
"""Directions looked for beside those that are used: so the last of these are found, too."""
_ROUNDS: Final = 4
"""Of subspace iteration."""
_LEAST: Final = 1e-5
"""Of the largest singular value: what is smaller is rounding, in float32."""


def initialize_spectral(model: SplitModel, batch: Mapping[str, Tensor]) -> None:
    """Turn A of every active module of a fresh adapter: its rows keep their lengths, and become the
    first right singular vectors of the weight's gradient on a batch, from one training micro-batch.

    `batch` has `input_ids`, `attention_mask` and `labels`. Rows beyond the gradient's rank stay as
    they were drawn, and so does LoRA that no exchange reaches: idle, in edge layers, on the LM
    head. So call it when Kill and Revive has chosen its first set (`before_step(0)`), and then
    `measure_anew`. Raises UsageError off the plain wire, where the edge lacks x or g; without
    labels; where nothing is trained; and for an adapter that adds something already.
    """
    check_spectral(model)
    if (labels := batch.get("labels")) is None or not (labels != IGNORE).any():
        raise UsageError("a spectral start follows the loss of a batch: give it with labels")

    found: dict[nn.Parameter, Tensor] = {}
    with ExitStack() as after, torch.inference_mode(False), torch.enable_grad():
        _set_aside(model, after)
        for layer in _layers(model):
            for name in active_names(layer):
                sides = (layer.lora_A[name], layer.lora_B[name])
                if any(side.weight.requires_grad for side in sides):
                    _watch(*sides, found, after)
        loss = model(**batch).loss
        if not loss.requires_grad:
            raise UsageError("a spectral start is of modules that are trained: none is active")
        loss.backward()

    with torch.no_grad():
        for a_RD, directions_QD in found.items():
            some = a_RD[: len(directions_QD)]
            some.copy_(directions_QD * some.norm(dim=1, keepdim=True))


def check_spectral(model: SplitModel) -> None:
    """Raises UsageError where a spectral start cannot be made."""
    if model.options.wire != "plain":
        raise UsageError(
            f"a spectral start reads gradients that wire={model.options.wire} does not bring here: "
            "build the model with wire=plain, and set_options(wire=...) afterwards"
        )
    layers = _layers(model)
    if isinstance(model.peft_config["default"], BottleneckConfig) or not layers:
        raise UsageError(
            "a spectral start is of LoRA on linear modules in the cloud: there is none"
        )
    for layer in layers:
        if any(layer.lora_B[name].weight.any() for name in active_names(layer)):
            raise UsageError(
                "a spectral start is of a fresh adapter: B of this one is not zero, and another A "
                "would change what it does"
            )


def _layers(model: SplitModel) -> list[LoraLayer]:
    return [layer for site in model.sites for layer in site.layers]


def _set_aside(model: SplitModel, after: ExitStack) -> None:
    """Let a micro-batch leave no trace in the model but its cost; nothing drops out meanwhile."""
    for parameter in model.parameters():
        after.callback(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None
    for module in model.modules():
        after.callback(setattr, module, "training", module.training)
    model.train()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.eval()

    # x of whole micro-batches, and no probe, which would be one more for the next decision.
    after.callback(setattr, model.part_count, "number", model.part_count.number)
    after.callback(setattr, model, "probe_modules", model.probe_modules)
    model.part_count.number, model.probe_modules = 1, ()


def _watch(
    lora_A: nn.Module, lora_B: nn.Module, found: dict[nn.Parameter, Tensor], after: ExitStack
) -> None:
    """Note a module's directions when the gradient of its output comes."""
    a_RD = lora_A.get_parameter("weight")
    read: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0].detach()]

    def answered(_: nn.Module, __: Any, y_NO: Tensor) -> None:
        y_NO.register_hook(partial(note, read[0]))

    def note(x_ND: Tensor, g_NO: Tensor) -> None:
        found[a_RD] = _directions(x_ND, g_NO, len(a_RD))

    for hook in (lora_A.register_forward_pre_hook(keep), lora_B.register_forward_hook(answered)):
        after.callback(hook.remove)


def _directions(x_ND: Tensor, g_NO: Tensor, rank: int) -> Tensor:
    """The first right singular vectors of g^T x, [R, D]; fewer where its rank is smaller than R.

    By subspace iteration on the two factors (Halko et al., arXiv:0909.4061, algorithm 4.4).
    """
    x_ND, g_NO = x_ND.float(), g_NO.float()
    width, size = x_ND.shape[1], min(rank + _MORE, x_ND.shape[1])
    generator = torch.Generator().manual_seed(0)
    start_DQ = torch.randn(width, size, generator=generator).to(x_ND)
    basis_DQ = torch.linalg.qr(start_DQ).Q
    for _ in range(_ROUNDS):
        image_OQ = torch.linalg.qr(g_NO.T @ (x_ND @ basis_DQ)).Q
        basis_DQ = torch.linalg.qr(x_ND.T @ (g_NO @ image_OQ)).Q
    _, values_Q, right_QQ = torch.linalg.svd(g_NO.T @ (x_ND @ basis_DQ), full_matrices=False)
    there = int((values_Q > _LEAST * values_Q[0]).sum())
    directions: Tensor = (right_QQ @ basis_DQ.T)[: min(rank, there)]
    return directions
