"""Bytes, seconds and counts in the unit that a person reads. Loads no torch."""

from __future__ import annotations

__all__ = ["clock", "counted", "readable_bytes", "readable_time"]


def readable_bytes(count: float) -> str:
    """Bytes with up to three digits: 512 B, 1.23 MB, 45.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # else three digits are 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_time(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for unit, size in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if seconds < size - 0.5:
            return f"{seconds:.2g} {unit}" if seconds < 9.5 else f"{seconds:.0f} {unit}"
        seconds /= 24.0 if unit == "h" else size
    return f"{seconds:.0f} days"


def clock(seconds: float) -> str:
    """Minutes and seconds, 4:05, or hours before them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """1 row, 2 rows, 12,345 rows."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
