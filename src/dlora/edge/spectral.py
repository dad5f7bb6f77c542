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
from dlora.edge.lora import active_names
from dlora.edge.model import SplitModel
from dlora.errors import UsageError

__all__ = ["check_spectral", "initialize_spectral"]

_MORE: Final = 8
"""Directions looked for beside those that are used: so the last of these are found, too."""
_ROUNDS: Final = 4
"""Of subspace iteration."""


def initialize_spectral(model: SplitModel, batch: Mapping[str, Tensor]) -> None:
    """Turn A of every active module of a fresh adapter: its rows keep their lengths, and become the
    first right singular vectors of the weight's gradient on a batch, from one training micro-batch.

    `batch` has `input_ids`, `attention_mask` and `labels`. Modules that no exchange reaches stay as
    they are, so call it when Kill and Revive has chosen its first set (`before_step(0)`). Raises
    UsageError off the plain wire, where the edge lacks x or g; without labels; and for an adapter
    that adds something already.
    """
    check_spectral(model)
    if batch.get("labels") is None:
        raise UsageError("a spectral start follows the loss of a batch: give it with labels")
    layers = _layers(model)
    kept = {p: p.grad for p in model.parameters() if p.requires_grad}
    parts, model.part_count.number = model.part_count.number, 1  # x of whole micro-batches
    was_training, found = model.training, dict[nn.Parameter, Tensor]()
    try:
        with ExitStack() as hooks, torch.enable_grad():
            model.train()
            for layer in layers:
                layer.lora_dropout.eval()
                for name in active_names(layer):
                    _watch(layer, name, found, hooks)
            model(**batch).loss.backward()
    finally:
        model.part_count.number = parts
        model.train(was_training)
        for parameter, grad in kept.items():
            parameter.grad = grad

    with torch.no_grad():
        for a_RD, directions_QD in found.items():
            some = a_RD[: len(directions_QD)]
            some.copy_(directions_QD[: len(some)] * some.norm(dim=1, keepdim=True))


def check_spectral(model: SplitModel) -> None:
    """Raises UsageError where a spectral start cannot be made."""
    if model.options.wire != "plain":
        raise UsageError(
            f"a spectral start reads gradients that wire={model.options.wire} does not bring here: "
            "build the model with wire=plain, and set_options(wire=...) afterwards"
        )
    layers = _layers(model)
    if isinstance(model.peft_config["default"], BottleneckConfig) or not layers:
        raise UsageError("a spectral start is of LoRA on linear modules: this model has none")
    for layer in layers:
        if any(layer.lora_B[name].weight.any() for name in active_names(layer)):
            raise UsageError(
                "a spectral start is of a fresh adapter: B of this one is not zero, and another A "
                "would change what it does"
            )


def _layers(model: SplitModel) -> list[LoraLayer]:
    return [layer for site in model.sites for layer in site.layers]


def _watch(
    layer: LoraLayer, name: str, found: dict[nn.Parameter, Tensor], hooks: ExitStack
) -> None:
    """Note a module's directions when the gradient of its output comes."""
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    read: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0].detach()]

    def answered(_: nn.Module, __: Any, y_NO: Tensor) -> None:
        if y_NO.requires_grad:
            y_NO.register_hook(partial(note, read[0]))

    def note(x_ND: Tensor, g_NO: Tensor) -> None:
        found[lora_A.weight] = _directions(x_ND, g_NO, len(lora_A.weight))

    for hook in (lora_A.register_forward_pre_hook(keep), lora_B.register_forward_hook(answered)):
        hooks.callback(hook.remove)


def _directions(x_ND: Tensor, g_NO: Tensor, rank: int) -> Tensor:
    """The first right singular vectors of g^T x, [R, D], fewer where D is smaller than R.

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
    *_, right_QQ = torch.linalg.svd(g_NO.T @ (x_ND @ basis_DQ), full_matrices=False)
    directions: Tensor = (right_QQ @ basis_DQ.T)[:rank]
    return directions
