"""What a run costs: exact bytes, round trips and FLOPs, and the formulas they are checked against.

FLOPs count 2 per multiply-add of matrix products; look-ups, norms and softmax count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from dlora.protocol.wire import WIRE_DTYPES, payload_bytes

__all__ = ["Meter", "adapter_flops", "step_traffic"]


_EARLIER: Final = {"held_flops": "edge_layer_flops"}


@dataclass
class Meter:
    """Counters that only grow. Subtract two snapshots to get the cost of what lies between."""

    sent_bytes: int = 0
    """Serialised messages, edge to cloud; repeated micro-batches count again."""
    received_bytes: int = 0
    round_trips: int = 0
    """Times that the edge had to wait for an answer to something it had sent."""
    wait_s: float = 0.0
    """Seconds in which the edge waited for the cloud."""
    cloud_s: float = 0.0
    """Of these, seconds in which the cloud says that it computed; the rest are network and
    queues.
    """
    micro_batches: int = 0
    passes: int = 0
    """Forward passes with a KV cache: one a generated token, fewer with drafts."""
    retries: int = 0
    tokens: int = 0
    """Attended tokens (padding left out) of finished forward passes."""
    adapter_flops: int = 0
    head_flops: int = 0
    embedding_flops: int = 0
    """Always 0: an embedding is a look-up. Kept so that the sum of the edge is complete."""
    edge_layer_flops: int = 0
    """Decoder layers that run on the edge, forward and backward, without their LoRA modules."""
    cloud_forward_flops: int = 0
    cloud_backward_flops: int = 0

    @property
    def edge_flops(self) -> int:
        """All FLOPs on the edge."""
        return self.adapter_flops + self.head_flops + self.embedding_flops + self.edge_layer_flops

    @property
    def cloud_flops(self) -> int:
        """All FLOPs in the cloud."""
        return self.cloud_forward_flops + self.cloud_backward_flops

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> Meter:
        """The meter that `asdict` was taken of; names of earlier versions are known."""
        return cls(**{_EARLIER.get(name, name): value for name, value in values.items()})

    def copy(self) -> Meter:
        """A snapshot."""
        return Meter(**asdict(self))

    def __sub__(self, other: Meter) -> Meter:
        return Meter(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        )

    def __add__(self, other: Meter) -> Meter:
        return Meter(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def adapter_flops(
    rows: int, d: int, r: int, o: int, *, training: bool, input_grad: bool, factored: bool = False
) -> int:
    """FLOPs of one LoRA module x A^T B^T on [rows, d] -> [rows, o] with rank r.

    Backward adds dB and the gradient at the rank (2 r o each), dA (d r) and, where the site
    asks for it, dx (d r). Factored, all that has B in it is the cloud's.
    """
    o = 0 if factored else o
    macs = r * (d + o)
    if training:
        macs += 2 * r * o + d * r + (d * r if input_grad else 0)
    return 2 * rows * macs


def step_traffic(
    rows: int,
    kept: int,
    embedding_width: int,
    hidden_width: int,
    sites: Iterable[tuple[int, Sequence[tuple[int, int]]]],
    wire_dtype: str,
    *,
    factored: bool = False,
    input_grad: bool = False,
) -> tuple[int, int]:
    """(sent, received) payload bytes of one training micro-batch.

    Where the edge holds layers, `embedding_width` and `hidden_width` are those between layers,
    `kept` is all rows if it holds the last, and `input_grad` says that adapters in the first want
    the gradient of what was sent.

    `sites` holds, for each active site in calling order, its input width d and (o, r) of its active
    modules: output width and rank. The first site sends no input gradient unless it is wanted. On
    the plain wire a module sends deltas of width o and gets their gradients; factored it sends Z of
    width r and B once, and gets the gradients of both. Framing adds under 1 % from some hundred
    tokens on.
    """

    def size(rows: int, width: int) -> int:
        return payload_bytes(WIRE_DTYPES[wire_dtype], rows, width)

    sent = size(rows, embedding_width) + size(kept, hidden_width)
    received = size(kept, hidden_width) + (size(rows, embedding_width) if input_grad else 0)
    for index, (d, modules) in enumerate(sites):
        answers = sum(size(rows, r) + size(o, r) if factored else size(rows, o) for o, r in modules)
        sent += answers + (size(rows, d) if index or input_grad else 0)
        received += answers + size(rows, d)
    return sent, received
