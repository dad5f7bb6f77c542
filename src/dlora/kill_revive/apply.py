"""Kill and Revive on a split model: measures units, applies decisions, keeps within the budget.

kr = KillAndRevive(model, KillReviveConfig(), total_steps)
for step, batch in enumerate(batches):     # `KillReviveCallback` does it in Trainer
    kr.before_step(step)
    model(**batch).loss.backward()
    kr.before_update(optimizer)
    optimizer.step()
    kr.after_update()
    optimizer.zero_grad()
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.edge.model import SplitModel
from dlora.edge.responder import product_of
from dlora.errors import UsageError
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.decide import Costs, Decision, Record, Unit, decide, is_due, needs_probe
from dlora.protocol.layers import layer_of

__all__ = ["KillAndRevive", "KillReviveCallback", "units_of"]

_STATE_FILE: Final = "dlora_kr.json"
_TENSOR_FILE: Final = "dlora_kr.safetensors"


def units_of(model: SplitModel, kind: str) -> list[Unit]:
    """The units of a model's adapter, in the cloud's calling order."""
    found = []
    for site in model.sites:
        names = site.names
        layer = layer_of(names[0])
        if kind == "site":
            found.append(Unit(f"site {site.index}: {', '.join(names)}", tuple(names), layer))
        else:
            found += [Unit(name, (name,), layer) for name in names]
    return found


def costs_of(
    model: SplitModel, kind: Any = "bytes", tokens: int = 512, supervised: float = 0.25
) -> Costs:
    """What sets of modules cost in a step of so many tokens, on the model's wire."""
    sites = []
    for site in model.sites:
        added = {}
        for name, layer in zip(site.names, site.layers, strict=True):
            rank = sum(layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.r)
            out = layer.out_features
            added[name] = out if model.wire == "plain" else max(1, round(rank * (1 + out / tokens)))
        sites.append((site.in_features, added))
    description = model.link.description
    if model.edge_layers:
        between = description.layers.width
        ends = round(2 * between + 2 * (1.0 if model.edge_layers.last else supervised) * between)
    else:
        ends = round(description.embedding_width + 2 * supervised * description.hidden_width)
    return Costs(tuple(sites), ends, kind)


