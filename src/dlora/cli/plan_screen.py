"""What `dlora plan` prints: one step, the whole run, or a table of the ways over a link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dlora.cli.lines import shell, wrapped
from dlora.edge.link import Link
from dlora.edge.model import SplitModel
from dlora.training.advice import SEEN, advise, command, table
from dlora.training.calibrate import calibrate
from dlora.training.link_speed import link_speed
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_run import PlannedRun, Total, read_run, total_of
from dlora.training.planned_set import foreseen
from dlora.training.planner import Prediction, activate, check, planned_model
from dlora.training.readable import counted, readable_bytes, readable_time

__all__ = ["plan_lines"]


def plan_lines(settings: PlanSettings, link: Link) -> Iterator[tuple[str, str] | str]:
    """Names with their texts, and lines that stand for themselves."""
    model = planned_model(settings if settings.link is None else settings.for_table, link)
    planned, run = read_run(settings, link, model)
    if settings.link is not None:
        yield from _table(settings, planned, link, model, run)
        return

    activate(planned, model, run.load)
    step, evaluated, whole = total_of(planned, model, calibrate(planned, model), run)
    yield (
        "model",
        f"{link.description.model_id}, {counted(step.active_sites, 'active site')}, "
        f"{settings.wire} wire, {step.in_flight} in flight",
    )
    yield from _data(settings, run)
    yield from _step(planned, run, step)
    yield from _run(run, evaluated, whole)
    yield from _kill_revive(planned, model, run)
    if settings.check:
        model.set_options(in_flight=step.in_flight)
        yield _check(planned, step, *check(planned, model))


def _data(settings: PlanSettings, run: PlannedRun) -> Iterator[tuple[str, str]]:
    """The rows, where there are some, and what is fetched before the first of them."""
    if run.rows is not None:
        yield "data", f"{settings.data}: {run.rows}"
    if run.held_out is not None:
        yield "", f"{settings.eval_data or 'held out of it'}: {run.held_out}"
    yield (
        "first",
        f"{readable_bytes(run.download_bytes)} of edge files (embedding, head, tokenizer), once "
        "for a model; they are here now",
    )


def _step(settings: PlanSettings, run: PlannedRun, step: Prediction) -> Iterator[tuple[str, str]]:
    """Tokens, bytes, round trips and seconds of an optimizer step."""
    several = settings.gradient_accumulation_steps
    times = f"{several} micro-batches of " if several > 1 else ""
    padding = " with padding" if run.load is not None else ""
    yield "a step", f"{times}{settings.batch_size} x {settings.length} tokens{padding}"
    yield (
        "bytes",
        f"{readable_bytes(step.sent_bytes)} up, {readable_bytes(step.received_bytes)} down, "
        f"{counted(step.round_trips, 'round trip')}",
    )
    yield (
        "seconds",
        f"{step.seconds:.2f}: cloud {step.cloud_s:.2f}, edge {step.edge_s:.2f}, "
        f"messages {step.wire_s:.2f}, link {step.link_s:.2f}",
    )


def _run(run: PlannedRun, evaluated: Total, whole: Total) -> Iterator[tuple[str, str]]:
    """Everything, in units that a person reads."""
    if run.evaluations:
        crossed = evaluated.sent_bytes + evaluated.received_bytes
        yield (
            "evaluated",
            f"{counted(run.evaluations, 'time')}: {readable_bytes(crossed)} and "
            f"{readable_time(evaluated.seconds)} in all",
        )
    yield (
        "the run",
        f"{counted(run.steps, 'step')}: {readable_bytes(whole.sent_bytes)} up, "
        f"{readable_bytes(whole.received_bytes)} down, about {readable_time(whole.seconds)}",
    )


def _kill_revive(
    settings: PlanSettings, model: SplitModel, run: PlannedRun
) -> Iterator[tuple[str, str]]:
    """What is active at a time, and whether the budget can be kept."""
    found = foreseen(settings, model, run.load, run.steps)
    if found is None or settings.sites is not None:
        return
    modules = f"{len(found.modules)} of {counted(len(model.adapted_modules), 'module')}"
    yield "", f"with {modules} at a time, {found.whole:.1%} of what training all takes"
    if found.warning:
        yield "", found.warning


def _check(settings: PlanSettings, step: Prediction, cost: Any, seconds: float) -> tuple[str, str]:
    """How far the plan is from steps that were run, over rows of the planned length."""
    traffic = step.sent_bytes + step.received_bytes
    off = traffic / (cost.sent_bytes + cost.received_bytes) - 1
    checked = f"bytes off by {off:+.2%}, round trips {cost.round_trips}, "

    link = (settings.rtt_ms, settings.up_mbit, settings.down_mbit)
    if any(value is not None for value in link):
        return "checked", f"{checked}seconds not compared: the link here is not the one given"
    return "checked", f"{checked}seconds {seconds:.2f}, off by {step.seconds / seconds - 1:+.0%}"


def _table(
    settings: PlanSettings, planned: PlanSettings, link: Link, model: SplitModel, run: PlannedRun
) -> Iterator[tuple[str, str] | str]:
    """The ways to train over a link, and commands of the fastest."""
    rows = advise(planned, link, model, run.load)
    tokens = f"{planned.batch_size} x {planned.length} tokens a micro-batch"
    yield from _data(settings, run)
    yield f"{link.description.model_id} over {link_speed(settings.link or 'here')}"
    yield f"{tokens}; seconds and MB are of an optimizer step\n"
    yield from table(rows)

    yield "\n*  the fastest that shows no more, trained as local tuning would"
    if any(row.mark == "+" for row in rows):
        yield (
            "+  faster still, but another training: few modules at a time, larger steps,\n"
            "   or coarse codecs (int4; -dx: without gradients of inputs)"
        )
    for row in rows:
        if row.mark:
            whole = _of_the_run(run, row.seconds) if row.as_local and run.rows else ""
            yield "\n" + wrapped(f"{row.mark}  the cloud sees {SEEN[row.choice.wire]}{whole}:")
            words = command(row, settings.data)
            yield "".join(f"   {line}\n" for line in shell(words, 3).split("\n")).rstrip()


def _of_the_run(run: PlannedRun, seconds: float) -> str:
    return f"; {counted(run.steps, 'step')} take about {readable_time(run.steps * seconds)}"
