"""What a run has cost: bytes, round trips and FLOPs, counted as they happen.

FLOPs count 2 per multiply-add of matrix products; look-ups, norms and softmax count nothing. The
same in closed form is in `dlora.formulas`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

__all__ = ["Meter"]

_EARLIER: Final = {"held_flops": "edge_layer_flops"}


@dataclass(repr=False)
class Meter:
    """Counters that only grow. Subtract two snapshots to get the cost of what lies between."""

    sent_bytes: int = 0
    """Serialised messages, edge to cloud; repeated micro-batches count again."""
    received_bytes: int = 0
    round_trips: int = 0
    """Times that the edge had to wait for an answer to something it had sent. Parts in flight
    count each their own.
    """
    wait_s: float = 0.0
    """Seconds in which the edge waited for the cloud. With parts in flight: in which all that
    were not done waited.
    """
    cloud_s: float = 0.0
    """Of these, seconds in which the cloud says that it computed; the rest are network and
    queues. With parts in flight the sum of theirs, and at most `wait_s`.
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

    def __repr__(self) -> str:
        """Traffic, waiting, tokens and FLOPs in a line; `dataclasses.asdict` has all counters."""
        retries = f", {self.retries} retries" if self.retries else ""
        return (
            f"<{self.sent_bytes / 1e6:.3f} MB up, {self.received_bytes / 1e6:.3f} MB down, "
            f"{self.round_trips} round trips{retries}, {self.wait_s:.1f} s waited; "
            f"{self.tokens} tokens; edge {self.edge_flops / 1e9:.3f} GFLOP, "
            f"cloud {self.cloud_flops / 1e9:.3f} GFLOP>"
        )

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

    def add(self, cost: Meter) -> None:
        """Count what another meter has counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(cost, field.name))

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
