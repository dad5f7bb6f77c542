"""A training run: settings in, adapter folder and run.json out, on trl's SFTTrainer.

output/adapter_config.json, adapter_model.safetensors   the adapter, as peft writes it
output/run.json                       settings, versions, costs, how it ended
output/log.jsonl                      one line for every log entry of the trainer, loss and costs
output/recording/                     with --record: frames and truth, see privacy/recording.py
output/kr.jsonl                       with Kill and Revive: why each unit is active or not
output/checkpoints/checkpoint-N/      what --resume continues from
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import peft
import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.data import load_rows
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel, get_peft_model, load_adapter, load_tokenizer
from dlora.edge.noise import Noise
from dlora.edge.responder import Wait
from dlora.errors import DataError, DivergedError, DLoRAError, UsageError
from dlora.files import write_json
from dlora.formulas import pass_bytes
from dlora.kill_revive.apply import KillReviveCallback
from dlora.privacy.recording import Recorder
from dlora.proto import dlora_pb2 as pb
from dlora.training.settings import TrainSettings

__all__ = ["AccountingCallback", "SplitTrainer", "train"]

log = logging.getLogger(__name__)

_METER_FILE: Final = "dlora_meter.json"
_MIB: Final = 2**20


def train(settings: TrainSettings, link: Link) -> dict[str, Any]:
    """Run, or continue, a training run; return what run.json holds.

    On the first Ctrl-C or SIGTERM the step is finished and saved, and "status" is
    "interrupted". Raises DLoRAError with a message for the user.
    """
    record = _prepare_output(settings, link)
    set_seed(settings.seed)
    tokenizer = load_tokenizer(link)
    checkpoint = _last_checkpoint(settings.output) if settings.resume else None
    recorder = Recorder(settings.output / "recording", settings.record) if settings.record else None
    model = _build_model(settings, link if recorder is None else recorder.link(link))
    trainer = _build_trainer(settings, model, tokenizer)
    if recorder is not None:
        recorder.number = _micro_batches_before(trainer, checkpoint)
        recorder.watch(model)
        if not recorder.active:
            log.warning(
                "nothing is recorded: the checkpoint is %d micro-batches into the run, and "
                "`record` asks for the first "
                "%d",
                *(recorder.number, recorder.count),
            )
    accounting = AccountingCallback(model.meter)
    trainer.remove_callback(ProgressCallback)
    for callback in (accounting, _Progress(), _StopOnSignal(), _StopOnDivergence()):
        trainer.add_callback(callback)
    trainer.accounting, trainer.log_file = accounting, settings.output / "log.jsonl"
    if (config := settings.kill_revive) is not None:
        trainer.kill_revive = KillReviveCallback(config, settings.output / "kr.jsonl")
        trainer.add_callback(trainer.kill_revive)
    if settings.resume:
        log.info("resuming from %s", checkpoint or "the start: there is no checkpoint yet")
    write_json(settings.output / "run.json", record)
    started = time.monotonic()
    try:
        with _stop_on_signals(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException as error:
        record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record["error"] = (
            str(error).splitlines()[0] if isinstance(error, DLoRAError) else type(error).__name__
        )
        write_json(settings.output / "run.json", record | _summary(trainer, started))
        raise
    trainer.save_model(str(settings.output))
    record["status"] = "interrupted" if trainer.stopped_by_signal else "finished"
    record |= _summary(trainer, started)
    write_json(settings.output / "run.json", record)
    return record


class SplitTrainer(SFTTrainer):
    """SFTTrainer whose log records also say what the split costs."""

    accounting: AccountingCallback | None = None
    kill_revive: KillReviveCallback | None = None
    stopped_by_signal = False
    log_file: Path | None = None
    _lines_written: int | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add bytes, round trips, waiting and FLOPs since the last record: those of steps, or of an
        evaluation.
        """
        if self.accounting is not None and ("loss" in logs or "eval_loss" in logs):
            logs.update(self.accounting.since_last_log())
        if self.kill_revive is not None and self.kill_revive.reviver is not None and "loss" in logs:
            reviver = self.kill_revive.reviver
            logs["active_units"] = len(reviver.active)
            logs["cost_share"] = reviver.active_share
            logs["cost_share_so_far"] = reviver.spent / max(1, self.state.global_step)
        super().log(logs, start_time)
        if self.log_file is not None:
            # All of it, as a resumed run takes its history from the checkpoint that it continues.
            lines = [json.dumps(entry) + "\n" for entry in self.state.log_history]
            if self._lines_written is None or self._lines_written > len(lines):
                self.log_file.write_text("".join(lines))
            else:
                with self.log_file.open("a") as file:
                    file.writelines(lines[self._lines_written :])
            self._lines_written = len(lines)


