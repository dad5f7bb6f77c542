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
from dlora.kill_revive.decide import State, change_cost, decide

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
    if config.policy == "all":
        return Foreseen(everything, 1.0, 1.0)
    if warm >= total_steps:  # nothing is ever decided
        return Foreseen(everything, 1.0, 1.0, _warning(config, costs, 1.0, warm, 1.0))

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

    # A set that takes less becomes larger on the way.
    share, left = costs.share(modules), total_steps - warm
    whole = (warm + left * share + change_cost(same, costs, modules, state.going, left)) / (
        total_steps
    )
    if config.idle == "edge":
        whole = 1.0
    elif config.average:
        whole = max(whole, config.budget)
    return Foreseen(tuple(modules), share, whole, _warning(config, costs, whole, warm, share))


def _warning(config: KillReviveConfig, costs: Costs, whole: float, warm: int, share: float) -> str:
    """Empty where the run keeps its budget."""
    takes = whole if config.average or config.idle == "edge" else share
    if takes <= config.budget * _AS_ASKED:
        return ""

    # What is in the way, the first of them alone.
    ends, fading = costs.share([]), config.drop_steps if config.idle == "drop" else 0
    if config.idle == "edge":
        why = "idle=edge exchanges all modules at every step: use idle=drop or cloud"
    elif ends >= config.budget:
        why = (
            f"embeddings and last hidden states alone, which always travel, take {ends:.1%}: "
            f"ask for more, or leave Kill and Revive out"
        )
    elif share <= config.budget:
        after = f" and the {fading} after it, in which what is killed fades," if fading else ""
        why = (
            f"the {warm} steps of the warm-up{after} train or exchange everything: ask for more, "
            "for more steps, or for a smaller warmup or drop_steps"
        )
    else:
        unit = " or unit=module" if config.unit == "site" else ""
        why = f"it pays for no unit, and one is trained at least: ask for more{unit}"
    of = "bytes" if costs.kind == "bytes" else "modules"
    return (
        f"kr budget: got {config.budget:.1%}, and this run will take about {takes:.1%} of the "
        f"{of} of training all modules, since {why}"
    )
