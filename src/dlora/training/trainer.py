"""The trainer of a run, with data that is loaded, tokenised and known to fit.

What cannot work is refused here, with the setting or the data's file and line: rows that are too
long, batches that the server would not take, an optimizer that is not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase

from dlora.edge.model import SplitModel
from dlora.edge.templates import tokenising
from dlora.errors import UsageError
from dlora.kill_revive.callback import KillReviveCallback
from dlora.runs import RunFolder
from dlora.training.callbacks import AccountingCallback
from dlora.training.rewards import load_rewards
from dlora.training.rows import check_same_rows, digest, rows_of
from dlora.training.settings import TrainSettings
from dlora.training.split_trainer import SplitSFTTrainer, SplitTrainer
from dlora.training.task_rows import check_room, fit_task_rows
from dlora.training.trainer_config import trainer_config

__all__ = ["build_trainer"]


def _kind(settings: TrainSettings) -> tuple[Any, dict[str, Any]]:
    """The class of the task's trainer, and its own arguments."""
    if settings.task == "sft":
        return SplitSFTTrainer, {}
    from dlora.training.preference_trainers import KINDS  # trl's are not needed elsewhere

    own: dict[str, Any] = {"is_new": settings.adapter is None, "max_length": settings.max_length}
    if settings.task == "grpo":
        own["reward_funcs"] = load_rewards(settings.reward)
    return KINDS[settings.task], own


def build_trainer(
    settings: TrainSettings, model: SplitModel, tokenizer: PreTrainedTokenizerBase
) -> SplitTrainer:
    """The trainer, with data that is loaded, tokenised and known to fit.

    Raises UsageError for arguments, and DataError for rows, that cannot work.
    """
    (rows, origins), (eval_rows, eval_origins) = rows_of(settings, tokenizer)
    arguments, folder = trainer_config(settings), RunFolder(settings.output)
    config, patience = settings.kill_revive, settings.early_stopping_patience
    early_stopping = None if patience is None else EarlyStoppingCallback(patience)
    kill_revive = None if config is None else KillReviveCallback(config, folder.decisions_file)
    data = (rows, origins), (eval_rows, eval_origins)
    kind, own = _kind(settings)
    with tokenising(tokenizer, *data, refused="the trainer refused"):
        trainer: SplitTrainer = kind(
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
            spectral_start=settings.spectral_start,
            **own,
        )

    _check_optimizer(trainer)
    uses = [("data", "train_dataset", origins), ("eval_data", "eval_dataset", eval_origins)]
    for use, name, places in uses:
        if (dataset := getattr(trainer, name)) is None:
            continue
        training = use == "data"
        fitting, sizes = fit_task_rows(dataset, places, settings, trainer, training=training)
        setattr(trainer, name, fitting)
        trainer.sizes[use] = sizes
        trainer.rows[use] = digest(fitting, as_text=settings.task == "grpo")
        check_room(sizes, settings, trainer.args, model, training=training)
    check_same_rows(folder, trainer.rows)
    return trainer


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
