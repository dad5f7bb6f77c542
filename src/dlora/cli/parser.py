"""From the words of a command line to checked settings.

Flags may be written with - for _. A switch may stand without a value. Values come from YAML files
first (`--config`), then from flags; a later one overrides an earlier one. What is wrong is one
UsageError that names the flag as it was typed, or the file and its key, and the nearest known name.

Not argparse and not a library on top of it: both read `--prompt ---` as a flag, and libraries that
also read YAML turn `--prompt null` into nothing at all.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dlora.cli.flags import OLD_NAMES, Command, Flag, flags_of
from dlora.cli.help import command_help, overview
from dlora.cli.values import dump_yaml, from_word, from_yaml, load_yaml
from dlora.errors import UsageError
from dlora.version import __version__

__all__ = ["parse"]


def parse(argv: list[str], commands: Mapping[str, Command]) -> str | tuple[Command, Any]:
    """A text to print, or the command with its settings. Raises UsageError."""
    first, rest = (argv[0], argv[1:]) if argv else ("help", [])
    if first in ("help", "-h", "--help"):
        return command_help(_command(rest[0], commands)) if rest else overview(commands)
    if first in ("-V", "--version"):
        return f"dlora {__version__}"

    command = _command(first, commands)
    try:
        reader = _Reader(command)
        reader.read(rest)
        if reader.wants_help:
            return command_help(command)
        if reader.prints_settings:
            return dump_yaml(reader.known_values()).rstrip("\n")
        return command, reader.settings()
    except UsageError as error:
        named = str(error).startswith(f"{command.name} ")
        raise UsageError(str(error) if named else f"{command.name}: {error}") from error


def _command(name: str, commands: Mapping[str, Command]) -> Command:
    if name in commands:
        return commands[name]
    kind = "flag" if name.startswith("-") else "command"
    hint = _hint(name, commands, "See dlora --help")
    raise UsageError(f"unknown {kind} {_word(name)}{hint}")


@dataclass(frozen=True)
class _Given:
    """A value, and where it was given: a flag as it was typed, or a file and its key."""

    value: Any
    where: str


class _Reader:
    """Reads the words after one command."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.flags = flags_of(command)
        self.wants_help = False
        self.prints_settings = False
        self._from_files: dict[str, _Given] = {}
        self._from_flags: dict[str, _Given] = {}
        self._words: list[str] = []
        self._see = f"see dlora {command.name} --help"

        # Every name that may be typed, and the setting that it means.
        self._old = {
            old: new
            for old, new in OLD_NAMES.get(command.name, {}).items()
            if new in self.flags and old not in self.flags
        }
        aliases = {alias: flag.name for flag in self.flags.values() for alias in flag.aliases}
        self._names = {name: name for name in self.flags if name != command.word} | aliases

    # -- words

    def read(self, words: Iterable[str]) -> None:
        """Read all words, up to a request for help. Raises UsageError."""
        queue = deque(words)
        while queue and not self.wants_help:
            word = queue.popleft()
            if word in ("-h", "--help"):
                self.wants_help = True
            elif word == "--":
                self._words += queue
                queue.clear()
            elif word.startswith("-") and len(word) > 1:
                self._read_flag(word, queue)
            else:
                self._words.append(word)
        if not self.wants_help:
            self._read_words()

    def _read_flag(self, word: str, queue: deque[str]) -> None:
        typed, equals, value = word.partition("=")
        if _plain(typed) == "print_config" and not equals:
            self.prints_settings = True
            return
        if _plain(typed) == "config":
            self._read_file(value if equals else self._next(typed, queue))
            return

        # `--kr_options.budget 0.2` sets one value of a dictionary.
        name, _, key = _plain(typed).partition(".")
        flag = self._flag(name) if typed.startswith("--") else None
        if flag is None or (key and get_origin(flag.kind) is not dict):
            raise UsageError(f"unknown flag {_word(typed)}{self._nearest(typed)}")

        if not equals and flag.is_switch:
            value = queue.popleft() if queue and queue[0].lower() in ("true", "false") else "true"
        elif not equals:
            value = self._next(typed, queue)
        if name in self._old:
            self._warn(f"--{name}", f"--{flag.name}")
        self._set(flag, key, value, typed)

    def _set(self, flag: Flag, key: str, word: str, typed: str) -> None:
        try:
            if key:
                before = self._from_flags.get(flag.name) or self._from_files.get(flag.name)
                inside = from_word(word, get_args(flag.kind)[1])
                value = {**(before.value if before else {}), key: inside}
            else:
                value = from_word(word, flag.kind)
            self._from_flags[flag.name] = _Given(self._checked(flag, value), typed)
        except ValueError as error:
            raise UsageError(f"{typed}: {error}") from error

    def _next(self, typed: str, queue: deque[str]) -> str:
        """The value after a flag. Another flag of this command is not one: a value was forgotten.

        So a text may begin with dashes: `--prompt ---`.
        """
        following = queue[0].partition("=")[0] if queue else None
        if following is None or (following.startswith("--") and self._is_flag(following)):
            raise UsageError(f"{typed}: its value is missing; {self._see}")
        return queue.popleft()

    def _read_words(self) -> None:
        """The words without a flag: the one setting that takes them, or too many."""
        flag = self.flags[self.command.word] if self.command.word else None
        takes_many = flag is not None and get_origin(flag.kind) is list
        surplus = self._words if flag is None else [] if takes_many else self._words[1:]
        if surplus:
            raise UsageError(f"unexpected word {surplus[0]!r}; {self._see}")
        if flag is None or not self._words:
            return

        where = flag.name.upper()
        try:
            if takes_many:
                values: Any = [from_word(word, get_args(flag.kind)[0]) for word in self._words]
            else:
                values = from_word(self._words[0], flag.kind)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        self._from_flags[flag.name] = _Given(values, where)

    # -- files

    def _read_file(self, name: str) -> None:
        try:
            content = load_yaml(Path(name).read_text())
        except OSError as error:
            raise UsageError(f"--config: {name}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--config: {name}: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(f"--config: {name}: want lines of the form name: value")

        for key, value in content.items():
            given = str(key).replace("-", "_")
            flag = self.flags.get(given) or self._flag(given)
            if flag is None:
                hint = self._nearest(str(key), prefix="")
                raise UsageError(f"{name}: unknown key {_word(str(key))}{hint}")
            if given in self._old:
                self._warn(f"{name}: {given}", flag.name)
            self._set_from_file(flag, value, f"{name}: {key}")

    def _set_from_file(self, flag: Flag, value: Any, where: str) -> None:
        if value is None and flag.is_required:  # as --print_config writes it
            return
        try:
            converted = self._checked(flag, from_yaml(value, flag.kind))
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        self._from_files[flag.name] = _Given(converted, where)

    # -- the whole

    def known_values(self) -> dict[str, Any]:
        """Every setting by name, as given or by default; None for what is missing."""
        given = self._from_files | self._from_flags
        return {
            name: given[name].value if name in given else None if flag.is_required else flag.default
            for name, flag in self.flags.items()
        }

    def settings(self) -> Any:
        """The checked settings. Raises UsageError for what is missing or cannot work together."""
        given = self._from_files | self._from_flags
        missing = [
            f"--{name}" if name != self.command.word else name.upper()
            for name, flag in self.flags.items()
            if flag.is_required and name not in given
        ]
        if missing:
            *others, last = missing
            names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
            raise UsageError(f"{names} missing; {self._see}")

        try:
            return self.command.settings(**{name: one.value for name, one in given.items()})
        except UsageError as error:
            # "batch_size: got 0, want ..." is about the flag, or the key, that was given.
            name, colon, reason = str(error).partition(": ")
            if not colon or name not in self.flags:
                raise
            where = given[name].where if name in given else f"--{name}"
            raise UsageError(f"{where}: {reason}") from error

    def _checked(self, flag: Flag, value: Any) -> Any:
        """A value; inside a dictionary of settings, each as its own settings class wants it."""
        inner = self.command.inner.get(flag.name)
        if inner is None:
            return value
        kinds = get_type_hints(inner)
        checked = {}
        for key, item in value.items():
            try:
                checked[key] = from_yaml(item, kinds.get(key, Any))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return checked

    # -- names

    def _flag(self, name: str) -> Flag | None:
        meant = self._names.get(name) or self._old.get(name)
        return None if meant is None else self.flags[meant]

    def _is_flag(self, typed: str) -> bool:
        name = _plain(typed).partition(".")[0]
        return name in ("config", "print_config", "help") or self._flag(name) is not None

    def _nearest(self, typed: str, prefix: str = "--") -> str:
        known = [*self._names, "config", "print_config"] if prefix else list(self.flags)
        see = f"See dlora {self.command.name} --help"
        return _hint(_plain(typed), known, see, prefix)

    def _warn(self, old: str, new: str) -> None:
        print(
            f"dlora: {self.command.name}: {old} is now {new}; the old name works in this version",
            file=sys.stderr,
        )


def _plain(typed: str) -> str:
    """A flag's name: without dashes in front, and with _ for -. Keys of a dictionary stay."""
    name, dot, key = typed.lstrip("-").partition(".")
    return name.replace("-", "_") + dot + key


def _hint(name: str, known: Iterable[str], see: str, prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, and where to look."""
    near = difflib.get_close_matches(name, list(known), n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}? {see}"
    return f"; {see[0].lower()}{see[1:]}"


def _word(word: str) -> str:
    """A word inside a message of one line."""
    return word if re.fullmatch(r"[!-~]+", word) else repr(word)
