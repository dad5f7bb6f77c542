"""`dlora train --task dpo|kto|grpo`: whole runs, endings, rows and settings that cannot work."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers import same
from test_endings import At, Broken, broken, send, with_callback

from dlora.embedded import InProcessLink
from dlora.training.run import train
from dlora.training.settings import TrainSettings

REWARD = """
import random

def longer(completions, answer, **_):
    return [float(len(text)) for text in completions]

async def dice(completions, **_):
    return [random.random() for _ in completions]

def nothing(completions, **_):
    return [None for _ in completions]

def few(completions, **_):
    return [1.0]

def no_number(completions, trainer_state, **_):
    return [float("nan") if trainer_state.global_step == 2 else 1.0 for _ in completions]

def fails(completions, trainer_state, **_):
    if trainer_state.global_step == 2:
        raise KeyError(completions[0])
    return [float(len(set(text))) for text in completions]
"""
PAIRS = [
    {"prompt": f"parcel {n * 37 % 91}:", "chosen": f" desk {n % 4}", "rejected": " lost" * (n % 3)}
    | ({"rejected": " the desk"} if n % 3 == 0 else {})
    for n in range(8)
]
RATED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
    for n, row in enumerate(PAIRS)
]
ASKED = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in PAIRS]
ROWS = {"dpo": PAIRS, "kto": RATED, "grpo": ASKED}

# Answers of a draw are learned from in two steps, twice: most checkpoints fall in between.
DRAWN = {"num_generations": 2, "max_completion_length": 5, "steps_per_generation": 4}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"lora_dropout": 0.2},
    "kto": {"lora_dropout": 0.2},
    "grpo": {"trainer": DRAWN | {"num_iterations": 2, "beta": 0.1}},
}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def entries(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def settings(folder: Path, task: str, output: str = "run", **changes: Any) -> TrainSettings:
    """A run of 6 steps of 2 micro-batches of 2 rows each, over several epochs."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    values: dict[str, Any] = {
        "server": "in-process",
        "task": task,
        "data": str(write_lines(folder / f"{task}.jsonl", ROWS[task])),
        "output": folder / output,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_steps": 100,
        "give_up_after_s": 0.0,
    }
    if task == "grpo":
        values["reward"] = [f"{reward}:longer", f"{reward}:dice"]
    return TrainSettings(**(values | KINDS[task] | changes))


@pytest.mark.parametrize("task", ROWS)
def test_a_run_that_ends_again_and_again_equals_one_that_did_not(
    link: InProcessLink, tmp_path: Path, task: str
) -> None:
    """After Ctrl-C, an exception between micro-batches and one after a step, each resumed, the
    adapter has the very bits of a run never stopped; with answers drawn, rated by chance and
    learned from across checkpoints and epochs too.
    """
    whole = train(settings(tmp_path, task, "whole"), link)
    assert (whole["status"], whole["steps"]) == ("finished", 6)
    for number, (event, step, act) in enumerate(
        [
            ("on_step_begin", 0, send(signal.SIGINT)),
            ("on_substep_end", 2, broken),
            ("on_step_end", 4, broken),
        ]
    ):
        with with_callback(At(event, step, act)):
            raises = pytest.raises(Broken) if act is broken else nullcontext()
            with raises as caught:
                train(settings(tmp_path, task, resume=number > 0), link)
            if caught is not None:
                assert "continue with the same command and" in caught.value.__notes__[-1]
    again = train(settings(tmp_path, task, resume=True), link)
    assert (again["status"], again["steps"]) == ("finished", 6)
    assert same(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "ref").exists()
    whole_log, log = (
        {entry["step"]: entry["loss"] for entry in entries(tmp_path / name) if "loss" in entry}
        for name in ("whole", "run")
    )
    assert len(log) == 5 and log.items() <= whole_log.items()  # one ended before it was logged
