"""Settings of a run as the configuration that trl's trainer of the task takes."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Final

from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from dlora.errors import UsageError
from dlora.runs import RunFolder
from dlora.training.settings import TrainSettings
from dlora.training.tasks import Task, best_metric

__all__ = ["trainer_arguments", "trainer_config"]

_CONFIGS: Final[dict[Task, Any]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "grpo": GRPOConfig,
}


def trainer_config(settings: TrainSettings) -> TrainingArguments:
    """The arguments of the task's trainer. Raises UsageError for those that it does not have."""
    kind = _CONFIGS[settings.task]
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in settings.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"trainer: {kind.__name__} of trl has no argument {name}{hint}")
    try:
        config: TrainingArguments = kind(**trainer_arguments(settings))
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise UsageError(f"training arguments: {str(error).splitlines()[0]}") from error
    return config


def trainer_arguments(settings: TrainSettings) -> dict[str, Any]:
    """These settings as arguments of trl's configuration of the task."""
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
        "metric_for_best_model": best_metric(settings.task) if evaluates else None,
        "prediction_loss_only": True,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": False,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": settings.report_to or "none",
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
        **_of_task(settings),
    } | settings.trainer


def _of_task(settings: TrainSettings) -> dict[str, Any]:
    """What one trainer has and another has not."""
    if settings.task == "grpo":  # half of a row may be prompt, half is room for an answer
        return {"max_completion_length": max(1, settings.max_length // 2)}
    # Length is checked by `fit_rows`, with file and line.
    if settings.task == "sft":
        return {"max_length": None, "completion_only_loss": None}
    return {"max_length": None, "disable_dropout": not (settings.lora_dropout or settings.adapter)}
