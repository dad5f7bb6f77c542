"""Adapters on fused weights of experts (peft's `target_parameters`), which the cloud computes.

Experts see only their own tokens, so that no delta of theirs can be asked for: such adapters are
active on the hosted wire alone. Here is what peft makes of them on the skeleton, and which the
server takes.

Shapes: E experts, D width of what one reads, O of what it gives, R rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor
from transformers import PreTrainedModel

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.options import check_experts
from dlora.errors import PeerError, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.sites import Module, Site

__all__ = [
    "adapted_name",
    "check_parameters",
    "experts_of",
    "fused_sites",
    "joined",
    "layer_widths",
    "offered_experts",
    "targeted_parameters",
]


def experts_of(layer: LoraLayer) -> int:
    """Experts whose fused weight a LoRA layer adapts; 0 for a linear module."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else 0


def adapted_name(name: str, layer: LoraLayer) -> str:
    """The full name of what a LoRA layer adapts, given the name that peft has for the layer.

    Layers of several parameters of one module lie in each other.
    """
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def fused_sites(description: pb.Description) -> list[Site]:
    """The sites of fused weights, as the cloud numbers them: behind all others."""
    first = len(description.sites) + sum(len(site.modules) for site in description.sites)
    return [
        Site(
            index=first + number,
            in_features=one.in_features,
            modules=(Module(name=one.name, out_features=one.out_features, allowed=one.allowed),),
            depth=one.site,
            experts=one.experts,
            transposed=one.transposed,
            rows=one.rows,
        )
        for number, one in enumerate(description.experts)
    ]


def offered_experts(description: pb.Description) -> str:
    """Names within a layer of all fused weights that may be adapted."""
    kinds = {
        re.sub(r"^.*\.\d+\.", "", one.name): None for one in description.experts if one.allowed
    }
    return ", ".join(kinds) or "none"


def layer_widths(config: LoraConfig, description: pb.Description) -> dict[str, tuple[int, int]]:
    """(in, out) of every fused weight that an adapter targets, by the name of peft's layer.

    The first parameter of a module is wrapped first, and so lies innermost.
    """
    by_owner: dict[str, list[pb.FusedWeight]] = {}
    for one in description.experts:
        if one.allowed and targeted_parameters(config, [one.name]):
            by_owner.setdefault(one.name.rpartition(".")[0], []).append(one)
    return {
        owner + ".base_layer" * (len(weights) - 1 - number): (one.in_features, one.out_features)
        for owner, weights in by_owner.items()
        for number, one in enumerate(weights)
    }


def joined(factors: Iterable[tuple[Tensor, Tensor]], experts: int) -> tuple[Tensor, Tensor]:
    """A [E R, D] and B [O, R E] of the sum of several adapters on one fused weight.

    Rows of A are by expert and then by rank, columns of B by rank and then by expert.
    """
    downs, ups = zip(*factors, strict=True)
    if len(downs) == 1:
        return downs[0], ups[0]
    a_ERD = torch.cat([down.view(experts, -1, down.shape[1]) for down in downs], dim=1)
    b_ORE = torch.cat([up.view(len(up), -1, experts) for up in ups], dim=1)
    return a_ERD.flatten(0, 1), b_ORE.flatten(1, 2)


# ----------------------------------------------------------------- what is refused


def targeted_parameters(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Those of these parameters, by full name, that `target_parameters` means."""
    keys = config.target_parameters or ()
    return [name for name in names if any(name == key or name.endswith(f".{key}") for key in keys)]


def check_parameters(
    config: LoraConfig, base: PreTrainedModel, description: pb.Description, wire: str
) -> None:
    """Raises UsageError for parameters that this server, or this wire, does not let edges adapt.

    And for keys that name none. Called before peft makes A and B: their sizes are those that were
    described, and so were checked. Raises PeerError where the model's own are others.
    """
    asked = sorted(config.target_parameters or ())
    config = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(config, base, [])
    except ValueError:  # peft will say it once more
        return
    if not config.target_parameters:
        return
    parameters = dict(base.named_parameters())
    names = targeted_parameters(config, parameters)
    if names and isinstance(config, BottleneckConfig):
        raise UsageError(f"bottleneck adapters sit on linear modules, and not on {names[0]}")
    check_experts(wire, names)

    offered = {one.name: one for one in description.experts}
    offer = f"This server lets edges adapt: {offered_experts(description)}."
    for key in asked:
        if not any(name == key or name.endswith(f".{key}") for name in names):
            raise UsageError(f"target_parameters: {key!r} names no parameter of the model. {offer}")
    for name in names:
        if name not in offered:
            raise UsageError(
                f"target_parameters: {name} is no fused weight of experts that this server can let "
                f"edges adapt. {offer}"
            )
        one = offered[name]
        if not one.allowed:
            raise UsageError(f"this server does not allow adapters on {name}. {offer}")
        widths = (one.in_features, one.out_features)
        shape = (one.experts, *(widths if one.transposed else widths[::-1]))
        owner = base.get_submodule(name.rpartition(".")[0])
        transposed = bool(getattr(owner, "is_transposed", False))
        if (tuple(parameters[name].shape), transposed) != (shape, one.transposed):
            raise PeerError(
                f"the cloud describes {name} as {list(shape)}, its configuration makes it "
                f"{list(parameters[name].shape)}: use another server"
            )
    if config.lora_dropout:
        raise UsageError(
            f"lora_dropout: got {config.lora_dropout}, peft has none for fused weights such as "
            f"{names[0]}: use 0"
        )
