"""Settings of Kill and Revive: what is measured, what is kept, what comes back. No torch here.

After arXiv:2404.05182: where the paper is silent the options below say what is done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dlora.errors import UsageError

__all__ = ["OF_LORA", "PAPER", "KillReviveConfig", "Policy", "check_linear", "from_options"]

OF_LORA: Final = ("target_parameters", "modules_to_save", "trainable_token_indices")
"""What LoRA can train beside linear modules."""

Policy = Literal[
    "kr",
    "all",
    "random",
    "redraw",
    "rotate",
    "last",
    "spread",
    "gradient",
    "magnitude",
    "sensitivity",
    "output",
]


_SCORELESS: Final = ("random", "redraw", "rotate", "last", "spread")
"""Baselines that choose without having measured anything."""


@dataclass(frozen=True, kw_only=True)
class KillReviveConfig:
    """Settings of Kill and Revive, and of the baselines behind the same interface."""

    policy: Policy = "kr"
    """kr; or chosen once after the warm-up: all (FT), random, last layers, evenly spread layers,
    largest gradient, magnitude of B A, sensitivity |weight x gradient| (AdaLoRA), output size
    (LoRA-drop); or anew each interval: redraw, at random, as LISA does (arXiv:2403.17919); rotate,
    evenly spread layers, each time one further, block by block as BAdam (arXiv:2404.02827)."""
    unit: Literal["site", "module"] = "site"
    """What is killed and revived as a whole. What whole units leave of the budget goes to single
    modules of others."""
    budget: float = 0.125
    """Share of FT's cost, in (0, 1]. Warm-up, probes, fading and uploads are paid from it. A run
    ends within 2 % of it, or says before its first step what it will take."""
    cost: Literal["bytes", "modules"] = "bytes"
    """What the budget counts: traffic, or the number of active modules."""
    average: bool = True
    """The budget is the average of the whole run, warm-up included; false: of the steps after
    it.
    """
    warmup: float = 0.0
    """Steps with all modules active; under 1: a share of the run. 0: begin with evenly spread
    units.
    """
    interval: int = 20
    """Optimizer steps between decisions."""
    signal: Literal["delta_norm", "norm_delta", "relative", "gradient"] = "relative"
    """Score of an active unit: change of the weights' norm, norm of their change, norm of the
    change of s B A over that of the frozen weight, or norm of the gradient; all over the last
    interval."""
    revive: Literal["none", "random", "scored"] = "none"
    """How idle units come back: not, at random, or by their gradient's norm in a probe step."""
    revive_share: float = 0.25
    """Share of the budget for revived units."""
    prefer: Literal["score", "score_per_cost"] = "score"
    """Which units are best: those of the highest score, or of the highest score for what each adds
    to the cost. The second favours small modules, and modules of sites that others pay for already:
    unit module makes use of it."""
    cover: bool = False
    """Keep the units spread: one for each of as many bands of consecutive units as fit the budget.
    Those that change least are killed, for `revive_share` of the budget, and others of their own
    bands come back."""
    hysteresis: float = 0.1
    """A unit that was active for longer than one interval counts with its score times 1 + this."""
    schedule: Literal["constant", "cubic"] = "constant"
    """How the budget is reached after the warm-up: at once, or falling by the cube (AdaLoRA) until
    `settle`.
    """
    settle: float = 0.5
    """Share of the run after which a cubic budget is down."""
    final: float = 0.25
    """Share of the run at its end in which nothing changes any more."""
    idle: Literal["drop", "cloud", "edge"] = "drop"
    """What becomes of idle modules: removed; applied by the cloud, which then sees them; or applied
    here, at the cost of active ones."""
    drop_steps: int = 4
    """With idle drop: steps in which a killed module fades to nothing."""
    rewarm_steps: int = 5
    """Steps in which the updates of a revived module grow to full size."""
    moments: Literal["reset", "keep"] = "reset"
    """What the optimizer knows of a module that comes back: forgotten, or as it was."""
    seed: int = 0
    """Seed of random draws."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name, low, high in (
            ("budget", 0, 1),
            ("revive_share", 0, 1),
            ("settle", 0, 1),
            ("final", 0, 1),
        ):
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
        return max(steps, 0 if self.policy in ("kr", "all", *_SCORELESS) else 1)


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


def from_options(name: Literal["on", "paper"], options: Mapping[str, Any]) -> KillReviveConfig:
    """A preset with some options changed. Raises UsageError for unknown ones."""
    preset = PAPER if name == "paper" else KillReviveConfig()
    known = {one: getattr(preset, one) for one in preset.__dataclass_fields__}
    if unknown := sorted(options.keys() - known.keys()):
        raise UsageError(f"kr_options: {unknown[0]} is not known; there are: {', '.join(known)}")
    return KillReviveConfig(**(known | dict(options)))


def check_linear(adapter: object, allowed: Collection[str] = ()) -> None:
    """Raises UsageError where settings, or peft's configuration, have more than linear modules.

    `allowed` are names of modules that may be trained beside them.
    """
    for name in OF_LORA:
        if set(getattr(adapter, name, None) or ()) - set(allowed):
            raise UsageError(
                f"Kill and Revive measures linear modules: got an adapter with {name}, want one "
                "without, or kr off"
            )
