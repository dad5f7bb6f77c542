"""What `dlora eval --tasks` prints: a table that fits the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dlora.cli.lines import table_lines

__all__ = ["task_lines"]

_HEADS: Final = ("task and metric", "value", "stderr", "examples", "rows")


def task_lines(
    figures: Mapping[str, Any], kept: Path | None, predictions: Path | None
) -> Iterator[str]:
    """Adapter and model, every task with its metrics below it, and the files that were written."""
    for name in ("adapter", "model_id"):
        yield f"{name:11} {figures[name]}"
    yield ""
    yield from table_lines(_HEADS, list(_rows(figures["tasks"])))
    yield ""
    for name, file in (("kept in", kept), ("predictions", predictions)):
        if file is not None:
            yield f"{name:11} {file}"


def _rows(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """A line for every task, with what it was of, and one for each of its metrics."""
    for task, one in tasks.items():
        yield [task, "", "", _text(one["num_fewshot"]), _text(one["rows"])]
        for metric in one["metrics"]:
            title = f"  {metric['metric']}"
            if metric["filter"] != "none":
                title += f" ({metric['filter']})"
            yield [title, _number(metric["value"]), _number(metric["stderr"]), "", ""]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"
