"""However a run ends, its last finished step is a checkpoint, and what goes on from there equals a
run that was never stopped.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import NO_DRAIN
from helpers import same
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

import dlora
from dlora import runs
from dlora.cli.train_screen import shown
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import Access, GrpcLink
from dlora.embedded import InProcessLink
from dlora.errors import DivergedError, PeerError, PeerLost, UsageError
from dlora.files import read_secret, write_private
from dlora.runs import RunFolder, damage, read_kept, step_of
from dlora.server import keys
from dlora.server.identities import Identities
from dlora.server.server import Server
from dlora.training import run as training
from dlora.training.checkpoints import SaveByTime
from dlora.training.run import train
from dlora.training.settings import TrainSettings


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


def test_tokens_are_replaced_while_a_run_goes_on(
    link: InProcessLink,
    data: Path,
    tmp_path: Path,
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A token that is revoked ends a run like a server that stays away; one that is replaced in its
    file does not end it. Both runs have the bits of one that nothing happened to.
    """
    folder, file = tmp_path / "keys", tmp_path / "token"
    keys.make_authority(folder, ["127.0.0.1"], 2)
    names = []

    def put_token() -> None:
        name, token = keys.add_token(folder, "alice", 1)
        names.append(name)
        write_private(file, token.encode())

    def reach() -> GrpcLink:
        access = Access(token=read_secret(file), token_file=file)
        return dlora.connect(server.address, access=access, cache=tmp_path / "cache")

    def revoke(**_: Any) -> None:
        keys.revoke(folder, names[-1])
        while True:  # the server looks at the file once a second
            time.sleep(0.3)
            try:
                reach().close()
            except PeerError:
                return

    def rotate(**_: Any) -> None:
        revoke()
        put_token()

    train(settings(data, tmp_path / "whole", epochs=1.0), link)
    put_token()
    identities = Identities(folder / "identities.json")
    with Server(
        cloud_models("llama"), tokenizer, identities=identities, options=NO_DRAIN
    ) as server:
        with closing(reach()) as mine, with_callback(At("on_substep_end", 2, rotate)):
            patient = settings(data, tmp_path / "rotated", epochs=1.0, give_up_after_s=20.0)
            run = train(patient, mine)
        assert run["status"] == "finished" and run["cost"]["retries"] > 0
        assert same(tmp_path / "whole", tmp_path / "rotated")

        revoked = settings(data, tmp_path / "revoked", epochs=1.0)
        with (
            closing(reach()) as mine,
            with_callback(At("on_substep_end", 2, revoke)),
            pytest.raises(PeerLost, match="does not take the token of .*put a valid one there"),
        ):
            train(revoked, mine)
        newest = RunFolder(tmp_path / "revoked").newest_complete()
        assert newest is not None and step_of(newest) == 2
        put_token()
        time.sleep(1.5)
        with closing(reach()) as mine:
            train(replace(revoked, resume=True), mine)
    assert same(tmp_path / "whole", tmp_path / "revoked")


def test_a_run_with_nothing_left_is_finished(
    link: InProcessLink, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose last checkpoint is its last step, in the middle of an epoch, is finished by
    --resume without another step, also where run.json is gone and somebody keeps a copy of a
    checkpoint there. Seconds and start are those of the whole.
    """
    output = tmp_path / "run"
    chosen = settings(data, output, max_steps=4, record=4, save_total_limit=1)
    folder = RunFolder(output)
    with with_callback(At("on_train_end", 4, broken)), pytest.raises(Broken):
        train(replace(chosen, save_steps=1, record=4), link)
    earlier = json.loads((output / "run.json").read_text())
    for name in ("checkpoint-backup", "checkpoint-4-backup"):
        shutil.copytree(folder.checkpoints / "checkpoint-4", folder.checkpoints / name)
    (output / "run.json").unlink()

    again = replace(chosen, save_steps=1, resume=True)
    with pytest.raises(UsageError, match="these settings differ from .*dlora_run.json: r"):
        train(replace(again, r=3), link)
    with caplog.at_level("INFO"):
        run = train(again, link)
    assert (run["status"], run["steps"]) == ("finished", 4)
    kept = read_kept(folder.checkpoints / "checkpoint-4")
    assert run["started"] == earlier["started"] and run["seconds"] >= kept["seconds"] > 0
    assert run["cost"]["micro_batches"] == earlier["cost"]["micro_batches"] == 8
    assert same(output, folder.checkpoints / "checkpoint-4")
    left = sorted(path.name for path in folder.checkpoints.glob("checkpoint*"))
    assert left == ["checkpoint-4", "checkpoint-4-backup", "checkpoint-backup"]
    assert "all 4 micro-batches to record were recorded before" in caplog.text


def test_an_error_before_the_first_micro_batch_shows_itself(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """What fails when the loop begins is what is raised, and run.json says that the run ended."""
    with with_callback(At("on_train_begin", 0, broken)), pytest.raises(Broken) as raised:
        train(settings(data, tmp_path / "run"), link)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["status"], run["error"], run["steps"]) == ("failed", "Broken", 0)
    assert "no step is saved" in raised.value.__notes__[-1]


def test_an_ending_is_written_on_a_full_disk(tmp_path: Path) -> None:
    """Where run.json cannot be written anew it does not stay at "running"."""
    folder = RunFolder(tmp_path)
    folder.write({"status": "running", "settings": {"r": 8}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
        folder.write_ending({"status": "failed", "settings": {"r": 8}}, {"steps": 3})
    assert json.loads(folder.run_file.read_text()) == {"status": "failed", "settings": {"r": 8}}


def test_checkpoints_by_time() -> None:
    """Ten minutes after the last checkpoint another is asked for, whatever the strategy is; at an
    epoch's end it waits for the evaluation there.
    """
    now = [0.0]
    saver = SaveByTime(10.0, clock=lambda: now[0])
    state, control = TrainerState(max_steps=9, global_step=1, epoch=0.5), TrainerControl()
    evaluated = SimpleNamespace(eval_strategy=IntervalStrategy.EPOCH)
    saver.on_train_begin(evaluated, state, control)
    asked = []
    for now[0], state.epoch in ((599, 0.5), (600, 0.6), (1199, 0.7), (1200, 1.0)):
        saver.on_step_end(evaluated, state, control)
        asked.append(control.should_save)
        if control.should_save:
            saver.on_save(evaluated, state, control)
        control.should_save = False
    assert asked == [False, True, False, False]
    saver.on_epoch_end(evaluated, state, control)
    assert control.should_save
    assert TrainSettings(server="-", data="-", output=Path("new")).save_minutes == 10.0


def test_a_terminal_that_is_gone_costs_no_step(
    link: InProcessLink, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody reads standard error any more, as behind a pipe whose reader has died, the
    finished steps are saved all the same, and run.json says how the run ended.
    """

    def gone(self: Any) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("dlora.cli.train_screen.TrainScreen.close", gone)
    output = tmp_path / "run"
    asked = settings(data, output, max_steps=4)
    at = At("on_step_begin", 2, broken)
    with with_callback(at), pytest.raises(Broken), shown(asked) as screen:
        train(asked, link, screen)
    folder = RunFolder(output)
    assert step_of(folder.last_checkpoint()) == 2
    assert json.loads(folder.run_file.read_text())["status"] != "running"
