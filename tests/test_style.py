"""Sizes that keep the code readable: measured on every file, so that a new one is covered."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import dlora

SOURCE = Path(dlora.__file__).parent
FILES = [file for file in sorted(SOURCE.rglob("*.py")) if "proto" not in file.parts]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def size(node: ast.ClassDef | Function) -> int:
    """Lines from the first to the last, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def nodes(kind: type) -> Iterator[tuple[Path, list[str], ast.ClassDef | Function]]:
    """(file, its lines, node) of every class or function."""
    for file in FILES:
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kind):
                yield file, text.splitlines(), node


def longest_run(lines: list[str], node: Function) -> int:
    """The most lines of a function's body in a row without a blank line or a comment."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = (first.end_lineno or 0) + 1 if is_docstring else first.lineno
    longest = current = 0
    for line in lines[start - 1 : node.end_lineno]:
        current = 0 if not line.strip() or line.strip().startswith("#") else current + 1
        longest = max(longest, current)
    return longest


def test_files_and_classes_stay_small() -> None:
    """No class is over 300 lines and no file over 450; half of the files have at most 150."""
    lengths = {file: len(file.read_text().splitlines()) for file in FILES}
    assert not {file.name: count for file, count in lengths.items() if count > 450}
    assert statistics.median(lengths.values()) <= 150
    assert not [node.name for _, _, node in nodes(ast.ClassDef) if size(node) > 300]


def test_functions_are_short_and_have_paragraphs() -> None:
    """98 % of functions are under 50 lines; long ones have a break every 15 lines at the median."""
    functions = list(nodes(Function))
    long = [f"{file.name}: {node.name}" for file, _, node in functions if size(node) >= 50]
    assert len(long) <= 0.02 * len(functions), long
    runs = [longest_run(lines, node) for _, lines, node in functions if size(node) >= 20]
    assert statistics.median(runs) <= 15
