"""A training run: settings in, an adapter folder out, on trl's trainer of the task.

settings, link -> model -> trainer, with data that fits -> the loop -> adapter and run.json.
What the folder then holds, and by which names, is in `dlora.runs`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from transformers import TrainerCallback, set_seed

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import get_peft_model, load_adapter, load_tokenizer
from dlora.edge.model import SplitModel
from dlora.edge.sites import refuse_head
from dlora.edge.spectral import check_spectral
from dlora.errors import PeerLost
from dlora.kill_revive.config import OF_LORA
from dlora.kill_revive.units import check_measurable
from dlora.privacy.recording import Recorder
from dlora.runs import RunFolder, step_of
from dlora.training.card import write_run_card
from dlora.training.ending import failure, results, way_on
from dlora.training.output import began, check_output, first_values
from dlora.training.parts import follow_parts
from dlora.training.rewards import digests
from dlora.training.run_lock import alone_in_output
from dlora.training.settings import TrainSettings
from dlora.training.split_trainer import SplitTrainer
from dlora.training.task_rows import check_streams
from dlora.training.trainer import build_trainer
from dlora.training.trainer_config import trainer_config
from dlora.training.waiting import SayWaiting

__all__ = ["train"]

log = logging.getLogger(__name__)


@alone_in_output
def train(
    settings: TrainSettings,
    link: Link,
    screen: Callable[[SplitTrainer], TrainerCallback] | None = None,
) -> dict[str, Any]:
    """Run, or continue, a training run; return what run.json holds.

    `screen` makes what shows it: it is told of everything last, with all decided.
    On the first Ctrl-C, SIGTERM or SIGHUP the step is finished and saved, and "status" is
    "interrupted". Raises DLoRAError with a message for the user. Whatever is raised once the run
    has begun, the last finished step is a checkpoint, and a note at the error says how to go on.
    """
    folder = RunFolder(settings.output)
    recorder, model, trainer = _prepare(settings, link)
    for late in (SayWaiting(settings, model), screen and screen(trainer)):
        if late is not None:  # after Kill and Revive has decided
            trainer.add_callback(late)

    checkpoint = folder.last_checkpoint() if settings.resume else None
    if settings.resume:
        log.info("resuming from %s", checkpoint or "the start: there is no checkpoint yet")
    run = first_values(settings, link) | {"rows": trainer.rows} | began(folder, checkpoint)
    if settings.reward:
        run["rewards"] = digests(settings.reward, folder.read().get("rewards", {}))
    folder.path.mkdir(parents=True, exist_ok=True)
    follow_parts(run, folder, model, resume=settings.resume)
    folder.write(run)
    trainer.run = run

    # Whatever ends it from here on, run.json says how, and what it cost until then.
    try:
        if recorder is not None:
            _start_recording(recorder, trainer, checkpoint)
        model.set_options(retry=replace(model.options.retry, sleep=trainer.stop.sleep))
        with trainer.stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_adapter(folder.path)
    except BaseException as error:
        is_saved = trainer.save_finished()
        if not (is_saved and trainer.stop.asked and isinstance(error, PeerLost)):
            folder.write_ending(run | failure(error), results(trainer))
            error.add_note(way_on(folder, trainer, error))
            raise
        log.warning("stopped in the middle of a step, as the server is lost: %s", error)
        trainer.save_adapter(folder.path)

    run["status"] = "interrupted" if trainer.stop.asked else "finished"
    run |= results(trainer)
    folder.write(run)
    write_run_card(folder, run)
    return run


def _prepare(
    settings: TrainSettings, link: Link
) -> tuple[Recorder | None, SplitModel, SplitTrainer]:
    """Refuse what can be refused: until it is over nothing is written into the folder."""
    check_output(settings, link)
    trainer_config(settings)  # before anything is loaded: it checks itself
    set_seed(settings.seed)
    tokenizer = load_tokenizer(link)
    recording = RunFolder(settings.output).recording
    recorder = Recorder(recording, settings.record) if settings.record else None
    model = _build_model(settings, link if recorder is None else recorder.link(link))
    check_streams(settings, model)
    return recorder, model, build_trainer(settings, model, tokenizer)


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
        "cache_prefix": settings.cache_prefix,
    }
    if settings.adapter is not None:
        model = load_adapter(link, settings.adapter, **options)
        if settings.kr != "off":
            check_measurable(model)
    else:
        model = get_peft_model(link, _config(settings), **options)
    refuse_head(model, link.description)
    if settings.spectral_start:
        check_spectral(model)
    return model


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
        **{name: getattr(settings, name) or None for name in OF_LORA},
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        **common,
    )


# ----------------------------------------------------------------- recording


def _start_recording(recorder: Recorder, trainer: SplitTrainer, checkpoint: Path | None) -> None:
    """Record from here on, with the numbers that micro-batches have in the whole run."""
    recorder.number = _micro_batches_before(trainer, checkpoint)
    recorder.watch(trainer.model)
    if recorder.active:
        return
    if recorder.written >= recorder.count:
        log.info("all %d micro-batches to record were recorded before", recorder.count)
    else:
        log.warning(
            "nothing more is recorded: the checkpoint is %d micro-batches into the run, and "
            "`record` asks for the first %d, of which %d are there",
            *(recorder.number, recorder.count, recorder.written),
        )


def _micro_batches_before(trainer: SplitTrainer, checkpoint: Path | None) -> int:
    """Training micro-batches that the steps before a checkpoint took.

    The last step of an epoch may take fewer than the others.
    """
    steps = step_of(checkpoint) if checkpoint else 0
    of_step = trainer.args.gradient_accumulation_steps
    of_epoch = trainer.micro_batches
    epochs, rest = divmod(steps, max(1, math.ceil(of_epoch / of_step)))
    return epochs * of_epoch + rest * of_step
