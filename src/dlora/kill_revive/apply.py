"""Kill and Revive on a split model: measures units, applies decisions, keeps within the budget.

kr = KillAndRevive(model, KillReviveConfig(), total_steps)
for step, batch in enumerate(batches):     # `KillReviveCallback` does it in Trainer
    kr.before_step(step)
    model(**batch).loss.backward()
    kr.before_update(optimizer)
    optimizer.step()
    kr.after_update()
    optimizer.zero_grad()

A module that is killed with `idle` drop fades: it is exchanged for a few steps more, without
updates, while its B shrinks to zero. A module that is revived warms up: its first updates are
shortened. All of that, probes and uploads count as spent. Scores are in `scores.py`, decisions in
`decide.py`, what a run will take in `foresee.py`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import USUAL, Rows, Unit, trained_modules
from dlora.kill_revive.decide import (
    Decision,
    DecisionLine,
    State,
    decide,
    is_due,
    last_ranks,
    needs_outputs,
    needs_probe,
    one_more,
)
from dlora.kill_revive.foresee import Foreseen, foresee
from dlora.kill_revive.scores import gradient_size
from dlora.kill_revive.state_files import check_same, read_state, write_state
from dlora.kill_revive.units import (
    adds,
    costs_of,
    layers_of,
    parameters_of,
    probes_of,
    scores_of,
    units_of,
    weights_of,
)

__all__ = ["KillAndRevive", "Noted"]

Noted = tuple[dict[str, Any], int, dict[str, Tensor]]
"""Between two steps: `state_dict` without records, how many records there are, the snapshot."""

log = logging.getLogger(__name__)


class KillAndRevive:
    """Kill and Revive for a training loop: call its three methods around every optimizer step.

    `decision_log` says for every decision and unit why it is as it is. `state_dict` and
    `load_state_dict` make a resumed run equal one that was never stopped.
    """

    def __init__(
        self, model: SplitModel, config: KillReviveConfig, total_steps: int, rows: Rows = USUAL
    ) -> None:
        """`rows` is what the average micro-batch holds: the budget counts its bytes.

        A run that cannot keep its budget says so in the log, before its first step.
        """
        if total_steps < 1:
            raise UsageError(
                f"Kill and Revive wants to know the number of steps, got {total_steps}"
            )
        self.model, self.config, self.total_steps = model, config, total_steps
        self.rows, self.units = rows, units_of(model, config.unit)
        self.costs = costs_of(model, config.cost, rows)
        self.layers = layers_of(model)
        # Modules by the names of their units, and by their own: both are in states.
        self._modules = {name: (name,) for name in self.layers} | {
            unit.name: unit.modules for unit in self.units
        }

        # Where the run is.
        self.step = 0
        self.spent = 0.0
        """Sum over all steps so far of their cost as a share of FT's, with probes and uploads."""
        self.active = frozenset(unit.name for unit in self.units)
        self.partial: dict[str, tuple[str, ...]] = {}
        """Of active units that are trained in part: the modules that are."""
        self.since = dict.fromkeys(self.active, 0)
        self.fading: dict[str, int] = {}
        """Killed modules that are still exchanged while they fade, and the steps left to them."""
        self.warming: dict[str, int] = {}
        """Revived modules whose updates are not yet full, and the steps done."""
        self.decision_log: list[DecisionLine] = []

        # What was measured since the last decision.
        self.snapshot = weights_of(self.layers)
        """Weights at the last decision, as `weights_of` gives them."""
        self._gradients: dict[str, float] = defaultdict(float)
        """Per unit, over the interval: squared gradients, or |weight x gradient|."""
        model.output_squares = {} if config.policy == "output" else None

        # Within one optimizer step.
        self._before: dict[nn.Parameter, Tensor] = {}
        self._reset: list[nn.Parameter] = []

    # ----------------------------------------------------------------- around a step

    def before_step(self, step: int) -> None:
        """Decide, if it is time, and set what the next forward trains; `step` counts from 0."""
        self.step = step
        if step == 0 and self.foreseen.warning:
            log.warning("%s", self.foreseen.warning)
        if is_due(self.config, step, self.total_steps):
            state = self._state(self.spent, self._scores(), probes_of(self.model, self._idle()))
            self._apply(decide(self.config, self.units, self.costs, state))
            self.measure_anew()
        state, ranks = self._state(self._committed), last_ranks(self.decision_log)
        if more := one_more(self.config, self.units, self.costs, state, ranks):
            self._apply(more)

        # What this step measures for the next decision. Deltas are no longer wanted after theirs.
        if not needs_outputs(self.config, step, self.total_steps):
            self.model.output_squares = None
        self.model.probe_norms.clear()
        probe = needs_probe(self.config, step, self.total_steps)
        self.model.probe_modules = (
            [module for unit in self.units for module in unit.modules] if probe else []
        )
        self.spent += self.active_share
        if probe:
            self.spent += self.costs.probe(self._exchanged_modules())

    def measure_anew(self) -> None:
        """Measure changes from here on: what another than the optimizer did is nobody's merit."""
        self.snapshot = weights_of(self.layers)
        self._gradients.clear()

    def before_update(self, optimizer: Any) -> None:
        """Between backward and the optimizer: note gradients, but drop those of fading units.

        What the optimizer remembers of a revived unit's parameters is forgotten, or kept (option
        `moments`).
        """
        for parameter in self._reset:
            optimizer.state.pop(parameter, None)
        self._reset = []
        for name in self.fading:
            for parameter in self._parameters(name):
                parameter.grad = None

        sensitivity = self.config.policy == "sensitivity"
        for name in self.active:
            for parameter in self._parameters(name):
                if parameter.grad is not None:
                    self._gradients[name] += gradient_size(
                        parameter.detach(), parameter.grad.detach(), sensitivity=sensitivity
                    )

        # `after_update` goes back a part of the way to these.
        self._before = {
            parameter: parameter.detach().clone()
            for name in self.warming
            for parameter in self._parameters(name)
        }

    @torch.no_grad()
    def after_update(self) -> None:
        """After the optimizer: shorten the first updates of revived units, let killed ones fade."""
        for name in list(self.warming):
            done = self.warming[name] + 1
            for parameter in self._parameters(name):
                if parameter in self._before:
                    undone = 1 - done / (self.config.rewarm_steps + 1)
                    parameter.lerp_(self._before[parameter], undone)
            self.warming[name] = done
            if done >= self.config.rewarm_steps:
                del self.warming[name]

        gone = [name for name, left in self.fading.items() if left == 1]
        for name, left in self.fading.items():
            for parameter in parameters_of(self.layers[name], only_b=True):
                parameter.mul_((left - 1) / left)
            self.fading[name] = left - 1
        for name in gone:  # B is zero: the module is exchanged no more
            del self.fading[name]
        if gone:
            self._set()
        self._before = {}

    @property
    def active_share(self) -> float:
        """Cost of a step as it is now, as a share of FT's."""
        is_all = self.config.idle == "edge"  # then idle modules are exchanged too
        return self.costs.share(self.layers if is_all else self._exchanged_modules())

    @property
    def foreseen(self) -> Foreseen:
        """Before the first step: what the run will train and take."""
        return foresee(self.config, self.units, self.costs, self.total_steps, self._going())

    # ----------------------------------------------------------------- what a decision does

    def _apply(self, decision: Decision) -> None:
        self.decision_log += decision.lines
        before = set(self._trained_modules())
        for name in self.active - decision.active:
            self.since.pop(name, None)
        for name in decision.active - self.active:
            self.since[name] = self.step
        self.active, self.partial = decision.active, dict(decision.partial)

        after = set(self._trained_modules())
        for name in sorted(after - before):
            self.fading.pop(name, None)
            if self.config.moments == "reset":
                self._reset += self._parameters(name)
            if self.config.rewarm_steps:
                self.warming[name] = 0

        killed = sorted(before - after)
        changed = [name for name in killed if adds(self.layers[name])]
        for name in killed:
            self.warming.pop(name, None)
        if self.config.idle == "drop" and self.config.drop_steps:
            self.fading |= dict.fromkeys(changed, self.config.drop_steps)
        elif self.config.idle == "cloud" and changed:  # then it is given all idle ones
            self.spent += self.costs.upload(set(self._going()) - after, after)
        self._set()

    def _set(self) -> None:
        self.model.set_active(self._exchanged_modules(), self.config.idle)

    def _trained_modules(self) -> list[str]:
        """Modules of active units, in the cloud's calling order."""
        return trained_modules(self.units, self.active, self.partial)

    def _exchanged_modules(self) -> list[str]:
        """They and fading ones, in the same order."""
        exchanged = {*self._trained_modules(), *self.fading}
        return [name for name in self.layers if name in exchanged]

    def _going(self) -> list[str]:
        """Modules that add something."""
        return [name for name, layer in self.layers.items() if adds(layer)]

    @property
    def _committed(self) -> float:
        """What is spent, and what modules that fade now will still take."""
        more = self.costs.share(self._exchanged_modules())
        more -= self.costs.share(self._trained_modules())
        return self.spent + max(self.fading.values(), default=0) * more

    # ----------------------------------------------------------------- what a decision is made of

    def _state(
        self,
        spent: float,
        scores: dict[str, float] | None = None,
        probes: dict[str, float] | None = None,
    ) -> State:
        return State(
            step=self.step,
            total_steps=self.total_steps,
            active=self.active,
            since=self.since,
            scores=scores or {},
            probes=probes or {},
            spent=spent,
            partial=self.partial,
            going=self._going() if scores is not None else (),
        )

    def _scores(self) -> dict[str, float]:
        """Of every active unit: the policy's measure, or the signal's."""
        kind = self.config.signal if self.config.policy in ("kr", "all") else self.config.policy
        units = [unit for unit in self.units if unit.name in self.active]
        return scores_of(kind, self.model, units, self.snapshot, self._gradients)

    def _idle(self) -> list[Unit]:
        return [unit for unit in self.units if unit.name not in self.active]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        """Of a unit or a module."""
        return [
            parameter
            for module in self._modules[name]
            for parameter in parameters_of(self.layers[module])
        ]

    # ----------------------------------------------------------------- stopping and going on

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors of `snapshot`, as plain values.

        Keys stay as they are: a run may go on from a checkpoint of an older version.
        """
        return self._values() | {"records": [asdict(line) for line in self.decision_log]}

    def state(self) -> Noted:
        """The state as it is now, for `save`: what follows does not change it."""
        return self._values(), len(self.decision_log), self.snapshot

    def _values(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "spent": self.spent,
            "active": sorted(self.active),
            "partial": {name: list(modules) for name, modules in sorted(self.partial.items())},
            "since": dict(self.since),
            "fading": dict(self.fading),
            "warming": dict(self.warming),
            "squares": dict(self._gradients),
            "probes": [dict(norms) for norms in self.model.probe_norms],
            "outputs": [[*key, size] for key, size in (self.model.output_squares or {}).items()],
        }

    def load_state_dict(self, state: dict[str, Any], snapshot: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. Raises UsageError for another configuration."""
        check_same(asdict(self.config), self.total_steps, state)
        self.spent, self.active = state["spent"], frozenset(state["active"])
        self.since = dict(state["since"])
        # Older versions have no units that are trained in part, and names of units for modules.
        self.partial = {name: tuple(of) for name, of in state.get("partial", {}).items()}
        self.fading, self.warming = self._of_modules(state["fading"], state["warming"])
        self.decision_log = [DecisionLine(**line) for line in state["records"]]

        self.snapshot = snapshot
        self._gradients = defaultdict(float, state["squares"])
        self.model.probe_norms[:] = state["probes"]
        if self.model.output_squares is not None:
            self.model.output_squares.update(
                {(site, module): size for site, module, size in state["outputs"]}
            )
        if len(self.active) < len(self.units):
            self._set()

    def _of_modules(self, *states: dict[str, int]) -> Iterable[dict[str, int]]:
        """The same by modules, where units are named."""
        for state in states:
            yield {module: left for name, left in state.items() for module in self._modules[name]}

    def save(self, folder: Path, state: Noted | None = None) -> None:
        """Write state and snapshot into a checkpoint: as they are now, or as `state` noted them."""
        values, num_records, snapshot = state or self.state()
        records = [asdict(line) for line in self.decision_log[:num_records]]
        write_state(folder, values | {"records": records}, snapshot)

    def load(self, folder: Path) -> None:
        """Read them from a checkpoint. Raises UsageError if they are not there."""
        self.load_state_dict(*read_state(folder))
