"""Checkpoints that can be relied on: on the disk before older ones go, and saved on every ending.

`SaveByTime` asks for one every few minutes, `save_finished` makes the one that an ending needs,
and `rotate_checkpoints` removes older ones.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.files import sync_folder
from dlora.runs import RunFolder, checkpoint_of, damage
from dlora.training.last_finished import LastFinished, evaluates_at_epoch_end

__all__ = ["SaveByTime", "newest", "rotate_checkpoints", "save_finished", "sync_checkpoint"]

log = logging.getLogger(__name__)


class SaveByTime(TrainerCallback):
    """A checkpoint after so many minutes, beside those after epochs or steps.

    Where an evaluation follows at the end of an epoch, every checkpoint of that step waits for it:
    a run that continued from before it would not repeat it.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`minutes` 0: never by time."""
        self.every_s, self.clock = 60 * minutes, clock
        self._saved_at = clock()
        self._waits = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The time begins."""
        self._saved_at = self.clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint, if it is time."""
        if self.every_s and self.clock() - self._saved_at >= self.every_s:
            control.should_save = True
        if evaluates_at_epoch_end(args, state):
            self._waits, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Ask for what had to wait."""
        control.should_save = control.should_save or self._waits
        self._waits = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The time begins again."""
        self._saved_at = self.clock()


def sync_checkpoint(trainer: Trainer) -> None:
    """Let the newest checkpoint reach the disk; older ones may then be removed."""
    sync_folder(newest(trainer))


def rotate_checkpoints(folder: Path, *, limit: int | None, kept: set[Path]) -> None:
    """Keep `limit` checkpoints, the newest, and those in `kept` whatever the limit is.

    Only folders that have a checkpoint's name are looked at.
    """
    if not limit:
        return
    all_of_them = RunFolder(folder.parent).all_checkpoints()
    room = max(0, limit - len(kept & set(all_of_them)))
    others = [path for path in all_of_them if path not in kept]
    for path in others[: max(0, len(others) - room)]:
        shutil.rmtree(path, ignore_errors=True)


def save_finished(trainer: Trainer, finished: LastFinished) -> bool:
    """Save the steps that were finished, where they are not yet; whether they are saved now.

    Never raises: this is called where the run ends with an error of its own.
    """
    try:
        finished.go_back(trainer)
        if not trainer.state.global_step:
            return False
        folder = newest(trainer)
        if folder.is_dir() and damage(folder) is None:
            return True
        trainer._save_checkpoint(trainer.model, None)
    except Exception as error:  # whatever it is: the run's own error is what counts
        log.warning("%d finished steps could not be saved: %s", trainer.state.global_step, error)
        return False
    return True


def newest(trainer: Trainer) -> Path:
    """The folder of the checkpoint of this step, which may not be there."""
    return checkpoint_of(Path(str(trainer.args.output_dir)), trainer.state.global_step)
