"""Checkpoints after crashes, power cuts, lost servers and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import same

from dlora.embedded import InProcessLink
from dlora.errors import PeerLost
from dlora.runs import RunFolder, damage, step_of
from dlora.training import split_trainer as trainer_module
from dlora.training.checkpoints import rotate_checkpoints
from dlora.training.run import train
from dlora.training.settings import TrainSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows of prompt and completion."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"parcel {n * 37 % 91}:", "completion": f" desk {n % 4}"} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def settings(data: Path, output: Path, **changes: Any) -> TrainSettings:
    """Two epochs of 3 steps of 2 micro-batches, with dropout; saved at the epochs' ends."""
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
        "save_steps": 100,
    }
    return TrainSettings(**(values | changes))


@pytest.fixture(scope="module")
def whole(link: InProcessLink, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(settings(data, output), link)
    return output


class Ending:
    """A link that fails from its `after`th micro-batch on."""

    def __init__(self, link: InProcessLink, after: int, fail: Callable[[], None]) -> None:
        self.link, self.left, self.fail = link, after, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        self.left -= 1
        if self.left < 0:
            self.fail()
        return self.link.open()


def _lost_and_stopped() -> None:
    """The server is lost, and then the user stops the run."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise PeerLost("nobody there")


@pytest.mark.parametrize("after", [7])
def test_a_signal_while_the_server_is_lost_saves_at_once(
    link: InProcessLink, data: Path, tmp_path: Path, whole: Path, after: int
) -> None:
    """SIGTERM while a lost server is waited for ends the run in a moment, and it goes on from the
    last finished step as if nothing had been, also from the middle of a step and of an epoch.
    """
    started = time.monotonic()
    output = tmp_path / "run"
    run = train(settings(data, output), Ending(link, after, _lost_and_stopped))
    assert time.monotonic() - started < 60  # give_up_after_s is 600
    assert run["status"] == "interrupted" and run["steps"] == after // 2
    run = train(settings(data, output, resume=True), link)
    assert run["status"] == "finished" and run["steps"] == 6
    assert same(whole, output)


def test_a_run_without_a_finished_step_has_nothing_to_save(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """Stopped before the first step ends, the run says why it ended, and no checkpoint is made."""
    with pytest.raises(PeerLost, match="stopped while the server was lost"):
        train(settings(data, tmp_path / "run"), Ending(link, 1, _lost_and_stopped))
    assert RunFolder(tmp_path / "run").last_checkpoint() is None


FILES = (
    "adapter_model.safetensors adapter_config.json optimizer.pt scheduler.pt rng_state.pth "
    "trainer_state.json dlora_meter.json"
).split()


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_one_file_cut_in_half_is_passed_over(
    link: InProcessLink,
    data: Path,
    tmp_path: Path,
    whole: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever file a crash has cut, the checkpoint before is taken, with a word."""
    folder = RunFolder(tmp_path)
    source = whole / "checkpoints"
    newest = max(source.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    older = folder.checkpoints / "checkpoint-1"
    damaged = folder.checkpoints / "checkpoint-2"
    shutil.copytree(newest, older)
    shutil.copytree(newest, damaged)
    assert damage(damaged) is None
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    assert folder.last_checkpoint() == older
    assert f"checkpoint-2 is not complete ({name}" in caplog.text


def test_a_changed_byte_in_the_optimizer_is_noticed(whole: Path, tmp_path: Path) -> None:
    """Not only a missing end: torch's files carry a sum of every part."""
    newest = next((whole / "checkpoints").glob("checkpoint-*"))
    shutil.copytree(newest, tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6/optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "optimizer.pt" in (damage(tmp_path / "checkpoint-6") or "")
    (tmp_path / "checkpoint-6/scheduler.pt").unlink()
    assert damage(tmp_path / "checkpoint-6") == "scheduler.pt is missing"


def test_older_checkpoints_go_when_the_newer_is_on_the_disk(
    link: InProcessLink, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every removal of a checkpoint the newer one has been synced, and the limit is kept."""
    synced: list[str] = []
    real_sync, real_rotate = trainer_module.sync_checkpoint, trainer_module.rotate_checkpoints

    def sync(trainer: Any) -> None:
        real_sync(trainer)
        synced.append(f"checkpoint-{trainer.state.global_step}")

    def rotate(folder: Path, **options: Any) -> None:
        newest = max(folder.glob("checkpoint-*"), key=step_of)
        assert newest.name in synced
        real_rotate(folder, **options)

    monkeypatch.setattr(trainer_module, "sync_checkpoint", sync)
    monkeypatch.setattr(trainer_module, "rotate_checkpoints", rotate)
    train(settings(data, tmp_path / "run", save_steps=1, save_total_limit=2), link)
    assert len(synced) == 6
    assert len(list((tmp_path / "run/checkpoints").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("limit", [1, 2, 5, 8])
def test_as_many_checkpoints_are_kept_as_was_said(tmp_path: Path, limit: int) -> None:
    """After each of twelve checkpoints there are the newest of them, as many as the limit says, and
    the best one.
    """
    folder = tmp_path / "checkpoints"
    for step in range(1, 13):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        rotate_checkpoints(folder, limit=limit, kept={folder / "checkpoint-2"})
        left = sorted(int(path.name.rpartition("-")[2]) for path in folder.iterdir())
        newest = [one for one in range(1, step + 1) if one != 2]
        room = limit - (step >= 2)
        want = newest[len(newest) - room :] if room < len(newest) else newest
        assert left == sorted([*want, *([2] if step >= 2 else [])])
