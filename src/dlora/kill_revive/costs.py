"""Kill and Revive: what a set of modules costs in a training step. Plain numbers, no model.

A unit is what is killed and revived as a whole: a site (all modules that read the same tensor) or
a module. Costs are shares of those of full tuning (FT), which trains every module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["USUAL", "Costs", "Rows", "Unit", "modules_of"]


@dataclass(frozen=True)
class Unit:
    """One unit: its name, its modules in the cloud's calling order, its decoder layer (or -1)."""

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
    """What a set of modules costs in a training step, as a share of FT."""

    sites: tuple[tuple[int, Mapping[str, float]], ...]
    """(input width, elements that each module adds to both directions) of every site, in calling
    order. On the plain wire a module adds its output width; factored r (1 + out / tokens); hosted
    r (in + out) / tokens, and the site itself nothing: its input width is 0."""
    ends: float = 0
    """Elements a token that always travel: embeddings up, last hidden states down, their gradient
    up."""
    kind: Literal["bytes", "modules"] = "bytes"
    input_grad: float = 1.0
    """What the gradient of a site's input takes, over what the input takes: less where its codec is
    coarser, 0 where it is dropped."""

    def share(self, modules: Collection[str]) -> float:
        """Cost of training these modules over that of training all."""
        everything = [name for _, site in self.sites for name in site]
        if self.kind == "modules":
            return len(set(modules)) / max(1, len(everything))
        return self.elements(set(modules)) / max(1, self.elements(set(everything)))

    def elements(self, modules: set[str]) -> float:
        """Elements a token that travel, both ways together, when these modules are trained.

        One is what a value of a site's input takes; what travels in another codec counts so much
        more or less.
        """
        total, lowest = float(self.ends), True
        for width, site in self.sites:
            if trained := [name for name in site if name in modules]:
                # x down, its gradient up (not at the lowest site); deltas up, their gradients down
                total += width * (1 if lowest else 1 + self.input_grad)
                total += 2 * sum(site[name] for name in trained)
                lowest = False
        return total


def modules_of(units: Iterable[Unit]) -> set[str]:
    """The modules of these units."""
    return {module for unit in units for module in unit.modules}