class KillAndRevive:
    """Kill and Revive for a training loop: call its three methods around every optimizer step.

    `records` says for every decision and unit why it is as it is. `state_dict` and
    `load_state_dict` make a resumed run equal one that was never stopped.
    """

    def __init__(self, model: SplitModel, config: KillReviveConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise UsageError(
                f"Kill and Revive wants to know the number of steps, got {total_steps}"
            )
        self.model, self.config, self.total_steps = model, config, total_steps
        self.units = units_of(model, config.unit)
        self.costs = costs_of(model, config.cost)
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
        self.step = 0
        self.spent = 0.0
        """Sum over all steps so far of their cost as a share of FT's, probes included."""
        self.active = frozenset(unit.name for unit in self.units)
        self.since = dict.fromkeys(self.active, 0)
        self.fading: dict[str, int] = {}
        """Killed units that are still exchanged while they fade, and the steps that they have
        left.
        """
        self.warming: dict[str, int] = {}
        """Revived units whose updates are not yet full, and the steps done."""
        self.records: list[Record] = []
        self._squares: dict[str, float] = defaultdict(float)
        """Per unit, over the interval: squared gradients, or |weight x gradient|."""
        self._snapshot = self._weights()
        self._before: dict[nn.Parameter, Tensor] = {}
        self._reset: list[nn.Parameter] = []
        if config.policy == "output":
            model.output_squares = {}

    # ----------------------------------------------------------------- around a step

    def before_step(self, step: int) -> None:
        """Decide, if it is time, and set what the next forward trains; `step` counts from 0."""
        self.step = step
        if is_due(self.config, step, self.total_steps):
            self._apply(
                decide(
                    self.config,
                    self.units,
                    self.costs,
                    step=step,
                    total_steps=self.total_steps,
                    active=self.active,
                    since=self.since,
                    scores=self._scores(),
                    probes=self._probes(),
                    spent=self.spent,
                )
            )
            self._snapshot = self._weights()
            self._squares.clear()
            if self.model.output_squares is not None:
                self.model.output_squares.clear()
        self.model.probe_norms.clear()
        probe = needs_probe(self.config, step, self.total_steps)
        self.model.probe_modules = (
            [module for unit in self.units for module in unit.modules] if probe else []
        )
        modules = {
            module for unit in self.units if self._exchanged(unit.name) for module in unit.modules
        }
        self.spent += self.costs.share(modules)

    def before_update(self, optimizer: Any) -> None:
        """Between backward and the optimizer: gradients of fading units are dropped, of all others
        noted.

        What the optimizer remembers of a revived unit's parameters is forgotten.
        """
        for parameter in self._reset:
            optimizer.state.pop(parameter, None)
        self._reset = []
        for name in self.fading:
            for parameter in self._parameters(name):
                parameter.grad = None
        for name in self.active:
            for parameter in self._parameters(name):
                if parameter.grad is not None:
                    grad = parameter.grad.detach()
                    size = (
                        (grad * parameter.detach()).abs().sum()
                        if self._sensitive
                        else grad.square().sum()
                    )
                    self._squares[name] += float(size)
        self._before = {
            parameter: parameter.detach().clone()
            for name in self.warming
            for parameter in self._parameters(name)
        }

    def after_update(self) -> None:
        """After the optimizer: shorten the first updates of revived units, let killed ones fade."""
        with torch.no_grad():
            for name in list(self.warming):
                done = self.warming[name] + 1
                for parameter in self._parameters(name):
                    if parameter in self._before:
                        parameter.lerp_(
                            self._before[parameter], 1 - done / (self.config.rewarm_steps + 1)
                        )
                self.warming[name] = done
                if done >= self.config.rewarm_steps:
                    del self.warming[name]
            for name in list(self.fading):
                left = self.fading[name]
                for layer in self._layers(name):
                    for adapter in layer.active_adapters:
                        if adapter in layer.lora_B:
                            for parameter in layer.lora_B[adapter].parameters():
                                parameter.mul_((left - 1) / left)
                self.fading[name] = left - 1
                if left == 1:
                    del self.fading[name]
                    self._set()
        self._before = {}

    @property
    def active_share(self) -> float:
        """Cost of a step as it is now, as a share of FT's."""
        return self.costs.share(
            {m for unit in self.units if self._exchanged(unit.name) for m in unit.modules}
        )

    # ----------------------------------------------------------------- what a decision does

    def _apply(self, decision: Decision) -> None:
        self.records += decision.records
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
        modules = [
            module for unit in self.units if self._exchanged(unit.name) for module in unit.modules
        ]
        self.model.set_active(modules, self.config.idle)

    def _exchanged(self, name: str) -> bool:
        return name in self.active or name in self.fading

    # ----------------------------------------------------------------- scores

    @property
    def _sensitive(self) -> bool:
        return self.config.policy == "sensitivity"

    def _scores(self) -> dict[str, float]:
        """Of every active unit: the policy's measure, or the signal's."""
        kind = self.config.signal if self.config.policy in ("kr", "all") else self.config.policy
        return {name: self._score(name, kind) for name in self.active}

    def _score(self, name: str, kind: str) -> float:
        if kind == "sensitivity":
            return self._squares[name]
        if kind == "gradient":
            return self._squares[name] ** 0.5
        layers = list(self._named_layers(name))
        if kind == "output":
            squares = self.model.output_squares or {}
            wanted = set(self._unit(name).modules)
            names = {
                (s.index, i): one
                for s in self.model.sites
                for i, one in zip(s.modules, s.names, strict=True)
            }
            return sum(size for key, size in squares.items() if names[key] in wanted)
        if kind == "magnitude":
            return sum(_product_norm(*product_of(layer)) ** 2 for _, layer in layers) ** 0.5
        old, new = self._snapshot, self._weights()
        if kind == "relative":
            total = 0.0
            for module, layer in layers:
                change = _change_norm(old[f"{module}.A"], old[f"{module}.B"], *product_of(layer))
                total += (change / max(self.weight_norms[module], 1e-12)) ** 2
            return total**0.5
        keys = [f"{module}.{factor}" for module, _ in layers for factor in "AB"]
        if kind == "norm_delta":
            return sum(float((new[key] - old[key]).square().sum()) for key in keys) ** 0.5
        norms = [
            sum(float(those[key].square().sum()) for key in keys) ** 0.5 for those in (new, old)
        ]
        return abs(norms[0] - norms[1])

    def _probes(self) -> dict[str, float]:
        """Gradient norms of idle units, over the micro-batches of the last step."""
        found = {}
        for unit in self.units:
            if unit.name not in self.active:
                squares = [
                    norms.get(module, 0.0) ** 2
                    for norms in self.model.probe_norms
                    for module in unit.modules
                ]
                found[unit.name] = sum(squares) ** 0.5
        return found

    def _weights(self) -> dict[str, Tensor]:
        """Copies of A and scaled B of every module."""
        found = {}
        for name, layer in self.layers.items():
            a, b = product_of(layer)
            found[f"{name}.A"], found[f"{name}.B"] = a.clone(), b.clone()
        return found

    def _unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def _named_layers(self, name: str) -> Iterator[tuple[str, LoraLayer]]:
        for module in self._unit(name).modules:
            yield module, self.layers[module]

    def _layers(self, name: str) -> list[LoraLayer]:
        return [layer for _, layer in self._named_layers(name)]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [
            parameter
            for layer in self._layers(name)
            for adapter in layer.active_adapters
            for modules in (layer.lora_A, layer.lora_B)
            if adapter in modules
            for parameter in modules[adapter].parameters()
        ]

    # ----------------------------------------------------------------- stopping and going on

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors of `snapshot`, as plain values."""
        return {
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "spent": self.spent,
            "active": sorted(self.active),
            "since": self.since,
            "fading": self.fading,
            "warming": self.warming,
            "squares": dict(self._squares),
            "probes": [dict(norms) for norms in self.model.probe_norms],
            "outputs": [[*key, size] for key, size in (self.model.output_squares or {}).items()],
            "records": [asdict(record) for record in self.records],
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
        self.spent, self.since, self.fading = (
            state["spent"],
            dict(state["since"]),
            dict(state["fading"]),
        )
        self.active, self.warming = frozenset(state["active"]), dict(state["warming"])
        self._squares = defaultdict(float, state["squares"])
        self.model.probe_norms[:] = state["probes"]
        if self.model.output_squares is not None:
            self.model.output_squares.update(
                {(site, i): size for site, i, size in state["outputs"]}
            )
        self.records = [Record(**record) for record in state["records"]]
        self._snapshot = snapshot
        if len(self.active) < len(self.units):
            self._set()

    def save(self, folder: Path) -> None:
        """Write both into a checkpoint."""
        save_file(self._snapshot, folder / _TENSOR_FILE)
        (folder / _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def load(self, folder: Path) -> None:
        """Read them from one. Raises UsageError if they are not there."""
        try:
            state = json.loads((folder / _STATE_FILE).read_text())
            snapshot = load_file(folder / _TENSOR_FILE)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} holds no state of Kill and Revive: {error}") from error
        self.load_state_dict(state, snapshot)


def _product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A, from Gram matrices of size R."""
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum())) ** 0.5


