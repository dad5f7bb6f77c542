"""What a message may hold, looked at before it is parsed.

Two bytes on the wire can become fifty in memory: a message of a few MiB that is made of empty parts
would take all of it. So its fields are counted first, at every depth, as they lie in the bytes.
Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dlora.errors import WireError

__all__ = ["MODULE", "ONCE", "TENSOR", "VALUE_BYTES", "Most", "Rules", "check_message"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are never ours
_SKIPPED: Final = {_FIXED64: 8, _FIXED32: 4}
_MOST_UNKNOWN: Final = 16
"""Fields of a later version that one message may hold."""
VALUE_BYTES: Final = 5
"""A uint32 takes at most so many bytes."""


@dataclass(frozen=True)
class Most:
    """How often a field may stand in its message, and what may be inside."""

    count: int
    values: int = 1
    """Numbers in it, where it is a list of them."""
    inside: Rules = field(default_factory=dict)


Rules = Mapping[int, Most]
"""Field number -> how much of it; fields that are not listed may stand there once."""

ONCE: Final = Most(1)
TENSOR: Final = Most(1, inside={2: Most(8, 8)})
MODULE: Final = dict.fromkeys((1, 2, 3, 4), TENSOR)
"""Inside `ModuleTensors`."""


def check_message(data: bytes, rules: Rules, what: str) -> None:
    """Raises WireError for a message that is none, or that holds more than its rules say."""
    _check(memoryview(data), 0, len(data), rules, what)


def _check(data: memoryview, at: int, end: int, rules: Rules, what: str) -> None:
    counts: dict[int, int] = {}
    unknown = 0
    while at < end:
        tag, at = _varint(data, at, end, what)
        number, kind = tag >> 3, tag & 7
        start = at
        if kind == _VARINT:
            _, at = _varint(data, at, end, what)
        elif kind == _BYTES:
            size, start = _varint(data, at, end, what)
            at = start + size
        elif kind in _SKIPPED:
            at += _SKIPPED[kind]
        else:
            raise WireError(f"{what}: got wire type {kind}, want protobuf without groups")
        if at > end:
            raise WireError(f"{what}: a field ends {at - end} bytes behind its message")

        # Above the highest field of today stands what a later version may add.
        most = rules.get(number, ONCE)
        counts[number] = counts.get(number, 0) + 1
        unknown += number > 64
        if counts[number] > most.count or unknown > _MOST_UNKNOWN:
            raise WireError(f"{what}: got more than {most.count} of field {number}")
        if kind == _BYTES and most.inside:
            _check(data, start, at, most.inside, what)
        elif kind == _BYTES and most.values > 1 and at - start > most.values * VALUE_BYTES:
            raise WireError(
                f"{what}: got {at - start} bytes of numbers in field {number}, want at most "
                f"{most.values} numbers"
            )


def _varint(data: memoryview, at: int, end: int, what: str) -> tuple[int, int]:
    """(value, where the next byte is)."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise WireError(f"{what}: got a number without end")
