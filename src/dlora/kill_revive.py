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
from typing import Any, Final, Literal

from dlora.errors import UsageError

__all__ = [
    "PAPER",
    "Costs",
    "Decision",
    "KillReviveConfig",
    "Record",
    "Unit",
    "decide",
    "from_options",
    "is_due",
    "needs_probe",
    "schedule",
]

Policy = Literal["kr", "all", "random", "redraw", "last", "spread", "gradient", "magnitude", "sensitivity", "output"]


@dataclass(frozen=True, kw_only=True)
class KillReviveConfig:
    """Settings of Kill and Revive, and of the baselines behind the same interface."""

    policy: Policy = "kr"
    """kr; or chosen once after the warm-up: all (FT), random, last layers, evenly spread layers, largest gradient,
    magnitude of B A, sensitivity |weight x gradient| (AdaLoRA), output size (LoRA-drop); or redraw: random anew each
    interval."""
    unit: Literal["site", "module"] = "site"
    """What is killed and revived as a whole."""
    budget: float = 0.125
    """Share of FT's cost, in (0, 1]."""
    cost: Literal["bytes", "modules"] = "bytes"
    """What the budget counts: traffic, or the number of active modules."""
    average: bool = True
    """The budget is the average of the whole run, warm-up included; false: of the steps after it."""
    warmup: float = 0.0
    """Steps with all modules active; under 1: a share of the run. 0: begin with evenly spread units."""
    interval: int = 20
    """Optimizer steps between decisions."""
    signal: Literal["delta_norm", "norm_delta", "relative", "gradient"] = "relative"
    """Score of an active unit: change of the weights' norm, norm of their change, norm of the change of s B A over that
    of the frozen weight, or norm of the gradient; all over the last interval."""
    revive: Literal["none", "random", "scored"] = "none"
    """How idle units come back: not, by lot, or by the norm of their gradient in a probe step."""
    revive_share: float = 0.25
    """Share of the budget for revived units."""
    prefer: Literal["score", "score_per_cost"] = "score"
    """Which units are best: those of the highest score, or of the highest score for what each adds to the cost. The
    second favours small modules, and modules of sites that others pay for already: unit module makes use of it."""
    cover: bool = False
    """Keep the units spread: one for each of as many bands of consecutive units as fit the budget. Those that change
    least are killed, for `revive_share` of the budget, and others of their own bands come back."""
    hysteresis: float = 0.1
    """A unit that was active for longer than one interval counts with its score times 1 + this."""
    schedule: Literal["constant", "cubic"] = "constant"
    """How the budget is reached after the warm-up: at once, or falling by the cube (AdaLoRA) until `settle`."""
    settle: float = 0.5
    """Share of the run after which a cubic budget is down."""
    final: float = 0.25
    """Share of the run at its end in which nothing changes any more."""
    idle: Literal["drop", "cloud", "edge"] = "drop"
    """What becomes of idle modules: removed; applied by the cloud, which then sees them; or applied here, at the cost
    of active ones."""
    drop_steps: int = 4
    """With idle drop: steps in which a killed module fades to nothing."""
    rewarm_steps: int = 5
    """Steps in which the updates of a revived module grow to full size."""
    seed: int = 0
    """Seed of drawing by lot."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name, low, high in (("budget", 0, 1), ("revive_share", 0, 1), ("settle", 0, 1), ("final", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high or (name == "budget" and value == 0):
                raise UsageError(f"kr {name}: got {value}, want a value from {low} to {high}")
        for name in ("warmup", "hysteresis", "drop_steps", "rewarm_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"kr {name}: got {getattr(self, name)}, want 0 or more")
        if self.interval < 1:
            raise UsageError(f"kr interval: got {self.interval}, want at least 1")

    def warmup_steps(self, total_steps: int) -> int:
        """Steps with all modules active. At least one, where a baseline needs a score to choose."""
        steps = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        return max(steps, 0 if self.policy in ("kr", "all", "random", "redraw", "last", "spread") else 1)


PAPER: Final = KillReviveConfig(
    unit="module",
    cost="modules",
    average=False,
    warmup=0.05,
    signal="delta_norm",
    revive="random",
    hysteresis=0.0,
    final=0.0,
)
"""The paper's own words, taken literally: one module in eight, by the variation of its l2 norm."""


@dataclass(frozen=True)
class Unit:
    """One unit: its modules, the decoder layer they are in (-1: none), in the cloud's calling order."""

    name: str
    modules: tuple[str, ...]
    layer: int


