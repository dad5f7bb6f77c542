"""Rewards of task grpo: functions in Python files of the user, looked at early and watched later.

FILE.py:NAME is looked up without running the file (`check_rewards`), then the file is run
(`load_rewards`). What a function raises or returns is checked at every call: a run that a reward
ends is one line, and goes on where it was once the file is mended. No torch here.
"""

from __future__ import annotations

import ast
import asyncio
import difflib
import functools
import hashlib
import importlib.util
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlora.errors import RewardError, UsageError

__all__ = ["Reward", "check_rewards", "digests", "load_rewards"]

log = logging.getLogger(__name__)

Reward = Callable[..., list[float | None]]
"""As trl calls it: `prompts`, `completions` and every other column as keywords, a number each."""


def check_rewards(names: Sequence[str]) -> None:
    """Raises UsageError for a file that is not there, is no Python, or lacks the name."""
    seen: dict[str, str] = {}
    for one in names:
        path, name = _parts(one)
        if name in seen:
            raise UsageError(
                f"reward: {seen[name]} and {one} have the same name, by which they are logged: "
                "rename one"
            )
        seen[name] = one
        there = sorted(set(_bound(_parsed(path))))
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; it has {', '.join(there) or 'none'}"
            )
            raise UsageError(f"reward: {path} has no function {name}{hint}")


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions, checked at every call. Raises UsageError for files that cannot be run.

    Where several are asked, each may leave an answer out with None, as long as one rates it.
    """
    check_rewards(names)
    modules: dict[Path, Any] = {}
    found = []
    for one in names:
        path, name = _parts(one)
        if path not in modules:
            modules[path] = _run_file(path)
        function = getattr(modules[path], name, None)
        if not callable(function):
            raise UsageError(f"reward: {one} is a {type(function).__name__}, want a function")
        found.append((one, path, function))

    rated: list[bool] = []
    return [
        _watched(one, path, function, rated, is_first=index == 0, is_last=index == len(found) - 1)
        for index, (one, path, function) in enumerate(found)
    ]


def digests(names: Sequence[str], earlier: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the file of each reward, as run.json keeps it; a change is said, and allowed."""
    now = {one: hashlib.sha256(_parts(one)[0].read_bytes()).hexdigest() for one in names}
    if changed := [one for one in names if earlier.get(one, now[one]) != now[one]]:
        log.warning(
            "reward %s is another than when the run began: from here on it rates answers as it "
            "does now",
            ", ".join(changed),
        )
    return now


# ----------------------------------------------------------------- the file


def _parts(one: str) -> tuple[Path, str]:
    file, colon, name = one.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise UsageError(f"reward: got {one!r}, want FILE.py:NAME")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"reward: {file}: no such file")
    return path, name


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise UsageError(
            f"reward: {where}: not Python ({getattr(error, 'msg', error)!s})"
        ) from None


def _bound(module: ast.Module) -> Iterator[str]:
    """Names that the file gives to something at its top level, also inside `if` and `try`."""
    for node in _statements(module.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (one.asname or one.name for one in node.names)
        elif isinstance(node, ast.Assign):
            yield from (one.id for one in node.targets if isinstance(one, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _run_file(path: Path) -> Any:
    """The file as a module; what stands beside it can be imported, as where a script is run."""
    name = f"dlora_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"reward: {path} is no Python file (want .py)")
    module = importlib.util.module_from_spec(spec)
    beside = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses look there for their module
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"reward: {path}{_line_in(path, error)}: {type(error).__name__}: {error}"
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """The last line of the file on the way to an error, as ":12"."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    return f":{lines[-1]}" if lines else ""


# ----------------------------------------------------------------- a call


def _watched(
    one: str,
    path: Path,
    function: Callable[..., Any],
    rated: list[bool],
    *,
    is_first: bool,
    is_last: bool,
) -> Reward:
    """The function, whose answers are numbers or its run ends. `rated` is shared by all."""

    @functools.wraps(function)
    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            got = function(prompts=prompts, completions=completions, **columns)
            if inspect.isawaitable(got):
                got = asyncio.run(_awaited(got))
        except Exception as error:
            wrong = RewardError(
                f"reward {one}: raised {type(error).__name__} at {path.name}"
                f"{_line_in(path, error)}: mend it"
            )
            wrong.add_note(f"{type(error).__name__}: {error}")  # it may have data in it
            raise wrong from error

        numbers = _numbers(one, got, len(completions))
        if is_first:
            rated[:] = [False] * len(numbers)
        for index, number in enumerate(numbers):
            rated[index] = rated[index] or number is not None
        if is_last and not all(rated):
            raise RewardError(
                f"reward {one}: {rated.count(False)} of {len(rated)} answers have no number of any "
                "reward (None), the first is answer "
                f"{rated.index(False) + 1}: return a number for each"
            )
        return numbers

    # trl logs by this name, and asks whether a function is asynchronous: this one is not.
    reward.__name__ = _parts(one)[1]
    del reward.__wrapped__
    return reward


async def _awaited(value: Any) -> Any:
    return await value


def _numbers(one: str, got: Any, wanted: int) -> list[float | None]:
    """A finite number, or None, for every answer. Raises RewardError."""
    if hasattr(got, "tolist"):
        got = got.tolist()
    if not isinstance(got, list | tuple):
        raise RewardError(
            f"reward {one}: returned a {type(got).__name__}, want a list of {wanted} numbers"
        )
    if len(got) != wanted:
        raise RewardError(
            f"reward {one}: returned {len(got)} numbers for {wanted} answers, want one for each"
        )
    numbers: list[float | None] = []
    for index, value in enumerate(got, 1):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {one}: returned a {type(value).__name__} for answer {index} of {wanted}, "
                "want a number"
            ) from None
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward {one}: returned {number} for answer {index} of {wanted}, want a finite "
                "number"
            )
        numbers.append(number)
    return numbers
