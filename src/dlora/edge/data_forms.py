"""The forms of rows that people have, made the one that trl takes: prompt and completion, or text.

Forms by their columns: `prompt` and `completion`; `messages`; Alpaca (`instruction`, `input`,
`output`); ShareGPT (`conversations`); `text`. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dlora.edge.data_files import kind_of
from dlora.errors import DataError, UsageError

__all__ = ["check_columns", "check_messages", "check_text", "form_of", "own_row", "renamed"]

FORMS: Final = (
    ("prompt", "completion"),
    ("messages",),
    ("instruction", "output"),
    ("conversations",),
    ("text",),
)
"""Columns that a form must have; a row of several forms is of the first."""
WANT: Final = (
    "want columns `prompt` and `completion`, or `messages`, or `text`; or `instruction` and "
    "`output` (Alpaca), or `conversations` (ShareGPT)"
)
_OPTIONAL: Final = ("input", "system", "history", "choices", "answer")
_NAMES: Final = (*(name for form in FORMS for name in form), *_OPTIONAL)

_ROLES: Final = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
}
"""What ShareGPT's files call the speakers."""

# Stanford's Alpaca, train.py, for models without a chat template.
_ALPACA: Final = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)
_PAIRED: Final = ", paired with an input that provides further context"


def check_columns(columns: Mapping[str, str], names: Sequence[str] = _NAMES) -> None:
    """Raises UsageError for a mapping to names that no form has."""
    for name in columns:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(
                f"columns: got {name!r} in front of =, want {', '.join(names[:-1])} or "
                f"{names[-1]}, and behind it the name in the data{hint}"
            )


def renamed(where: str, row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names. `columns` maps ours to the data's. Raises DataError."""
    for name in columns.values():
        if name not in row:
            raise DataError(f"{where}: columns: no column {name!r}; there are {', '.join(row)}")
    taken = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}


def form_of(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    """The form of a data set, by its first row. Raises DataError."""
    form = next((form for form in FORMS if all(name in row for name in form)), None)
    if form is None:
        has = ", ".join(row) or "none"
        raise DataError(f"{where}: got columns {has}; {WANT}. --columns gives others these names")
    return form


def own_row(
    where: str, row: dict[str, Any], form: tuple[str, ...], *, chat: bool
) -> dict[str, Any]:
    """The row as trl takes it: prompt and completion, as texts or as messages; or text.

    `chat`: the model has a chat template. Raises DataError.
    """
    missing = [name for name in form if row.get(name) in (None, "", [])]
    if missing:
        raise DataError(
            f"{where}: `{missing[0]}` is missing or empty; the first row has {' and '.join(form)}"
        )
    if form == ("messages",):
        return _of_messages(where, row["messages"], row.get("tools"))
    if form == ("conversations",):
        return _of_messages(where, _sharegpt(where, row), row.get("tools"))
    if form == ("instruction", "output"):
        _check_texts(where, row, ("instruction", "input", "output", "system"))
        return _of_messages(where, _alpaca_chat(where, row), None) if chat else _alpaca(where, row)

    _check_texts(where, row, form)
    return {name: row[name] for name in form}


def _check_texts(where: str, row: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        value = row.get(name)
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: `{name}` is a {kind_of(value)}, want text")
        check_text(where, name, value)


def _of_messages(where: str, messages: Any, tools: Any) -> dict[str, Any]:
    """All messages but the last as the prompt; the last, which is the assistant's, is learned."""
    check_messages(where, messages)
    if tools:
        raise DataError(f"{where}: `tools` are not supported: put what they say into a message")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last of at least two messages must have role assistant")
    if not messages[-1]["content"]:
        raise DataError(f"{where}: the last message is empty: there is nothing to learn")
    plain = [{"role": part["role"], "content": part["content"]} for part in messages]
    return {"prompt": plain[:-1], "completion": plain[-1:]}


# ----------------------------------------------------------------- Alpaca and ShareGPT


def _alpaca_chat(where: str, row: dict[str, Any]) -> list[dict[str, str]]:
    """System, earlier turns, instruction with its input, and the output, as messages."""
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise DataError(f"{where}: `history` must be a list of pairs: [[question, answer]]")
        pair = zip(("user", "assistant"), turn, strict=True)
        messages += [{"role": role, "content": text} for role, text in pair]
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    answer = {"role": "assistant", "content": row["output"]}
    return [*messages, {"role": "user", "content": asked}, answer]


def _alpaca(where: str, row: dict[str, Any]) -> dict[str, str]:
    """The prompt of Stanford's Alpaca."""
    for name in ("system", "history"):
        if row.get(name):
            raise DataError(f"{where}: `{name}` needs a model with a chat template")
    given = row.get("input") or ""
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=row["instruction"],
        input=f"\n\n### Input:\n{given}" if given else "",
    )
    return {"prompt": prompt, "completion": row["output"]}


def _sharegpt(where: str, row: dict[str, Any]) -> list[Any]:
    """`from` and `value` as role and content; a column `system` is the first message."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: `conversations` must be a list of {{from, value}}")

    messages: list[Any] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": row["system"]})
    for turn in turns:
        if "from" not in turn:  # role and content are what they are called elsewhere
            messages.append(turn)
            continue
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise DataError(
                f"{where}: `conversations` has a turn from {turn['from']!r}, want human, gpt or "
                "system: calls of tools are not supported"
            )
        messages.append({"role": role, "content": turn.get("value")})
    return messages


# ----------------------------------------------------------------- texts


def check_messages(where: str, messages: Any, column: str = "messages") -> None:
    """Raises DataError for what is no list of messages, or has more in it than texts."""
    fine = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str) or _calls(message))
        for message in messages
    )
    if not fine:
        raise DataError(
            f"{where}: `{column}` must be a list of {{role, content}} with text in both"
        )
    for message in messages:
        if name := _calls(message):
            raise DataError(
                f"{where}: `{name}` of a message is not supported, and would be left out: write "
                "the call into `content`, as the model's chat template writes it"
            )
        check_text(where, column, message["content"])


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
