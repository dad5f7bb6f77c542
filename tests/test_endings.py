"""However a run ends, its last finished step is a checkpoint, and what goes on from there equals a
run that was never stopped.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same
from transformers import PreTrainedTokenizerFast, TrainerCallback

from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import DivergedError, PeerError, PeerLost
from dlora.runs import RunFolder, damage, step_of
from dlora.training import run as training
from dlora.training.run import train
from dlora.training.settings import TrainSettings


@pytest.fixture(scope="module")
def link(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast
) -> Iterator[InProcessLink]:
    """A tiny Llama with a tokenizer, in this process."""
    made = InProcessLink(cloud_models("llama"), tokenizer)
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows of prompt and completion."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"parcel {n * 37 % 91}:", "completion": f" desk {n % 4}"} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


# Runs of 6 steps in two epochs, of 2 micro-batches each, that save at the ends of epochs alone.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evaluated": {"eval_data": True, "learning_rate": 0.3},
    "evaluated by steps": {"eval_data": True, "eval_steps": 2, "save_steps": 4},
    "kill and revive": {
        "kr": "on",
        "kr_options": {"budget": 0.4, "interval": 2, "drop_steps": 0, "rewarm_steps": 2},
        "target_modules": ["q_proj", "v_proj", "o_proj"],
    },
}


def settings(data: Path, output: Path, kind: str = "plain", **changes: Any) -> TrainSettings:
    """A run of this kind, with dropout: it draws random numbers all the time."""
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": output,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 2.0,
        "lora_dropout": 0.2,
        "learning_rate": 1e-2,
        "report_to": [],
    }
    values |= KINDS[kind] | changes
    if values.get("eval_data"):
        values["eval_data"] = str(data)
    return TrainSettings(**values)


@pytest.fixture(scope="module")
def whole(
    link: InProcessLink, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run of a kind that nothing happened to."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "run"
            train(settings(data, made[kind], kind), link)
        return made[kind]

    return get


class At(TrainerCallback):
    """Does something once, at an event of the training loop."""

    def __init__(self, event: str, step: int, act: Callable[..., None]) -> None:
        self.step, self.act, self.done = step, act, False
        setattr(self, event, self.happen)

    def happen(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        if state.global_step >= self.step and not self.done:
            self.done = True
            self.act(**things)


@contextmanager
def with_callback(callback: TrainerCallback) -> Iterator[list[Any]]:
    """Runs have it, as their last; yields their trainers."""
    build, trainers = training.build_trainer, []

    def wrapped(*args: Any) -> Any:
        trainers.append(build(*args))
        trainers[-1].add_callback(callback)
        return trainers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_trainer", wrapped)
        yield trainers


def check_ending(output: Path, steps: int) -> dict[str, Any]:
    """The last finished step is a checkpoint, and run.json says that the run ended, and how."""
    run: dict[str, Any] = json.loads((output / "run.json").read_text())
    newest = RunFolder(output).newest_complete()
    assert newest is not None and step_of(newest) == steps == run["steps"]
    assert run["status"] in ("failed", "interrupted")
    assert all(damage(folder) is None for folder in RunFolder(output).all_checkpoints())
    return run


def check_resumed(link: Any, data: Path, output: Path, kind: str, whole: Path) -> None:
    """The run that goes on ends as the one that nothing happened to, with the same evaluations."""
    run = train(settings(data, output, kind, resume=True), link)
    assert run["status"] == "finished" and run["steps"] == 6
    assert same(whole, output)
    one, other = (json.loads((path / "run.json").read_text()) for path in (whole, output))
    for name in ("train_loss", "eval_loss", "best_eval_loss", "started"):
        assert name == "started" or one[name] == other[name], name
    losses = [
        [
            (entry["step"], entry.get("loss"), entry.get("eval_loss"))
            for entry in map(json.loads, (path / "log.jsonl").read_text().splitlines())
            if "loss" in entry or "eval_loss" in entry
        ]
        for path in (whole, output)
    ]
    assert [e for e in losses[0] if e[2]] == [e for e in losses[1] if e[2]]


class Broken(Exception):
    """What a callback of somebody else raises."""


def broken(**_: Any) -> None:
    raise Broken("a callback failed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kind", ["plain", "evaluated", "kill and revive"])
def test_signals(
    link: InProcessLink,
    data: Path,
    tmp_path: Path,
    whole: Callable[[str], Path],
    number: int,
    kind: str,
) -> None:
    """Ctrl-C, SIGTERM and a terminal that hangs up let the step be finished, save it, and say so;
    an evaluation that belongs to the end of the epoch is not made in the middle of it.
    """
    output = tmp_path / "run"
    with with_callback(At("on_step_begin", 3, lambda **_: os.kill(os.getpid(), number))):
        run = train(settings(data, output, kind), link)
    assert run["status"] == "interrupted"
    check_ending(output, 4)
    check_resumed(link, data, output, kind, whole(kind))


# Where a callback may fail, at the step with 4 behind it, and which step is then the last finished.
EVENTS = {
    "on_step_begin": 4,
    "on_substep_end": 4,
    "on_pre_optimizer_step": 4,
    "on_optimizer_step": 4,
    "on_step_end": 4,
    "on_log": 4,
    "on_save": 6,
    "on_epoch_end": 6,
    "on_train_end": 6,
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", ["plain", "kill and revive"])
def test_an_exception_in_a_callback(
    link: InProcessLink,
    data: Path,
    tmp_path: Path,
    whole: Callable[[str], Path],
    event: str,
    kind: str,
) -> None:
    """Wherever a callback fails, also between an update and the count of it, nothing is lost and
    the error says what to type.
    """
    output = tmp_path / "run"
    with with_callback(At(event, 4, broken)), pytest.raises(Broken) as raised:
        train(settings(data, output, kind), link)
    run = check_ending(output, EVENTS[event])
    assert run["status"] == "failed" and run["error"] == "Broken"
    (note,) = raised.value.__notes__
    assert f"{EVENTS[event]} of {EVENTS[event]} finished steps are saved" in note
    assert note.endswith("continue with the same command and --resume")
    check_resumed(link, data, output, kind, whole(kind))
