"""A command's flags, read from its settings class: names, types, defaults, help and groups.

Settings are dataclasses. A field is a flag and a key of a YAML file; the docstring under the field
is its help; `GROUPS` of the class says under which headline of the help it stands. Nothing about
a setting is written a second time here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

__all__ = ["ALIASES", "OLD_NAMES", "Command", "Flag", "flags_of", "groups_of", "passed_over"]

ALIASES: Final = {"lr": "learning_rate", "rank": "r", "alpha": "lora_alpha"}
"""Other names of settings, in every command that has the setting."""

OLD_NAMES: Final[dict[str, dict[str, str]]] = {
    "serve": {"audit_log": "access_log"},
    "plan": {"steps": "max_steps"},
}
"""Command -> old name -> new name. Old names work for one version, with a warning, and are in no
help. An entry whose new name is no setting (yet) does nothing."""


@dataclass(frozen=True)
class Command:
    """What a word after `dlora` does: a function with its settings and its line in the help."""

    run: Callable[[Any], int]
    """Takes the settings that its annotation names, and returns the exit code."""
    group: str = "commands"
    """The headline under which `dlora --help` has it."""
    word: str | None = None
    """The setting that is given without a flag, as `runs` of `dlora report RUN RUN`."""
    inner: Mapping[str, type] = field(default_factory=dict)
    """Setting -> a class that annotates the types of its values, where it is a dictionary."""
    beside: type | None = None
    """Settings of another command, whose flags and files may be given here: what is no setting of
    this one is passed over."""
    check: Callable[[Any], None] | None = None
    """Raises UsageError for settings that cannot work here, before anything is loaded."""

    @property
    def settings(self) -> Any:
        """The settings class."""
        return typing.get_type_hints(self.run)["settings"]

    @property
    def text(self) -> str:
        """The line in the help: the first of the function's docstring."""
        return (self.run.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting of a command."""

    name: str
    kind: Any
    """Its type, as the settings class annotates it."""
    default: Any
    """`dataclasses.MISSING` where it is required."""
    text: str
    group: str
    aliases: tuple[str, ...] = ()
    inside: Mapping[str, Any] = field(default_factory=dict)
    """Key -> type of what a dictionary holds, where a class says it."""

    @property
    def is_required(self) -> bool:
        """Whether the command does nothing without it."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether it may stand without a value."""
        return self.kind is bool


def flags_of(command: Command) -> dict[str, Flag]:
    """Name -> flag of every setting, group by group, in the order of the help."""
    return _flags_of(command.settings, command.inner)


def passed_over(command: Command) -> dict[str, Flag]:
    """Name -> flag of what may be given and changes nothing."""
    own = {one.name for one in dataclasses.fields(command.settings)}
    others = {} if command.beside is None else _flags_of(command.beside, {})
    return {name: flag for name, flag in others.items() if name not in own}


def _flags_of(settings: Any, inner: Mapping[str, type]) -> dict[str, Flag]:
    fields = {one.name: one for one in dataclasses.fields(settings)}
    kinds, texts = typing.get_type_hints(settings), _docstrings(settings)

    return {
        name: Flag(
            name=name,
            kind=kinds[name],
            default=_default(fields[name]),
            text=texts.get(name, ""),
            group=group,
            aliases=tuple(alias for alias, meant in ALIASES.items() if meant == name),
            inside=typing.get_type_hints(inner[name]) if name in inner else {},
        )
        for group, names in groups_of(settings).items()
        for name in names
        if name in fields
    }


def groups_of(settings: type) -> dict[str, list[str]]:
    """Headline of the help -> names of settings."""
    groups: dict[str, str] = getattr(settings, "GROUPS", {})
    return {group: names.split() for group, names in groups.items()}


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return setting.default


@cache
def _docstrings(settings: type) -> dict[str, str]:
    """Name -> the docstring under the field, on one line; a subclass may say it anew."""
    return {name: text for base in reversed(settings.__mro__) for name, text in _written(base)}


def _written(base: type) -> Iterator[tuple[str, str]]:
    if not dataclasses.is_dataclass(base):
        return

    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []

    # Python keeps no docstrings of fields: each is the text right after its field.
    for statement, after in itertools.pairwise(body):
        match statement, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())
