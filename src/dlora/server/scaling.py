"""How many replicas there should be: a pure decision over their load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dlora.errors import UsageError

__all__ = ["Scaling", "scale"]

# Starting takes minutes, so an idle replica is kept for this many times the patience.
_IDLE_PATIENCE: Final = 6


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas there are."""

    least: int = 1
    most: int = 1
    queue: float = 1.0
    """More are started while over this many streams a replica wait for a compute slot."""
    patience_s: float = 10.0
    """For how long it has to be so, in seconds; idle replicas go after six times as long."""

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that do not fit together."""
        if not 1 <= self.least <= self.most:
            raise UsageError(
                f"replicas: got {self.least} to {self.most}, want 1 or more, and the least first"
            )


def scale(
    scaling: Scaling, now: int, queued: int, streams: int, busy_s: float, idle_s: float
) -> int:
    """How many replicas there should be; at most one more or one less than `now`.

    `queued` streams wait for a slot, `streams` are in flight, of all replicas together. `busy_s`
    and `idle_s` say for how long the queue was too long, and a replica too many.
    """
    if queued > scaling.queue * now and busy_s >= scaling.patience_s:
        return min(now + 1, scaling.most)
    if streams < now and not queued and idle_s >= _IDLE_PATIENCE * scaling.patience_s:
        return max(now - 1, scaling.least)
    return max(scaling.least, min(now, scaling.most))
