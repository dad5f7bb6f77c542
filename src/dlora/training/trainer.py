"""The trainer of a run: trl's SFTTrainer with rows that fit, and a log that knows the costs.

`build_trainer` takes settings, model and tokenizer to a trainer that may begin. What cannot work
is refused here, with the setting or the data's file and line: rows that are too long, batches that
the server would not take, an optimizer that is not installed.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, Final

from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from trl import SFTConfig, SFTTrainer

from dlora.edge.model import SplitModel
from dlora.edge.templates import tokenising
from dlora.errors import UsageError
from dlora.files import write_json
from dlora.formulas import pass_bytes
from dlora.kill_revive.callback import KillReviveCallback
from dlora.proto import dlora_pb2 as pb
from dlora.runs import KEPT_FILE, RunFolder, damage
from dlora.training.callbacks import AccountingCallback, StopOnDivergence, StopOnSignal
from dlora.training.checkpoints import (
    SaveByTime,
    newest,
    rotate_checkpoints,
    save_finished,
    sync_checkpoint,
)
from dlora.training.last_finished import LastFinished
from dlora.training.rows import check_same_rows, digest, fit_rows, rows_of
from dlora.training.settings import TrainSettings

__all__ = ["SplitTrainer", "build_trainer"]

log = logging.getLogger(__name__)

_MIB: Final = 2**20


class SplitTrainer(SFTTrainer):
    """SFTTrainer whose log also says what the split costs, and whose endings lose nothing."""

    def __init__(
        self,
        *,
        accounting: AccountingCallback,
        kill_revive: KillReviveCallback | None = None,
        early_stopping: EarlyStoppingCallback | None = None,
        log_file: Path,
        save_minutes: float = 0.0,
        **arguments: Any,
    ) -> None:
        """`arguments` are SFTTrainer's. `log_file` holds the whole log, a JSON object a line."""
        self.accounting, self.kill_revive, self.log_file = accounting, kill_revive, log_file
        self.stop, self.finished = StopOnSignal(), LastFinished(kill_revive)
        self.run: dict[str, Any] = {}
        """What run.json holds; every checkpoint keeps it."""
        self.rows: dict[str, dict[str, Any]] = {}
        """Digests of the rows, by the setting that they come from."""
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


def build_trainer(
    settings: TrainSettings, model: SplitModel, tokenizer: PreTrainedTokenizerBase
) -> SplitTrainer:
    """The trainer, with data that is loaded, tokenised and known to fit.

    Raises UsageError for arguments, and DataError for rows, that cannot work.
    """
    (rows, origins), (eval_rows, eval_origins) = rows_of(settings, tokenizer)
    try:
        arguments = SFTConfig(**trainer_arguments(settings))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"training arguments: {str(error).splitlines()[0]}") from error

    folder, config = RunFolder(settings.output), settings.kill_revive
    patience = settings.early_stopping_patience
    early_stopping = None if patience is None else EarlyStoppingCallback(patience)
    kill_revive = None if config is None else KillReviveCallback(config, folder.decisions_file)
    data = (rows, origins), (eval_rows, eval_origins)
    with tokenising(tokenizer, *data, refused="the trainer refused"):
        trainer = SplitTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            accounting=AccountingCallback(model.meter),
            kill_revive=kill_revive,
            early_stopping=early_stopping,
            log_file=folder.log_file,
            save_minutes=settings.save_minutes,
        )

    _check_optimizer(trainer)
    limits = model.link.description.limits
    trainer.train_dataset = fit_rows(trainer.train_dataset, origins, settings)
    _check_room(trainer.train_dataset, trainer.args, limits, training=True)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = fit_rows(trainer.eval_dataset, eval_origins, settings)
        _check_room(trainer.eval_dataset, trainer.args, limits, training=False)
    trainer.rows = _digests(trainer)
    check_same_rows(folder, trainer.rows)
    return trainer


def _digests(trainer: SplitTrainer) -> dict[str, dict[str, Any]]:
    """What the rows are, by the setting that they come from."""
    rows = {"data": trainer.train_dataset, "eval_data": trainer.eval_dataset}
    return {use: digest(dataset) for use, dataset in rows.items() if dataset is not None}


def trainer_arguments(settings: TrainSettings) -> dict[str, Any]:
    """These settings as arguments of trl.SFTConfig."""
    evaluates, eval_steps = settings.evaluates, settings.eval_steps
    save_steps = settings.save_steps or eval_steps
    return {
        # Optimizer and schedule.
        "learning_rate": settings.learning_rate,
        "optim": settings.optim,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        # How much, in which portions.
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "pad_to_multiple_of": settings.pad_to or None,
        "seed": settings.seed,
        # Evaluations, checkpoints, logs.
        "output_dir": str(RunFolder(settings.output).checkpoints),
        "eval_strategy": "no" if not evaluates else "steps" if eval_steps else "epoch",
        "eval_steps": eval_steps,
        "save_strategy": "steps" if save_steps else "epoch",
        "save_steps": save_steps or 500,
        "save_total_limit": settings.save_total_limit,
        "load_best_model_at_end": evaluates and settings.keep_best,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "prediction_loss_only": True,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": False,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": settings.report_to or "none",
        # Length is checked by `fit_rows`, with file and line.
        "max_length": None,
        "completion_only_loss": None,
        # The routers of a mixture are in the cloud: their own loss cannot be added here.
        "router_aux_loss_coef": 0.0,
        # Half precision is the cloud's choice; the adapter trains in fp32. There are no layers here
        # to checkpoint, and worker processes must not be forked while a gRPC channel is open.
        "use_cpu": settings.device == "cpu",
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    } | settings.trainer


def _check_optimizer(trainer: SplitTrainer) -> None:
    """Raises UsageError where optimizer or schedule want a package, or an argument of their own.

    Both are made, and dropped: the trainer makes its own once it knows the number of steps.
    """
    try:
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)  # any number will do
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"optim or lr_scheduler_type: {reason}") from error
    trainer.optimizer = trainer.lr_scheduler = None


def _check_room(rows: Dataset, arguments: SFTConfig, limits: pb.Limits, *, training: bool) -> None:
    """Raises UsageError if a batch of the longest rows, padded, is more than the server takes."""
    pad_to = arguments.pad_to_multiple_of
    longest = max(len(ids) for ids in rows["input_ids"])
    padded = math.ceil(longest / pad_to) * pad_to if pad_to else longest
    row = f"the longest row has {longest} tokens"
    if pad_to:
        row += f", {padded} with pad_to {pad_to}"
    if padded > limits.max_length:
        raise UsageError(
            f"{row}; this server takes sequences of up to {limits.max_length}: lower max_length "
            "and set overlong to drop or truncate" + (", or lower pad_to" if pad_to else "")
        )

    size = arguments.per_device_train_batch_size
    batch = min(size if training else arguments.per_device_eval_batch_size, len(rows))
    tokens, needed = batch * padded, 0.0
    if training:
        needed = pass_bytes(batch, padded, limits.bytes_per_token, limits.bytes_per_token_squared)
    if tokens > limits.max_tokens or needed > limits.max_inflight_bytes:
        raise UsageError(
            f"{row}; a batch of {batch} x {padded} makes {tokens} tokens and this server takes "
            f"{limits.max_tokens} a micro-batch; it needs {needed / _MIB:.0f} MiB of activations "
            f"of {limits.max_inflight_bytes / _MIB:.0f}: lower batch_size"
            + (" (and raise gradient_accumulation_steps as much)" if training else "")
        )
