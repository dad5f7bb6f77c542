"""Kill and Revive: what it needs of a split model: units, their costs on its wire, weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.ends import CLASSIFIERS
from dlora.edge.lora import product_of
from dlora.edge.model import SplitModel
from dlora.edge.options import SplitOptions
from dlora.kill_revive.config import check_linear
from dlora.kill_revive.costs import USUAL, Costs, Rows, Unit
from dlora.kill_revive.scores import Measured, probe_score, score
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import payload_bytes

__all__ = [
    "adds",
    "check_measurable",
    "costs_of",
    "layers_of",
    "outputs_of",
    "parameters_of",
    "probes_of",
    "scores_of",
    "units_of",
    "weights_of",
]

_WIDTH: Final = 1024  # a whole number of groups in every codec
_BYTES_OF_NORM: Final = 4


def check_measurable(model: SplitModel) -> None:
    """Raises UsageError for adapters with parts of which nothing could be measured.

    A new classification head, which is always trained, is none of them.
    """
    for config in model.peft_config.values():
        check_linear(config, CLASSIFIERS)


def units_of(model: SplitModel, kind: str) -> list[Unit]:
    """The units of a model's adapter, of kind "site" or "module", in the cloud's calling order.

    Raises UsageError for adapters of more than linear modules.
    """
    check_measurable(model)
    units = []
    for site in model.sites:
        names = site.names
        layer = layer_of(names[0])
        if kind == "site":
            units.append(Unit(f"site {site.index}: {', '.join(names)}", tuple(names), layer))
        else:
            units += [Unit(name, (name,), layer) for name in names]
    return units


def costs_of(
    model: SplitModel,
    kind: Any = "bytes",
    rows: Rows = USUAL,
    options: SplitOptions | None = None,
) -> Costs:
    """What sets of modules cost in a step of such micro-batches; `options`: not the model's own."""
    options = options or model.options
    tokens, supervised = rows.tokens, rows.supervised
    codecs, sites, uploads = options.codecs, [], {}
    factor, x, ends = _bytes(codecs.factors), _bytes(codecs.x), _bytes(codecs.ends)
    answer = (_bytes(codecs.deltas) + _bytes(codecs.delta_grads)) / 2
    for site in model.sites:
        added, width = {}, site.in_features
        for name, layer in zip(site.names, site.layers, strict=True):
            rank = sum(layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.r)
            out = layer.out_features
            if options.wire == "plain":
                added[name] = out * answer
            elif options.wire == "factored":
                added[name] = rank * (1 + out / tokens) * factor
            else:  # A and B once an optimizer step, their gradients with every micro-batch
                times = (1 + 1 / rows.accumulated) / 2
                added[name] = rank * (width + out) * times / tokens * factor
            frozen = rank * (width + out) * _bytes(pb.FP32)
            uploads[name] = frozen / (tokens * rows.accumulated)
        sites.append((0.0 if options.wire == "hosted" else width * x, added))

    # What travels in any case: where the edge holds layers it is hidden states, both ways.
    description = model.link.description
    if model.edge_layers:
        between = description.layers.width
        entry, values = (
            between,
            2 * between + 2 * (1.0 if model.edge_layers.last else supervised) * between,
        )
    else:
        entry = description.embedding_width
        values = entry + 2 * supervised * description.hidden_width
    dropped = options.input_grad == "drop"
    return Costs(
        tuple(sites),
        values * ends,
        kind,
        0.0 if dropped else _bytes(codecs.dx) / x,
        norms=_BYTES_OF_NORM * len(uploads) / tokens,
        uploads=uploads,
        entry=entry * ends / rows.accumulated,
    )


def _bytes(dtype: pb.DType) -> float:
    """Of a value in this codec, in rows of some width."""
    return payload_bytes(dtype, 1, _WIDTH) / _WIDTH


def parameters_of(layer: LoraLayer, *, only_b: bool = False) -> list[nn.Parameter]:
    """Parameters of A and B of a layer's active adapters, or those of B alone."""
    return [
        parameter
        for adapter in layer.active_adapters
        for modules in ((layer.lora_B,) if only_b else (layer.lora_A, layer.lora_B))
        if adapter in modules
        for parameter in modules[adapter].parameters()
    ]


def weights_of(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Copies of A [R, I] and scaled B [O, R] of every module, under name.A and name.B."""
    weights = {}
    for name, layer in layers.items():
        a_RI, b_OR = product_of(layer)
        weights[f"{name}.A"], weights[f"{name}.B"] = a_RI.clone(), b_OR.clone()
    return weights


def adds(layer: LoraLayer) -> bool:
    """Whether the layer adds anything: its B is not zero."""
    return float(product_of(layer)[1].abs().max()) > 0


def outputs_of(model: SplitModel) -> dict[str, float]:
    """Sums of squared deltas of each module, where they are measured."""
    squares = model.output_squares or {}
    return {
        name: squares[site.index, number]
        for site in model.sites
        for number, name in zip(site.modules, site.names, strict=True)
        if (site.index, number) in squares
    }


def probes_of(model: SplitModel, units: Iterable[Unit]) -> dict[str, float]:
    """Gradient norms of these units, over the micro-batches of the last step."""
    return {
        unit.name: probe_score(
            [norms.get(module, 0.0) for norms in model.probe_norms for module in unit.modules]
        )
        for unit in units
    }


def scores_of(
    kind: str,
    model: SplitModel,
    units: Iterable[Unit],
    old: Mapping[str, Tensor],
    gradients: Mapping[str, float],
) -> dict[str, float]:
    """Of these units, by `score`; `old` are weights at the last decision.

    `gradients` are sums of `gradient_size` by unit.
    """
    layers, outputs = layers_of(model), outputs_of(model)
    norms = {
        module.name: module.weight_norm
        for site in model.link.description.sites
        for module in site.modules
    }
    scores = {}
    for unit in units:
        measured = Measured(
            gradients=gradients.get(unit.name, 0.0),
            outputs=sum(outputs.get(module, 0.0) for module in unit.modules),
            old=[(old[f"{module}.A"], old[f"{module}.B"]) for module in unit.modules],
            new=[product_of(layers[module]) for module in unit.modules],
            weight_norms=[norms[module] for module in unit.modules],
        )
        scores[unit.name] = score(kind, measured)
    return scores


def layers_of(model: SplitModel) -> dict[str, LoraLayer]:
    """By full name, in the cloud's calling order."""
    return {
        name: layer
        for site in model.sites
        for name, layer in zip(site.names, site.layers, strict=True)
    }
