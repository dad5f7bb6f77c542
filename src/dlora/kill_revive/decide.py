"""Kill and Revive: which modules to train next. Pure decisions over plain numbers.

After arXiv:2404.05182: modules whose l2 norm hardly varies are killed (frozen), some come back
later, and only a small active set is trained and exchanged. Where the paper is silent the
options below say what is done. A unit is what is killed and revived as a whole: a site (all
modules that read the same tensor) or a module. Costs are shares of full tuning's (FT) traffic.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dlora.kill_revive.config import KillReviveConfig, Policy

__all__ = [
    "Costs",
    "Decision",
    "Record",
    "Unit",
    "decide",
    "is_due",
    "needs_probe",
    "schedule",
]


@dataclass(frozen=True)
class Unit:
    """One unit: its modules, the decoder layer they are in (-1: none), in the cloud's calling
    order.
    """

    name: str
    modules: tuple[str, ...]
    layer: int


@dataclass(frozen=True)
class Costs:
    """What a set of modules costs in a training step, as a share of FT."""

    sites: tuple[tuple[int, Mapping[str, int]], ...]
    """(input width, elements that each module adds to both directions) of every site, in calling
    order. On the plain wire a module adds its output width; factored r (1 + out / tokens)."""
    ends: int = 0
    """Elements a token that travel in any case: embeddings up, last hidden states down, their
    gradient up.
    """
    kind: Literal["bytes", "modules"] = "bytes"

    def share(self, modules: Collection[str]) -> float:
        """Cost of training these modules over that of training all."""
        everything = [name for _, site in self.sites for name in site]
        if self.kind == "modules":
            return len(set(modules)) / max(1, len(everything))
        return self._elements(set(modules)) / max(1, self._elements(set(everything)))

    def _elements(self, modules: set[str]) -> int:
        total, lowest = self.ends, True
        for width, site in self.sites:
            if found := [name for name in site if name in modules]:
                # x down, its gradient up (not at the lowest site); deltas up, their gradients down
                total += width * (1 if lowest else 2) + 2 * sum(site[name] for name in found)
                lowest = False
        return total


@dataclass(frozen=True)
class Record:
    """Why one unit is as it is after a decision."""

    step: int
    unit: str
    score: float | None
    rank: int | None
    active: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The units to train from now on."""

    active: frozenset[str]
    records: tuple[Record, ...] = field(default=(), compare=False)


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
            if (
                config.average
            ):  # what is left pays for a constant and for the rest of the cube above it
                cube = (end - warm) * rest**4 / 4
                final = max(
                    0.0, (config.budget * total_steps - spent - cube) / max(1.0, left - cube)
                )
            return final + (1 - final) * rest**3
    return max(0.0, level)


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
    """Whether this step must tell the gradients of idle units: the one before a decision that
    revives by score.
    """
    after = step + 1
    first = config.warmup_steps(total_steps)
    return (
        config.policy == "kr"
        and config.revive == "scored"
        and after > first
        and is_due(config, after, total_steps)
        and config.revive_share > 0
    )


def decide(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    *,
    step: int,
    total_steps: int,
    active: Collection[str],
    since: Mapping[str, int],
    scores: Mapping[str, float],
    probes: Mapping[str, float],
    spent: float,
) -> Decision:
    """Choose the units to train from `step` on.

    `scores` are those of `active` units (see `signal`, or the policy), `probes` those of
    idle ones, `since` the step at which each active unit became so. The same
    arguments give the same decision: lots are drawn from seed and step.
    """
    if (
        config.policy == "all"
    ):  # nothing to decide, but scores are wanted: how much each unit changes
        order = sorted(units, key=lambda unit: -scores.get(unit.name, 0.0))
        return _decision(
            step, units, units, scores, order, dict.fromkeys((u.name for u in units), "all")
        )
    allowed = schedule(config, step, total_steps, spent)
    lots = random.Random(f"{config.seed}:{step if config.policy != 'random' else 'once'}")
    if config.policy != "kr":
        order = _baseline_order(config.policy, units, scores, lots)
        spread = config.policy == "spread"
        chosen = _spread(units, costs, allowed) if spread else _fill(order, [], costs, allowed)
        return _decision(
            step,
            units,
            chosen,
            scores,
            order,
            dict.fromkeys((u.name for u in chosen), config.policy),
        )
    if step == 0:  # without warm-up: nothing is known yet
        chosen = _spread(units, costs, allowed)
        return _decision(
            step, units, chosen, {}, [], dict.fromkeys((u.name for u in chosen), "start")
        )
    fresh = {name for name, start in since.items() if step - start <= config.interval and start > 0}
    standing = {
        unit.name: scores.get(unit.name, 0.0)
        * (1.0 if unit.name in fresh else 1.0 + config.hysteresis)
        for unit in units
        if unit.name in active
    }
    order = sorted(
        (unit for unit in units if unit.name in active), key=lambda unit: -standing[unit.name]
    )
    idle = [unit for unit in units if unit.name not in active]
    revives = config.revive if idle else "none"
    if config.cover:
        chosen, reasons = _fill_bands(config, units, order, idle, costs, allowed, probes, lots)
        return _decision(step, units, chosen, {**probes, **scores}, order, reasons)
    fill = _fill_by_worth if config.prefer == "score_per_cost" else _fill
    kept = fill(
        order,
        [],
        costs,
        allowed * (1 - config.revive_share) if revives != "none" else allowed,
        standing,
    )
    reasons = {unit.name: "kept" for unit in kept}
    chosen = kept
    if revives != "none":
        if revives == "random":
            lots.shuffle(idle)
            chosen = _fill(idle, kept, costs, allowed)
        else:
            idle.sort(key=lambda unit: -probes.get(unit.name, 0.0))
            chosen = fill(idle, kept, costs, allowed, probes)
        reasons |= {unit.name: f"revived, {revives}" for unit in chosen if unit.name not in reasons}
        # What the revived ones left over goes to the best of the others.
        chosen = fill(order, chosen, costs, allowed, standing)
        reasons |= {unit.name: "kept" for unit in chosen if unit.name not in reasons}
    return _decision(step, units, chosen, {**probes, **scores}, order, reasons)


