"""Checking the adapter that travels with a request, for the cloud to compute (`Begin.hosted`).

Every size is known and checked here, before anything is allocated. `hosted.py` takes the tensors,
which come later, and computes.

Shapes: D width of what a module reads, R rank, O width of what it adds to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dlora.cloud.frozen_store import FrozenStore
from dlora.errors import AdapterMissing, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.activations import activation_of
from dlora.protocol.layers import layer_of
from dlora.protocol.sites import Site

__all__ = ["HostedModule", "HostedRequest", "HostedTensors", "check_hosted"]

HostedTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A [R, D], scaled B [O, R], and the biases of A [R] and of B [O] where there are any; float32.

Of E experts A [E R, D] and B [O, R E], in peft's order: rows of A are by expert and then by rank,
columns of B by rank and then by expert.
"""

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class HostedModule:
    """One active module of a request, checked."""

    site: int
    module: int
    name: str
    in_features: int
    rank: int
    out_features: int
    experts: int
    """0: a linear module. Else A and B hold those of so many experts, each of this rank."""
    transposed: bool
    """The weight of the experts is [experts, in, out]."""
    rows: float
    """Rows that it reads for each token."""

    device: torch.device
    """Where the linear is that it sits on."""
    message: pb.HostedModule
    kept: HostedTensors | None
    """Its tensors, if they are here already."""

    @property
    def shapes(self) -> list[tuple[int, ...] | None]:
        """Of A, B and the biases; None for one that there is not."""
        ranks = self.rank * max(1, self.experts)
        return [
            (ranks, self.in_features),
            (self.out_features, ranks),
            (self.rank,) if self.message.a_bias else None,
            (self.out_features,) if self.message.b_bias else None,
        ]

    @property
    def numel(self) -> int:
        """Values of A and B."""
        return max(1, self.experts) * self.rank * (self.in_features + self.out_features)

    @property
    def macs(self) -> int:
        """Multiply-adds of a token."""
        return int(self.rows * self.rank * (self.in_features + self.out_features))


@dataclass(frozen=True, kw_only=True)
class HostedRequest:
    """The adapter of one request."""

    modules: tuple[HostedModule, ...]
    frames: int
    """In which the tensors of all modules come; 0: they are here."""
    seed: int
    """Of the masks of dropout."""
    owner: str
    owner_bytes: int | None
    """What the owner may keep; None: no limit but the store's."""

    @property
    def macs(self) -> int:
        """Multiply-adds of a token in all modules."""
        return sum(module.macs for module in self.modules)

    def adapter_bytes(self, *, training: bool) -> int:
        """Memory of the tensors themselves and, in training, of their gradients.

        Those of experts are put together from each one's.
        """
        values = 0
        for module in self.modules:
            copies = 1 if not training else 3 if module.experts else 2
            values += copies * (module.numel + module.rank + module.out_features)
        return _FLOAT_BYTES * values

    def pass_bytes(self, tokens: int, *, training: bool, recompute: bool = False) -> int:
        """Memory of a pass over so many tokens: what backward needs, and the largest site's work.

        A site keeps x in float32; a module x A^T, before and after its activation, and for each
        mask of dropout the mask and what it leaves. Deltas and their gradients come and go. Where
        layers run again in backward only one keeps anything at a time. A fused weight reads a row
        for each expert that sees a token; its delta is made of rows alone.
        """
        kept: Counter[int] = Counter()
        most = 0.0
        for _, group in groupby(self.modules, key=lambda module: module.site):
            site = list(group)
            width, rows = site[0].in_features, site[0].rows
            most = max(most, 2 * rows * (width + sum(module.out_features for module in site)))
            layer = layer_of(site[0].name)
            values = width
            for module in site:
                masks = sum(1 for part in module.message.dropouts if part.p)
                values += 2 * masks * width + 2 * module.rank
            kept[layer] += math.ceil(rows * values)
        held = kept.total()
        if recompute:
            held = kept.pop(-1, 0) + max(kept.values(), default=0)
        return math.ceil(_FLOAT_BYTES * tokens * (most + (held if training else 0)))


