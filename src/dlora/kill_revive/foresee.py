"""Kill and Revive: what a run will train and take, before it begins. Plain numbers, no model.

What scores will say is not known. But sets of the same budget cost about the same, so that an
evenly spread one stands for those that are chosen by a score.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import Costs, Unit, trained_modules
from dlora.kill_revive.decide import State, change_cost, decide, is_due, schedule

__all__ = ["Foreseen", "foresee"]

_AS_ASKED: Final = 1.02
"""Over a budget by no more than this a run keeps it."""


@dataclass(frozen=True)
class Foreseen:
    """What is known of a run before its first step."""

    modules: tuple[str, ...]
    """Those that are trained after the warm-up, or as many of their kind, in calling order."""
    share: float
    """What a step with them costs, as a share of FT's."""
    whole: float
    """What the whole run costs, as a share of FT's."""
    warning: str = ""
    """Why that is more than the budget, and what to do; empty where it is not."""


def foresee(
    config: KillReviveConfig,
    units: Sequence[Unit],
    costs: Costs,
    total_steps: int,
    going: Collection[str] = (),
) -> Foreseen:
    """What a run of so many steps will train and take.

    `going` are modules that already add something at its beginning.
    """
    everything = tuple(module for unit in units for module in unit.modules)
    warm = config.warmup_steps(total_steps)
    left = total_steps - warm
    if config.policy == "all":
        return Foreseen(everything, 1.0, 1.0)
    if left < 1:  # nothing is ever decided
        return Foreseen(everything, 1.0, 1.0, _warning(config, costs, 1.0, 1.0, warm))

    # As the run will decide, but for what scores say.
    chosen_by = config.policy if config.policy in ("random", "redraw", "last") else "spread"
    same = replace(config, policy=chosen_by, warmup=float(warm), schedule="constant")
    state = State(
        step=warm,
        total_steps=total_steps,
        active=[unit.name for unit in units],
        since={},
        scores={},
        probes={},
        spent=float(warm),
        going=everything if warm else going,
    )
    decision = decide(same, units, costs, state)
    modules = trained_modules(units, decision.active, decision.partial)

    # A set that takes less than the budget becomes larger on the way.
    share = costs.share(modules)
    took = warm + left * share + change_cost(same, units, costs, state, modules)
    asked = config.budget * total_steps if config.average else warm + config.budget * left
    if config.idle == "edge":
        took = total_steps
    elif config.schedule == "cubic":
        least = min(costs.share(unit.modules) for unit in units)
        took = _of_a_cube(config, warm, total_steps, least)
    whole, asked = max(took, asked) / total_steps, asked / total_steps
    warning = _warning(config, costs, whole, share, warm) if whole > asked * _AS_ASKED else ""
    return Foreseen(tuple(modules), share, whole, warning)


def _of_a_cube(config: KillReviveConfig, warm: int, total_steps: int, least: float) -> float:
    """FT's steps that a cubic budget takes: between two decisions it does not fall."""
    spent, level = float(warm), 1.0
    fading = config.drop_steps if config.idle == "drop" else 0
    for step in range(warm, total_steps):
        if is_due(config, step, total_steps):
            now = min(1.0, max(least, schedule(config, step, total_steps, spent)))
            spent += fading * max(0.0, level - now)
            level = now
        spent += level
    return spent


def _warning(config: KillReviveConfig, costs: Costs, whole: float, share: float, warm: int) -> str:
    """What is in the way of a budget, and what to do about it."""
    ends, fading = costs.share([]), config.drop_steps if config.idle == "drop" else 0
    if config.idle == "edge":
        why = "idle=edge exchanges all modules at every step: use idle=drop or cloud"
    elif ends >= config.budget:
        why = (
            f"embeddings and last hidden states, which always travel, take {ends:.1%} by "
            "themselves: raise the budget, or leave Kill and Revive out"
        )
    elif config.schedule == "cubic":
        why = "a cubic budget falls at decisions alone: raise it, or lower interval or settle"
    elif share <= config.budget and warm:
        after = f" and {fading} more, in which killed modules fade," if fading else ""
        why = (
            f"{warm} steps of warm-up{after} exchange all modules: raise the budget or the number "
            "of steps, or lower warmup or drop_steps"
        )
    elif share <= config.budget:
        why = f"what is killed at the beginning fades for {fading} steps: lower drop_steps"
    else:
        unit = ", or take unit=module" if config.unit == "site" else ""
        why = f"one unit at least is trained, which takes {share:.1%}: raise the budget{unit}"
    return (
        f"kr budget: got {config.budget:.1%}, and this run will take about {whole:.1%} of what "
        f"training all modules takes, as {why}"
    )
