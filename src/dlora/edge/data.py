"""Data on the edge: files or hub data sets, checked row by row, in the forms that trl takes.

source -> rows of its files (`data_files`) -> rows of one form (`data_forms`) -> a `Dataset`: in
memory, or, where the files are large, in an Arrow file that is mapped into memory.
"""

from __future__ import annotations

import atexit
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, overload

import pyarrow
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter

from dlora.edge.data_files import ROW_FILES, Row, data_files, read_file
from dlora.edge.data_forms import (
    WANT,
    check_messages,
    check_text,
    form_of,
    own_row,
    renamed,
)
from dlora.edge.task_forms import Task, task_form, task_row
from dlora.errors import DataError
from dlora.files import ScratchFolder

__all__ = [
    "ROW_FILES",
    "ChoiceRow",
    "Origins",
    "check_choices",
    "check_messages",
    "check_text",
    "load_rows",
    "read_rows",
]

MOST_IN_MEMORY: Final = 2**26
"""Bytes of files whose rows are kept in memory; of a text that is about five times as much."""
_NO_COLUMNS: Final[Mapping[str, str]] = {}


class Origins(Sequence[str]):
    """Where each row stands, such as "file.jsonl:3", in 8 bytes a row."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._firsts: list[int] = []
        self._numbers = array("q")

    def add(self, name: str, number: int) -> None:
        """Note the next row."""
        if not self._names or self._names[-1] != name:
            self._names.append(name)
            self._firsts.append(len(self._numbers))
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number = self._numbers[index]
        file = bisect_right(self._firsts, range(len(self))[index]) - 1
        return f"{self._names[file]}:{number}"


def load_rows(
    source: str,
    columns: Mapping[str, str] = _NO_COLUMNS,
    *,
    chat: bool = True,
    limit: int | None = None,
    refused: list[str] | None = None,
    task: Task = "sft",
) -> tuple[Dataset, Origins]:
    """Load a source's rows, or the first of them, as trl takes them, and where each came from.

    A source is a file, a folder, several of them with commas, or a hub data set. `columns` maps
    names of ours to the data's. `chat`: the model has a chat template. `task`: what the rows are
    for, which decides their columns.
    `messages` become prompt (all but the last) and completion (the last, which must be the
    assistant's): the loss is on completions wherever they exist, else on the whole text.
    Raises DataError, naming file and line; with a list `refused`, rows that cannot be trained on
    are noted there and left out.
    """
    origins = Origins()
    located = islice(_located(source, columns), limit)
    rows = _own_rows(located, origins, chat=chat, refused=refused, task=task)
    size = sum(file.stat().st_size for file in data_files(source) or ())
    # Columns for rewards have types that no first row can say.
    large = limit is None and size > MOST_IN_MEMORY and task != "grpo"
    if large:
        return _mapped(rows), origins
    try:
        return Dataset.from_list(list(rows)), origins
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{source}: a column has values of several kinds: {reason}") from None


def _own_rows(
    located: Iterable[Row], origins: Origins, *, chat: bool, refused: list[str] | None, task: Task
) -> Iterator[dict[str, Any]]:
    """Rows of the form that the first one has; `origins` takes up where they stand."""
    form = task_of = None
    for name, number, row in located:
        where = f"{name}:{number}"
        if task == "sft":
            form = form or form_of(where, row)
        else:
            task_of = task_of or task_form(where, row, task)
        try:
            if task_of is not None:
                own = task_row(where, row, task_of)
            else:
                own = own_row(where, row, form or (), chat=chat)
        except DataError as error:
            if refused is None:
                raise
            refused.append(str(error))
            continue
        origins.add(name, number)
        yield own


def _mapped(rows: Iterator[dict[str, Any]]) -> Dataset:
    """A data set in an Arrow file of this process, which goes with it."""
    folder = ScratchFolder("dlora-rows-")
    atexit.register(folder.cleanup)
    file = Path(folder.name) / "rows.arrow"
    first = next(rows, None)
    if first is None:  # all of them were refused
        return Dataset.from_list([])
    with ArrowWriter(path=str(file), features=_features(first)) as writer:
        for row in chain([first], rows):
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(file))


def _features(row: dict[str, Any]) -> Features:
    """Types of columns, which no row can change: texts, lists of messages, or a truth value."""
    text = Value("string")
    kinds = {list: List({"role": text, "content": text}), bool: Value("bool")}
    return Features({name: kinds.get(type(value), text) for name, value in row.items()})


def read_rows(
    source: str, columns: Mapping[str, str] = _NO_COLUMNS, limit: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """The first rows of a source as they are, each with where it stands. Raises DataError."""
    rows = islice(_located(source, columns), limit)
    return [(f"{name}:{number}", row) for name, number, row in rows]


def _located(source: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """All rows of a source under our names; at least one. Raises DataError."""
    files, number = data_files(source), 0
    rows = _read_hub(source) if files is None else chain.from_iterable(map(read_file, files))
    for name, number, row in rows:
        yield name, number, renamed(f"{name}:{number}", row, columns) if columns else row
    if not number:
        raise DataError(f"{source}: no rows. {WANT[0].upper() + WANT[1:]}.")


@dataclass(frozen=True)
class ChoiceRow:
    """A question with several continuations of its prompt, one of them right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def check_choices(located: list[tuple[str, dict[str, Any]]]) -> list[ChoiceRow]:
    """Rows with `prompt`, `choices` and `answer`. Raises DataError, naming file and line."""
    rows = []
    for where, row in located:
        prompt, choices, answer = row.get("prompt"), row.get("choices"), row.get("answer")
        if not isinstance(prompt, str) or not prompt:
            raise DataError(f"{where}: `prompt` is missing or not text")

        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(c, str) and c for c in choices)
        ):
            raise DataError(f"{where}: `choices` must be a list of at least two texts")

        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if (
            isinstance(answer, bool)
            or not isinstance(answer, int)
            or not 0 <= answer < len(choices)
        ):
            raise DataError(
                f"{where}: `answer` is {answer!r}, want one of the choices, or 0 to "
                f"{len(choices) - 1}"
            )
        check_text(where, "prompt", prompt)
        for choice in choices:
            check_text(where, "choices", choice)
        rows.append(ChoiceRow(prompt, tuple(choices), answer))
    return rows


def _read_hub(source: str) -> Iterator[Row]:
    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # hub, network and format errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: no such file, and not loadable as a Hugging Face data set: {reason}"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield source, number, row