def _fill(
    order: Iterable[Unit],
    chosen: Sequence[Unit],
    costs: Costs,
    allowed: float,
    _: Mapping[str, float] | None = None,
) -> list[Unit]:
    """Add units in order as long as they fit; at least one in all."""
    found = list(chosen)
    modules = {module for unit in found for module in unit.modules}
    names = {unit.name for unit in found}
    for unit in order:
        if unit.name not in names and (
            not found or costs.share(modules | set(unit.modules)) <= allowed + 1e-9
        ):
            found.append(unit)
            names.add(unit.name)
            modules |= set(unit.modules)
    return found


def _fill_by_worth(
    order: Iterable[Unit],
    chosen: Sequence[Unit],
    costs: Costs,
    allowed: float,
    scores: Mapping[str, float],
) -> list[Unit]:
    """Add the unit with the highest score for what it adds to the cost, as long as one fits; at
    least one in all.
    """
    found = list(chosen)
    modules = {module for unit in found for module in unit.modules}
    taken = {unit.name for unit in found}
    left = [unit for unit in order if unit.name not in taken]
    while left:
        cost = costs.share(modules)
        totals = {unit.name: costs.share(modules | set(unit.modules)) for unit in left}
        left = [unit for unit in left if not found or totals[unit.name] <= allowed + 1e-9]
        if left:
            best = max(
                left,
                key=lambda unit: scores.get(unit.name, 0.0) / max(totals[unit.name] - cost, 1e-9),
            )
            found.append(best)
            left.remove(best)
            modules |= set(best.modules)
    return found


def _fill_bands(
    config: KillReviveConfig,
    units: Sequence[Unit],
    order: Sequence[Unit],
    idle: Sequence[Unit],
    costs: Costs,
    allowed: float,
    probes: Mapping[str, float],
    lots: random.Random,
) -> tuple[list[Unit], dict[str, str]]:
    """One unit for each band: the best of its active ones, or in the weakest bands a revived
    one.
    """
    count = len(_spread(units, costs, allowed))
    band = {unit.name: i * count // len(units) for i, unit in enumerate(units)}
    kept: dict[int, Unit] = {}
    for unit in order:
        kept.setdefault(band[unit.name], unit)
    comers: dict[int, Unit] = {}
    scored = config.revive == "scored"
    ranked = (
        sorted(idle, key=lambda unit: -probes.get(unit.name, 0.0))
        if scored
        else lots.sample(idle, len(idle))
    )
    for unit in ranked:
        comers.setdefault(band[unit.name], unit)
    if config.revive == "none":  # only to fill what no active unit covers
        weakest: list[int] = []
    else:
        weakest = list(reversed(kept))[: max(1, round(config.revive_share * count))]
    picked = {
        i: comers[i] if i in comers and (i in weakest or i not in kept) else kept[i]
        for i in range(count)
        if i in comers or i in kept
    }
    names = {unit.name for unit in kept.values()}
    # Kept ones first: should a change of the lowest site cost too much, it is a revived one that
    # waits.
    chosen = _fill(
        sorted(picked.values(), key=lambda unit: unit.name not in names), [], costs, allowed
    )
    return chosen, {
        u.name: "kept" if u.name in names else f"revived, {config.revive}" for u in chosen
    }


def _baseline_order(
    policy: Policy, units: Sequence[Unit], scores: Mapping[str, float], lots: random.Random
) -> list[Unit]:
    if policy in ("random", "redraw"):
        return lots.sample(list(units), len(units))
    if policy == "last":
        return list(reversed(units))
    return sorted(units, key=lambda unit: -scores.get(unit.name, 0.0))


def _spread(units: Sequence[Unit], costs: Costs, allowed: float) -> list[Unit]:
    """As many evenly spread units as fit; at least one."""
    for count in range(len(units), 0, -1):
        found = [units[int((i + 0.5) * len(units) / count)] for i in range(count)]
        if costs.share({module for unit in found for module in unit.modules}) <= allowed + 1e-9:
            return found
    return [units[len(units) // 2]]


def _decision(
    step: int,
    units: Sequence[Unit],
    chosen: Sequence[Unit],
    scores: Mapping[str, float],
    order: Sequence[Unit],
    reasons: Mapping[str, str],
) -> Decision:
    ranks = {unit.name: rank for rank, unit in enumerate(order)}
    names = frozenset(unit.name for unit in chosen)
    records = tuple(
        Record(
            step,
            unit.name,
            scores.get(unit.name),
            ranks.get(unit.name),
            unit.name in names,
            reasons.get(unit.name, "killed" if unit.name in ranks else "idle"),
        )
        for unit in units
    )
    return Decision(names, records)
