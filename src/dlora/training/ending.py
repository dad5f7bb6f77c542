"""How a run ended: what run.json says of it, and what a person types to go on."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from dlora.edge.model import SplitModel
from dlora.errors import DivergedError, DLoRAError
from dlora.runs import RunFolder, step_of
from dlora.training.callbacks import time_line
from dlora.training.split_trainer import SplitTrainer
from dlora.training.tasks import best_metric, figures_of

__all__ = ["failure", "results", "way_on"]


def way_on(folder: RunFolder, trainer: SplitTrainer, error: BaseException) -> str:
    """What is saved of a run that ended with this error, and how to go on."""
    saved, steps = folder.newest_complete(), trainer.state.global_step
    if saved is None:
        return f"no step is saved in {folder.path}: the same command with --resume starts again"
    if isinstance(error, DivergedError):
        return (
            f"{step_of(saved)} of {steps} finished steps are saved; to go on from there with other "
            f"settings give --adapter {saved} and a new --output"
        )
    return (
        f"{step_of(saved)} of {steps} finished steps are saved in {folder.path}: continue with the "
        "same command and --resume"
    )


def failure(error: BaseException) -> dict[str, str]:
    """An error as run.json has it: only messages that are meant for the user, and no data."""
    known = isinstance(error, DLoRAError)
    return {
        "status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
        "error": str(error).splitlines()[0] if known else type(error).__name__,
    }


def results(trainer: SplitTrainer) -> dict[str, Any]:
    """Losses, costs and time of the run so far, as plain values."""
    state, model = trainer.state, trainer.model
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    figures, best_name = figures_of(state.log_history), f"best_{best_metric(trainer.task)}"
    finite = bool(losses) and math.isfinite(losses[-1])  # JSON knows no others
    return {
        "steps": state.global_step,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": trainer.accounting.total_s,
        "train_loss": losses[-1] if finite else None,
        "eval_loss": eval_losses[-1] if eval_losses else None,
        best_name: state.best_metric,
        "best_checkpoint": state.best_model_checkpoint,
        **({"figures": figures} if figures else {}),
        "cost": asdict(trainer.accounting.total),
        "micro_batch": time_line(model.waits) if isinstance(model, SplitModel) else [],
    } | _kill_revive_results(trainer)


def _kill_revive_results(trainer: SplitTrainer) -> dict[str, Any]:
    """Settings, mean cost and active units, where Kill and Revive was on."""
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
