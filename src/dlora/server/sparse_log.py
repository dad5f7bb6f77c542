"""Lines of the log that a peer can cause: a flood of calls must not become a flood of lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

__all__ = ["SparseLog"]

_EVERY_S: Final = 60.0


class SparseLog:
    """Of each kind a few lines a minute; the first of the next minute says how many were left
    out.
    """

    def __init__(
        self,
        log: logging.Logger,
        level: int,
        lines: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._level, self._lines, self._clock = log, level, lines, clock
        self._since: dict[str, tuple[float, int]] = {}
        """Kind -> when its minute began, and the calls in it."""

    def note(self, kind: str, text: str) -> None:
        """Log a line of this kind, if it is one of its first in this minute. There are few kinds:
        a peer cannot make any.
        """
        now = self._clock()
        began, count = self._since.get(kind, (-_EVERY_S, 0))
        if now - began >= _EVERY_S:
            if (left_out := count - self._lines) > 0:
                text = f"{text} (and {left_out} more that are not shown)"
            began, count = now, 0
        self._since[kind] = (began, count + 1)
        if count < self._lines:
            self._log.log(self._level, "%s", text)