class AccountingCallback(TrainerCallback):
    """Meters per log record and in checkpoints. `total` spans all parts of a resumed run."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.before = Meter()  # of earlier parts of this run
        self.start = meter.copy()
        self.last, self.last_time = meter.copy(), time.monotonic()

    @property
    def total(self) -> Meter:
        """Everything since the run's first step."""
        return self.before + (self.meter - self.start)

    def since_last_log(self) -> dict[str, float]:
        """Costs since the previous call, as numbers for the log."""
        now, snapshot = time.monotonic(), self.meter.copy()
        cost, seconds = snapshot - self.last, max(now - self.last_time, 1e-9)
        self.last, self.last_time = snapshot, now
        return {
            "seconds": seconds,
            "tokens_per_second": cost.tokens / seconds,
            "sent_mb": cost.sent_bytes / 1e6,
            "received_mb": cost.received_bytes / 1e6,
            "round_trips": cost.round_trips,
            "wait_seconds": cost.wait_s,
            "cloud_seconds": cost.cloud_s,
            "edge_adapter_gflops": cost.adapter_flops / 1e9,
            "edge_head_gflops": cost.head_flops / 1e9,
            "cloud_gflops": (cost.cloud_forward_flops + cost.cloud_backward_flops) / 1e9,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        """Take up the meter of the checkpoint that this run continues from."""
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _METER_FILE
        if state.global_step and file.is_file():
            self.before = Meter.from_saved(json.loads(file.read_text()))
        self.start, self.last, self.last_time = (
            self.meter.copy(),
            self.meter.copy(),
            time.monotonic(),
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Keep the meter with the checkpoint."""
        write_json(
            Path(args.output_dir) / f"checkpoint-{state.global_step}" / _METER_FILE,
            asdict(self.total),
        )


class _Progress(ProgressCallback):
    """The trainer's bar, with the last record behind it instead of a line for each."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {float(logs['loss']):.3f}, {logs.get('tokens_per_second', 0):.0f} tok/s, "
                f"up {logs.get('sent_mb', 0):.1f} MB, down {logs.get('received_mb', 0):.1f} MB a "
                "step"
                + (
                    f", {logs['active_units']} active, {logs['cost_share']:.0%} of FT"
                    if "cost_share" in logs
                    else ""
                )
            )
        elif "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step}: eval loss {float(logs['eval_loss']):.4f}"
            )


