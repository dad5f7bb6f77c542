"""EVA (arXiv:2410.07170): LoRA that begins with what its modules read, on a model elsewhere.

peft's own code does it, by hooks on its LoRA layers, which want what each has read. On the edge x
of a site arrives as rows, and goes through A. From there it is handed to the hooks as they know it.

Shapes: B batch, T tokens, N attended tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.labels import spread
from dlora.edge.model import SplitModel
from dlora.errors import UsageError

__all__ = ["initialize_eva"]


def initialize_eva(model: SplitModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Give a fresh adapter with `init_lora_weights="eva"` its values, from passes over batches.

    They have `input_ids`, `attention_mask`, and `labels` where only tokens with one are to count.
    As many passes are made as peft needs to converge; ranks may move between modules, as its
    `eva_config` says. Raises UsageError on the hosted wire, where x never comes here.
    """
    config = model.peft_config["default"]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise UsageError('initialize_eva wants an adapter with init_lora_weights="eva"')
    if model.options.wire == "hosted":
        raise UsageError(
            "EVA reads what modules read, which on the hosted wire never comes here: build the "
            "model with wire=factored or plain, and set_options(wire=...) afterwards"
        )
    if not batches:
        raise UsageError("EVA reads what modules read: give one batch at least")

    parts, model.part_count.number = model.part_count.number, 1  # x of whole micro-batches
    try:
        initialize_lora_eva_weights(
            model, list(batches), forward_fn=_showing_inputs, show_progress_bar=False
        )
    except ValueError as error:
        raise UsageError(f"EVA: {error}") from error
    finally:
        model.part_count.number = parts
    model.match_sites()


def _showing_inputs(model: SplitModel, batch: Mapping[str, Tensor]) -> None:
    """A forward pass in which hooks on LoRA layers see what the layers read, [B, T, D].

    peft has switched the adapter off, and no site would ask. It adds nothing yet, so it may be on.
    """
    attended_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with ExitStack() as hooks:
        for site in model.sites:
            for layer in site.layers:
                show = partial(_show, layer, attended_BT)
                hook = layer.lora_A["default"].register_forward_pre_hook(show)
                hooks.callback(hook.remove)
        hooks.callback(model.base_model.disable_adapter_layers)
        model.base_model.enable_adapter_layers()
        model(input_ids=batch["input_ids"], attention_mask=attended_BT.long())


def _show(layer: LoraLayer, attended_BT: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
    x_ND = args[0]
    if len(x_ND) == attended_BT.numel():  # padding has travelled, too
        x_BTD = x_ND.view(*attended_BT.shape, -1)
    else:
        x_BTD = spread(x_ND, attended_BT)
    for hook in list(layer._forward_hooks.values()):
        hook(layer, (x_BTD,), None)
