"""Kill and Revive: which modules to train next. Pure decisions over plain numbers.

After arXiv:2404.05182: modules whose l2 norm hardly varies are killed (frozen), some come back
later, and only a small active set is trained and exchanged. Where the paper is silent the options
of `KillReviveConfig` say what is done.

A decision goes so: `is_due` says whether there is one before a step, `schedule` what a step may
cost from now on, and `decide` ranks the units and fills that budget with them (`fill.py`).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import Costs, Unit
from dlora.kill_revive.fill import fill, fill_bands, fill_best, spread

__all__ = [
    "Decision",
    "DecisionLine",
    "State",
    "decide",
    "is_due",
    "needs_outputs",
    "needs_probe",
    "schedule",
]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a decision knows of the run so far."""

    step: int
    """The step that comes next, counted from 0."""
    total_steps: int
    active: Collection[str]
    """Names of the units that are trained now."""
    since: Mapping[str, int]
    """The step at which each active unit became so."""
    scores: Mapping[str, float]
    """Of active units: the signal over the last interval, or the policy's own measure."""
    probes: Mapping[str, float]
    """Of idle units: norms of their gradients in the last step, where that was a probe step."""
    spent: float
    """Sum of the costs of all steps so far, each as a share of FT's."""


@dataclass(frozen=True)
class DecisionLine:
    """Why one unit is as it is after a decision: one line of the decision log."""

    step: int
    unit: str
    score: float | None
    rank: int | None
    active: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The units to train from now on, and a log line for every unit."""

    active: frozenset[str]
    lines: tuple[DecisionLine, ...] = field(default=(), compare=False)


# ----------------------------------------------------------------- when, and for how much


def is_due(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether a decision is made before this step (counted from 0)."""
    warm = config.warmup_steps(total_steps)
    if step == warm:
        return True
    if config.policy not in ("kr", "redraw", "all") or step < warm:
        return False
    ends = total_steps if config.policy == "all" else (1 - config.final) * total_steps
    return (step - warm) % config.interval == 0 and step < ends


