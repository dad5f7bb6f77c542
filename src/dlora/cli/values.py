"""From words and YAML to the types of settings; what does not fit is refused in plain words.

A word of the command line is text. It becomes a number, a path or a list only where the setting
is one: `--prompt null` is the prompt "null". A value of a YAML file already has a type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import yaml

__all__ = ["convert", "dump_yaml", "load_yaml", "members", "want"]


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


class _Dumper(yaml.SafeDumper):
    """YAML with paths as text."""


# Text that the loader would take for a number is quoted.
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """As plain as it can be. PyYAML folds these three ends of lines where they are not escaped."""
    style = '"' if _OTHER_ENDS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OTHER_ENDS: Final = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(Path, lambda dumper, path: dumper.represent_str(str(path)))


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
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def convert(value: Any, kind: Any, inside: Mapping[str, Any] | None = None) -> Any:
    """The value of a setting, from a word of the command line or from YAML.

    `inside` has the kinds of what a dictionary holds, by key. Raises ValueError: what was got and
    what is wanted.
    """
    kinds = members(kind)
    if kind is Any or (value is None and NoneType in kinds):
        return value

    # Text stays as it was given; a JSON list is a list where one is allowed.
    if isinstance(value, str) and str in kinds:
        if not _is_unicode(value):
            raise ValueError(f"got {ascii(value)[:80]}, want UTF-8 text")
        return _texts(value) if list[str] in kinds else value
    if value == "null" and NoneType in kinds and Path not in kinds:  # a file may have that name
        return None

    # A word that stands for a value, beside the values themselves.
    if value in (word for one in kinds[1:] for word in _words(one)):
        return value

    main = kinds[0]
    try:
        plain = _PLAIN[get_origin(main) or main](value, main)
    except ValueError:
        texts = str in kinds and not isinstance(value, list | dict)
        hint = " (put it in quotes)" if texts else ""
        raise ValueError(f"got {_shown(value)}, want {want(kind)}{hint}") from None

    if isinstance(plain, list):
        return [convert(item, get_args(main)[0]) for item in plain]
    if isinstance(plain, dict):
        return {str(key): _item(key, item, main, inside or {}) for key, item in plain.items()}
    return plain


def _item(key: Any, value: Any, kind: Any, inside: Mapping[str, Any]) -> Any:
    """A value inside a dictionary; what is wrong with it is named by its key."""
    try:
        return convert(value, inside.get(str(key), get_args(kind)[1]))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


# ----------------------------------------------------------------- one kind each


def _to_float(value: Any, _: Any) -> float:
    number = float(str(value).replace(".inf", "inf"))
    return number if not math.isnan(number) else _refuse()


def _to_path(value: str) -> Path:
    """A path; `~` at its beginning is the home, as some libraries would read it later."""
    try:
        return Path(value).expanduser()
    except RuntimeError:  # no such user, or no home
        return _refuse()


def _is_unicode(text: str) -> bool:
    """Whether a text could be written: bytes of a command line may be no text at all."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_choice(value: Any, kind: Any) -> str:
    word = ("off", "on")[value] if isinstance(value, bool) else value  # YAML 1.1 reads on as true
    return word if word in get_args(kind) else _refuse()


def _to_list(value: Any, _: Any) -> list[Any]:
    if isinstance(value, str):
        items = value.strip().removeprefix("[").removesuffix("]").split(",")
        return [one for one in (item.strip().strip("'\"") for item in items) if one]
    return value if isinstance(value, list) else _refuse()


def _to_dict(value: Any, kind: Any) -> dict[Any, Any]:
    """'{name: value}', or name=value,name=value."""
    loaded = load_yaml(value) if isinstance(value, str) else value
    if isinstance(loaded, str):
        pairs = [pair.partition("=") for pair in loaded.split(",")]
        is_text = bool({str, Path}.intersection(members(get_args(kind)[1])))
        loaded = {
            name.strip(): text.strip() if is_text else load_yaml(text)
            for name, equals, text in pairs
            if (name.strip() and equals) or _refuse()
        }
    return loaded if isinstance(loaded, dict) else _refuse()


def _refuse() -> Any:
    raise ValueError


# A number written out has one reading only: neither true nor 2.5 is a whole number.
_PLAIN: Final[dict[Any, Callable[[Any, Any], Any]]] = {
    bool: lambda value, _: ("false", "true").index(str(value).lower()) == 1,
    int: lambda value, _: int(str(value)),
    float: _to_float,
    str: lambda value, _: _refuse(),
    Path: lambda value, _: _to_path(value) if value and isinstance(value, str) else _refuse(),
    Literal: _to_choice,
    list: _to_list,
    dict: _to_dict,
}


def _texts(word: str) -> list[str] | str:
    """The texts of a JSON list; the word itself if it is not one."""
    try:
        items = json.loads(word) if word.startswith("[") else word
    except ValueError:
        return word
    return items if all(isinstance(item, str) for item in items) else word


# ----------------------------------------------------------------- words for kinds


def want(kind: Any) -> str:
    """What a setting of this kind takes, in words for a person."""
    kinds = members(kind)
    if list[str] in kinds:
        return "text, or a list of texts" if str in kinds else "names, separated by commas"
    main = kinds[0]

    if get_origin(main) is Literal:
        *others, last = get_args(main)
        return f"{', '.join(others)} or {last}" if others else str(last)
    if get_origin(main) is dict:
        return "names and values, such as name=value,name=value or '{name: value}'"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    others = [word for one in kinds[1:] for word in _words(one)]
    return " or ".join([words.get(main, "text"), *others])


def _words(kind: Any) -> tuple[Any, ...]:
    """The words of a choice; none for another kind."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _shown(value: Any) -> str:
    """A value in a message: as it would be typed, on one line, not too long."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
