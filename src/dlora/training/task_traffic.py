"""What a step of a task sends beside its training micro-batches: references, drawn answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.training.plan_settings import PlanSettings, plan_of
from dlora.training.planned_run import load_of
from dlora.training.planned_traffic import Load, Traffic, traffic
from dlora.training.row_sizes import RowSizes
from dlora.training.settings import TrainSettings

__all__ = ["step_traffic_of"]


def step_traffic_of(
    settings: TrainSettings,
    arguments: Any,
    model: SplitModel,
    sizes: RowSizes,
    sites: Sequence[ActiveSite] | None = None,
) -> Traffic:
    """Of an optimizer step with these sites, or all modules, active; with grpo, if every answer is
    as long as it may become. `arguments` are the trainer's.
    """
    sites = model.sites if sites is None else sites
    plan, several = plan_of(settings), settings.gradient_accumulation_steps
    plan = replace(plan, batch_size=settings.batch_size * sizes.sequences)
    parts = settings.in_flight if isinstance(settings.in_flight, int) else 1
    parts = min(parts, plan.batch_size)
    load = load_of(sizes, model, settings.batch_size, settings.pad_to)
    micro_batches = [traffic(plan, model, sites, parts=parts, load=load)]
    micro_batches += _beside(settings, arguments, plan, model, sites, load)
    total = _sum(several, micro_batches)
    if settings.task != "grpo":
        return total

    # Answers are drawn once for so many micro-batches.
    times = several / (arguments.steps_per_generation * arguments.num_iterations)
    drawn = _drawn(arguments, plan, model, sites, sizes)
    return _sum(1, [total, *(_sum(times, [one]) for one in drawn)])


def _beside(
    settings: TrainSettings,
    arguments: Any,
    plan: PlanSettings,
    model: SplitModel,
    sites: Sequence[ActiveSite],
    load: Load,
) -> Iterator[Traffic]:
    """Forward passes of a micro-batch that nothing is learned from."""
    # Without a copy of the adapter the reference is the model without any.
    of_reference = () if settings.adapter is None else model.sites
    if settings.task == "dpo" or (settings.task == "grpo" and arguments.beta):
        yield _forward(plan, model, of_reference, load)
    if settings.task == "kto":
        yield _forward(plan, model, of_reference, load)
        if arguments.loss_type != "apo_zero_unpaired":  # completions with the prompts of others
            yield _forward(plan, model, of_reference, load)
            yield _forward(plan, model, sites, load)


def _drawn(
    arguments: Any,
    plan: PlanSettings,
    model: SplitModel,
    sites: Sequence[ActiveSite],
    sizes: RowSizes,
) -> Iterator[Traffic]:
    """A pass over the prompts, and one for each token of an answer but the last."""
    rows, answer = arguments.generation_batch_size, sizes.learned[0]
    prompts = rows * sum(length - answer for length in sizes.lengths) / len(sizes.lengths)
    yield _forward(plan, model, sites, Load(prompts, rows))
    yield _sum(answer - 1, [_forward(plan, model, sites, Load(rows, rows))])


def _forward(
    plan: PlanSettings, model: SplitModel, sites: Sequence[ActiveSite], load: Load
) -> Traffic:
    return traffic(plan, model, sites, load=load, training=False)


def _sum(times: float, costs: Sequence[Traffic]) -> Traffic:
    return Traffic(
        sent=round(times * sum(one.sent for one in costs)),
        received=round(times * sum(one.received for one in costs)),
        round_trips=round(times * sum(one.round_trips for one in costs)),
    )
