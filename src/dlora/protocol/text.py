"""Text that comes from a peer, made fit for logs, terminals and files. No torch here."""

from __future__ import annotations

import unicodedata
from typing import Final

__all__ = ["clean_text", "without_controls"]

_MAX_CHARS: Final = 300
# Cc: control characters, ESC among them. Cf: invisible ones, that turn the direction of text.
# Cs: halves of characters, which cannot be written. Zl, Zp: other ends of lines.
_UNFIT: Final = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def clean_text(text: object, limit: int = _MAX_CHARS) -> str:
    """One line of at most `limit` characters, without control and escape characters."""
    cut = str(text)[: 4 * limit]
    shown = "".join(" " if unicodedata.category(char) in _UNFIT else char for char in cut)
    line = " ".join(shown.split())
    return line if len(line) <= limit else line[: limit - 4] + " ..."


def without_controls(text: str) -> str:
    """Text of several lines without control characters: an answer that goes to a terminal."""
    return "".join(
        char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs")
    )
