"""Names of this machine, as hosts are written. No torch here."""

from __future__ import annotations

from typing import Final

__all__ = ["LOOPBACK", "LOOPBACK_ADDRESS", "LOOPBACK_NAME", "is_loopback"]

LOOPBACK_ADDRESS: Final = "127.0.0.1"
LOOPBACK_NAME: Final = "localhost"
LOOPBACK: Final = (LOOPBACK_ADDRESS, LOOPBACK_NAME, "::1", "[::1]")


def is_loopback(address: str) -> bool:
    """Whether host:port, or a host alone in brackets or not, is on this machine."""
    return address in LOOPBACK or address.rpartition(":")[0] in LOOPBACK
