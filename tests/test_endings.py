"""However a run ends, its last finished step is a checkpoint, and what goes on from there equals a
run that was never stopped.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
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


# All runs have 3 steps of 2 micro-batches in an epoch, and save at the ends of epochs alone.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"epochs": 5.0},
    "evaluated by steps": {"epochs": 3.0, "eval_data": True, "eval_steps": 2, "save_steps": 8},
    "kill and revive, evaluated": {
        "epochs": 4.0,
        "eval_data": True,
        "kr": "on",
        "kr_options": {"budget": 0.4, "interval": 2, "drop_steps": 0, "rewarm_steps": 2},
        "target_modules": ["q_proj", "v_proj", "o_proj"],
    },
}


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """The trainer collects garbage whenever it starts: not among all that is loaded here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def settings(data: Path, output: Path, kind: str = "plain", **changes: Any) -> TrainSettings:
    """A run of this kind, with dropout: it draws random numbers all the time."""
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": output,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
        "learning_rate": 1e-2,
        "report_to": [],
        "give_up_after_s": 0.0,
    }
    values |= KINDS[kind] | changes
    if values.get("eval_data"):
        values["eval_data"] = str(data)
    return TrainSettings(**values)


class At(TrainerCallback):
    """Does something once, at an event of the training loop."""

    def __init__(self, event: str, step: int, act: Callable[..., None]) -> None:
        self.step, self.act, self.done = step, act, False
        setattr(self, event, self.happen)

    def happen(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """At the first such event with `step` steps behind it."""
        if state.global_step >= self.step and not self.done:
            self.done = True
            self.act(control=control, **things)


class Failing:
    """A link that, from a moment on, does not open streams any more."""

    def __init__(self, link: InProcessLink) -> None:
        self.link, self.error = link, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.link.open()


class Broken(Exception):
    """What a callback of somebody else raises."""


@dataclass
class Ending:
    """What ends a run, and what is then there."""

    name: str
    event: str
    step: int
    """With so many finished steps behind it..."""
    saved: int
    """...and so many in the newest checkpoint afterwards."""
    act: Callable[..., None]
    raises: type[BaseException] | None = None
    status: str = "failed"
    lost: Exception | None = field(default=None)
    """What the link raises from then on."""


def broken(**_: Any) -> None:
    raise Broken("a callback failed")


def send(*numbers: int) -> Callable[..., None]:
    """Signals to this process, as a person at the keyboard would send them."""

    def act(**_: Any) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def spoil(model: Any = None, **_: Any) -> None:
    """A gradient that is no number."""
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))


def full_disk(control: Any, **_: Any) -> None:
    """A checkpoint is due, and no file can grow beyond this many bytes, as on a full disk."""
    control.should_save = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


def nothing(**_: Any) -> None:
    """The link does it."""


TWICE = (KeyboardInterrupt, "interrupted")
ENDINGS: dict[str, list[Ending]] = {
    "plain": [
        Ending("Ctrl-C", "on_step_begin", 1, 2, send(signal.SIGINT), None, "interrupted"),
        Ending("an exception between micro-batches", "on_substep_end", 3, 3, broken, Broken),
        Ending("SIGTERM", "on_step_begin", 4, 5, send(signal.SIGTERM), None, "interrupted"),
        Ending("an exception after an update", "on_optimizer_step", 6, 6, broken, Broken),
        Ending("SIGHUP", "on_substep_end", 6, 7, send(signal.SIGHUP), None, "interrupted"),
        Ending("a full disk", "on_step_end", 9, 7, full_disk, Exception),
        Ending("an exception after a step", "on_step_end", 9, 9, broken, Broken),
        Ending("no number", "on_substep_end", 10, 10, spoil, DivergedError),
        Ending("Ctrl-C twice", "on_optimizer_step", 11, 11, send(2, 2), *TWICE),
        Ending("a server away for good", "on_substep_end", 12, 12, nothing, PeerLost),
        Ending("a cloud that refuses", "on_step_begin", 13, 13, nothing, PeerError),
        Ending("an exception at the end", "on_train_end", 15, 15, broken, Broken),
    ],
    "evaluated by steps": [
        Ending("Ctrl-C at an evaluation", "on_step_begin", 3, 4, send(2), None, "interrupted"),
        Ending("lost in an evaluation", "on_step_end", 6, 5, nothing, PeerLost),
    ],
    "kill and revive, evaluated": [
        Ending("Ctrl-C in an epoch", "on_step_begin", 1, 2, send(2), None, "interrupted"),
        Ending("an exception after a decision", "on_step_begin", 4, 4, broken, Broken),
        Ending("lost in an evaluation", "on_epoch_end", 6, 5, nothing, PeerLost),
        Ending("an exception after one", "on_evaluate", 9, 8, broken, Broken),
        Ending("an exception after an update", "on_optimizer_step", 10, 10, broken, Broken),
    ],
}


def run_until(ending: Ending, chosen: TrainSettings, link: Any) -> BaseException | None:
    """Train, or go on, until the ending; return what was raised."""
    failing = Failing(link)

    def act(**things: Any) -> None:
        if ending.raises in (PeerLost, PeerError):
            failing.error = ending.raises("nobody there")
        ending.act(**things)

    raised = None
    with with_callback(At(ending.event, ending.step, act)):
        try:
            train(chosen, failing)
        except BaseException as error:
            raised = error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert isinstance(raised, ending.raises or type(None)), ending.name
    return raised


@contextmanager
def with_callback(callback: TrainerCallback) -> Iterator[None]:
    """Runs have it, as their last."""
    build = training.build_trainer

    def wrapped(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(callback)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_trainer", wrapped)
        yield


def evaluations(output: Path) -> list[tuple[int, float]]:
    """Step and loss of every evaluation."""
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_no_ending_loses_a_step(link: InProcessLink, data: Path, tmp_path: Path, kind: str) -> None:
    """A run that ends again and again, each time in another way, has each time its last finished
    step as a checkpoint, says how it ended and what to type, and ends with the bits of one that
    nothing happened to.
    """
    whole, output = tmp_path / "whole", tmp_path / "run"
    want = train(settings(data, whole, kind), link)
    started = ""
    for ending in ENDINGS[kind]:
        error = run_until(ending, settings(data, output, kind, resume=bool(started)), link)

        # What is on the disk.
        run = json.loads((output / "run.json").read_text())
        assert (run["status"], run["started"]) == (ending.status, started or run["started"])
        newest = RunFolder(output).newest_complete()
        assert newest is not None and step_of(newest) == ending.saved, ending.name
        assert all(damage(folder) is None for folder in RunFolder(output).all_checkpoints())
        started = run["started"]

        # What is said.
        if error is not None:
            assert f"{ending.saved} of " in error.__notes__[-1], ending.name
            assert ("--adapter" if ending.name == "no number" else "--resume") in error.__notes__[
                -1
            ]

    got = train(settings(data, output, kind, resume=True), link)
    assert (got["status"], got["steps"]) == ("finished", want["steps"])
    assert same(whole, output) and evaluations(whole) == evaluations(output)
    assert got["best_eval_loss"] == want["best_eval_loss"] and got["started"] == started
    assert got.get("kill_revive") == want.get("kill_revive")
