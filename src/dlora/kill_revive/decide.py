"""Kill and Revive: which modules to train next. Pure decisions over plain numbers.

After arXiv:2404.05182: modules whose l2 norm hardly varies are killed (frozen), some come back
later, and only a small active set is trained and exchanged. Where the paper is silent the options
of `KillReviveConfig` say what is done.

A decision goes so: `is_due` says whether there is one before a step, `schedule` what a step may
cost from now on, and `decide` ranks the units and fills that budget with them (`fill.py`), so that
what fading or uploading the killed ones takes is paid for as well. Sets are coarse: after the last
decision `one_more` adds a module as soon as what is left pays for it until the end.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import Costs, Unit, trained_modules
from dlora.kill_revive.fill import farthest, fill, fill_bands, fill_best, fill_rest, rotated, spread

__all__ = [
    "Decision",
    "DecisionLine",
    "State",
    "change_cost",
    "decide",
    "is_due",
    "last_ranks",
    "needs_outputs",
    "needs_probe",
    "one_more",
    "schedule",
]

_TRIES: Final = 6
"""Of a decision, until what it kills is paid for."""
_LEFT_OVER: Final = 0.01
"""Of a budget, what may stay unspent before a set is made larger."""


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
    partial: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of active units that are trained in part: the modules that are."""
    going: Collection[str] = ()
    """Modules that add something: if they are killed they fade, or are uploaded."""


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
    partial: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of units that are to be trained in part: those modules."""
    lines: tuple[DecisionLine, ...] = field(default=(), compare=False)


# ----------------------------------------------------------------- when, and for how much


def is_due(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether a decision is made before this step (counted from 0)."""
    warm = config.warmup_steps(total_steps)
    if step == warm:
        return True
    if config.policy not in ("kr", "redraw", "rotate", "all") or step < warm:
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
    left = max(1, total_steps - step)
    purse = _purse(config, step, total_steps, spent)
    if _is_level(config, step, total_steps):
        return max(0.0, purse / left)

    # What is left pays for a constant, and for the rest of the cube above it.
    warm, end = config.warmup_steps(total_steps), _settled(config, total_steps)
    rest = 1 - (step - warm) / (end - warm)
    cube = (end - warm) * rest**4 / 4
    final = max(0.0, (purse - cube) / max(1.0, left - cube))
    return final + (1 - final) * rest**3


def _purse(config: KillReviveConfig, step: int, total_steps: int, spent: float) -> float:
    """What is left of the budget, in FT's steps.

    With idle=edge every step costs all there is: then the budget is only that of what is trained.
    """
    if config.idle == "edge":
        return config.budget * (total_steps - step)
    if config.average:
        return config.budget * total_steps - spent
    warm = config.warmup_steps(total_steps)  # such steps cost 1, and are not counted
    return config.budget * (total_steps - warm) - (spent - warm)


