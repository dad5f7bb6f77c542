"""Kill and Revive: what a set of modules costs in a training step. Plain numbers, no model.

A unit is what is killed and revived as a whole: a site (all modules that read the same tensor) or
a module. Costs are shares of those of full tuning (FT), which trains every module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

__all__ = ["USUAL", "Costs", "Rows", "Unit", "modules_of", "trained_modules"]


@dataclass(frozen=True)
class Unit:
    """One unit: its name, its modules in the cloud's calling order, its decoder layer (or -1).

    One of which only a part is trained has its name, and that part of its modules.
    """

    name: str
    modules: tuple[str, ...]
    layer: int


@dataclass(frozen=True)
class Rows:
    """What an average micro-batch holds: what travels once for all of it weighs by its tokens."""

    tokens: float
    """Without padding."""
    supervised: float
    """Share of the tokens whose last hidden states travel."""
    accumulated: int = 1
    """Micro-batches of an optimizer step."""


USUAL: Final = Rows(512, 0.25)
"""Where nobody knows the rows."""


@dataclass(frozen=True)
class Costs:
    """What a set of modules costs in a training step, as a share of FT.

    Sizes are bytes a token.
    """

    sites: tuple[tuple[float, Mapping[str, float]], ...]
    """(the input, what each module adds to both directions) of every site, in calling order. On the
    plain wire a module adds its output; factored r (1 + out / tokens) values; hosted
    r (in + out) / tokens, and the site itself nothing: its input is 0."""
    ends: float = 0
    """What always travels: embeddings up, last hidden states down, their gradient up."""
    kind: Literal["bytes", "modules"] = "bytes"
    input_grad: float = 1.0
    """What the gradient of a site's input takes, over what the input takes: less where its codec is
    coarser, 0 where it is dropped."""
    norms: float = 0.0
    """The numbers that a probe step asks for."""
    uploads: Mapping[str, float] = field(default_factory=dict)
    """By module: what it takes, once, to give it to the cloud as a frozen one."""
    entry: float = 0.0
    """Embeddings of one micro-batch: they go up once more where the cloud lacks a frozen module.
    So does a hosted adapter."""

    @cached_property
    def everything(self) -> float:
        """Bytes a token of FT."""
        return self.bytes_of({name for _, site in self.sites for name in site})

    def share(self, modules: Collection[str]) -> float:
        """Cost of training these modules over that of training all."""
        if self.kind == "modules":
            return len(set(modules)) / max(1, sum(len(site) for _, site in self.sites))
        return self.bytes_of(set(modules)) / max(1, self.everything)

    def probe(self, modules: Collection[str]) -> float:
        """What a probe step costs beside these modules: a gradient at the lowest site, too."""
        if self.kind == "modules":
            return 0.0
        lowest = next((size for size, site in self.sites if not site.keys().isdisjoint(modules)), 0)
        return (lowest * self.input_grad + self.norms) / max(1, self.everything)

    def upload(self, idle: Collection[str], modules: Collection[str]) -> float:
        """What it costs to let the cloud apply idle modules beside trained ones, in FT's steps."""
        if self.kind == "modules":
            return 0.0
        total = self.entry + sum(self.uploads.get(name, 0.0) for name in idle)
        hosted = [site for size, site in self.sites if not size]
        total += sum(site[name] for site in hosted for name in site.keys() & set(modules))
        return total / max(1, self.everything)

    def bytes_of(self, modules: set[str]) -> float:
        """Bytes a token that travel, both ways together, when these modules are trained."""
        total, lowest = float(self.ends), True
        for size, site in self.sites:
            if trained := [name for name in site if name in modules]:
                # x down, its gradient up (not at the lowest site); deltas up, their gradients down
                total += size * (1 if lowest else 1 + self.input_grad)
                total += 2 * sum(site[name] for name in trained)
                lowest = False
        return total


def modules_of(units: Iterable[Unit]) -> set[str]:
    """The modules of these units."""
    return {module for unit in units for module in unit.modules}


def trained_modules(
    units: Iterable[Unit], active: Collection[str], partial: Mapping[str, Sequence[str]]
) -> list[str]:
    """Modules of the active units; of those in `partial` the named ones alone."""
    return [
        module
        for unit in units
        if unit.name in active
        for module in unit.modules
        if module in partial.get(unit.name, unit.modules)
    ]
