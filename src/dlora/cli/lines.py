"""Lines that fit the terminal: names with what they stand for, and commands to be typed."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

__all__ = ["columns", "pair_lines", "served_at", "shell", "show", "table_lines", "wrapped"]

_NAME: Final = 11
_LEAST_NAME: Final = 8
_LEAST: Final = 40
"""Columns; a terminal that says less is no terminal."""


def columns() -> int:
    """How wide the terminal is; 80 where there is none."""
    return max(_LEAST, shutil.get_terminal_size().columns)


def show(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names with their texts, each at once."""
    for name, text in pairs:
        for line in pair_lines(name, text):
            print(line, flush=True)


def pair_lines(name: str, text: str) -> Iterator[str]:
    """A name and its text, wrapped under itself; a text of several lines is broken already."""
    head, margin = f"{name:{_NAME - 1}} ", " " * _NAME
    for line in text.split("\n"):
        yield from textwrap.wrap(
            line,
            width=10_000 if "\n" in text else columns(),
            initial_indent=head,
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [head.rstrip()]
        head = margin


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of numbers behind a name, a space at least between them. A long name is cut where
    the terminal is too narrow for all of it.
    """
    lines = [heads, *rows]
    sizes = [max(len(line[number]) for line in lines) for number in range(len(heads))]
    room = columns() - sum(sizes[1:]) - len(sizes) + 1
    sizes[0] = max(_LEAST_NAME, min(sizes[0], room))
    for name, *numbers in lines:
        cut = name if len(name) <= sizes[0] else f"{name[: sizes[0] - 2]}.."
        cells = [number.rjust(size) for number, size in zip(numbers, sizes[1:], strict=True)]
        yield " ".join([cut.ljust(sizes[0]), *cells])


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph."""
    return textwrap.fill(
        text,
        width=columns(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def shell(words: Sequence[str], margin: int = _NAME) -> str:
    """A command as a shell takes it; where it is long it goes on in further lines.

    It ends with "..." where a value is for the user to fill in.
    """
    parts: list[str] = []
    for word in words:
        text = word if word == "..." else shlex.quote(word)
        if parts and not word.startswith("--"):
            parts[-1] += f" {text}"
        else:
            parts.append(text)

    # Broken in front of flags.
    lines, room = [parts[0]], columns() - margin - 2
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) <= room:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {part}")
    return "\n".join(lines)


def served_at(settings: Any) -> list[str]:
    """The flags that reach the same server again; none holds a secret."""
    words = ["--server", settings.server]
    for name in ("tls_ca", "tls_cert", "tls_key", "token_file"):
        if getattr(settings, name) is not None:
            words += [f"--{name}", str(getattr(settings, name))]
    return [*words, *(["--tls"] if settings.tls else [])]
