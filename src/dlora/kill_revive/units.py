"""Kill and Revive: what it needs of a split model: units, their costs on its wire, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.ends import CLASSIFIERS
from dlora.edge.lora import product_of
from dlora.edge.model import SplitModel
from dlora.kill_revive.config import check_linear
from dlora.kill_revive.costs import USUAL, Costs, Rows, Unit
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import payload_bytes

__all__ = ["check_measurable", "costs_of", "parameters_of", "units_of", "weights_of"]

_WIDTH: Final = 1024  # a whole number of groups in every codec


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


def costs_of(model: SplitModel, kind: Any = "bytes", rows: Rows = USUAL) -> Costs:
    """What sets of modules cost in a step of such micro-batches, on the model's wire."""
    tokens, supervised = rows.tokens, rows.supervised
    codecs, sites = model.options.codecs, []
    factor = _share(codecs.factors, codecs.x)
    answer = (_share(codecs.deltas, codecs.x) + _share(codecs.delta_grads, codecs.x)) / 2
    for site in model.sites:
        added, width = {}, site.in_features
        for name, layer in zip(site.names, site.layers, strict=True):
            rank = sum(layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.r)
            out = layer.out_features
            if model.options.wire == "plain":
                added[name] = out * answer
            elif model.options.wire == "factored":
                added[name] = rank * (1 + out / tokens) * factor
            else:  # A and B once an optimizer step, their gradients with every micro-batch
                times = (1 + 1 / rows.accumulated) / 2
                added[name] = rank * (width + out) * times / tokens * factor
        sites.append((0 if model.options.wire == "hosted" else width, added))

    # What travels in any case: where the edge holds layers it is hidden states, both ways.
    description = model.link.description
    if model.edge_layers:
        between = description.layers.width
        ends = 2 * between + 2 * (1.0 if model.edge_layers.last else supervised) * between
    else:
        ends = description.embedding_width + 2 * supervised * description.hidden_width
    dropped = model.options.input_grad == "drop"
    return Costs(
        tuple(sites),
        ends * _share(codecs.ends, codecs.x),
        kind,
        0.0 if dropped else _share(codecs.dx, codecs.x),
    )


def _share(dtype: pb.DType, other: pb.DType) -> float:
    """Bytes of a value in one codec over those in another, in rows of some width."""
    return payload_bytes(dtype, 1, _WIDTH) / payload_bytes(other, 1, _WIDTH)


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
