"""From words and YAML to the types of settings; what does not fit is refused in plain words.

A word of the command line is text. It becomes a number, a path or a list only where the setting
is one: `--prompt null` is the prompt "null". A value of a YAML file already has a type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import yaml

__all__ = ["dump_yaml", "from_word", "from_yaml", "load_yaml", "want"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, and with 1e-3 as a number."""


# A copy of its own: the original is shared with every other user of PyYAML in the process.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in entries if not tag.endswith(":timestamp")]
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """The content of a YAML document. Raises ValueError that says where it is broken."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # derived from SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or "not YAML"
        raise ValueError(f"{where}{problem}") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Settings as a YAML file that gives them back."""
    plain = {name: str(one) if isinstance(one, Path) else one for name, one in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------- the command line


def from_word(word: str, kind: Any) -> Any:
    """The value of a word of the command line. Raises ValueError: what was got and is wanted."""
    kinds = _members(kind)

    # Text stays as it was typed; a JSON list is a list where one is allowed.
    if str in kinds:
        texts = _json_list(word) if list[str] in kinds else None
        return word if texts is None else texts
    if NoneType in kinds and word == "null":
        return None

    main = kinds[0]
    if get_origin(main) is dict:
        return _to_dict(word, main)
    try:
        return _CONVERTERS[get_origin(main) or main](word, main)
    except ValueError:
        raise ValueError(f"got {_shown(word)}, want {want(kind)}") from None


def _to_bool(word: str, _: Any) -> bool:
    return ("false", "true").index(word.lower()) == 1


def _to_float(word: str, _: Any) -> float:
    number = float(word.replace(".inf", "inf"))
    if math.isnan(number):
        raise ValueError("not a number")
    return number


def _to_path(word: str, _: Any) -> Path:
    if not word:
        raise ValueError("empty")
    return Path(word)


def _to_choice(word: str, kind: Any) -> str:
    if word not in get_args(kind):
        raise ValueError("not among the choices")
    return word


def _to_list(word: str, kind: Any) -> list[Any]:
    words = word.strip().removeprefix("[").removesuffix("]").split(",")
    items = [one.strip().strip("'\"") for one in words]
    return [from_word(one, get_args(kind)[0]) for one in items if one]


def _to_dict(word: str, kind: Any) -> Any:
    try:
        loaded = load_yaml(word)
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        raise ValueError(f"got {_shown(word)}, want {want(kind)}")
    return from_yaml(loaded, kind)  # what is wrong inside is named by its key


_CONVERTERS: Final[dict[Any, Callable[[str, Any], Any]]] = {
    bool: _to_bool,
    int: lambda word, _: int(word),
    float: _to_float,
    Path: _to_path,
    Literal: _to_choice,
    list: _to_list,
    Any: lambda word, _: load_yaml(word),
}


def _json_list(word: str) -> list[str] | None:
    """The texts of a JSON list; None if the word is not one."""
    if not word.startswith("["):
        return None
    try:
        items = json.loads(word)
    except ValueError:
        return None
    return items if all(isinstance(item, str) for item in items) else None


# ----------------------------------------------------------------- YAML files


def from_yaml(value: Any, kind: Any) -> Any:
    """The value of a key of a YAML file. Raises ValueError: what was got and is wanted."""
    kinds = _members(kind)
    if kind is Any or (value is None and NoneType in kinds):
        return value

    for member in kinds:
        fits, converted = _fitting(value, member)
        if fits:
            return converted

    # A number in quotes, a path, a choice, names with commas: the same as on the command line.
    if isinstance(value, str) and str not in kinds:
        return from_word(value, kind)
    hint = " (put it in quotes)" if str in kinds and not isinstance(value, list | dict) else ""
    raise ValueError(f"got {_shown(value)}, want {want(kind)}{hint}")


def _fitting(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of the kind, and what it then is."""
    match value, get_origin(kind) or kind:
        case bool(), _ if kind is bool:
            return True, value
        case bool(), _ if {"on", "off"} & set(get_args(kind)):  # YAML 1.1 reads on as true
            word = "on" if value else "off"
            return word in get_args(kind), word
        case bool(), _:
            return False, None
        case int(), _ if kind is int:
            return True, value
        case int() | float(), _ if kind is float:
            return not math.isnan(value), float(value)
        case str(), _ if kind is str:
            return True, value
        case list(), origin if origin is list:
            return True, [from_yaml(item, get_args(kind)[0]) for item in value]
        case dict(), origin if origin is dict:
            return True, {str(key): _item(key, value[key], get_args(kind)[1]) for key in value}
    return False, None


def _item(key: Any, value: Any, kind: Any) -> Any:
    """A value inside a dictionary; what is wrong with it is named by its key."""
    try:
        return from_yaml(value, kind)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


# ----------------------------------------------------------------- words for kinds


def want(kind: Any) -> str:
    """What a setting of this kind takes, in words for a person."""
    kinds = _members(kind)
    if list[str] in kinds:
        return "text, or a list of texts" if str in kinds else "names, separated by commas"
    main = kinds[0]

    if get_origin(main) is Literal:
        *others, last = get_args(main)
        return f"{', '.join(others)} or {last}" if others else str(last)
    if get_origin(main) is dict:
        return "names and values, such as '{name: value}'"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return words.get(main, "text")


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _shown(value: Any) -> str:
    """A value in a message: as it would be typed, on one line, not too long."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
