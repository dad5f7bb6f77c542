"""Fused weights of experts that adapters may sit on, where the cloud computes them.

Experts are no linear modules: they see only their own tokens, and one parameter holds all of them,
[experts, out, in] or [experts, in, out]. peft adapts such a parameter by name
(`target_parameters`). Which can be, and whether `LowRank` gives what peft's W + B A gives, is found
out at load by running them. Nothing here knows models' names.

Shapes: E experts, D width of what one reads, O of what it gives, R rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from dlora.cloud.low_rank import LowRank, with_weights
from dlora.cloud.parts import Parts
from dlora.cloud.trace import Linear, TracedPass
from dlora.protocol.decoder import last_hidden, prefix_of
from dlora.protocol.sites import Module, Site
from dlora.protocol.text import clean_text
from dlora.protocol.weights import is_offloaded

__all__ = ["FusedForward", "find_experts", "forward_place"]

log = logging.getLogger(__name__)

_SCALE: Final = 0.05
"""Of a trial's factors: what they add is large enough to be compared."""
# Largest difference to W + L R, as a share of the largest value: in float32, and where the model
# computes in 16 bits.
_TOLERANCE: Final = 1e-4
_COARSE_TOLERANCE: Final = 0.1


def find_experts(
    parts: Parts,
    sites: Sequence[Site],
    first: int,
    passes: Sequence[TracedPass],
    allowed: Callable[[str], bool],
) -> tuple[Site, ...]:
    """A site for each fused weight that can be adapted, numbered from `first` on.

    `sites` are those of linear modules, `passes` the forwards to watch, the first of them
    differentiable. `allowed` is the provider's policy on full names.
    """
    trials = _trials(parts)
    for number, one in enumerate(passes if trials else ()):
        _watch(parts, sites, trials, one, differentiable=number == 0)
    found: list[Site] = []
    for trial in trials:
        if trial.reason:
            log.info("%s takes no adapter: %s", trial.name, trial.reason)
            continue
        for parameter in trial.weights:
            shape, name = trial.shapes[parameter], f"{trial.name}.{parameter}"
            found.append(
                Site(
                    index=first + len(found),
                    in_features=shape[1],
                    modules=(Module(name=name, out_features=shape[2], allowed=allowed(name)),),
                    depth=trial.depth,
                    experts=shape[0],
                    transposed=trial.transposed,
                    rows=trial.rows[parameter],
                )
            )
    return tuple(found)


@dataclass(frozen=True, eq=False)
class FusedForward:
    """In the place of a module's own forward: it finds what a pass puts beside its fused weights.

    An object and no closure, so that a copy of the model has its own.
    """

    module: nn.Module
    own: Callable[..., Any]
    weights: Callable[[nn.Module], Mapping[str, LowRank]]
    """By parameter, of the pass of this thread; empty where it has none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        weights = self.weights(self.module)
        return (
            with_weights(self.module, weights, args, kwargs)
            if weights
            else self.own(*args, **kwargs)
        )


def forward_place(module: nn.Module) -> str:
    """The attribute that holds a module's own forward: where accelerate wrapped it, another."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


# ----------------------------------------------------------------- at load