def needs_probe(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether this step must measure idle units: the next decision revives by their gradients."""
    after = step + 1
    first = config.warmup_steps(total_steps)
    return (
        config.policy == "kr"
        and config.revive == "scored"
        and after > first
        and is_due(config, after, total_steps)
        and config.revive_share > 0
    )


def needs_outputs(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether this step must measure deltas: policy "output" decides once, after the warm-up."""
    return config.policy == "output" and step < config.warmup_steps(total_steps)


def schedule(config: KillReviveConfig, step: int, total_steps: int, spent: float) -> float:
    """The cost that a step may have now; `spent` is the sum of the shares of all steps so far."""
    warm = config.warmup_steps(total_steps)
    left = max(1, total_steps - step)
    level = (config.budget * total_steps - spent) / left if config.average else config.budget

    if config.schedule == "cubic":
        end = max(warm + 1, round(config.settle * total_steps))
        if step < end:
            rest = 1 - (step - warm) / (end - warm)
            final = config.budget
            if config.average:
                # What is left pays for a constant, and for the rest of the cube above it.
                cube = (end - warm) * rest**4 / 4
                final = max(
                    0.0, (config.budget * total_steps - spent - cube) / max(1.0, left - cube)
                )
            return final + (1 - final) * rest**3
    return max(0.0, level)


# ----------------------------------------------------------------- who


def decide(config: KillReviveConfig, units: Sequence[Unit], costs: Costs, state: State) -> Decision:
    """Choose the units to train from `state.step` on; the same arguments give the same choice.

    Random draws come from a generator that is seeded with the configuration's seed and the step.
    """
    if config.policy == "all":
        # Nothing to decide, but the log wants scores: how much each unit changed.
        order = _best_first(units, state.scores)
        return _decision(state.step, units, units, state.scores, order, "all")

    allowed = schedule(config, state.step, state.total_steps, state.spent)
    draws = random.Random(f"{config.seed}:{state.step if config.policy != 'random' else 'once'}")

    if config.policy != "kr":
        order = _baseline_order(config, units, state.scores, draws)
        chosen = (
            spread(units, costs, allowed)
            if config.policy == "spread"
            else fill(order, [], costs, allowed)
        )
        return _decision(state.step, units, chosen, state.scores, order, config.policy)

    if state.step == 0:  # without warm-up: nothing is known yet
        return _decision(state.step, units, spread(units, costs, allowed), {}, [], "start")
    return _kill_and_revive(config, units, costs, state, allowed, draws)


def _kill_and_revive(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    state: State,
    allowed: float,
    draws: random.Random,
) -> Decision:
    """Keep the best active units, and let idle ones come back for `revive_share` of the budget."""
    standing = _with_hysteresis(config, units, state)
    order = _best_first([unit for unit in units if unit.name in state.active], standing)
    idle = [unit for unit in units if unit.name not in state.active]
    scores = {**state.probes, **state.scores}

    if config.cover:
        chosen, reasons = fill_bands(
            config, units, order, idle, costs, allowed, state.probes, draws
        )
        return _decision(state.step, units, chosen, scores, order, reasons)

    if config.revive == "none" or not idle:
        kept = fill_best(config, order, [], costs, allowed, standing)
        reasons = {unit.name: "kept" for unit in kept}
        return _decision(state.step, units, kept, scores, order, reasons)

    # The best of the active units first, for what revival leaves of the budget.
    share = allowed * (1 - config.revive_share)
    chosen = fill_best(config, order, [], costs, share, standing)
    reasons = {unit.name: "kept" for unit in chosen}

    # Then idle units, at random or the largest gradients first.
    if config.revive == "random":
        draws.shuffle(idle)
        chosen = fill(idle, chosen, costs, allowed)
    else:
        idle = _best_first(idle, state.probes)
        chosen = fill_best(config, idle, chosen, costs, allowed, state.probes)
    revived = f"revived, {config.revive}"
    reasons |= {unit.name: revived for unit in chosen if unit.name not in reasons}

    # What they left over goes to the best of the other active units.
    chosen = fill_best(config, order, chosen, costs, allowed, standing)
    reasons |= {unit.name: "kept" for unit in chosen if unit.name not in reasons}
    return _decision(state.step, units, chosen, scores, order, reasons)


def _with_hysteresis(
    config: KillReviveConfig, units: Sequence[Unit], state: State
) -> dict[str, float]:
    """Scores of the active units, raised for those that were active for over an interval."""
    fresh = {
        name
        for name, start in state.since.items()
        if state.step - start <= config.interval and start > 0
    }
    return {
        unit.name: state.scores.get(unit.name, 0.0)
        * (1.0 if unit.name in fresh else 1.0 + config.hysteresis)
        for unit in units
        if unit.name in state.active
    }


def _baseline_order(
    config: KillReviveConfig,
    units: Sequence[Unit],
    scores: Mapping[str, float],
    draws: random.Random,
) -> list[Unit]:
    """The order in which a baseline fills the budget."""
    if config.policy in ("random", "redraw"):
        return draws.sample(list(units), len(units))
    if config.policy == "last":
        return list(reversed(units))
    return _best_first(units, scores)


def _best_first(units: Sequence[Unit], scores: Mapping[str, float]) -> list[Unit]:
    """Sorted by score; of equals the one that the cloud calls first comes first."""
    return sorted(units, key=lambda unit: -scores.get(unit.name, 0.0))


def _decision(
    step: int,
    units: Sequence[Unit],
    chosen: Sequence[Unit],
    scores: Mapping[str, float],
    order: Sequence[Unit],
    reasons: Mapping[str, str] | str,
) -> Decision:
    """The decision with its log lines; `reasons` are those of chosen units, or one for all."""
    if isinstance(reasons, str):
        reasons = {unit.name: reasons for unit in chosen}
    ranks = {unit.name: rank for rank, unit in enumerate(order)}
    names = frozenset(unit.name for unit in chosen)
    lines = tuple(
        DecisionLine(
            step,
            unit.name,
            scores.get(unit.name),
            ranks.get(unit.name),
            unit.name in names,
            reasons.get(unit.name, "killed" if unit.name in ranks else "idle"),
        )
        for unit in units
    )
    return Decision(names, lines)
