"""Sequences that need not be sent again: the edge's end of prefixes (`--cache_prefix`).

Below the lowest active site nothing is trained, so what enters its layer is the same whenever a
sequence comes again. The cloud keeps that under a name, and a later micro-batch sends its names in
place of its embeddings. A name is a keyed hash of all that the kept values depend on: who has not
the key cannot try whether a sequence is the one that he has in mind.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from dlora.edge.lora import FrozenModule
from dlora.edge.passes import PassInput
from dlora.edge.sites import ActiveSite
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, layer_of
from dlora.protocol.prefixes import NAME_BYTES
from dlora.protocol.wire import encode

__all__ = ["KnownPrefixes", "Prefixes", "about", "layer_below"]

log = logging.getLogger(__name__)

_MOST_NAMES: Final = 2**20
"""Which are remembered; more are forgotten, all at once."""


class KnownPrefixes:
    """What the cloud is believed to have kept, by name. Of one model, with a key of its own."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self._names: set[bytes] = set()

    def has_all(self, names: Iterable[bytes]) -> bool:
        """Whether none of these would have to be sent."""
        return self._names.issuperset(names)

    def found(self, names: Iterable[bytes]) -> None:
        """The cloud has these."""
        if len(self._names) > _MOST_NAMES:
            self._names.clear()
        self._names.update(names)

    def missed(self) -> None:
        """It has lost one of them: it was restarted, is another one, or has no room for all.

        One that lost one has lost others: they go whole once, and are not asked for one by one.
        """
        if self._names:
            log.warning(
                "the cloud has lost some of the %d sequences that it was to keep (restarted, or "
                "prefix_mib too small for them): they are sent again",
                len(self._names),
            )
        self._names.clear()


@dataclass
class Prefixes:
    """Those of one micro-batch: what they are called, and the way they go."""

    new: PassInput
    layer: int
    names: Sequence[bytes]
    known: KnownPrefixes
    dtype: pb.DType
    """In which embeddings travel."""
    by_name: bool

    @classmethod
    def of(
        cls, new: PassInput, layer: int, about: str, known: KnownPrefixes, dtype: pb.DType
    ) -> Prefixes:
        """The prefixes of these sequences before a layer. `about`: what else they depend on."""
        names = _names(new, f"{about} {layer} {dtype}", known.key)
        return cls(new, layer, names, known, dtype, known.has_all(names))

    def fields(self) -> dict[str, Any]:
        """The fields of `Begin`, with the tokens."""
        prefixes = pb.Prefixes(layer=self.layer, names=b"".join(self.names))
        return {"prefixes": prefixes, **self.new.fields(None if self.by_name else self.dtype)}

    def send_whole(self, begin: pb.Begin) -> bool:
        """Put the embeddings into `begin`; false if they are there."""
        if not self.by_name:
            return False
        self.by_name = False
        self.known.missed()
        begin.embeddings.CopyFrom(encode(self.new.entry_ND, self.dtype))
        return True

    def found(self) -> None:
        """The cloud has gone forward, and so has kept them."""
        self.known.found(self.names)


def layer_below(sites: Sequence[ActiveSite]) -> int:
    """The layer of the lowest of these sites; -1 for none, or one outside the layers."""
    return min((layer_of(name) for site in sites for name in site.names), default=-1)


def about(
    description: pb.Description,
    layer: int,
    edge_layers: EdgeLayers,
    frozen: Sequence[FrozenModule],
) -> str:
    """What the values before a layer depend on, beside the sequence: model, and frozen modules."""
    below = [
        f"{module.site}.{module.module}.{module.hash.hex()}"
        for module in frozen
        if layer_of(description.sites[module.site].modules[module.module].name) < layer
    ]
    return " ".join([description.fingerprint, str(edge_layers.first), *below])


def _names(new: PassInput, about: str, key: bytes) -> list[bytes]:
    """A name for each sequence: of its rows as they would travel, and where they stand."""
    entry_BTD, positions_BT = new.entry_BTD.detach().cpu(), new.position_ids_BT
    # Positions that start again part a row into several, where no mask is given.
    parted = positions_BT is not None and new.mask_BT is None
    about = f"{about} {entry_BTD.dtype} {positions_BT is not None} {parted}"

    names = []
    for number, attended_T in enumerate(new.attended_BT):
        columns = attended_T.nonzero()[:, 0]
        digest = hashlib.blake2b(about.encode(), key=key, digest_size=NAME_BYTES)
        digest.update(columns.numpy().tobytes())
        if positions_BT is not None:
            digest.update(positions_BT[number, columns].numpy().tobytes())
        rows = entry_BTD[number, columns].contiguous().view(torch.uint8)
        digest.update(rows.numpy().tobytes())
        names.append(digest.digest())
    return names