@dataclass
class _Trial:
    """A module with fused weights, and what running it has shown."""

    name: str
    module: nn.Module
    weights: dict[str, Tensor]
    transposed: bool
    reason: str = ""
    """Why no adapter can sit there."""
    depth: int = 0
    """The site that was read before it."""
    rows: dict[str, float] = field(default_factory=dict)
    """By parameter: rows that it reads for each token."""
    leaves: list[Tensor] = field(default_factory=list)
    """The factors of the differentiable pass."""
    calls: int = 0
    counted: Counter[str] = field(default_factory=Counter)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(E, D, O) of each parameter, as peft reads its shape."""
        found = {}
        for name, weight in self.weights.items():
            experts, first, second = weight.shape
            found[name] = (experts, first, second) if self.transposed else (experts, second, first)
        return found

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, differentiable: bool) -> Any:
        """The module's forward with small factors; at first compared with W + L R."""
        self.calls += 1
        factors = {name: self._factors(weight, name) for name, weight in self.weights.items()}
        output = with_weights(self.module, factors, args, kwargs)
        if differentiable:
            self.leaves = [leaf for one in factors.values() for leaf in (one.left, one.right)]
            with torch.no_grad():
                whole = {
                    name: torch.baddbmm(one.weight, one.left.to(one.dtype), one.right.to(one.dtype))
                    for name, one in factors.items()
                }
                self._compare(output, with_weights(self.module, whole, args, kwargs))
        return output

    def _factors(self, weight: Tensor, name: str) -> LowRank:
        generator = torch.Generator().manual_seed(self.calls)

        def count(rows: int, x: Tensor) -> None:
            self.counted[name] += rows

        experts, first, second = weight.shape
        left, right = (
            (_SCALE * torch.randn(shape, generator=generator)).to(weight.device).requires_grad_()
            for shape in ((experts, first, 1), (experts, 1, second))
        )
        return LowRank(weight, left, right, count)

    def _compare(self, got: Any, want: Any) -> None:
        if not isinstance(got, Tensor) or not isinstance(want, Tensor):
            self.reason = "it returns other than one tensor"
            return
        coarse = any(weight.dtype != torch.float32 for weight in self.weights.values())
        tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE
        gap, scale = (got - want).abs().max().item(), want.abs().max().item()
        if not gap <= tolerance * max(scale, 1e-6):
            self.reason = f"its output differs by {gap:.3g} (largest value {scale:.3g})"

    def end(self, tokens: int) -> None:
        """A pass over so many tokens is through."""
        if self.calls != 1:
            self.reason = self.reason or f"it runs {self.calls} times in one forward pass, not once"
        for name in self.weights:
            self.rows[name] = max(self.rows.get(name, 0.0), self.counted[name] / tokens)
            if not self.counted[name]:
                self.reason = self.reason or f"its forward does not use {name}"
        self.calls, self.counted = 0, Counter()


def _trials(parts: Parts) -> list[_Trial]:
    """Modules of the decoder that have parameters of three axes, with those."""
    trials, prefix = [], prefix_of(parts.model, parts.decoder)
    for name, module in parts.decoder.named_modules():
        forward = vars(module).get("forward")
        ours = forward is None or isinstance(forward, FusedForward)
        own = not ours and forward_place(module) == "forward"
        if isinstance(module, Linear) or is_offloaded(module) or own:
            continue
        weights = {
            parameter: weight
            for parameter, weight in module.named_parameters(recurse=False)
            if weight.dim() == 3 and len(weight) > 1 and weight.is_floating_point()
        }
        if weights:
            transposed = bool(getattr(module, "is_transposed", False))
            trials.append(_Trial(f"{prefix}{name}", module, weights, transposed))
    return trials


def _watch(
    parts: Parts,
    sites: Sequence[Site],
    trials: Sequence[_Trial],
    one: TracedPass,
    *,
    differentiable: bool,
) -> None:
    """Do a forward in which the modules find small factors beside their weights."""
    last = [0]
    with ExitStack() as undo, torch.set_grad_enabled(differentiable):
        for site in sites:

            def note(module: nn.Module, args: Any, index: int = site.index) -> None:
                last[0] = index

            first = parts.model.get_submodule(site.modules[0].name)
            undo.enter_context(first.register_forward_pre_hook(note))
        for trial in trials:
            _try_in(undo, trial, last, differentiable=differentiable)
        output = one.run()
    for trial in trials:
        trial.end(one.batch * one.length)

    leaves = [leaf for trial in trials if not trial.reason for leaf in trial.leaves]
    if not differentiable or not leaves:
        return
    hidden = last_hidden(output)
    grads = torch.autograd.grad(hidden, leaves, torch.ones_like(hidden), allow_unused=True)
    reached = {id(leaf) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None}
    for trial in trials:
        if not trial.reason and not reached.issuperset(map(id, trial.leaves)):
            trial.reason = "no gradient of the model's output reaches it"
        trial.leaves = []


def _try_in(undo: ExitStack, trial: _Trial, last: list[int], *, differentiable: bool) -> None:
    """Put a trial's factors into its module until `undo` ends; what fails is the trial's reason."""
    module, place = trial.module, forward_place(trial.module)
    own = getattr(module, place)

    def forward(*args: Any, **kwargs: Any) -> Any:
        trial.depth = last[0]
        if not trial.reason:
            try:
                return trial.run(args, kwargs, differentiable=differentiable)
            except Exception as error:  # of any forward that wants a tensor
                trial.reason = clean_text(error) or type(error).__name__
        return own(*args, **kwargs)

    setattr(module, place, forward)
    if place == "forward":
        undo.callback(delattr, module, place)
    else:
        undo.callback(setattr, module, place, own)
