"""What a run was at the end of its last finished step, so that any ending can be saved.

A step is finished when its update is made and the evaluation that belongs to it is done. An ending
may come anywhere: in a forward pass, in the middle of an update, in a callback, in an evaluation.
What has changed by then goes back to where the next step began, and a run that continues from
there equals one that was never stopped.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from dlora.kill_revive.callback import KillReviveCallback

__all__ = ["LastFinished", "evaluates_at_epoch_end"]


class LastFinished(TrainerCallback):
    """Notes the run whenever a step is finished; `go_back` makes it so again.

    Random states, counters and Kill and Revive are noted at the end of every step, and weights too
    where Kill and Revive may drop some before the next update. Weights, optimizer and schedule are
    copied before an update, and the copy is dropped when the step is finished.
    """

    def __init__(
        self, kill_revive: KillReviveCallback | None, attributes: Sequence[str] = ()
    ) -> None:
        """`attributes` of the trainer change in a step as well. They are replaced, not changed."""
        self.kill_revive, self.attributes = kill_revive, attributes
        self.step = 0
        """Number of finished steps."""
        self.epoch_ended = False
        self.evaluating = False
        """An evaluation has begun, and what follows from it is not done."""
        self._random: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        self._log_length = 0
        self._flos = 0.0
        self._own: dict[str, Any] = {}
        self._states: list[tuple[Any, dict[str, Any]]] = []
        self._weights: list[Tensor] | None = None
        self._before_update: tuple[list[Tensor], dict[str, Any], dict[str, Any]] | None = None

    def note(self, trainer: Trainer) -> None:
        """A step is finished, with all that belongs to it; or the run begins."""
        state = trainer.state
        self.step, self.evaluating, self._before_update = state.global_step, False, None
        self._random = _random_states()

        self._counters, self._log_length = dict(vars(state)), len(state.log_history)
        self._flos = trainer.current_flos
        self._own = {name: getattr(trainer, name) for name in self.attributes}
        self._states = [
            (callback, callback.state()["attributes"])
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, ExportableState)
        ]
        if self.kill_revive is not None:
            self.kill_revive.note()
            self._weights = _copies(trainer.optimizer)

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Copy what the update is going to change."""
        self._before_update = (
            _copies(optimizer),
            copy.deepcopy(optimizer.state_dict()),
            copy.deepcopy(lr_scheduler.state_dict()),
        )

    def may_note(self, trainer: Trainer) -> bool:
        """Whether nothing of the newest step is to come: its evaluation may be the epoch's."""
        state = trainer.state
        in_epoch_end = self.epoch_ended or not evaluates_at_epoch_end(trainer.args, state)
        return in_epoch_end and state.global_step > 0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """An epoch is under way."""
        self.epoch_ended = False

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """What follows is the end of the epoch."""
        self.epoch_ended = True

    def go_back(self, trainer: Trainer) -> None:
        """Undo what was begun after the last finished step.

        If the newest update is made, and no evaluation is due, that step counts as finished.
        """
        if not self._random:  # the run ended before it began
            return
        due = trainer.control.should_evaluate or self.evaluating
        due = due or evaluates_at_epoch_end(trainer.args, trainer.state)
        if trainer.state.global_step > self.step and not due:
            self.note(trainer)
            return

        weights = self._weights
        if self._before_update is not None:
            before, optimizer, schedule = self._before_update
            weights = before if weights is None else weights
            trainer.optimizer.load_state_dict(optimizer)
            trainer.lr_scheduler.load_state_dict(schedule)
        if weights is not None:
            _put_back(weights, trainer.optimizer)

        vars(trainer.state).update(self._counters)
        trainer.state.log_history = trainer.state.log_history[: self._log_length]
        trainer.current_flos = self._flos
        vars(trainer).update(self._own)
        for callback, attributes in self._states:
            vars(callback).update(attributes)
        if self.kill_revive is not None:
            self.kill_revive.go_back()
        _set_random_states(self._random)


def evaluates_at_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether an evaluation follows this step since it is the last of its epoch, or of the run."""
    last = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
    return bool(args.eval_strategy == IntervalStrategy.EPOCH and state.global_step and last)


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copies(optimizer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(optimizer)]


@torch.no_grad()
def _put_back(weights: list[Tensor], optimizer: Any) -> None:
    for parameter, weight in zip(_parameters(optimizer), weights, strict=True):
        parameter.copy_(weight)


def _random_states() -> dict[str, Any]:
    """Those that a checkpoint keeps."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
