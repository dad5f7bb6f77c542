"""Which linear modules read the same tensor: sites, from watching a few small forward passes.

A site has one row for each token, in what goes in and in what comes out, in every pass: of another
shape, and behind a KV cache. Nothing here knows model names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.errors import INSTEAD, ModelError
from dlora.protocol.decoder import last_hidden, prefix_of
from dlora.protocol.sites import Module, Site

__all__ = ["Linear", "Trace", "TracedPass", "linear_widths", "one_row_a_token", "trace"]

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


@dataclass(frozen=True, kw_only=True)
class TracedPass:
    """A forward to watch: `run` must do one over [batch, length] new tokens."""

    run: Callable[[], Any]
    batch: int
    length: int


def trace(
    model: nn.Module,
    decoder: nn.Module,
    passes: Sequence[TracedPass],
    allowed: Callable[[str], bool] = lambda name: True,
) -> Trace:
    """Group the linear modules under `decoder` into sites by running all passes.

    The first one has to be differentiable. A module that is called more than once in a pass, never,
    with other than one row for each token, or that no gradient of the output reaches, is listed in
    `unusable`. `allowed` is the provider's policy on module names.
    """
    prefix = prefix_of(model, decoder)
    linears = {
        f"{prefix}{name}": module
        for name, module in decoder.named_modules()
        if isinstance(module, Linear)
    }
    unusable: dict[str, str] = {}
    groups: list[list[str]] = []
    for number, one in enumerate(passes):
        with torch.set_grad_enabled(number == 0):
            found = _groups(linears, one, unusable, differentiable=number == 0)
        # Modules that read one tensor in one pass and two in another are sites of their own.
        groups = found if not number else _split_up(groups, found)
    groups = [[name for name in names if name not in unusable] for names in groups]

    sites = tuple(
        _site(index, {name: linears[name] for name in names}, allowed)
        for index, names in enumerate(names for names in groups if names)
    )
    if not sites:
        reasons = "; ".join(dict.fromkeys(unusable.values())) or "the decoder has none"
        raise ModelError(
            f"{type(model).__name__} cannot be split: it has no linear module that an adapter "
            f"could sit on: {reasons}. {INSTEAD}"
        )
    return Trace(sites=sites, unusable=unusable)


def one_row_a_token(x: Tensor, batch: int, length: int) -> bool:
    """Whether a tensor [..., width] has a row for each token, in their order.

    That is [batch, length], or flat, and axes of size 1 may be anywhere.
    """
    shape = tuple(size for size in x.shape[:-1] if size != 1)
    want = tuple(size for size in (batch, length) if size != 1)
    return shape in (want, tuple(size for size in (batch * length,) if size != 1))


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


def _groups(
    linears: dict[str, nn.Module],
    one: TracedPass,
    unusable: dict[str, str],
    *,
    differentiable: bool,
) -> list[list[str]]:
    """Names of modules that read the same tensor in this pass, in calling order.

    What cannot be used is added to `unusable`, with the reason.
    """
    calls, gradless = _watch(linears, one.run, unusable, differentiable=differentiable)
    counts = Counter(name for name, _, _ in calls)
    for name in linears:
        if counts[name] != 1:
            unusable.setdefault(name, f"it runs {counts[name]} times in one forward pass, not once")

    # Tensors that are the very same object make a site: `calls` keeps them, so ids stay unique.
    groups: dict[int, list[str]] = {}
    for name, x, output in calls:
        for what, tensor in (("input", x), ("output", output)):
            if not one_row_a_token(tensor, one.batch, one.length):
                shape = list(tensor.shape)
                unusable.setdefault(name, f"its {what} {shape} has not one row for each token")
        if name in gradless:
            unusable.setdefault(name, "no gradient of the model's output reaches it")
        groups.setdefault(id(x), []).append(name)
    return list(groups.values())


def _split_up(groups: list[list[str]], others: list[list[str]]) -> list[list[str]]:
    """`groups`, each split into those that `others` has together as well."""
    place = {name: number for number, names in enumerate(others) for name in names}
    parts: list[list[str]] = []
    for names in groups:
        by_place: dict[int, list[str]] = {}
        for name in names:
            by_place.setdefault(place.get(name, -1), []).append(name)
        parts += by_place.values()
    return parts


def _watch(
    linears: dict[str, nn.Module],
    run: Callable[[], Any],
    unusable: dict[str, str],
    *,
    differentiable: bool,
) -> tuple[list[tuple[str, Tensor, Tensor]], set[str]]:
    """Call `run()`. Returns (name, input, output) of each call of a linear module.

    And the names of those that no gradient reaches, where that is to be found out. What is called
    otherwise is added to `unusable`.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    leaves: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in linears.items():

            def note(
                module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name
            ) -> Tensor | None:
                if len(args) != 1 or not isinstance(args[0], Tensor):
                    unusable[name] = "it is not called with exactly one tensor"
                    return None
                if not isinstance(output, Tensor):
                    unusable[name] = "it returns more than one tensor"
                    return None
                calls.append((name, args[0], output))
                if not differentiable:
                    return None
                leaves[name] = torch.zeros_like(output, requires_grad=True)
                return output + leaves[name]

            hooks.enter_context(module.register_forward_hook(note))
        output = run()
    if not differentiable or not leaves:
        return calls, set()

    # Modules that only choose, such as indexers, get none.
    hidden = last_hidden(output)
    grads = torch.autograd.grad(
        hidden, list(leaves.values()), torch.ones_like(hidden), allow_unused=True
    )
    return calls, {name for name, grad in zip(leaves, grads, strict=True) if grad is None}
