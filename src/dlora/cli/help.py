"""The help of `dlora` and of its commands: required flags first, then group by group."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from dlora.cli.flags import Command, Flag, flags_of

__all__ = ["command_help", "overview"]

_INDENT: Final = 26
"""Column at which the text of a flag begins."""

_COMMON: Final = (
    ("--config FILE", "YAML file with any of these settings. Flags override it."),
    ("--print_config", "Print the settings as such a file, and do nothing else."),
    ("-h, --help", "Show this help."),
)


def overview(commands: Mapping[str, Command]) -> str:
    """What `dlora --help` shows."""
    lines = ["usage: dlora COMMAND [flags]", ""]
    lines += ["Fine-tune a model in the cloud with data that stays here.", "", "commands:"]
    lines += [f"  {name:10} {command.text}" for name, command in commands.items()]

    lines += ["", "flags:"]
    lines += ["  -h, --help     Show this help; `dlora help COMMAND` shows that of a command."]
    lines += ["  -V, --version  Show the version."]
    lines += ["", "Settings can also come from a YAML file: dlora COMMAND --config FILE."]
    return "\n".join(lines)


def command_help(command: Command) -> str:
    """What `dlora COMMAND --help` shows."""
    flags = flags_of(command)
    required = [flag for flag in flags.values() if flag.is_required]
    usage = " ".join([f"dlora {command.name}", *(_head(flag, command) for flag in required)])
    lines = textwrap.wrap(f"usage: {usage} [flags]", _width(), subsequent_indent=" " * 4)
    lines += ["", command.text]

    if required:
        lines += ["", "required:", *_entries(required, command)]
    for group in dict.fromkeys(flag.group for flag in flags.values()):
        others = [flag for flag in flags.values() if flag.group == group and not flag.is_required]
        if others:
            lines += ["", f"{group}:", *_entries(others, command)]

    lines += ["", "settings file and help:"]
    for head, text in _COMMON:
        lines += _entry(head, text)
    return "\n".join(lines)


def _entries(flags: Iterable[Flag], command: Command) -> list[str]:
    return [line for flag in flags for line in _entry(_head(flag, command), _text(flag))]


def _entry(head: str, text: str) -> list[str]:
    """A flag and its text, side by side where the flag is short."""
    indent = " " * _INDENT
    lines = textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent)
    start = f"  {head}"
    if len(start) >= _INDENT - 1 or not lines:
        return [start, *lines]
    return [start.ljust(_INDENT) + lines[0].lstrip(), *lines[1:]]


def _head(flag: Flag, command: Command) -> str:
    """A flag with its value, and its other names."""
    value = "true|false" if flag.default is True else _value(flag.kind)
    if flag.name == command.word:
        name = flag.name.removesuffix("s").upper()
        return f"{name} [{name} ...]" if get_origin(flag.kind) is list else value or name
    names = ", ".join(f"--{name}" for name in (flag.name, *flag.aliases))
    return f"{names} {value}".rstrip()


def _value(kind: Any) -> str:
    """What stands for the value of a flag; nothing for a switch, or for a path without a flag."""
    main = next((one for one in get_args(kind) if one in (int, float, Path, str)), kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is dict:
        return "'{NAME: VALUE}'"
    if get_origin(kind) is list:
        return "A,B"
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(main, "TEXT")


def _text(flag: Flag) -> str:
    """The help of a flag, with its default where it says something."""
    default = flag.default
    if flag.is_required or default in (None, "") or default == [] or default == {}:
        return flag.text
    if default is False or "default:" in flag.text.lower():
        return flag.text

    shown = ",".join(default) if isinstance(default, list) else str(default)
    return f"{flag.text} (default: {'true' if default is True else shown})"


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size().columns))
