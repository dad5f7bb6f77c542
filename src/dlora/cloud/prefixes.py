"""Prefixes of a request (`Begin.prefixes`): what enters a layer, kept for sequences that come
again.

Where a request has embeddings the pass keeps what it computes on its way, under the edge's names.
Where it has none the pass begins at that layer, with what is kept. Names are the owner's alone.

Shapes: N rows that travel, T attended tokens of a sequence, D width between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dlora.cloud.frozen_store import FrozenStore
from dlora.errors import PrefixMissing, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.prefixes import NAME_BYTES
from dlora.protocol.sites import Site

__all__ = ["PrefixRequest", "check_prefixes"]


@dataclass(frozen=True, kw_only=True)
class PrefixRequest:
    """The prefixes of one request, checked."""

    layer: int
    names: tuple[bytes, ...]
    lengths: tuple[int, ...]
    """T of every sequence; N together."""
    kept: tuple[Tensor, ...] | None
    """What was kept under these names, [T, D] each; None: they are to be kept."""
    store: FrozenStore | None
    """None: nothing is ever kept here."""
    owner: str

    def keep(self, entry_ND: Tensor) -> None:
        """Keep the rows that enter the layer."""
        if self.store is not None:
            parts = entry_ND.detach().split(self.lengths)
            for name, prefix_TD in zip(self.names, parts, strict=True):
                self.store.put_prefix(self.layer, name, prefix_TD, self.owner)


def check_prefixes(
    message: pb.Begin,
    active: Sequence[tuple[Site, tuple[int, ...]]],
    edge_layers: EdgeLayers,
    store: FrozenStore | None,
    owner: str,
) -> PrefixRequest | None:
    """The prefixes of a `Begin` whose tokens were checked; None where it has none.

    Raises WireError for what does not fit the request, PrefixMissing where a name says nothing.
    """
    if not message.HasField("prefixes"):
        return None
    layer, data = message.prefixes.layer, message.prefixes.names
    wants_more = message.probe or message.wants_input_grad or message.dense
    if not message.training or wants_more or message.cache_length:
        raise WireError("prefixes: want a training step that is all above them, and not dense")

    lowest = min((module.layer for site, _ in active for module in site.modules), default=-1)
    if not (layer <= lowest and edge_layers.in_cloud(layer)):
        raise WireError(
            f"prefixes: got layer {layer}, want one of the cloud's, up to that of the lowest "
            f"active site: {lowest}"
        )
    if len(data) != NAME_BYTES * message.batch:
        raise WireError(
            f"prefixes: got {len(data)} bytes of names, want {NAME_BYTES} for each of "
            f"{message.batch} sequences"
        )

    names = tuple(data[at : at + NAME_BYTES] for at in range(0, len(data), NAME_BYTES))
    lengths = _lengths(message)
    kept = None
    if not message.HasField("embeddings"):
        kept = tuple(_kept(layer, name, store, owner) for name in names)
        if tuple(map(len, kept)) != lengths:
            raise WireError("prefixes: what was kept under these names is of other lengths")
    return PrefixRequest(
        layer=layer, names=names, lengths=lengths, kept=kept, store=store, owner=owner
    )


def _lengths(message: pb.Begin) -> tuple[int, ...]:
    """Attended tokens of every sequence."""
    mask, length = message.attention_mask, message.length
    if not mask:
        return (length,) * message.batch
    return tuple(mask.count(1, at, at + length) for at in range(0, len(mask), length))


def _kept(layer: int, name: bytes, store: FrozenStore | None, owner: str) -> Tensor:
    prefix_TD = None if store is None else store.get_prefix(layer, name, owner)
    if prefix_TD is None:
        raise PrefixMissing("a sequence is not here by its name: send the micro-batch whole")
    return prefix_TD
