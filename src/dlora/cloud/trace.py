"""Which linear modules read the same tensor: sites, from watching one small forward pass.

Nothing here knows model names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.errors import ModelError
from dlora.protocol.sites import Module, Site

__all__ = ["Linear", "Trace", "linear_widths", "trace"]

Linear = (nn.Linear, Conv1D)


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
    linears = {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in decoder.named_modules()
        if isinstance(module, Linear)
    }
    calls, unusable = _watch(linears, run)

    counts = Counter(name for name, _ in calls)
    for name in linears:
        if counts[name] != 1:
            unusable.setdefault(name, f"it runs {counts[name]} times in one forward pass, not once")

    # Tensors that are the very same object make a site: `calls` keeps them, so ids stay unique.
    groups: dict[int, list[str]] = {}
    for name, x in calls:
        if name in unusable:
            continue
        if tuple(x.shape[:-1]) not in ((batch, length), (batch * length,)):
            unusable[name] = f"its input has shape {list(x.shape)}: not one row for each token"
            continue
        groups.setdefault(id(x), []).append(name)

    sites = tuple(
        _site(index, {name: linears[name] for name in names}, allowed)
        for index, names in enumerate(groups.values())
    )
    if not sites:
        raise ModelError(
            "found no linear module that an adapter could sit on: " + "; ".join(unusable.values())
        )
    return Trace(sites=sites, unusable=unusable)


def _site(index: int, linears: dict[str, nn.Module], allowed: Callable[[str], bool]) -> Site:
    """The site of linear modules that read the same tensor."""
    widths = {name: linear_widths(module) for name, module in linears.items()}
    return Site(
        index=index,
        in_features=next(iter(widths.values()))[0],
        modules=tuple(
            Module(name=name, out_features=out_features, allowed=allowed(name))
            for name, (_, out_features) in widths.items()
        ),
    )


def _watch(
    linears: dict[str, nn.Module], run: Callable[[], Any]
) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
    """Call `run()`. Returns (name, input) of each call of a linear module, and what went wrong.

    The latter is module name -> why it is unusable.
    """
    calls: list[tuple[str, Tensor]] = []
    unusable: dict[str, str] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in linears.items():

            def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if len(args) == 1 and isinstance(args[0], Tensor):
                    calls.append((name, args[0]))
                else:
                    unusable[name] = "it is not called with exactly one tensor"

            hooks.enter_context(module.register_forward_pre_hook(note))
        run()
    return calls, unusable
