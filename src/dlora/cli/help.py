"""A command's flags as argparse shows them: required ones first, then group by group."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dlora.cli.flags import Flag
from dlora.cli.values import members

__all__ = ["Formatter", "Note", "add_flags"]


class Formatter(argparse.HelpFormatter):
    """Lines of at most 100 columns; a value as `metavar` says it, without brackets."""

    def __init__(self, prog: str) -> None:
        width = max(60, min(100, shutil.get_terminal_size().columns))
        super().__init__(prog, max_help_position=26, width=width)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return default_metavar if action.metavar is None else str(action.metavar)


class Note(argparse.Action):
    """Notes a flag, its word or words, and how it was typed: files count before flags."""

    def __init__(self, *, flag: Flag, **options: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **options)
        self.flag = flag

    def __call__(self, _: Any, namespace: Any, values: Any, typed: str | None = None) -> None:
        value = "--" if values == [] else values  # some versions of argparse drop it, even after =
        one = (self.flag, value, typed or self.dest.upper())
        namespace.given = [*getattr(namespace, "given", ()), one]

    def completer(self, **_: Any) -> tuple[str, ...]:
        """What argcomplete offers for the value."""
        return ("true", "false") if self.flag.is_switch else _choices(self.flag)


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag], word: str | None) -> None:
    """Every flag under its headline; `word` is the one that is given without its name."""
    groups: dict[str, Any] = {}
    parser.usage = "%(prog)s"
    for flag in sorted(flags, key=lambda flag: not flag.is_required):
        title = "required" if flag.is_required else flag.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)

        metavar, nargs = _value(flag), "?" if flag.is_switch else None
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        if flag.name == word:
            many = get_origin(flag.kind) is list
            names, nargs = [flag.name], "*" if many else "?"
            short = flag.name.removesuffix("s").upper()
            metavar = f"{short} [{short} ...]" if many else metavar
        if flag.is_required:
            parser.usage += f" {metavar}" if flag.name == word else f" {names[0]} {metavar}"
        groups[title].add_argument(
            *names, action=Note, flag=flag, nargs=nargs, metavar=metavar, help=_text(flag)
        )
    groups[title].add_argument("-h", "--help", action="help", help="Show this help.")
    parser.usage += " [flags]"


def _choices(flag: Flag) -> tuple[str, ...]:
    return get_args(flag.kind) if get_origin(flag.kind) is Literal else ()


def _value(flag: Flag) -> str:
    """What stands for the value of a flag; nothing for a switch."""
    if flag.is_switch:
        return "true|false" if flag.default is True else ""
    if choices := _choices(flag):
        return "|".join(choices)
    kinds = members(flag.kind)
    main = str if str in kinds else get_origin(kinds[0]) or kinds[0]
    values = {int: "N", float: "X", Path: "PATH", dict: "NAME=VALUE,...", list: "A,B"}
    return values.get(main, "TEXT")


def _text(flag: Flag) -> str:
    """The help of a flag, with its default where it says something."""
    default, text = flag.default, flag.text.replace("%", "%%")
    is_plain = flag.is_required or default is False or default in (None, "", [], {})
    if is_plain or "default:" in text.lower():
        return text
    shown = ",".join(default) if isinstance(default, list) else str(default)
    return f"{text} (default: {'true' if default is True else shown})"
