"""Checkpoints that can be relied on: on the disk before older ones go, and saved on every ending.

A run that ends in the middle of a step, since the server is lost or refuses, keeps the steps that
were finished. Continued from there it equals one that was never stopped: random states are those
of the end of the last finished step, not of where the next one broke off.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from dlora.files import sync_folder
from dlora.runs import RunFolder, damage

__all__ = ["RandomStates", "save_finished", "sync_checkpoint"]

log = logging.getLogger(__name__)

_PREFIX: Final = "checkpoint-"


class RandomStates(TrainerCallback):
    """Notes the random states whenever a checkpoint could be saved, which is between two steps."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def note(self, *_: Any, **__: Any) -> None:
        """Note them as they are now."""
        self.states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            self.states["cuda"] = torch.cuda.get_rng_state_all()

    # An evaluation, too, may draw numbers; and so may what begins a new epoch.
    on_step_end = on_epoch_end = on_evaluate = on_log = on_save = note

    def restore(self) -> None:
        """Make them again what they were."""
        random.setstate(self.states["python"])
        np.random.set_state(self.states["numpy"])
        torch.set_rng_state(self.states["cpu"])
        if "cuda" in self.states:
            torch.cuda.set_rng_state_all(self.states["cuda"])


def sync_checkpoint(trainer: Trainer) -> None:
    """Let the newest checkpoint reach the disk; older ones may then be removed."""
    sync_folder(_newest(trainer))


def save_finished(trainer: Trainer, random_states: RandomStates, output: Path) -> bool:
    """Save the steps that were finished, where they are not yet; whether they are saved now.

    Never raises: this is called where the run ends with an error of its own.
    """
    folder = _newest(trainer)
    if folder.is_dir() and damage(folder) is None:
        return True
    if not trainer.state.global_step or not random_states.states:
        return False
    try:
        random_states.restore()
        trainer._save_checkpoint(trainer.model, None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    except (OSError, RuntimeError) as error:
        log.warning("%d finished steps could not be saved: %s", trainer.state.global_step, error)
        return False
    log.info(
        "%d finished steps are saved: --resume continues in %s",
        *(trainer.state.global_step, RunFolder(output).path),
    )
    return True


def _newest(trainer: Trainer) -> Path:
    """The folder of the checkpoint of this step, which may not be there."""
    return Path(str(trainer.args.output_dir)) / f"{_PREFIX}{trainer.state.global_step}"