def _change_norm(old_a: Tensor, old_b: Tensor, a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A - B' A', in float64: the difference of two nearly equal products."""
    return _product_norm(torch.cat([a, old_a]).double(), torch.cat([b, -old_b], dim=1).double())


class KillReviveCallback(TrainerCallback):
    """Kill and Revive in transformers' `Trainer` and trl's `SFTTrainer`: add it, and nothing else.

    State goes with the checkpoints. With `log` one JSON line for every decision and unit is
    appended there.
    """

    def __init__(self, config: KillReviveConfig, log: Path | None = None) -> None:
        self.config, self.log = config, log
        self.reviver: KillAndRevive | None = None
        self._written = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Bind to the model; take up the state of the checkpoint that the run continues from."""
        if not isinstance(model, SplitModel):
            raise UsageError(f"Kill and Revive wants a split model, got {type(model).__name__}")
        self.reviver = KillAndRevive(model, self.config, state.max_steps)
        if state.global_step:
            self.reviver.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._write(new=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Decide, if it is time."""
        if self.reviver is not None:
            self.reviver.before_step(state.global_step)
            self._write()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Note gradients."""
        if self.reviver is not None:
            self.reviver.before_update(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fade and warm."""
        if self.reviver is not None:
            self.reviver.after_update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Keep the state with the checkpoint."""
        if self.reviver is not None:
            self.reviver.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _write(self, *, new: bool = False) -> None:
        if self.log is None or self.reviver is None:
            return
        records = self.reviver.records if new else self.reviver.records[self._written :]
        with self.log.open("w" if new else "a") as file:
            for record in records:
                file.write(json.dumps(asdict(record)) + "\n")
        self._written = len(self.reviver.records)
