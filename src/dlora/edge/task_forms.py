"""Rows of the tasks that learn from preferences or rewards, made the ones that trl takes.

dpo: `prompt`, `chosen`, `rejected`, as texts or as messages; messages also without `prompt`, which
is then what both begin with. kto: `prompt`, `completion`, `label`. grpo: `prompt`, and whatever
columns a reward wants to read. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from dlora.edge.data_files import kind_of
from dlora.edge.data_forms import check_columns, check_messages, check_text
from dlora.errors import DataError

__all__ = ["Task", "TaskForm", "check_task_columns", "task_form", "task_row"]

Task = Literal["sft", "dpo", "kto", "grpo"]

_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",),
}
_OF_REWARDS: Final = (
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),
    *("environments", "environment", "image", "images"),
)
"""Arguments of a reward that no column can be, and columns that trl takes for something else."""


class TaskForm(NamedTuple):
    """What the rows of a data set look like, by its first."""

    task: Task
    columns: tuple[str, ...]
    as_messages: bool
    """Lists of messages, and not texts."""


def check_task_columns(columns: Mapping[str, str], task: Task) -> None:
    """Raises UsageError for a mapping to names that no row of the task has."""
    if task == "sft":
        check_columns(columns)
    elif task != "grpo":  # there rewards may want columns of any name
        check_columns(columns, _COLUMNS[task])


def task_form(where: str, row: dict[str, Any], task: Task) -> TaskForm:
    """The form of a data set, by its first row. Raises DataError."""
    wanted = _COLUMNS[task]
    if task == "dpo" and "prompt" not in row and isinstance(row.get("chosen"), list):
        wanted = ("chosen", "rejected")
    if any(name not in row for name in wanted):
        has = ", ".join(row) or "none"
        names = [f"`{name}`" for name in _COLUMNS[task]]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise DataError(
            f"{where}: got columns {has}; task {task} wants {listed}. --columns gives others these "
            "names"
        )
    decides = "chosen" if task == "dpo" else "prompt"
    return TaskForm(task, wanted, isinstance(row[decides], list))


def task_row(where: str, row: dict[str, Any], form: TaskForm) -> dict[str, Any]:
    """The row as trl's trainer of the task takes it. Raises DataError."""
    missing = [name for name in form.columns if row.get(name) in (None, "", [])]
    if missing:
        raise DataError(
            f"{where}: `{missing[0]}` is missing or empty; task {form.task} wants "
            f"{' and '.join(form.columns)}"
        )
    if row.get("tools"):
        raise DataError(f"{where}: `tools` are not supported: put what they say into a message")
    if form.task == "dpo":
        return _pair(where, row, form)
    if form.task == "grpo":
        return _prompt(where, row, form)
    own = {
        "prompt": _value(where, "prompt", row["prompt"], form),
        "completion": _answer(where, "completion", row["completion"], form),
    }
    return own | {"label": _label(where, row["label"])}


def _pair(where: str, row: dict[str, Any], form: TaskForm) -> dict[str, Any]:
    """prompt, chosen and rejected; chosen and rejected differ, and neither is empty."""
    chosen, rejected = (_answer(where, name, row[name], form) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if form.as_messages and not isinstance(prompt, list):
        prompt, chosen, rejected = _shared(where, prompt, chosen, rejected)
    prompt = _value(where, "prompt", prompt, form)
    if form.as_messages:  # some data repeats the prompt in both
        chosen, rejected = (_behind(prompt, answer) for answer in (chosen, rejected))
    if chosen == rejected:
        raise DataError(f"{where}: `chosen` and `rejected` are the same: there is no preference")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared(
    where: str, asked: Any, chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """What both begin with as the prompt, and what follows; `asked` is the prompt's last text."""
    prompt = chosen[:-1]
    if not prompt or prompt != rejected[:-1]:
        raise DataError(
            f"{where}: without a `prompt` of messages `chosen` and `rejected` are whole "
            "conversations, the same up to their last message: here they are not"
        )
    if asked is not None and asked != prompt[-1]["content"]:
        raise DataError(
            f"{where}: `prompt` is a {kind_of(asked)} and not what `chosen` begins with: give it "
            "as messages, or leave it out"
        )
    return prompt, chosen[-1:], rejected[-1:]


def _behind(prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> list[dict[str, str]]:
    """An answer without the prompt, where it begins with that."""
    repeats = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeats else answer


def _prompt(where: str, row: dict[str, Any], form: TaskForm) -> dict[str, Any]:
    """The prompt, and all other columns as they are."""
    if taken := [name for name in _OF_REWARDS if name in row]:
        raise DataError(
            f"{where}: a column {taken[0]!r} cannot be handed to rewards: give it another name "
            f"(--columns name={taken[0]}), or take it out"
        )
    prompt = _value(where, "prompt", row["prompt"], form)
    if form.as_messages and prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: `prompt` ends with the assistant's message: nothing is asked")
    return row | {"prompt": prompt}


# ----------------------------------------------------------------- values


def _value(where: str, name: str, value: Any, form: TaskForm) -> Any:
    """A text, or plain messages, as the first row has it."""
    if not form.as_messages:
        if not isinstance(value, str):
            raise DataError(
                f"{where}: `{name}` is a {kind_of(value)}, want text as in the first row"
            )
        check_text(where, name, value)
        return value
    if not isinstance(value, list):
        raise DataError(
            f"{where}: `{name}` is a {kind_of(value)}, want a list of messages as in the first row"
        )
    check_messages(where, value, name)
    return [{"role": part["role"], "content": part["content"]} for part in value]


def _answer(where: str, name: str, value: Any, form: TaskForm) -> Any:
    """What is preferred or not: it ends with something that the assistant says."""
    answer = _value(where, name, value, form)
    if form.as_messages and answer[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message of `{name}` must have role assistant")
    if not (answer[-1]["content"] if form.as_messages else answer).strip():
        raise DataError(f"{where}: `{name}` is empty: there is nothing to prefer")
    return answer


def _label(where: str, value: Any) -> bool:
    """True or false; tables have them as words."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "false"):
        return bool(word == "true")
    if not isinstance(value, bool):
        raise DataError(
            f"{where}: `label` is {value!r:.40}, want true (a good completion) or false"
        )
    return value
