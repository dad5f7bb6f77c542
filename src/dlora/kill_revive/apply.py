"""Kill and Revive on a split model: measures units, applies decisions, keeps within the budget.

kr = KillAndRevive(model, KillReviveConfig(), total_steps)
for step, batch in enumerate(batches):     # `KillReviveCallback` does it in Trainer
    kr.before_step(step)
    model(**batch).loss.backward()
    kr.before_update(optimizer)
    optimizer.step()
    kr.after_update()
    optimizer.zero_grad()

A unit that is killed with `idle` drop fades: it is exchanged for a few steps more, without
updates, while its B shrinks to zero. A unit that is revived warms up: its first updates are
shortened. Scores are in `scores.py`, decisions in `decide.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlora.edge.lora import product_of
from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import USUAL, Rows
from dlora.kill_revive.decide import (
    Decision,
    DecisionLine,
    State,
    decide,
    is_due,
    needs_outputs,
    needs_probe,
)
from dlora.kill_revive.scores import Measured, gradient_size, probe_score, score
from dlora.kill_revive.units import costs_of, parameters_of, units_of, weights_of

__all__ = ["KillAndRevive", "Noted"]

Noted = tuple[dict[str, Any], int, dict[str, Tensor]]
"""Between two steps: `state_dict` without records, how many records there are, the snapshot."""

_STATE_FILE: Final = "dlora_kr.json"
_TENSOR_FILE: Final = "dlora_kr.safetensors"


class KillAndRevive:
    """Kill and Revive for a training loop: call its three methods around every optimizer step.

    `decision_log` says for every decision and unit why it is as it is. `state_dict` and
    `load_state_dict` make a resumed run equal one that was never stopped.
    """

    def __init__(
        self, model: SplitModel, config: KillReviveConfig, total_steps: int, rows: Rows = USUAL
    ) -> None:
        """`rows` is what the average micro-batch holds: the budget counts its bytes."""
        if total_steps < 1:
            raise UsageError(
                f"Kill and Revive wants to know the number of steps, got {total_steps}"
            )
        self.model, self.config, self.total_steps = model, config, total_steps
        self.rows, self.units = rows, units_of(model, config.unit)
        self.costs = costs_of(model, config.cost, rows)
        self.layers: dict[str, LoraLayer] = {
            name: layer
            for site in model.sites
            for name, layer in zip(site.names, site.layers, strict=True)
        }
        self.weight_norms = {
            module.name: module.weight_norm
            for site in model.link.description.sites
            for module in site.modules
        }

        # Where the run is.
        self.step = 0
        self.spent = 0.0
        """Sum over all steps so far of their cost as a share of FT's, probes included."""
        self.active = frozenset(unit.name for unit in self.units)
        self.since = dict.fromkeys(self.active, 0)
        self.fading: dict[str, int] = {}
        """Killed units that are still exchanged while they fade, and the steps left to them."""
        self.warming: dict[str, int] = {}
        """Revived units whose updates are not yet full, and the steps done."""
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
        if is_due(self.config, step, self.total_steps):
            state = State(
                step=step,
                total_steps=self.total_steps,
                active=self.active,
                since=self.since,
                scores=self._scores(),
                probes=self._probes(),
                spent=self.spent,
            )
            self._apply(decide(self.config, self.units, self.costs, state))
            self.snapshot = weights_of(self.layers)
            self._gradients.clear()

        # What this step measures for the next decision. Deltas are no longer wanted after theirs.
        if not needs_outputs(self.config, step, self.total_steps):
            self.model.output_squares = None
        self.model.probe_norms.clear()
        probe = needs_probe(self.config, step, self.total_steps)
        self.model.probe_modules = (
            [module for unit in self.units for module in unit.modules] if probe else []
        )
        self.spent += self.active_share

    def before_update(self, optimizer: Any) -> None:
        """Between backward and the optimizer: note gradients, but drop those of fading units.

        What the optimizer remembers of a revived unit's parameters is forgotten.
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

        for name, left in list(self.fading.items()):
            for layer in self._layers(name):
                for parameter in parameters_of(layer, only_b=True):
                    parameter.mul_((left - 1) / left)
            self.fading[name] = left - 1
            if left == 1:  # B is zero: the unit is exchanged no more
                del self.fading[name]
                self._set()
        self._before = {}

    @property
    def active_share(self) -> float:
        """Cost of a step as it is now, as a share of FT's."""
        return self.costs.share(set(self._exchanged_modules()))

    # ----------------------------------------------------------------- what a decision does

    def _apply(self, decision: Decision) -> None:
        self.decision_log += decision.lines
        killed, revived = self.active - decision.active, decision.active - self.active
        for name in sorted(revived):
            self.fading.pop(name, None)
            self.since[name] = self.step
            self._reset += self._parameters(name)
            if self.config.rewarm_steps:
                self.warming[name] = 0

        for name in sorted(killed):
            self.since.pop(name, None)
            self.warming.pop(name, None)
            trained = any(
                float(product_of(layer)[1].abs().max()) > 0 for layer in self._layers(name)
            )
            if self.config.idle == "drop" and self.config.drop_steps and trained:
                self.fading[name] = self.config.drop_steps

        self.active = decision.active
        self._set()

    def _set(self) -> None:
        self.model.set_active(self._exchanged_modules(), self.config.idle)

    def _exchanged_modules(self) -> list[str]:
        """Modules of active and fading units, in the cloud's calling order."""
        return [
            module
            for unit in self.units
            if unit.name in self.active or unit.name in self.fading
            for module in unit.modules
        ]

    # ----------------------------------------------------------------- what a decision is made of

    def _scores(self) -> dict[str, float]:
        """Of every active unit: the policy's measure, or the signal's."""
        kind = self.config.signal if self.config.policy in ("kr", "all") else self.config.policy
        outputs = self._outputs()
        scores = {}
        for unit in self.units:
            if unit.name in self.active:
                measured = Measured(
                    gradients=self._gradients[unit.name],
                    outputs=sum(outputs.get(module, 0.0) for module in unit.modules),
                    old=[
                        (self.snapshot[f"{module}.A"], self.snapshot[f"{module}.B"])
                        for module in unit.modules
                    ],
                    new=[product_of(self.layers[module]) for module in unit.modules],
                    weight_norms=[self.weight_norms[module] for module in unit.modules],
                )
                scores[unit.name] = score(kind, measured)
        return scores

    def _outputs(self) -> dict[str, float]:
        """Sums of squared deltas of each module, where they are measured."""
        squares = self.model.output_squares or {}
        return {
            name: squares[site.index, number]
            for site in self.model.sites
            for number, name in zip(site.modules, site.names, strict=True)
            if (site.index, number) in squares
        }

    def _probes(self) -> dict[str, float]:
        """Gradient norms of idle units, over the micro-batches of the last step."""
        return {
            unit.name: probe_score(
                [
                    norms.get(module, 0.0)
                    for norms in self.model.probe_norms
                    for module in unit.modules
                ]
            )
            for unit in self.units
            if unit.name not in self.active
        }

    def _layers(self, name: str) -> list[LoraLayer]:
        unit = next(unit for unit in self.units if unit.name == name)
        return [self.layers[module] for module in unit.modules]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for layer in self._layers(name) for parameter in parameters_of(layer)]

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
            "since": dict(self.since),
            "fading": dict(self.fading),
            "warming": dict(self.warming),
            "squares": dict(self._gradients),
            "probes": [dict(norms) for norms in self.model.probe_norms],
            "outputs": [[*key, size] for key, size in (self.model.output_squares or {}).items()],
        }

    def load_state_dict(self, state: dict[str, Any], snapshot: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. Raises UsageError for another configuration."""
        changed = [
            name
            for name, value in asdict(self.config).items()
            if state["config"].get(name) != value
        ]
        if changed or state["total_steps"] != self.total_steps:
            raise UsageError(
                "Kill and Revive cannot go on with other settings: "
                f"{', '.join(changed) or 'total steps'}"
            )

        self.spent, self.active = state["spent"], frozenset(state["active"])
        self.since, self.fading = dict(state["since"]), dict(state["fading"])
        self.warming = dict(state["warming"])
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

    def save(self, folder: Path, state: Noted | None = None) -> None:
        """Write state and snapshot into a checkpoint: as they are now, or as `state` noted them."""
        values, num_records, snapshot = state or self.state()
        records = [asdict(line) for line in self.decision_log[:num_records]]
        save_file(snapshot, folder / _TENSOR_FILE)
        (folder / _STATE_FILE).write_text(
            json.dumps(values | {"records": records}), encoding="utf-8"
        )

    def load(self, folder: Path) -> None:
        """Read them from a checkpoint. Raises UsageError if they are not there."""
        try:
            state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            snapshot = load_file(folder / _TENSOR_FILE)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} holds no state of Kill and Revive: {error}") from error
        self.load_state_dict(state, snapshot)