class _StopOnSignal(TrainerCallback):
    """After a signal: save at the end of the step, then stop."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


class _StopOnDivergence(TrainerCallback):
    """Refuse an update with gradients that are not finite: the adapter stays as it was."""

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        for name, parameter in model.named_parameters() if model is not None else ():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise DivergedError(
                    f"step {state.global_step + 1}: the gradient of {name} is not finite. No "
                    "update was made with it, "
                    "and saved checkpoints are fine. Lower learning_rate, or use wire_dtype fp32."
                )


@contextmanager
def _stop_on_signals(trainer: SplitTrainer) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: finish the step and save. Second: stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = next(
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, _StopOnSignal)
    )

    def handle(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = trainer.stopped_by_signal = True
        log.warning("finishing this step and saving; once more to stop at once")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _build_model(settings: TrainSettings, link: Link) -> SplitModel:
    options: dict[str, Any] = {
        "wire": settings.wire,
        "wire_dtype": settings.wire_dtype,
        "retry": RetryPolicy(give_up_after_s=settings.give_up_after_s),
        "device": settings.device,
        "edge_layers": settings.edge_layers,
    }
    if settings.adapter is not None:
        model = load_adapter(link, settings.adapter, **options)
    else:
        model = get_peft_model(link, _config(settings), **options)
    model.head_positions = "supervised"
    model.noise = Noise(
        entry=settings.noise_entry, tail=settings.noise_tail, clip=settings.noise_clip
    )
    model.hide_lengths = settings.pad_to > 0
    return model


def _config(settings: TrainSettings) -> peft.LoraConfig:
    common: dict[str, Any] = {
        "r": settings.r,
        "lora_dropout": settings.lora_dropout,
        "target_modules": settings.targets,
    }
    if settings.kind != "lora":
        return BottleneckConfig(
            kind=settings.kind, activation=settings.activation, scale=settings.scale, **common
        )
    return peft.LoraConfig(
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        **common,
    )


def _micro_batches_before(trainer: SplitTrainer, checkpoint: Path | None) -> int:
    """Training micro-batches that the steps before a checkpoint took; an epoch's last step may take
    fewer.
    """
    steps = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    each, an_epoch = trainer.args.gradient_accumulation_steps, len(trainer.get_train_dataloader())
    epochs, rest = divmod(steps, max(1, math.ceil(an_epoch / each)))
    return epochs * an_epoch + rest * each


def _build_trainer(
    settings: TrainSettings, model: SplitModel, tokenizer: PreTrainedTokenizerBase
) -> SplitTrainer:
    rows, origins = load_rows(settings.data)
    eval_rows, eval_origins = load_rows(settings.eval_data) if settings.eval_data else (None, [])
    try:
        arguments = SFTConfig(**trainer_arguments(settings))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"training arguments: {str(error).splitlines()[0]}") from error
    callbacks = []
    if settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    try:
        trainer = SplitTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    except (
        RuntimeError,
        ValueError,
    ) as error:  # a logger that is not installed, a tokenizer without chat template
        raise UsageError(f"the trainer refused: {str(error).splitlines()[0]}") from error
    limits = model.link.description.limits
    trainer.train_dataset = _fit_length(trainer.train_dataset, origins, settings)
    pad_to = trainer.args.pad_to_multiple_of
    _check_room(
        trainer.train_dataset,
        trainer.args.per_device_train_batch_size,
        pad_to,
        limits,
        training=True,
    )
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _fit_length(trainer.eval_dataset, eval_origins, settings)
        _check_room(
            trainer.eval_dataset,
            trainer.args.per_device_eval_batch_size,
            pad_to,
            limits,
            training=False,
        )
    return trainer


def trainer_arguments(settings: TrainSettings) -> dict[str, Any]:
    """These settings as arguments of trl.SFTConfig."""
    evaluates = settings.eval_data is not None
    eval_steps = settings.eval_steps
    save_steps = settings.save_steps or eval_steps
    return {
        "output_dir": str(settings.output / "checkpoints"),
        "learning_rate": settings.learning_rate,
        "optim": settings.optim,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "eval_strategy": "no" if not evaluates else "steps" if eval_steps else "epoch",
        "eval_steps": eval_steps,
        "save_strategy": "steps" if save_steps else "epoch",
        "save_steps": save_steps or 500,
        "save_total_limit": settings.save_total_limit,
        "load_best_model_at_end": evaluates and settings.keep_best,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "prediction_loss_only": True,
        "pad_to_multiple_of": settings.pad_to or None,
        "disable_tqdm": False,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": settings.report_to or "none",
        "seed": settings.seed,
        "restore_callback_states_from_checkpoint": True,
        "use_cpu": settings.device == "cpu",
        # Length is checked by `_fit_length`, with file and line.
        "max_length": None,
        "completion_only_loss": None,
        # Half precision is the cloud's choice; the adapter trains in fp32. There are no layers here
        # to checkpoint, and worker processes must not be forked while a gRPC channel is open.
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    } | settings.trainer


def _fit_length(rows: Dataset, origins: list[str], settings: TrainSettings) -> Dataset:
    """Apply `max_length` to tokenised rows: refuse, drop or truncate those that are longer."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    over = [index for index, length in enumerate(lengths) if length > settings.max_length]
    if not over:
        return rows
    if settings.overlong == "error":
        raise DataError(
            f"{origins[over[0]]}: {lengths[over[0]]} tokens, max_length is {settings.max_length}; "
            f"{len(over)} of "
            f"{len(rows)} rows are longer (the longest has {max(lengths)} tokens). Raise "
            "max_length, or set overlong "
            "to drop or truncate."
        )
    log.warning(
        "%d of %d rows are over max_length %d: %s",
        len(over),
        len(rows),
        settings.max_length,
        settings.overlong,
    )
    if settings.overlong == "truncate":
        columns = [
            name
            for name in ("input_ids", "completion_mask", "assistant_masks", "labels")
            if name in rows.column_names
        ]
        limit = settings.max_length
        rows = rows.map(
            lambda row: {name: row[name][:limit] for name in columns}, desc="Truncating"
        )
        if "completion_mask" in columns and (
            empty := sum(not any(mask) for mask in rows["completion_mask"])
        ):
            log.warning(
                "%d truncated rows have lost their whole completion and teach nothing", empty
            )
        return rows
    rows = rows.select(
        [index for index, length in enumerate(lengths) if length <= settings.max_length]
    )
    if not len(rows):
        raise DataError(
            f"every row is longer than max_length {settings.max_length}: nothing is left"
        )
    return rows


