"""Where adapters may sit: sites, which both halves number alike.

A site is the set of linear modules that read the very same tensor (q, k and v of a
layer; gate and up of an MLP): they share one exchange. Behind these, and those of outputs, come
fused weights of experts, each a site of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlora.protocol.layers import layer_of

__all__ = ["Module", "Site", "output_sites"]


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
    experts: int = 0
    """Over 0: its one module is a fused weight of so many experts, named as a parameter. It can be
    adapted on the hosted wire alone. `depth` is then the site that is read before it."""
    transposed: bool = False
    """The fused weight is [experts, in, out], not [experts, out, in]."""
    rows: float = 1.0
    """Rows that its modules read for each token; of a fused weight, as many as experts see one."""

    @property
    def place(self) -> int:
        """`depth`, which is `index` for sites that read an input."""
        return self.depth if self.reads_output or self.experts else self.index


def output_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """A site behind every module of `sites`, numbered on from these, in calling order."""
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