@dataclass(frozen=True)
class Costs:
    """What a set of modules costs in a training step, as a share of FT."""

    sites: tuple[tuple[int, Mapping[str, int]], ...]
    """(input width, elements that each module adds to both directions) of every site, in calling order. On the plain
    wire a module adds its output width; factored r (1 + out / tokens)."""
    ends: int = 0
    """Elements a token that travel in any case: embeddings up, last hidden states down, their gradient up."""
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
            if config.average:  # what is left pays for a constant and for the rest of the cube above it
                cube = (end - warm) * rest**4 / 4
                final = max(0.0, (config.budget * total_steps - spent - cube) / max(1.0, left - cube))
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
    """Whether this step must tell the gradients of idle units: the one before a decision that revives by score."""
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
    if config.policy == "all":  # nothing to decide, but scores are wanted: how much each unit changes
        order = sorted(units, key=lambda unit: -scores.get(unit.name, 0.0))
        return _decision(step, units, units, scores, order, dict.fromkeys((u.name for u in units), "all"))
    allowed = schedule(config, step, total_steps, spent)
    lots = random.Random(f"{config.seed}:{step if config.policy != 'random' else 'once'}")
    if config.policy != "kr":
        order = _baseline_order(config.policy, units, scores, lots)
        spread = config.policy == "spread"
        chosen = _spread(units, costs, allowed) if spread else _fill(order, [], costs, allowed)
        return _decision(step, units, chosen, scores, order, dict.fromkeys((u.name for u in chosen), config.policy))
    if step == 0:  # without warm-up: nothing is known yet
        chosen = _spread(units, costs, allowed)
        return _decision(step, units, chosen, {}, [], dict.fromkeys((u.name for u in chosen), "start"))
    fresh = {name for name, start in since.items() if step - start <= config.interval and start > 0}
    standing = {
        unit.name: scores.get(unit.name, 0.0) * (1.0 if unit.name in fresh else 1.0 + config.hysteresis)
        for unit in units
        if unit.name in active
    }
    order = sorted((unit for unit in units if unit.name in active), key=lambda unit: -standing[unit.name])
    idle = [unit for unit in units if unit.name not in active]
    revives = config.revive if idle else "none"
    if config.cover:
        chosen, reasons = _fill_bands(config, units, order, idle, costs, allowed, probes, lots)
        return _decision(step, units, chosen, {**probes, **scores}, order, reasons)
    fill = _fill_by_worth if config.prefer == "score_per_cost" else _fill
    kept = fill(order, [], costs, allowed * (1 - config.revive_share) if revives != "none" else allowed, standing)
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
    order: Iterable[Unit], chosen: Sequence[Unit], costs: Costs, allowed: float, _: Mapping[str, float] | None = None
) -> list[Unit]:
    """Add units in order as long as they fit; at least one in all."""
    found = list(chosen)
    modules = {module for unit in found for module in unit.modules}
    names = {unit.name for unit in found}
    for unit in order:
        if unit.name not in names and (not found or costs.share(modules | set(unit.modules)) <= allowed + 1e-9):
            found.append(unit)
            names.add(unit.name)
            modules |= set(unit.modules)
    return found


def _fill_by_worth(
    order: Iterable[Unit], chosen: Sequence[Unit], costs: Costs, allowed: float, scores: Mapping[str, float]
) -> list[Unit]:
    """Add the unit with the highest score for what it adds to the cost, as long as one fits; at least one in all."""
    found = list(chosen)
    modules = {module for unit in found for module in unit.modules}
    taken = {unit.name for unit in found}
    left = [unit for unit in order if unit.name not in taken]
    while left:
        cost = costs.share(modules)
        totals = {unit.name: costs.share(modules | set(unit.modules)) for unit in left}
        left = [unit for unit in left if not found or totals[unit.name] <= allowed + 1e-9]
        if left:
            best = max(left, key=lambda unit: scores.get(unit.name, 0.0) / max(totals[unit.name] - cost, 1e-9))
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
    """One unit for each band: the best of its active ones, or in the weakest bands a revived one."""
    count = len(_spread(units, costs, allowed))
    band = {unit.name: i * count // len(units) for i, unit in enumerate(units)}
    kept: dict[int, Unit] = {}
    for unit in order:
        kept.setdefault(band[unit.name], unit)
    comers: dict[int, Unit] = {}
    scored = config.revive == "scored"
    ranked = sorted(idle, key=lambda unit: -probes.get(unit.name, 0.0)) if scored else lots.sample(idle, len(idle))
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
    # Kept ones first: should a change of the lowest site cost too much, it is a revived one that waits.
    chosen = _fill(sorted(picked.values(), key=lambda unit: unit.name not in names), [], costs, allowed)
    return chosen, {u.name: "kept" if u.name in names else f"revived, {config.revive}" for u in chosen}


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


def from_options(name: Literal["on", "paper"], options: Mapping[str, Any]) -> KillReviveConfig:
    """A preset with some options changed. Raises UsageError for unknown ones."""
    preset = PAPER if name == "paper" else KillReviveConfig()
    known = {one: getattr(preset, one) for one in preset.__dataclass_fields__}
    if unknown := sorted(options.keys() - known.keys()):
        raise UsageError(f"kr_options: {unknown[0]} is not known; there are: {', '.join(known)}")
    return KillReviveConfig(**(known | dict(options)))