def _check_room(
    rows: Dataset, batch_size: int, pad_to: int | None, limits: pb.Limits, *, training: bool
) -> None:
    """Raises UsageError if a batch of the longest rows, padded, is more than the server takes."""
    longest = max(len(ids) for ids in rows["input_ids"])
    padded = math.ceil(longest / pad_to) * pad_to if pad_to else longest
    says = f"the longest row has {longest} tokens" + (
        f", {padded} with pad_to {pad_to}" if pad_to else ""
    )
    if padded > limits.max_length:
        raise UsageError(
            f"{says}; this server takes sequences of up to {limits.max_length}: lower max_length "
            "and set overlong to "
            "drop or truncate" + (", or lower pad_to" if pad_to else "")
        )
    batch = min(batch_size, len(rows))
    tokens = batch * padded
    cost = (
        pass_bytes(batch, padded, limits.bytes_per_token, limits.bytes_per_token_squared)
        if training
        else 0.0
    )
    if tokens > limits.max_tokens or cost > limits.max_inflight_bytes:
        raise UsageError(
            f"{says}; a batch of {batch} x {padded} makes {tokens} tokens and this server takes "
            f"{limits.max_tokens} a "
            f"micro-batch; it needs {cost / _MIB:.0f} MiB of activations of "
            f"{limits.max_inflight_bytes / _MIB:.0f}: "
            "lower batch_size"
            + (" (and raise gradient_accumulation_steps as much)" if training else "")
        )


# ----------------------------------------------------------------- the output folder


def _prepare_output(settings: TrainSettings, link: Link) -> dict[str, Any]:
    """Check what `output` already holds; return the start of run.json. Never overwrites a run."""
    file = settings.output / "run.json"
    values = settings.as_dict()
    if file.is_file():
        if not settings.resume:
            raise UsageError(
                f"{settings.output} already holds a run: continue it with --resume, or use another "
                "folder"
            )
        try:
            saved = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UsageError(f"{file} cannot be read: {error}") from error
        if changed := settings.differences(saved.get("settings", {})):
            raise UsageError(
                f"--resume continues the same run, but these settings differ from {file}: "
                f"{', '.join(changed)}"
            )
        if saved.get("fingerprint") != link.description.fingerprint:
            raise UsageError(
                f"--resume: the run was made with {saved.get('model_id')} "
                f"({str(saved.get('fingerprint'))[:12]}), "
                f"{link.address} now serves {link.description.model_id} "
                f"({link.description.fingerprint[:12]})"
            )
        if saved.get("status") == "finished":
            raise UsageError(
                f"the run in {settings.output} is finished: there is nothing to resume"
            )
    elif settings.resume and not (settings.output / "checkpoints").is_dir():
        raise UsageError(f"--resume: {settings.output} holds no run")
    elif settings.output.is_dir() and any(settings.output.iterdir()):
        raise UsageError(f"{settings.output} is not empty: use a new folder")
    settings.output.mkdir(parents=True, exist_ok=True)
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": link.description.model_id,
        "fingerprint": link.description.fingerprint,
        "settings": values,
        "versions": {
            name: version(name)
            for name in ("dlora", "torch", "transformers", "peft", "trl", "grpcio")
        },
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint; a half-written one (disk full, power cut) is passed over."""
    folders = sorted(
        (output / "checkpoints").glob("checkpoint-*"),
        key=lambda folder: int(folder.name.rpartition("-")[2]),
        reverse=True,
    )
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
        except (OSError, json.JSONDecodeError):
            log.warning("%s is not complete: looking for an older one", folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    return None


def _summary(trainer: SplitTrainer, started: float) -> dict[str, Any]:
    total = trainer.accounting.total if trainer.accounting else Meter()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    last_loss = losses[-1]["loss"] if losses else None
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "train_loss": last_loss if last_loss is None or math.isfinite(last_loss) else None,
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "best_eval_loss": trainer.state.best_metric,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "cost": asdict(total),
        "micro_batch": time_line(trainer.model.waits)
        if isinstance(trainer.model, SplitModel)
        else [],
    } | _kill_revive_summary(trainer)


def time_line(waits: Sequence[Wait]) -> list[list[Any]]:
    """The newest training micro-batch as [who, from, to] in seconds: the edge, the cloud, or the
    link between them.

    What the cloud did not compute of a wait is the link's (or a queue's), half of it before and
    half after.
    """
    found: list[list[Any]] = []
    for wait, before in zip(waits, (None, *waits[:-1]), strict=True):
        zero, link = waits[0].start, (wait.end - wait.start - wait.cloud_s) / 2
        marks = [wait.start, wait.start + link, wait.end - link, wait.end]
        names = ["link", "cloud", "link"]
        if before is not None:
            marks, names = [before.end, *marks], ["edge", *names]
        found += [
            [name, round(start - zero, 6), round(end - zero, 6)]
            for name, start, end in zip(names, marks, marks[1:], strict=False)
            if end > start
        ]
    return found


def _kill_revive_summary(trainer: SplitTrainer) -> dict[str, Any]:
    if trainer.kill_revive is None or trainer.kill_revive.reviver is None:
        return {}
    reviver = trainer.kill_revive.reviver
    return {
        "kill_revive": {
            "config": asdict(reviver.config),
            "cost_share": reviver.spent / max(1, trainer.state.global_step),
            "active": sorted(reviver.active),
        }
    }
