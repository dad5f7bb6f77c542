"""What `task` of a run changes about its settings, its rows and what it logs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dlora.edge.task_forms import Task
from dlora.errors import UsageError

__all__ = [
    "SEQUENCES",
    "TITLES",
    "Task",
    "best_metric",
    "check_task",
    "figures_of",
    "is_figure",
    "said",
]

SEQUENCES: Final[dict[Task, int]] = {"sft": 1, "dpo": 2, "kto": 1, "grpo": 1}
"""Sequences of tokens that a row is."""

TITLES: Final = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "reward": "reward",
}
"""What a log entry says beside the loss, in the order in which it is shown -> in words."""

_ALSO: Final = ("reward_std", "kl", "completions/mean_length")

_NOT_GRPO: Final = ((), "rewards are for task grpo")
_ONE_ADAPTER: Final = (
    ("lora",),
    "the reference is a second adapter, and bottleneck adapters stand alone",
)
_REFUSED: Final[dict[Task, dict[str, tuple[tuple[Any, ...], str]]]] = {
    "sft": {"reward": _NOT_GRPO},
    "dpo": {"reward": _NOT_GRPO, "kind": _ONE_ADAPTER},
    "kto": {"reward": _NOT_GRPO, "kind": _ONE_ADAPTER},
    "grpo": {
        "cache_prefix": ((False,), "answers are new in every step, and no row comes again"),
        "pad_to": ((0,), "prompts are padded on the left, where padding does not travel"),
        "overlong": (("error", "drop"), "a prompt that is cut asks for something else"),
    },
}
"""Settings that a task has no use for -> the values that may stand, and why no others."""


def check_task(task: Task, values: Mapping[str, Any]) -> None:
    """Raises UsageError for settings that the task has no use for, and for a reward that lacks."""
    for name, (allowed, why) in _REFUSED[task].items():
        value = values[name]
        if value and value not in allowed:
            shown = ",".join(value) if isinstance(value, list) else value
            raise UsageError(f"{name}: got {shown} with task {task}: {why}: leave it out")
    if task == "grpo" and not values["reward"]:
        raise UsageError("reward: task grpo wants one or more, as FILE.py:NAME")


def best_metric(task: Task) -> str:
    """What evaluations are compared by. With grpo the loss says nothing of what was learned."""
    return "eval_reward" if task == "grpo" else "eval_loss"


def is_figure(name: str) -> bool:
    """Whether a name in a log entry is a figure of the task, beside loss and costs."""
    name = name.removeprefix("eval_")
    return name in TITLES or name in _ALSO or name.startswith("rewards/")


def said(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What a log entry says of the task, in words; `prefix` is before the names."""
    return [
        f"{title} {float(logs[prefix + name]):.3f}"
        for name, title in TITLES.items()
        if logs.get(prefix + name) is not None
    ]


def figures_of(log: list[dict[str, Any]]) -> dict[str, float]:
    """Of a whole log the last value of each figure, those of evaluations under `eval_`."""
    return {
        name: value
        for entry in log
        for name, value in entry.items()
        if is_figure(name) and value is not None
    }
