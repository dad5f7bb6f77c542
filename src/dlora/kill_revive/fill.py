"""Kill and Revive: filling a budget with units. Pure functions over plain numbers.

`allowed` is the cost that the chosen units may have together, as a share of FT's (see `Costs`).
Every function chooses at least one unit, even where the budget pays for none. What whole units
leave over goes to single modules of further ones (`fill_rest`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import Costs, Unit, modules_of

__all__ = [
    "farthest",
    "fill",
    "fill_bands",
    "fill_best",
    "fill_by_worth",
    "fill_rest",
    "rotated",
    "spread",
]

_ROUNDING: Final = 1e-9  # a set that costs just the budget fits


def spread(units: Sequence[Unit], costs: Costs, allowed: float) -> list[Unit]:
    """As many evenly spread units as fit."""
    for count in range(len(units), 0, -1):
        chosen = [units[int((i + 0.5) * len(units) / count)] for i in range(count)]
        if costs.share(modules_of(chosen)) <= allowed + _ROUNDING:
            return chosen
    return [units[len(units) // 2]]


def rotated(units: Sequence[Unit], costs: Costs, allowed: float, turn: int) -> list[Unit]:
    """`spread`, each unit moved on by as many as there were turns, the last to the beginning."""
    places = {unit.name: i for i, unit in enumerate(units)}
    moved = [
        units[(places[unit.name] + turn) % len(units)] for unit in spread(units, costs, allowed)
    ]
    return fill(moved, [], costs, allowed)


def fill(
    order: Iterable[Unit], already: Sequence[Unit], costs: Costs, allowed: float
) -> list[Unit]:
    """Those chosen already, and in order every other unit that still fits."""
    chosen = list(already)
    modules = modules_of(chosen)
    names = {unit.name for unit in chosen}

    for unit in order:
        if unit.name not in names and (
            not chosen or costs.share(modules | set(unit.modules)) <= allowed + _ROUNDING
        ):
            chosen.append(unit)
            names.add(unit.name)
            modules |= set(unit.modules)
    return chosen


def fill_by_worth(
    order: Iterable[Unit],
    already: Sequence[Unit],
    costs: Costs,
    allowed: float,
    scores: Mapping[str, float],
) -> list[Unit]:
    """Those chosen already, and again and again the unit with the best score per added cost."""
    chosen = list(already)
    modules = modules_of(chosen)
    taken = {unit.name for unit in chosen}
    left = [unit for unit in order if unit.name not in taken]

    while left:
        # What a unit adds depends on the set: a module of an open site does not pay for x again.
        cost = costs.share(modules)
        totals = {unit.name: costs.share(modules | set(unit.modules)) for unit in left}
        left = [unit for unit in left if not chosen or totals[unit.name] <= allowed + _ROUNDING]

        if left:
            best = max(
                left,
                key=lambda unit: scores.get(unit.name, 0.0) / max(totals[unit.name] - cost, 1e-9),
            )
            chosen.append(best)
            left.remove(best)
            modules |= set(best.modules)
    return chosen


def fill_best(
    config: KillReviveConfig,
    order: Iterable[Unit],
    already: Sequence[Unit],
    costs: Costs,
    allowed: float,
    scores: Mapping[str, float],
) -> list[Unit]:
    """`fill` or `fill_by_worth`, as the configuration prefers."""
    if config.prefer == "score_per_cost":
        return fill_by_worth(order, already, costs, allowed, scores)
    return fill(order, already, costs, allowed)


def fill_rest(
    order: Iterable[Unit], chosen: Sequence[Unit], costs: Costs, allowed: float
) -> list[Unit]:
    """The chosen units, and of those in order every single module that still fits.

    A unit of which not all modules fit is one with those that do. So is a unit that was chosen
    though it does not fit, where a part of it does.
    """
    modules = modules_of(chosen)
    if len(chosen) == 1 and costs.share(modules) > allowed + _ROUNDING:
        part = _fitting(chosen[0], set(), costs, allowed)
        return [_part_of(chosen[0], part)] if part else list(chosen)

    # Names stay where they are; what is new comes behind.
    found = {unit.name: unit for unit in chosen}
    for unit in order:
        if added := _fitting(unit, modules, costs, allowed):
            modules |= added
            found[unit.name] = _part_of(unit, modules)
    return list(found.values())


def farthest(units: Sequence[Unit], chosen: Iterable[Unit]) -> list[Unit]:
    """Units that are not chosen, each the one farthest from all before it, of equals the highest.

    The highest, because backward ends at the lowest.
    """
    names = {unit.name for unit in chosen}
    taken = [i for i, unit in enumerate(units) if unit.name in names]
    distances = {
        i: min((abs(i - other) for other in taken), default=len(units))
        for i, unit in enumerate(units)
        if unit.name not in names
    }

    ordered = []
    while distances:
        best = max(distances, key=lambda i: (distances[i], i))
        del distances[best]
        distances = {i: min(distance, abs(i - best)) for i, distance in distances.items()}
        ordered.append(units[best])
    return ordered


def _fitting(unit: Unit, modules: set[str], costs: Costs, allowed: float) -> set[str]:
    """The unit's modules that fit beside these, one after another."""
    added: set[str] = set()
    for name in unit.modules:
        if name not in modules and costs.share(modules | added | {name}) <= allowed + _ROUNDING:
            added.add(name)
    return added


def _part_of(unit: Unit, modules: set[str]) -> Unit:
    return Unit(unit.name, tuple(name for name in unit.modules if name in modules), unit.layer)


def fill_bands(
    config: KillReviveConfig,
    units: Sequence[Unit],
    order: Sequence[Unit],
    idle: Sequence[Unit],
    costs: Costs,
    allowed: float,
    probes: Mapping[str, float],
    draws: random.Random,
) -> tuple[list[Unit], dict[str, str]]:
    """One unit for each band of consecutive units, and the reason for each.

    That is the best of the band's active units (`order` is best first). In the weakest bands, and
    where none is active, it is an idle unit that comes back.
    """
    # As many bands as evenly spread units fit.
    count = len(spread(units, costs, allowed))
    band = {unit.name: i * count // len(units) for i, unit in enumerate(units)}
    kept = _first_in_each_band(order, band)

    # Who would come back in each band.
    ranked = (
        sorted(idle, key=lambda unit: -probes.get(unit.name, 0.0))
        if config.revive == "scored"
        else draws.sample(idle, len(idle))
    )
    revived = _first_in_each_band(ranked, band)

    # `kept` was filled best first, so that its last bands are the weakest.
    weakest: list[int] = []
    if config.revive != "none":
        weakest = list(reversed(kept))[: max(1, round(config.revive_share * count))]
    picked = {
        i: revived[i] if i in revived and (i in weakest or i not in kept) else kept[i]
        for i in range(count)
        if i in revived or i in kept
    }

    # Kept units first: should a change of the lowest site cost too much, a revived unit waits.
    names = {unit.name for unit in kept.values()}
    chosen = fill(
        sorted(picked.values(), key=lambda unit: unit.name not in names), [], costs, allowed
    )
    reasons = {
        unit.name: "kept" if unit.name in names else f"revived, {config.revive}" for unit in chosen
    }
    return chosen, reasons


def _first_in_each_band(order: Iterable[Unit], band: Mapping[str, int]) -> dict[int, Unit]:
    firsts: dict[int, Unit] = {}
    for unit in order:
        firsts.setdefault(band[unit.name], unit)
    return firsts