def _is_level(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether what is left is for equal steps until the end."""
    return config.schedule == "constant" or step >= _settled(config, total_steps)


def _settled(config: KillReviveConfig, total_steps: int) -> int:
    """The step from which on a cubic budget is down."""
    return max(config.warmup_steps(total_steps) + 1, round(config.settle * total_steps))


def _keeps(config: KillReviveConfig) -> bool:
    """Whether later decisions keep what is active, as it is paid for."""
    return config.policy == "kr" and config.revive == "none" and not config.cover


def _decides_again(config: KillReviveConfig, step: int, total_steps: int) -> bool:
    """Whether a later decision may choose other units."""
    if step < config.warmup_steps(total_steps):
        return True
    if _keeps(config):
        return False
    after = range(step + 1, min(total_steps, step + config.interval + 1))
    return any(is_due(config, one, total_steps) for one in after)


def change_cost(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    state: State,
    modules: Collection[str],
) -> float:
    """What it takes to come from the state to these modules, in FT's steps.

    That is what killed ones cost while they fade, or to upload. The cloud is then given all idle
    ones, those that it had before as well.
    """
    idle = set(state.going) - set(modules)
    if config.idle == "drop":
        steps = min(config.drop_steps, state.total_steps - state.step)
        return steps * (costs.share(idle | set(modules)) - costs.share(modules))
    now = trained_modules(units, state.active, state.partial)
    uploads = config.idle == "cloud" and not idle.isdisjoint(now)
    return costs.upload(idle, modules) if uploads else 0.0


# ----------------------------------------------------------------- who


class _Choice(NamedTuple):
    """What a decision is made of."""

    chosen: Sequence[Unit]
    scores: Mapping[str, float]
    order: Sequence[Unit]
    """Ranked units, best first."""
    reasons: Mapping[str, str]
    """Of chosen units."""


def decide(config: KillReviveConfig, units: Sequence[Unit], costs: Costs, state: State) -> Decision:
    """Choose the units to train from `state.step` on; the same arguments give the same choice.

    Random draws come from a generator that is seeded with the configuration's seed and the step.
    """
    step, total_steps = state.step, state.total_steps
    if config.policy == "all":
        # Nothing to decide, but the log wants scores: how much each unit changed.
        order = _best_first(units, state.scores)
        reasons = {unit.name: "all" for unit in units}
        return _decision(step, units, _Choice(units, state.scores, order, reasons), units)

    allowed = schedule(config, step, total_steps, state.spent)
    decision = _choose(config, units, costs, state, allowed)
    if not _is_level(config, step, total_steps):
        return decision

    # What is killed still takes a little: choose anew with what that leaves of the budget.
    left = max(1, total_steps - step)
    purse = _purse(config, step, total_steps, state.spent)
    for _ in range(_TRIES):
        modules = trained_modules(units, decision.active, decision.partial)
        change = change_cost(config, units, costs, state, modules)
        if left * costs.share(modules) + change <= purse + 1e-9:
            break
        decision = _choose(config, units, costs, state, max(0.0, (purse - change) / left))
    return decision


def one_more(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    state: State,
    ranked: Sequence[str],
) -> Decision | None:
    """The same set with a module more, if what is left pays for it until the end.

    Only after the last decision, and while more than a hundredth of the budget would stay unspent.
    `ranked` are names of that decision's units, best first.
    """
    step, total_steps = state.step, state.total_steps
    if config.policy == "all" or not _is_level(config, step, total_steps):
        return None
    left, purse = total_steps - step, _purse(config, step, total_steps, state.spent)
    unspent = purse - left * costs.share(trained_modules(units, state.active, state.partial))
    if unspent <= _LEFT_OVER * config.budget * total_steps:
        return None
    if _decides_again(config, step, total_steps):
        return None

    by_name = {unit.name: unit for unit in units}
    chosen = [_as_trained(unit, state) for unit in units if unit.name in state.active]
    best = [by_name[name] for name in ranked]
    order = _rest_order(config, units, chosen, best)[:1]
    larger = fill_rest(order, chosen, costs, purse / left)
    if not order or larger == chosen:
        return None
    reasons = {unit.name: "kept" for unit in chosen} | {order[0].name: "rest"}
    return _decision(step, units, _Choice(chosen, {}, [], reasons), larger)


def last_ranks(log: Sequence[DecisionLine]) -> list[str]:
    """Units that the last decision ranked, best first."""
    ranked = [line for line in log if line.rank is not None]
    last = [line for line in ranked if line.step == ranked[-1].step]
    return [line.unit for line in sorted(last, key=lambda line: line.rank or 0)]


def _choose(
    config: KillReviveConfig, units: Sequence[Unit], costs: Costs, state: State, allowed: float
) -> Decision:
    """The policy's choice of units for this cost, and single modules for what they leave over."""
    draws = random.Random(f"{config.seed}:{state.step if config.policy != 'random' else 'once'}")
    if config.policy == "kr" and state.step > 0:
        choice = _kill_and_revive(config, units, costs, state, allowed, draws)
    else:
        start = config.policy == "kr"  # without warm-up: nothing is known yet
        order = [] if start else _baseline_order(config, units, state.scores, draws)
        if start or config.policy == "spread":
            chosen = spread(units, costs, allowed)
        elif config.policy == "rotate":
            turn = (state.step - config.warmup_steps(state.total_steps)) // config.interval
            chosen = rotated(units, costs, allowed, turn)
        else:
            chosen = fill(order, [], costs, allowed)
        reasons = {unit.name: "start" if start else config.policy for unit in chosen}
        choice = _Choice(chosen, {} if start else state.scores, order, reasons)

    order = _rest_order(config, units, choice.chosen, choice.order)
    if _keeps(config) and state.step > config.warmup_steps(state.total_steps):
        order = []  # `one_more` makes it larger, as it does with any set that stays
    larger = fill_rest(order, choice.chosen, costs, allowed)
    return _decision(state.step, units, choice, larger)


def _kill_and_revive(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    state: State,
    allowed: float,
    draws: random.Random,
) -> _Choice:
    """Keep the best active units, and let idle ones come back for `revive_share` of the budget."""
    standing = _with_hysteresis(config, units, state)
    active = [_as_trained(unit, state) for unit in units if unit.name in state.active]
    order = _best_first(active, standing)
    idle = [unit for unit in units if unit.name not in state.active]
    scores = {**state.probes, **state.scores}

    if config.cover:
        chosen, reasons = fill_bands(
            config, units, order, idle, costs, allowed, state.probes, draws
        )
        return _Choice(chosen, scores, order, reasons)

    if config.revive == "none" or not idle:
        kept = fill_best(config, order, [], costs, allowed, standing)
        return _Choice(kept, scores, order, {unit.name: "kept" for unit in kept})

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
    return _Choice(chosen, scores, order, reasons)


def _as_trained(unit: Unit, state: State) -> Unit:
    """The unit with the modules of it that are trained."""
    return Unit(unit.name, tuple(state.partial.get(unit.name, unit.modules)), unit.layer)


def _rest_order(
    config: KillReviveConfig, units: Sequence[Unit], chosen: Sequence[Unit], ranked: Sequence[Unit]
) -> list[Unit]:
    """Where single modules come from: from units that are trained in part, then from the best.

    Where ranks do not count, and behind ranked units, it is those farthest from all others.
    """
    now = {unit.name: unit for unit in chosen}
    in_part = [
        unit
        for unit in units
        if unit.name in now and len(now[unit.name].modules) < len(unit.modules)
    ]
    others = {unit.name: unit for unit in units if unit.name not in now}
    if config.policy in ("spread", "rotate") or config.cover:
        ranked = []
    best = [others[unit.name] for unit in ranked if unit.name in others]
    return [*in_part, *best, *farthest(units, [*chosen, *best])]


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
    step: int, units: Sequence[Unit], choice: _Choice, chosen: Sequence[Unit]
) -> Decision:
    """The decision for the `chosen`, with a log line for every unit.

    `choice` has the reasons, but for units of which single modules were taken besides.
    """
    ranks = {unit.name: rank for rank, unit in enumerate(choice.order)}
    whole = {unit.name: len(unit.modules) for unit in units}
    partial = {unit.name: unit.modules for unit in chosen if len(unit.modules) < whole[unit.name]}
    names = frozenset(unit.name for unit in chosen)

    def reason(name: str) -> str:
        if name not in names:
            return "killed" if name in ranks else "idle"
        only = ", ".join(module.rpartition(".")[2] for module in partial.get(name, ()))
        return choice.reasons.get(name, "rest") + (f", only {only}" if only else "")

    lines = tuple(
        DecisionLine(
            step,
            unit.name,
            choice.scores.get(unit.name),
            ranks.get(unit.name),
            unit.name in names,
            reason(unit.name),
        )
        for unit in units
    )
    return Decision(names, partial, lines)
