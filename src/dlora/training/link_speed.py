"""Links by name and by numbers, for plans. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from dlora.errors import UsageError

__all__ = ["HERE", "NAMED", "LinkSpeed", "link_speed"]


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """What an edge sees of its line; None: as measured."""

    up_mbit: float | None = None
    """Mbit/s towards the server."""
    down_mbit: float | None = None
    """Mbit/s from the server."""
    rtt_ms: float | None = None
    """Round trip time in milliseconds."""

    def __str__(self) -> str:
        if self == HERE:
            return "the link there is"
        return f"{self.up_mbit:g} Mbit/s up, {self.down_mbit:g} down, {self.rtt_ms:g} ms"


HERE: Final = LinkSpeed()
NAMED: Final = {
    "lan": LinkSpeed(up_mbit=1000, down_mbit=1000, rtt_ms=1),
    "fibre": LinkSpeed(up_mbit=100, down_mbit=100, rtt_ms=10),
    "home": LinkSpeed(up_mbit=20, down_mbit=100, rtt_ms=40),
    "mobile": LinkSpeed(up_mbit=5, down_mbit=20, rtt_ms=80),
    "here": HERE,
}


def link_speed(text: str) -> LinkSpeed:
    """The link that a word, or UP/DOWN/RTT in Mbit/s, Mbit/s and ms, stands for.

    Raises UsageError for anything else.
    """
    if text in NAMED:
        return NAMED[text]
    try:
        up_mbit, down_mbit, rtt_ms = map(float, text.split("/"))
    except ValueError:
        up_mbit = down_mbit = rtt_ms = math.nan
    if not (0 < up_mbit < math.inf and 0 < down_mbit < math.inf and 0 <= rtt_ms < math.inf):
        raise UsageError(
            f"link: got {text[:80]!r}, want {', '.join(NAMED)}, or UP/DOWN/RTT in Mbit/s, Mbit/s "
            "and ms, such as 20/100/40"
        )
    return LinkSpeed(up_mbit=up_mbit, down_mbit=down_mbit, rtt_ms=rtt_ms)