def check_hosted(
    message: pb.Begin,
    active: Sequence[tuple[Site, tuple[int, ...]]],
    store: FrozenStore,
    owner: str,
    owner_bytes: int | None,
    devices: Mapping[str, torch.device] | None = None,
) -> HostedRequest | None:
    """The adapter of a `Begin`; None where the edge computes it.

    `devices` are those of the modules that are not on the store's.

    Raises WireError for modules that are not exactly the active ones, or do not fit them, and
    AdapterMissing for a hash that this owner has kept nothing under.
    """
    if not message.hosted:
        if message.modules or message.module_frames:
            raise WireError(f"modules: got {len(message.modules)} in a request that is not hosted")
        return None
    if message.factored:
        raise WireError("a request is either factored or hosted, got both")

    wanted = [(site, index) for site, indices in active for index in indices]
    if len(message.modules) != len(wanted):
        raise WireError(f"modules: got {len(message.modules)}, want {len(wanted)}: the active ones")
    modules = []
    for entry, (site, index) in zip(message.modules, wanted, strict=True):
        if (entry.site, entry.module) != (site.index, index):
            raise WireError(
                f"modules: got {(entry.site, entry.module)}, want {(site.index, index)}: the "
                "active ones, in order"
            )
        device = (devices or {}).get(site.modules[index].name, store.device)
        modules.append(_checked(entry, site, index, store, owner, device))

    # Every module has a hash, or comes in one of the frames that are announced.
    coming = sum(1 for module in modules if module.kept is None)
    if coming not in (0, len(modules)) or not min(coming, 1) <= message.module_frames <= coming:
        raise WireError(
            f"modules: got {message.module_frames} frames for {coming} modules without a hash, "
            f"of {len(modules)}"
        )
    return HostedRequest(
        modules=tuple(modules),
        frames=message.module_frames,
        seed=message.dropout_seed,
        owner=owner,
        owner_bytes=owner_bytes,
    )


def _checked(
    entry: pb.HostedModule,
    site: Site,
    index: int,
    store: FrozenStore,
    owner: str,
    device: torch.device,
) -> HostedModule:
    """One module that fits the linear that it sits on."""
    name, width = site.modules[index].name, site.modules[index].out_features
    kept, rank = None, entry.rank
    if entry.hash:
        kept = store.get_hosted(entry.hash, owner)
        if kept is None:
            raise AdapterMissing(f"the adapter of {name} is not here: send it whole")

    # No module gains by a rank over both widths.
    most = max(site.in_features, width)
    if not 1 <= rank <= most:
        raise WireError(f"{name}: got rank {rank}, want 1 to {most}")
    checked = HostedModule(
        site=site.index,
        module=index,
        name=name,
        in_features=site.in_features,
        rank=rank,
        out_features=width,
        experts=site.experts,
        transposed=site.transposed,
        rows=site.rows,
        device=device,
        message=entry,
        kept=kept,
    )
    if kept is not None and checked.shapes != [None if t is None else tuple(t.shape) for t in kept]:
        raise WireError(f"{name}: what was kept under this hash has other shapes")
    _check_arithmetic(entry, rank, name)
    if site.experts and (entry.a_bias or entry.b_bias or entry.activation or entry.dropouts):
        raise WireError(f"{name}: a fused weight has no biases, activation or dropout")
    return checked


def _check_arithmetic(entry: pb.HostedModule, rank: int, name: str) -> None:
    """Activation and dropout are such as the cloud can compute."""
    try:
        activation_of(entry.activation)
    except ValueError as error:
        raise WireError(f"{name}: activation number {entry.activation} is not known") from error
    if entry.dropouts and sum(part.rank for part in entry.dropouts) != rank:
        raise WireError(f"{name}: dropouts of another rank than {rank}")
    for part in entry.dropouts:
        if not (part.rank and math.isfinite(part.p) and 0 <= part.p < 1):
            raise UsageError(f"{name}: got dropout {part.p} of rank {part.rank}, want p in [0, 1)")
