"""A checked request: everything that one pass needs, and nothing that is not validated.

Shapes: B batch, T tokens, N rows that travel, K kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dlora.cloud.hosted_request import HostedRequest
from dlora.cloud.prefixes import PrefixRequest
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import Codecs
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.sites import Site

__all__ = ["PassRequest"]


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """A `Begin` or `Extend` whose every field was checked; indices are on the cloud's device."""

    codecs: Codecs
    """Of the tensors that the cloud sends."""

    training: bool
    batch: int
    length: int

    mask_BT: Tensor | None
    """With a KV cache: [B, past + T]."""

    position_ids_BT: Tensor | None

    rows_N: Tensor | None
    """Flat positions of the rows that travel; None: all of them."""

    keep_K: Tensor
    """Flat positions whose last hidden states the edge wants."""

    embeddings: pb.Tensor

    active: tuple[tuple[Site, tuple[int, ...]], ...]
    """Sites where the edge computes deltas, and for which of their modules."""

    idle: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(site, module) -> (A, B) that the cloud applies itself."""

    probe: tuple[tuple[Site, tuple[int, ...]], ...] = ()
    """Modules whose norm of g^T x is asked for."""

    factored: bool = False
    """Deltas come as Z = x A^T and B."""

    rank: int = 0
    """Factored: the largest rank of any Z; 0: the edge did not say."""

    hosted: HostedRequest | None = None
    """The active modules' adapter, which the cloud computes; None: the edge does."""

    cost_bytes: int = 0
    """Memory that the pass needs beside the weights."""

    cache_length: int = 0
    """Tokens of each sequence that the KV cache may come to hold; 0: there is none."""

    past: int = 0
    """Tokens of each sequence that are in the KV cache already."""

    rollback: bool = False
    """The edge may take tokens back, such as drafts that were wrong."""

    drop: int = 0
    """Cached tokens to forget before the pass; `past` is without them."""

    order: Tensor | None = None
    """Rows of the cache, in their new order."""

    edge_layers: EdgeLayers = field(default_factory=EdgeLayers)
    """Layers that the edge runs; `embeddings` are then what goes into the cloud's first layer."""

    wants_input_grad: bool = False
    """The gradient of `embeddings` goes back to the edge."""

    drop_input_grads: bool = False
    """No site asks for its input gradient: what the adapters add to it is left out."""

    recompute: bool = False
    """Decoder layers run again in backward, with the answers that came: less is kept until then."""
    prefixes: PrefixRequest | None = None
    """What enters a layer: to be kept, or kept already, in place of `embeddings`."""

    @property
    def num_rows(self) -> int:
        """N: the rows that travel in every tensor but the last hidden states."""
        return self.batch * self.length if self.rows_N is None else len(self.rows_N)

    @property
    def first_layer(self) -> int:
        """The first decoder layer that the cloud computes."""
        if self.prefixes is not None and self.prefixes.kept is not None:
            return self.prefixes.layer
        return self.edge_layers.first

    @property
    def has_backward(self) -> bool:
        """Whether anything asks for a gradient."""
        return self.training and (bool(self.active) or self.wants_input_grad)
