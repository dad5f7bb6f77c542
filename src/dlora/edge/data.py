"""Data on the edge: files or hub data sets, checked row by row, in the forms that trl takes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from datasets import Dataset, load_dataset

from dlora.errors import DataError

__all__ = [
    "DATA_FILES",
    "FORMS",
    "ChoiceRow",
    "check_choices",
    "check_messages",
    "check_rows",
    "check_text",
    "load_rows",
    "read_rows",
]

DATA_FILES: Final = (".jsonl", ".json", ".csv")
FORMS: Final = (("prompt", "completion"), ("messages",), ("text",))
_WANT: Final = "want columns `prompt` and `completion`, or `messages`, or `text`"


def load_rows(source: str) -> tuple[Dataset, list[str]]:
    """Load a data file or hub data set, for training: rows for trl, and where each came from.

    Where is, for example, "file.jsonl:3".
    `messages` become prompt (all but the last) and completion (the last, which must be the
    assistant's): the loss is on completions wherever they exist, else on the whole text.
    Raises DataError, naming file and line.
    """
    return check_rows(read_rows(source))


def check_rows(located: list[tuple[str, dict[str, Any]]]) -> tuple[Dataset, list[str]]:
    """The same for rows that are already read."""
    where, first = located[0]
    form = next((form for form in FORMS if all(name in first for name in form)), None)
    if form is None:
        raise DataError(f"{where}: got columns {', '.join(first) or 'none'}; {_WANT}")
    rows = [_check_row(where, row, form) for where, row in located]
    return Dataset.from_list(rows), [where for where, _ in located]


def read_rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a data file or hub data set, each with where it stands. Raises DataError."""
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    kind = path.suffix.lower()
    if kind in DATA_FILES or path.exists():
        if not path.is_file():
            raise DataError(f"{source}: no such file")
        reader = _read_csv if kind == ".csv" else _read_jsonl
        located = list(reader(path))
    else:
        located = list(_read_hub(source))
    if not located:
        raise DataError(f"{source}: no rows. {_WANT[0].upper() + _WANT[1:]}.")
    return located


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


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}:{number}: got a {type(row).__name__}, want one JSON object a line"
                    )
                yield f"{path}:{number}", row
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}); want one JSON object a line"
            ) from None
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number + 1}: not UTF-8 text") from None


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # The module's own limit is 128 KiB a field; a field is in the file, so no longer than that.
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}:{reader.line_num}: the row has not as many fields as the header"
                    )
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8 text") from None


def _read_hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # hub, network and format errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: no such file, and not loadable as a Hugging Face data set: {reason}"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{source}:{number}", row


def _check_row(where: str, row: dict[str, Any], form: tuple[str, ...]) -> dict[str, Any]:
    """The row as trl takes it. Raises DataError."""
    missing = [name for name in form if row.get(name) in (None, "", [])]
    if missing:
        raise DataError(
            f"{where}: `{missing[0]}` is missing or empty; the first row has {' and '.join(form)}"
        )

    if form == ("messages",):
        messages = row["messages"]
        check_messages(where, messages)
        if row.get("tools"):
            raise DataError(f"{where}: `tools` are not supported: put what they say into a message")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last of at least two messages must have role assistant")
        if not messages[-1]["content"]:
            raise DataError(f"{where}: the last message is empty: there is nothing to learn")
        plain = [{"role": part["role"], "content": part["content"]} for part in messages]
        return {"prompt": plain[:-1], "completion": plain[-1:]}

    for name in form:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: `{name}` is a {type(row[name]).__name__}, want text")
        check_text(where, name, row[name])
    return {name: row[name] for name in form}


# ----------------------------------------------------------------- texts


def check_messages(where: str, messages: Any) -> None:
    """Raises DataError for what is no list of messages, or has more in it than texts."""
    fine = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str) or _calls(message))
        for message in messages
    )
    if not fine:
        raise DataError(
            f"{where}: `messages` must be a list of {{role, content}} with text in both"
        )
    for message in messages:
        if name := _calls(message):
            raise DataError(
                f"{where}: `{name}` of a message is not supported, and would be left out: write "
                "the call into `content`, as the model's chat template writes it"
            )
        check_text(where, "messages", message["content"])


def _calls(message: dict[str, Any]) -> str | None:
    """The field by which a message calls tools; None if it does not."""
    return next((name for name in ("tool_calls", "function_call") if message.get(name)), None)


def check_text(where: str, name: str, text: str) -> None:
    """Raises DataError for a text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{name}` has half of a character ({text[error.start]!a} alone, at "
            f"{error.start}), which no tokenizer takes: take it out"
        ) from None
