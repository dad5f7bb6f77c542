"""A whole run, before anything is trained: its rows and steps, evaluations and first download."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from dlora.edge.link import Link
from dlora.edge.load import load_tokenizer
from dlora.edge.model import SplitModel
from dlora.protocol.layer_files import files_for
from dlora.training.calibrate import Calibration
from dlora.training.plan_settings import PlanSettings, run_of
from dlora.training.planned_set import STEPS, foreseen
from dlora.training.planned_traffic import Load
from dlora.training.planner import Prediction, line_of, predict, predict_evaluation
from dlora.training.row_sizes import RowSizes
from dlora.training.trainer import build_trainer

__all__ = ["PlannedRun", "Total", "load_of", "read_run", "total_of"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What is known of a run from its data and its server."""

    rows: RowSizes | None
    held_out: RowSizes | None
    steps: int
    evaluations: int
    download_bytes: int
    """What an edge fetches once for a model."""
    load: Load | None
    """What travels of a micro-batch on average."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """Of all evaluations, or of everything."""

    sent_bytes: float
    received_bytes: float
    seconds: float


def read_run(
    settings: PlanSettings, link: Link, model: SplitModel
) -> tuple[PlanSettings, PlannedRun]:
    """The settings with lengths of the run's own rows, and the run.

    Rows are read, tokenised and refused as training does it. Raises UsageError and DataError.
    """
    size = _download_bytes(link, model)
    if settings.data is None:
        steps = STEPS if settings.max_steps < 1 else settings.max_steps
        run = PlannedRun(
            rows=None, held_out=None, steps=steps, evaluations=0, download_bytes=size, load=None
        )
        return settings, run

    with tempfile.TemporaryDirectory(prefix="dlora-plan-") as scratch:
        asked = run_of(replace(settings, link=None), Path(scratch))
        trainer = build_trainer(replace(asked, report_to=[]), model, load_tokenizer(link))
    rows, held = trainer.sizes["data"], trainer.sizes.get("eval_data")

    # Steps and evaluations as transformers counts them.
    epoch = math.ceil(
        rows.micro_batches(settings.batch_size) / settings.gradient_accumulation_steps
    )
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * epoch)
    evaluations = 0 if held is None else math.ceil(steps / (settings.eval_steps or epoch))

    length = rows.padded(settings.batch_size, settings.pad_to)
    learned = min(length - 1, round(sum(rows.learned) / len(rows.learned)))
    run = PlannedRun(
        rows=rows,
        held_out=held,
        steps=steps,
        evaluations=evaluations,
        download_bytes=size,
        load=load_of(rows, model, settings.batch_size, settings.pad_to),
    )
    choice = settings if settings.link is None else settings.for_table
    return replace(choice, data=None, length=length, supervised=learned), run


def _download_bytes(link: Link, model: SplitModel) -> int:
    """Of embedding, head and tokenizer, and of the decoder layers that run here."""
    wanted, described = files_for(model.edge_layers), link.description
    layers = sum(file.size for file in described.layers.files if file.name in wanted)
    return layers + sum(file.size for file in described.edge_files)


def load_of(rows: RowSizes, model: SplitModel, batch_size: int, pad_to: int = 0) -> Load:
    """What travels of a micro-batch: no padding, but where every position has to."""
    tokens, supervised = rows.travelling(batch_size)
    if not pad_to and not model.link.description.all_rows:
        return Load(tokens, supervised)
    number = len(rows.lengths) / rows.micro_batches(batch_size)  # sequences of a micro-batch
    everything = number * rows.padded(batch_size, pad_to)
    return Load(everything, everything if pad_to else supervised)


def total_of(
    settings: PlanSettings, model: SplitModel, measured: Calibration, run: PlannedRun
) -> tuple[Prediction, Total, Total]:
    """(a step, all evaluations, the whole run with its first download)."""
    step = predict(settings, model, measured, run.load)
    evaluated = Total(sent_bytes=0, received_bytes=0, seconds=0)
    if run.held_out is not None and run.evaluations:
        load = load_of(run.held_out, model, settings.eval_batch_size, settings.pad_to)
        one = predict_evaluation(settings, model, measured, load, run.load)
        number = run.evaluations * run.held_out.micro_batches(settings.eval_batch_size)
        evaluated = Total(
            sent_bytes=number * one.sent_bytes,
            received_bytes=number * one.received_bytes,
            seconds=number * one.seconds,
        )

    # The set of a run with Kill and Revive is a little larger for a part of its steps.
    found, steps = foreseen(settings, model, run.load, run.steps), float(run.steps)
    if found is not None and settings.sites is None:
        steps *= found.whole / found.share
    if settings.spectral_start:
        steps += 1 / settings.gradient_accumulation_steps

    _, _, down_s = line_of(settings, measured)
    whole = Total(
        sent_bytes=steps * step.sent_bytes + evaluated.sent_bytes,
        received_bytes=steps * step.received_bytes + evaluated.received_bytes + run.download_bytes,
        seconds=steps * step.seconds + evaluated.seconds + run.download_bytes * down_s,
    )
    return step, evaluated, whole
