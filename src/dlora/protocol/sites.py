"""Where adapters may sit: sites, found by watching one small forward pass.

A site is the set of linear modules that read the very same tensor (q, k and v of a
layer; gate and up of an MLP): they share one exchange. Nothing here knows model names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.errors import ModelError
from dlora.protocol.layers import layer_of

__all__ = [
    "Linear",
    "Module",
    "Site",
    "Trace",
    "attention_flops",
    "backward_flops",
    "forward_flops",
    "linear_widths",
    "output_sites",
    "pass_bytes",
    "trace",
]

Linear = (nn.Linear, Conv1D)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One linear module that an adapter may sit on; `name` is relative to the causal LM."""

    name: str
    out_features: int
    allowed: bool = True

    @property
    def layer(self) -> int:
        """The first number in the name: the decoder layer, or -1 where there is none."""
        return layer_of(self.name)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linear modules that read the same tensor of width `in_features`, in calling order.

    Or the output of one linear module, for an adapter in series with it: `reads_output`.
    """

    index: int
    in_features: int
    modules: tuple[Module, ...]
    reads_output: bool = False
    depth: int = -1
    """The place of its modules in the forward pass: the index of the site that they read."""

    @property
    def place(self) -> int:
        """`depth`, which is `index` for sites that read an input."""
        return self.depth if self.reads_output else self.index


def output_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """A site behind every module of `sites`; both halves number them on from these, in calling
    order.
    """
    pairs = [(site, module) for site in sites for module in site.modules]
    return tuple(
        Site(
            index=len(sites) + number,
            in_features=module.out_features,
            modules=(module,),
            reads_output=True,
            depth=site.index,
        )
        for number, (site, module) in enumerate(pairs)
    )


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or a GPT-2 style Conv1D."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ModelError(f"{type(module).__name__} is not a linear module")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one forward showed: the sites in calling order, and the linears that cannot be used."""

    sites: tuple[Site, ...]
    unusable: dict[str, str]
    """Module name -> why no adapter can sit there."""


def trace(
    model: nn.Module,
    decoder: nn.Module,
    run: Callable[[], Any],
    batch: int,
    length: int,
    allowed: Callable[[str], bool] = lambda name: True,
) -> Trace:
    """Group the linear modules under `decoder` into sites by calling `run()` once.

    `run` must do one forward of a [batch, length] input. A module that is called more than
    once, never, or with anything but a [batch, length, width] or [batch * length, width]
    tensor is listed in `unusable`. `allowed` is the provider's policy on module names.
    """
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    calls: list[tuple[str, nn.Module, Tensor]] = []  # keeps inputs alive, so that ids stay unique
    unusable: dict[str, str] = {}
    handles = []
    linears = {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in decoder.named_modules()
        if isinstance(module, Linear)
    }
    for name, module in linears.items():

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                calls.append((name, module, args[0]))
            else:
                unusable[name] = "it is not called with exactly one tensor"

        handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()

    counts: dict[str, int] = {}
    for name, _, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    for name in linears:
        if counts.get(name, 0) != 1:
            unusable.setdefault(
                name, f"it runs {counts.get(name, 0)} times in one forward pass, not once"
            )
    groups: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for name, module, x in calls:
        if name in unusable:
            continue
        if tuple(x.shape[:-1]) not in ((batch, length), (batch * length,)):
            unusable[name] = f"its input has shape {list(x.shape)}: not one row for each token"
            continue
        groups.setdefault(id(x), []).append((name, module, x))
    sites = tuple(
        Site(
            index=index,
            in_features=linear_widths(group[0][1])[0],
            modules=tuple(
                Module(name=name, out_features=linear_widths(module)[1], allowed=allowed(name))
                for name, module, _ in group
            ),
        )
        for index, group in enumerate(groups.values())
    )
    if not sites:
        raise ModelError(
            "found no linear module that an adapter could sit on: " + "; ".join(unusable.values())
        )
    return Trace(sites=sites, unusable=unusable)


def forward_flops(sites: Sequence[Site], tokens: int) -> int:
    """FLOPs of the linear modules of `sites` for `tokens` rows: 2 per multiply-add."""
    return sum(
        2 * tokens * site.in_features * module.out_features
        for site in sites
        for module in site.modules
    )


def backward_flops(sites: Sequence[Site], lowest: int | None, tokens: int, attention: int) -> int:
    """FLOPs of a backward pass through `sites`: input gradients only, since the weights are frozen.

    It ends at site `lowest`; None: at the input of the first layer. `attention` is one layer's
    forward, whose backward is twice that.
    """
    layers = {module.layer for site in sites for module in site.modules} - {-1}
    if lowest is None:
        return forward_flops(sites, tokens) + 2 * attention * len(layers)
    bottom = next(site for site in sites if site.index == lowest)
    layer = bottom.modules[0].layer
    # The first site of a layer feeds its attention; from any later one attention gets no gradient.
    reads_layer_input = all(site.modules[0].layer != layer for site in sites if site.index < lowest)
    count = sum(1 for one in layers if one > layer or (one == layer and reads_layer_input))
    return (
        forward_flops([site for site in sites if site.index > lowest], tokens)
        + 2 * attention * count
    )


def attention_flops(config: Any, batch: int, length: int, past: int = 0) -> int:
    """FLOPs of Q K^T and P V of one layer, counted densely (no discount for the causal mask).

    `length` new tokens look at themselves and at `past` cached ones.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(4 * batch * length * (past + length) * heads * head_dim)


def pass_bytes(
    batch: int, length: int, per_token: float, per_token_squared: float, past: int = 0
) -> float:
    """Memory in which the cloud runs forward and backward over [batch, length] tokens behind `past`
    cached ones.

    `per_token` and `per_token_squared` are what it measured at load, and tells in its limits.
    """
    return batch * length * (per_token + per_token_squared * (past + length))
