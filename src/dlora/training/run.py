"""A training run: settings in, an adapter folder out, on trl's SFTTrainer.

settings, link -> model -> trainer, with data that fits -> the loop -> adapter and run.json.
What the folder then holds, and by which names, is in `dlora.runs`.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
from transformers import set_seed

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import get_peft_model, load_adapter, load_tokenizer
from dlora.edge.model import SplitModel
from dlora.errors import DLoRAError, PeerError, PeerLost, WireError
from dlora.privacy.recording import Recorder
from dlora.runs import RunFolder, step_of
from dlora.training.callbacks import time_line
from dlora.training.output import check_output, first_values, no_folders_if_refused
from dlora.training.parts import follow_parts
from dlora.training.run_lock import alone_in_output
from dlora.training.settings import TrainSettings
from dlora.training.trainer import SplitTrainer, build_trainer

__all__ = ["train"]

log = logging.getLogger(__name__)


@alone_in_output
def train(settings: TrainSettings, link: Link) -> dict[str, Any]:
    """Run, or continue, a training run; return what run.json holds.

    On the first Ctrl-C or SIGTERM the step is finished and saved, and "status" is
    "interrupted". Raises DLoRAError with a message for the user.
    """
    folder = RunFolder(settings.output)

    # What can be refused is refused here: until it is over nothing is written into the folder.
    check_output(settings, link)
    with no_folders_if_refused(folder):
        set_seed(settings.seed)
        tokenizer = load_tokenizer(link)
        recorder = Recorder(folder.recording, settings.record) if settings.record else None
        model = _build_model(settings, link if recorder is None else recorder.link(link))
        trainer = build_trainer(settings, model, tokenizer)

    checkpoint = folder.last_checkpoint() if settings.resume else None
    if settings.resume:
        log.info("resuming from %s", checkpoint or "the start: there is no checkpoint yet")
    run, started = first_values(settings, link) | {"rows": trainer.rows}, time.monotonic()
    folder.path.mkdir(parents=True, exist_ok=True)
    follow_parts(run, folder, model, resume=settings.resume)
    folder.write(run)
    if recorder is not None:
        _start_recording(recorder, trainer, checkpoint)

    # Whatever ends the loop, run.json says how, and what it cost until then.
    model.set_options(retry=replace(model.options.retry, sleep=trainer.stop.sleep))
    try:
        with trainer.stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException as error:
        peer = isinstance(error, PeerLost | PeerError | WireError)
        is_saved = peer and trainer.save_finished(folder.path)
        if not (is_saved and trainer.stop.asked and isinstance(error, PeerLost)):
            folder.write(run | _failure(error) | _results(trainer, started))
            raise
        log.warning("stopped in the middle of a step, as the server is lost: %s", error)

    trainer.save_model(str(folder.path))
    run["status"] = "interrupted" if trainer.stop.asked else "finished"
    run |= _results(trainer, started)
    folder.write(run)
    return run


def _build_model(settings: TrainSettings, link: Link) -> SplitModel:
    options: dict[str, Any] = {
        "wire": settings.wire,
        "wire_dtype": settings.wire_dtype,
        "input_grad": settings.input_grad,
        "in_flight": 1 if settings.record else settings.in_flight,
        "upload_consent": settings.upload_consent,
        "retry": RetryPolicy(give_up_after_s=settings.give_up_after_s),
        "device": settings.device,
        "edge_layers": settings.edge_layers,
        "noise": settings.noise,
        "hide_lengths": settings.pad_to > 0,
        "head_positions": "supervised",
    }
    if settings.adapter is not None:
        return load_adapter(link, settings.adapter, **options)
    return get_peft_model(link, _config(settings), **options)


def _config(settings: TrainSettings) -> peft.LoraConfig:
    """The adapter that is asked for, as peft's configuration."""
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


# ----------------------------------------------------------------- recording


def _start_recording(recorder: Recorder, trainer: SplitTrainer, checkpoint: Path | None) -> None:
    """Record from here on, with the numbers that micro-batches have in the whole run."""
    recorder.number = _micro_batches_before(trainer, checkpoint)
    recorder.watch(trainer.model)
    if not recorder.active:
        log.warning(
            "nothing is recorded: the checkpoint is %d micro-batches into the run, and "
            "`record` asks for the first %d",
            *(recorder.number, recorder.count),
        )


def _micro_batches_before(trainer: SplitTrainer, checkpoint: Path | None) -> int:
    """Training micro-batches that the steps before a checkpoint took.

    The last step of an epoch may take fewer than the others.
    """
    steps = step_of(checkpoint) if checkpoint else 0
    of_step = trainer.args.gradient_accumulation_steps
    of_epoch = len(trainer.get_train_dataloader())
    epochs, rest = divmod(steps, max(1, math.ceil(of_epoch / of_step)))
    return epochs * of_epoch + rest * of_step


# ----------------------------------------------------------------- how it ended, for run.json


def _failure(error: BaseException) -> dict[str, str]:
    """An error as run.json has it: only messages that are meant for the user, and no data."""
    known = isinstance(error, DLoRAError)
    return {
        "status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
        "error": str(error).splitlines()[0] if known else type(error).__name__,
    }


def _results(trainer: SplitTrainer, started: float) -> dict[str, Any]:
    """Losses, costs and time of the run so far, as plain values."""
    state, model = trainer.state, trainer.model
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    finite = bool(losses) and math.isfinite(losses[-1])  # JSON knows no others
    return {
        "steps": state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "train_loss": losses[-1] if finite else None,
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "best_eval_loss": state.best_metric,
        "best_checkpoint": state.best_model_checkpoint,
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
