"""Log lines on a terminal with bars: none is glued to a bar, and an outage is one line."""

from __future__ import annotations

import logging
import shutil
import sys
from typing import Any, Final, TextIO

from dlora.edge.link import Outage
from dlora.training.readable import clock

__all__ = ["Console", "bar_columns", "is_terminal", "settle"]

_NOTICED_S: Final = 1.0
"""Shorter outages are no news: a stream that ended while nobody asked is one."""
_EVERY_S: Final = 60.0
"""Where no line can be rewritten: one in so many seconds."""


def bar_columns() -> int:
    """How wide a bar may be: one column is left, as a terminal may wrap at the last."""
    return shutil.get_terminal_size().columns - 1


def is_terminal(stream: TextIO | None) -> bool:
    """Whether lines can be rewritten there."""
    return stream is not None and stream.isatty()


def settle() -> None:
    """A command has ended: no outage is shown any longer."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Console):
            handler.settle()


class Console(logging.StreamHandler[TextIO]):
    """Writes log lines above bars. Of an outage there is one line, rewritten in place; elsewhere
    than on a terminal a line a minute.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream or sys.stderr)
        self.setFormatter(_Format())
        self._line: Any = None
        self._said_s: float | None = None
        """When an outage was last said, in seconds since it began."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless it is about an outage that is shown already."""
        try:
            outage = getattr(record, "outage", None)
            if isinstance(outage, Outage) and not self._is_news(outage):
                return
            self._write(self.format(record))
        except Exception:  # as logging's own handlers do
            self.handleError(record)

    def settle(self) -> None:
        """Take the line of an outage away."""
        if self._line is not None:
            self._line.close()
        self._line = self._said_s = None

    def _is_news(self, outage: Outage) -> bool:
        """Whether a line of its own says it; on a terminal the line in place says the rest."""
        if outage.left_s is None:
            was_shown = self._line is not None or self._said_s is not None
            self.settle()
            return was_shown and outage.lasted_s >= _NOTICED_S
        if is_terminal(self.stream):
            self._draw(_in_place(outage, outage.left_s))
            return False

        # In a file: not at once, and not again and again.
        if outage.lasted_s < _NOTICED_S:
            return False
        due = self._said_s is None or outage.lasted_s - self._said_s >= _EVERY_S
        self._said_s = outage.lasted_s if due else self._said_s
        return due

    def _draw(self, text: str) -> None:
        from tqdm import tqdm

        if self._line is None:
            # Without bars an answer may stand there that has come half way.
            if is_terminal(sys.stdout) and not getattr(tqdm, "_instances", ()):
                self.stream.write("\n")
            self._line = tqdm(total=0, bar_format="{desc}", file=self.stream, leave=False)
        self._line.ncols = bar_columns()
        self._line.set_description_str(text)

    def _write(self, text: str) -> None:
        if "tqdm" not in sys.modules:  # then there is no bar
            self.stream.write(f"{text}\n")
        else:
            from tqdm import tqdm

            tqdm.write(text, file=self.stream)
        self.flush()


def _in_place(outage: Outage, left_s: float) -> str:
    """An outage on a line of a terminal, what counts first: the line is cut at its end."""
    reason = outage.reason.rpartition(": ")[2]
    return (
        f"no answer for {clock(outage.lasted_s)}, giving up in {clock(left_s)}; trying again "
        f"({reason})"
    )


class _Format(logging.Formatter):
    """Time and text; the name of the logger where it is not ours, or everything is asked for."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(where)s%(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        everything = logging.getLogger("dlora").isEnabledFor(logging.DEBUG)
        is_ours = record.name.partition(".")[0] == "dlora"
        record.where = "" if is_ours and not everything else f"{record.name}: "
        return super().formatMessage(record)
