"""What a run adds to each of trl's trainers: costs in the log, endings that lose nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from trl import SFTTrainer

from dlora.edge.spectral import initialize_spectral
from dlora.files import write_json
from dlora.kill_revive.callback import KillReviveCallback
from dlora.runs import KEPT_FILE, damage
from dlora.training.callbacks import AccountingCallback, StopOnDivergence, StopOnSignal
from dlora.training.checkpoints import (
    SaveByTime,
    newest,
    rotate_checkpoints,
    save_finished,
    sync_checkpoint,
)
from dlora.training.last_finished import LastFinished
from dlora.training.row_sizes import RowSizes
from dlora.training.tasks import Task

__all__ = ["SplitSFTTrainer", "SplitTrainer"]

_REFERENCE: Final = "ref"
"""trl's name for its copy of the adapter."""


class SplitTrainer(Trainer):
    """A trainer whose log also says what the split costs, and whose endings lose nothing.

    Stands before one of trl's trainers among the bases of a class.
    """

    task: ClassVar[Task] = "sft"
    changed_in_steps: ClassVar[Sequence[str]] = ()
    """Attributes that a step replaces, and that an undone step gives back."""

    def __init__(
        self,
        *,
        accounting: AccountingCallback,
        kill_revive: KillReviveCallback | None = None,
        early_stopping: EarlyStoppingCallback | None = None,
        log_file: Path,
        save_minutes: float = 0.0,
        spectral_start: bool = False,
        **arguments: Any,
    ) -> None:
        """`arguments` are trl's trainer's. `log_file` holds the whole log, a JSON object a line."""
        self.accounting, self.kill_revive, self.log_file = accounting, kill_revive, log_file
        self._spectral_start = spectral_start
        self.stop = StopOnSignal()
        self.finished = LastFinished(kill_revive, self.changed_in_steps)
        self.run: dict[str, Any] = {}
        """What run.json holds; every checkpoint keeps it."""
        self.rows: dict[str, dict[str, Any]] = {}
        """Digests of the rows, by the setting that they come from."""
        self.sizes: dict[str, RowSizes] = {}
        """Their lengths, by the same."""
        self._lines_written: int | None = None

        super().__init__(callbacks=[early_stopping] if early_stopping else [], **arguments)
        # Ours, as transformers' own also removes folders that only begin like a checkpoint.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None

        # Whoever runs it shows how far it is.
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (
            *(accounting, self.stop, SaveByTime(save_minutes), self.finished),
            *(StopOnDivergence(), kill_revive),
        ):
            if callback is not None:
                self.add_callback(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add costs since the last entry: bytes, round trips, waiting and FLOPs.

        They are those of steps, or of an evaluation.
        """
        if "loss" in logs or "eval_loss" in logs:
            logs.update(self.accounting.since_last_log())
        if self.kill_revive is not None and self.kill_revive.reviver is not None and "loss" in logs:
            reviver = self.kill_revive.reviver
            logs["active_units"] = len(reviver.active)
            logs["cost_share"] = reviver.active_share
            logs["cost_share_so_far"] = reviver.spent / max(1, self.state.global_step)

        super().log(logs, start_time)
        self._write_log()

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Nothing, where a run is resumed that had no step left."""
        self.finished.note(self)
        patience = [
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        ]
        if self.state.global_step >= self.state.max_steps or any(patience):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """A micro-batch; the first of a run turns A before it, where that was asked for.

        Kill and Revive has chosen its first set by then: only that is exchanged.
        """
        if self._spectral_start and self.state.global_step == 0:
            self._spectral_start = False
            names = ("input_ids", "attention_mask", "labels")
            initialize_spectral(self.model, {name: inputs[name] for name in names})
            if self.kill_revive is not None and self.kill_revive.reviver is not None:
                self.kill_revive.reviver.measure_anew()
        return super().training_step(model, inputs, *args, **options)

    def _evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        self.finished.evaluating = True
        metrics: dict[str, float] = super()._evaluate(*args, **options)
        return metrics

    def _determine_best_metric(self, *args: Any, **options: Any) -> bool:
        """With `keep_best` save every adapter that is the best so far, whatever else is saved."""
        is_best = bool(super()._determine_best_metric(*args, **options))
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """The end of a step, or of an epoch."""
        super()._maybe_log_save_evaluate(*args, **options)
        if self.finished.may_note(self):
            self.finished.note(self)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Remove older checkpoints only when the new one is on the disk.

        What is ours goes first: transformers writes last what makes a checkpoint complete.
        """
        folder = newest(self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.accounting.save(folder)
            write_json(folder / KEPT_FILE, self.run | {"seconds": self.accounting.total_s})
            if self.kill_revive is not None:
                self.kill_revive.save(folder)
            self.save_more(folder)
            super()._save_checkpoint(model, trial)
            sync_checkpoint(self)
        except BaseException:
            if damage(folder) is not None:  # a full disk: make room again
                shutil.rmtree(folder, ignore_errors=True)
            raise
        best = self.state.best_model_checkpoint
        rotate_checkpoints(
            folder.parent,
            limit=self.save_total_limit,
            kept={folder} | ({Path(best)} if best else set()),
        )

    @property
    def micro_batches(self) -> int:
        """Of an epoch of training."""
        return self.sizes["data"].micro_batches(self.args.per_device_train_batch_size)

    def save_more(self, folder: Path) -> None:
        """Keep with a checkpoint what the task's steps need beside weights and random states."""

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter that was trained, and no copy of it that a loss compared with."""
        self.drop_reference()
        self.save_model(str(folder))

    def begin_reference(self, *, is_new: bool) -> None:
        """Let the reference be the adapter as it begins, or none where it adds nothing yet.

        trl copies what has ".default." in its name: not so trained rows, whose name ends with it.
        And it drops nothing, so that it is the same in every pass.
        """
        if is_new:
            self.drop_reference()
        if _REFERENCE not in self.model.peft_config:
            return
        for name, parameter in self.model.named_parameters():
            if name.endswith(".default"):
                copied = self.model.get_parameter(name.removesuffix("default") + _REFERENCE)
                copied.data.copy_(parameter.data)
        for module in self.model.modules():
            if _REFERENCE in (dropouts := getattr(module, "lora_dropout", {})):
                dropouts[_REFERENCE] = nn.Identity()

    def drop_reference(self) -> None:
        """Let the model without an adapter be the reference, and no copy of the adapter."""
        if _REFERENCE in self.model.peft_config:
            self.model.delete_adapter(_REFERENCE)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside the checkpoints: the run writes one, of what it was and cost."""

    def save_finished(self) -> bool:
        """On any ending: save the last finished step, where it is not yet; whether it is saved."""
        return save_finished(self, self.finished)

    def _write_log(self) -> None:
        # All of it at first, as a resumed run takes its history from its checkpoint.
        lines = [json.dumps(entry) + "\n" for entry in self.state.log_history]
        if self._lines_written is None or self._lines_written > len(lines):
            self.log_file.write_text("".join(lines), encoding="utf-8")
        else:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.writelines(lines[self._lines_written :])
        self._lines_written = len(lines)


class SplitSFTTrainer(SplitTrainer, SFTTrainer):
    """Of task sft."""
