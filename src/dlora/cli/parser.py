"""The command line, on argparse: from its words to checked settings.

Flags may be written with - for _. A switch may stand without a value. Values come from YAML files
first (`--config`), then from flags; a later one overrides an earlier one. What is wrong is one
UsageError that names the flag as it was typed, or the file and its key, and the nearest known name.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn, get_origin

from dlora.cli.flags import OLD_NAMES, Command, Flag, flags_of, passed_over
from dlora.cli.help import Formatter, Note, add_flags
from dlora.cli.values import convert, dump_yaml, load_yaml
from dlora.errors import UsageError
from dlora.version import __version__

__all__ = ["LogLevel", "Request", "parse"]

LogLevel = Literal["debug", "info", "warning", "error"]

_LEVELS: Final[dict[str, LogLevel]] = {"quiet": "warning", "verbose": "debug"}
_LOG: Final = "what is said"
_FILE: Final = "settings file and help"
_COMMON: Final = tuple(
    Flag(name=name, kind=kind, default=None, text=text, group=group)
    for group, name, kind, text in (
        (_LOG, "quiet", bool, "Warnings, errors and results alone; no progress bars."),
        (_LOG, "verbose", bool, "More than usual and, with an error, where it was raised."),
        (_LOG, "log_level", LogLevel, "The same by name. Default: info."),
        (_FILE, "config", Path, "YAML file with any of these settings. Flags override it."),
        (_FILE, "print_config", bool, "Print the settings as such a file, and do nothing else."),
    )
)
"""Flags of every command that are no settings."""
_NOT_IN_FILES: Final = ("config", "print_config")


class Request(NamedTuple):
    """A command with its settings, checked as far as they are the same everywhere."""

    command: Command
    settings: Any
    name: str
    log_level: LogLevel
    places: Mapping[str, str]
    """Setting -> the flag as it was typed, or a file and its key."""

    def check(self) -> None:
        """Look at files, folders, ports and packages of this place. Raises UsageError."""
        if self.command.check is None:
            return
        try:
            self.command.check(self.settings)
        except UsageError as error:
            raise UsageError(f"{self.name}: {_placed(error, self.places)}") from error


def parse(argv: list[str], commands: Mapping[str, Command]) -> str | Request:
    """A text to print, or the command with its settings. Raises UsageError."""
    top = _Parser()
    names = top.add_subparsers(title="commands", metavar="COMMAND", prog="dlora")
    parsers = {
        name: names.add_parser(name, help=command.text, description=command.text)
        for name, command in commands.items()
    }

    # The shell asks for the end of a word through argcomplete, which answers and ends the process.
    if "_ARGCOMPLETE" in os.environ and find_spec("argcomplete"):
        for name, parser in parsers.items():
            _Reader(name, commands[name], parser)
        import_module("argcomplete").autocomplete(top)

    first, *words = argv or ["help"]
    if first == "help":
        first, words = (words or ["--help"])[0], ["--help"]
    if first in commands:
        return _Reader(first, commands[first], parsers[first]).read(words)
    if first in ("-h", "--help"):
        return _overview(commands)
    if first in ("-V", "--version"):
        return f"dlora {__version__}"
    kind = "flag" if first.startswith("-") else "command"
    raise UsageError(f"unknown {kind} {_word(first)}{_hint(first, commands, 'see dlora --help')}")


def _overview(commands: Mapping[str, Command]) -> str:
    """The help of `dlora` alone: commands by what they are for."""
    page = _Parser(
        usage="%(prog)s COMMAND [flags]",
        description="Fine-tune a model in the cloud with data that stays here.",
        epilog="Settings can also come from a YAML file: dlora COMMAND --config FILE.",
    )
    groups: dict[str, Any] = {}
    for name, command in commands.items():
        if command.group not in groups:
            groups[command.group] = page.add_argument_group(command.group)
        text = command.text.removeprefix("Cloud: ").removeprefix("Edge: ")
        groups[command.group].add_argument(name, help=text[:1].upper() + text[1:])

    flags = page.add_argument_group("flags")
    text = "Show this help; `dlora help COMMAND` shows that of a command."
    flags.add_argument("-h", "--help", action="help", help=text)
    flags.add_argument("-V", "--version", action="version", help="Show the version.")
    return page.format_help().rstrip()


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with errors that are raised."""

    def __init__(self, **options: Any) -> None:
        fixed: Any = {"add_help": False, "allow_abbrev": False, "formatter_class": Formatter}
        super().__init__(**{"prog": "dlora", **fixed, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Reader:
    """Reads the words after one command."""

    def __init__(self, name: str, command: Command, parser: argparse.ArgumentParser) -> None:
        self._name, self._command, self._parser = name, command, parser
        self._see = f"see dlora {name} --help"
        self._flags = flags_of(command)
        flags = [*self._flags.values(), *_COMMON]
        add_flags(parser, flags, command.word)

        # Setting -> its value, and where it was given: a flag as typed, or a file and its key.
        self._given: dict[str, tuple[Any, str]] = {}

        # Every name that may be typed -> the flag that it means; old names are in no hint.
        named = [flag for flag in flags if flag.name != command.word]
        self._names = {one: flag for flag in named for one in (flag.name, *flag.aliases)}

        # What another command knows may be given as well, and is in no hint either.
        self._over = {
            one: flag
            for flag in passed_over(command).values()
            for one in (flag.name, *flag.aliases)
            if one not in self._names
        }
        self._old = {
            old: self._flags[new]
            for old, new in OLD_NAMES.get(name, {}).items()
            if new in self._flags and old not in self._flags
        }

    def read(self, words: Iterable[str]) -> str | Request:
        """The command with its settings, or these as YAML. Raises UsageError."""
        noted = argparse.Namespace(given=[])
        try:
            joined = self._joined(words)
            if joined == ["--help"]:
                return self._parser.format_help().rstrip()
            _, surplus = self._parser.parse_known_args(joined, noted)
            if surplus := [word for word in surplus if word != "--"]:
                raise UsageError(f"unexpected word {surplus[0]!r}; {self._see}")

            # Files first, wherever they stand.
            for flag, value, where in sorted(noted.given, key=lambda one: one[0].name != "config"):
                if flag.name == "config":
                    self._read_file(value)
                else:
                    self._take(flag, value, where)

            given = {name: value for name, (value, _) in self._given.items()}
            common = {flag.name: given.pop(flag.name, None) for flag in _COMMON}
            if not common["print_config"]:
                return self._request(given, _level(common))
            known = {
                name: None if flag.is_required else flag.default
                for name, flag in self._flags.items()
            }
            return dump_yaml(known | given).rstrip()
        except UsageError as error:
            named = str(error).startswith(f"{self._name} ")
            raise UsageError(str(error) if named else f"{self._name}: {error}") from error

    # -- before argparse

    def _joined(self, words: Iterable[str]) -> list[str]:
        """Flags with their values as one word each, then the words without a flag.

        So a value may begin with dashes, and words may stand among flags. A name that is typed in
        a way of its own (with - for _, old, or with a key) is added to argparse as it is.
        """
        joined: list[str] = []
        others: list[str] = []
        known, queue = {f"--{name}" for name in self._names}, deque(words)
        while queue:
            word = queue.popleft()
            typed, equals, _ = word.partition("=")
            if word in ("-h", "--help"):
                return ["--help"]
            if word == "--":
                others += [word, *queue]
                break
            if not word.startswith("-") or word == "-":
                others.append(word)
                continue

            flag = self._flag(typed)
            if flag is None:
                hint = _hint(_plain(typed), self._names, self._see, prefix="--")
                raise UsageError(f"unknown flag {_word(typed)}{hint}")
            if typed not in known:
                self._parser.add_argument(typed, action=Note, flag=flag, help=argparse.SUPPRESS)
                known.add(typed)
            joined.append(word if equals else f"{typed}={self._value(flag, typed, queue)}")
        return joined + others

    def _value(self, flag: Flag, typed: str, queue: deque[str]) -> str:
        """The value after a flag. Another flag of this command is not one: it was forgotten."""
        if flag.is_switch:
            return queue.popleft() if queue and queue[0].lower() in ("true", "false") else "true"
        following = queue[0].partition("=")[0] if queue else "--help"
        if following == "--help" or self._flag(following):
            raise UsageError(f"{typed}: its value is missing; {self._see}")
        return queue.popleft()

    def _flag(self, typed: str) -> Flag | None:
        """The flag that is meant; `--kr_options.budget` is one value of a dictionary."""
        name, _, key = _plain(typed).partition(".")
        flag = self._names.get(name) or self._old.get(name) or self._over.get(name)
        if (
            flag is None
            or not typed.startswith("--")
            or (key and get_origin(flag.kind) is not dict)
        ):
            return None
        return flag

    # -- after argparse

    def _read_file(self, file: str) -> None:
        try:
            content = load_yaml(Path(file).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--config: {file}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--config: {file}: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(f"--config: {file}: want lines of the form name: value")

        for key, value in content.items():
            name, known = _plain(str(key)), self._flags | self._names
            flag = known.get(name) or self._old.get(name) or self._over.get(name)
            if flag is None or flag.name in _NOT_IN_FILES:
                hint = _hint(name, known, self._see)
                raise UsageError(f"{file}: unknown key {_word(str(key))}{hint}")
            if value is not None or not flag.is_required:  # as --print_config writes it
                self._take(flag, value, f"{file}: {key}")

    def _take(self, flag: Flag, value: Any, where: str) -> None:
        """Keep a value as its flag wants it; `where` is the flag as it was typed, or file and key.

        A flag with a key, as in `--kr_options.budget`, adds to what the dictionary has.
        """
        if flag.name in self._over:
            return
        is_flag = where.startswith("--")
        name, _, key = _plain(where).partition(".") if is_flag else (where.split()[-1], "", "")
        try:
            if key:
                # A value whose type is known is read as that; another one as YAML.
                plain = value if key in flag.inside else load_yaml(value)
                value = {**self._given.get(flag.name, ({}, ""))[0], key: plain}
            self._given[flag.name] = convert(value, flag.kind, flag.inside), where
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error

        if name in self._old:
            new = f"{'--' * is_flag}{flag.name}; the old name works in this version"
            print(f"dlora: {self._name}: {where} is now {new}", file=sys.stderr)

    def _request(self, given: Mapping[str, Any], level: LogLevel) -> Request:
        """The checked settings. Raises UsageError for what is missing or cannot work together."""
        missing = [
            name.upper() if name == self._command.word else f"--{name}"
            for name, flag in self._flags.items()
            if flag.is_required and name not in given
        ]
        if missing:
            *others, last = missing
            names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
            raise UsageError(f"{names} missing; {self._see}")

        places = {name: f"--{name}" for name in self._flags}
        places |= {name: where for name, (_, where) in self._given.items()}
        try:
            settings = self._command.settings(**given)
        except UsageError as error:
            raise UsageError(_placed(error, places)) from error
        return Request(self._command, settings, self._name, level, places)


def _placed(error: UsageError, places: Mapping[str, str]) -> str:
    """An error at its place: "batch_size: got 0" is about the flag, or the key, that was given."""
    name, colon, reason = str(error).partition(": ")
    return f"{places[name]}: {reason}" if colon and name in places else str(error)


def _level(common: Mapping[str, Any]) -> LogLevel:
    """How much is said. Raises UsageError where it is asked for twice."""
    asked = [name for name in (*_LEVELS, "log_level") if common[name]]
    if len(asked) > 1:
        raise UsageError(f"give --{asked[0]} or --{asked[1]}, not both")
    level: LogLevel = common["log_level"] or "info"
    return _LEVELS.get(asked[0], level) if asked else level


def _plain(typed: str) -> str:
    """A flag's name: without dashes in front, and with _ for -. Keys of a dictionary stay."""
    name, dot, key = typed.lstrip("-").partition(".")
    return name.replace("-", "_") + dot + key


def _hint(name: str, known: Iterable[str], see: str, prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, and where to look."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}? S{see[1:]}" if near else f"; {see}"


def _word(word: str) -> str:
    """A word inside a message of one line."""
    return word if re.fullmatch(r"[!-~]+", word) else repr(word)
