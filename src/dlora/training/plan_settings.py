"""Settings of `dlora plan`: what of a run decides its cost. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from dlora.edge.options import (
    InFlight,
    InputGrad,
    SplitOptions,
    check_experts,
    check_in_flight,
    check_input_grad,
)
from dlora.edge.settings import EdgeSettings, target_names
from dlora.edge.task_forms import Task
from dlora.errors import UsageError
from dlora.training.link_speed import link_speed
from dlora.training.settings import TrainSettings, check_spectral_start

__all__ = ["PlanSettings", "plan_of", "run_of"]

_OF_A_RUN: Final = ("wire", "wire_dtype", "input_grad", "in_flight", "kr")
"""Settings that are columns of the table over a link."""
_ALWAYS: Final = ("sites", "rtt_ms", "up_mbit", "down_mbit", "check")
"""Settings of a plan alone that are such columns, or of no use beside the table."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(EdgeSettings):
    """Settings of `dlora plan`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": f"{EdgeSettings.GROUPS['connection']} input_grad in_flight",
        "run": "task "
        "data columns val_size eval_data eval_steps eval_batch_size max_length overlong "
        "pad_to batch_size gradient_accumulation_steps epochs max_steps seed",
        "rows without data": "length supervised",
        "adapter": "adapter kind r target_modules target_parameters modules_to_save "
        "trainable_token_indices rank_pattern spectral_start",
        "Kill and Revive": "kr kr_options sites",
        "link": "link rtt_ms up_mbit down_mbit",
        "how good the plan is": "check",
        "privacy": EdgeSettings.GROUPS["privacy"],
        "computing": EdgeSettings.GROUPS["computing"],
    }

    task: Task = TrainSettings.task
    """What is learned, as for training. Plans are of sft."""
    data: str | None = None
    """Training data, as for training: steps and lengths of rows are then those of the run. Default:
    rows that all have `length` tokens."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in the data, as for training."""
    val_size: float = TrainSettings.val_size
    """Rows of `data` to hold out, as for training."""
    eval_data: str | None = None
    """Held-out data, as for training: evaluations are planned too."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations. Default: once an epoch."""
    eval_batch_size: int = TrainSettings.eval_batch_size
    """Rows of a micro-batch in evaluation."""
    max_length: int = TrainSettings.max_length
    """Longest row in tokens, as for training."""
    overlong: Literal["error", "drop", "truncate"] = TrainSettings.overlong
    """What to do with longer rows."""
    pad_to: int = TrainSettings.pad_to
    """As for training: over 0 rows are padded to a multiple of it, and all positions travel."""
    epochs: float = TrainSettings.epochs
    """Passes over the data."""
    max_steps: int = TrainSettings.max_steps
    """Optimizer steps of the run, in place of `epochs`. -1: as many as the epochs have; without
    data 1000."""
    seed: int = TrainSettings.seed
    """Seed of the choice of rows to hold out."""
    adapter: Path | None = None
    """An existing adapter folder that training would start from."""
    kind: Literal["lora", "series", "parallel"] = TrainSettings.kind
    """LoRA, or bottleneck adapters, as for training."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks for modules whose name matches a pattern."""
    spectral_start: bool = TrainSettings.spectral_start
    """One micro-batch more at the beginning, as for training."""
    kr: Literal["off", "on", "paper"] = TrainSettings.kr
    """Few modules at a time, as for training: a set that its budget pays for is planned."""
    kr_options: dict[str, Any] = field(default_factory=dict)
    """Settings of Kill and Revive by name, as for training."""
    target_modules: list[str] | str | None = None
    """Linear modules to adapt, as for training. Default: peft's for this architecture."""
    target_parameters: list[str] | None = None
    """Fused weights of experts to adapt, as for training."""
    modules_to_save: list[str] | None = None
    """Embedding or LM head to train whole, as for training."""
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)
    """Rows of them to train, as for training."""
    r: int = TrainSettings.r
    """LoRA rank."""
    sites: int | None = None
    """Number of active sites, evenly spread. Default: all, or what Kill and Revive's budget pays
    for."""
    batch_size: int = TrainSettings.batch_size
    """Rows of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step. On the hosted wire the adapter goes up once a step."""
    length: int = 128
    """Tokens of a row."""
    supervised: int = 16
    """Tokens of a row with a label."""
    link: str | None = None
    """A table of the ways to train over a link, the fastest of them and the command to use: lan,
    fibre, home, mobile, here (the link there is), or UP/DOWN/RTT in Mbit/s, Mbit/s and ms. All
    wires are in the table, with parts in flight, Kill and Revive's eighth, and codecs that were
    measured in whole runs."""
    rtt_ms: float | None = None
    """Round trip time of a link in place of the one there is. Default: as measured."""
    up_mbit: float | None = None
    """Bandwidth towards the server in Mbit/s, of a link slower than the one there is. Default: as
    measured."""
    down_mbit: float | None = None
    """Bandwidth from the server in Mbit/s. Default: as measured."""
    input_grad: InputGrad = SplitOptions.input_grad
    """drop: what the adapters add to the gradient of their inputs is left out, as for training."""
    in_flight: InFlight = SplitOptions.in_flight
    """Parts of a micro-batch that travel at the same time. auto: the best of 1, 2 and 4."""
    check: bool = False
    """Also run steps over random tokens, and show how far off the prediction is."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if self.task != "sft":
            raise UsageError(
                f"task: got {self.task}, and plans are of sft: `dlora train` says at its beginning "
                "what a step of another task sends. Leave task and data out for what a micro-batch "
                "of so many rows costs"
            )
        check_input_grad(self.wire, self.input_grad)
        check_in_flight(self.in_flight, self.wire)
        if self.target_parameters and self.link is not None:
            raise UsageError("link: its table has all wires, target_parameters go on one: leave it")
        check_experts(self.wire, self.target_parameters or ())
        if self.spectral_start and self.link is not None:
            raise UsageError(
                "link: its table has all wires, spectral_start goes over one: leave it"
            )
        check_spectral_start(self)
        if self.data is not None:
            self._check_run()
        for name in ("r", "batch_size", "gradient_accumulation_steps", "length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        if not 0 <= self.supervised < self.length:
            raise UsageError(f"supervised: got {self.supervised}, want 0 to {self.length - 1}")
        for name in ("rtt_ms", "up_mbit", "down_mbit"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name != "rtt_ms")):
                raise UsageError(f"{name}: got {value}, want more than 0")
        if self.check and self.gradient_accumulation_steps > 1:
            raise UsageError("check runs one micro-batch: leave gradient_accumulation_steps out")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UsageError(f"max_steps: got {self.max_steps}, want at least 1, or -1 for epochs")
        if self.link is not None:
            self._check_link(self.link)

    def _check_run(self) -> None:
        """Raises UsageError for what training would refuse, and for rows that are given twice."""
        run_of(self, Path())
        for name in ("length", "supervised"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"{name}: the rows of data have their own: leave it out")

    def _check_link(self, link: str) -> None:
        """Raises UsageError for a link that is none, and for what the table chooses itself."""
        link_speed(link)
        # What a run has chosen is one of the rows.
        for name in _ALWAYS if self.data is not None else (*_OF_A_RUN, *_ALWAYS):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise UsageError(f"{name}: the table of --link has its own: leave it out")

    @property
    def for_table(self) -> PlanSettings:
        """The same without what the table over a link chooses."""
        fresh: dict[str, Any] = {
            name: type(self).__dataclass_fields__[name].default for name in _OF_A_RUN
        }
        return replace(self, **fresh, kr_options={}, upload_consent=False)

    @property
    def targets(self) -> list[str] | str | None:
        """`target_modules` as peft takes it."""
        return target_names(self.target_modules)


def run_of(settings: PlanSettings, output: Path) -> TrainSettings:
    """The run that is planned, in the folder `output`. Raises UsageError for one that cannot be."""
    return TrainSettings(output=output, **_common(settings))


def plan_of(settings: TrainSettings) -> PlanSettings:
    """A run's settings as a plan takes them, without its data and its task."""
    return PlanSettings(**_common(settings) | {"data": None, "task": "sft"})


def _common(settings: PlanSettings | TrainSettings) -> dict[str, Any]:
    """What both have, by name."""
    plan, run = ({one.name for one in fields(kind)} for kind in (PlanSettings, TrainSettings))
    return {name: getattr(settings, name) for name in plan & run}
