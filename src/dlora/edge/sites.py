"""Which of the cloud's sites an adapter sits at.

The cloud describes its sites: groups of modules that read the same tensor. Here peft's LoRA layers
are paired with them by full name. A LoRA layer inside a decoder layer that runs on the edge, or on
the LM head, has no site: nothing of it is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from dlora.edge.bottleneck import BottleneckConfig, is_series
from dlora.edge.classifier import refuse_classifier
from dlora.edge.experts import adapted_name, experts_of, fused_sites, offered_experts
from dlora.edge.lora import active_names
from dlora.edge.prompt import virtual_tokens
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, layer_of
from dlora.protocol.sites import Module, Site, output_sites

__all__ = [
    "ActiveSite",
    "allowed_names",
    "entries_of",
    "match_sites",
    "names_of",
    "refuse_head",
    "shared_sites",
]


@dataclass(frozen=True, kw_only=True)
class ActiveSite:
    """The adapted modules of one site, in the cloud's order."""

    index: int
    in_features: int
    modules: tuple[int, ...]
    """Indices into the cloud's list of this site's modules."""
    layers: tuple[LoraLayer, ...]
    names: tuple[str, ...]
    """Full names of the modules; of a fused weight of experts, that of the parameter."""
    depth: int
    """Its place in the forward pass, among the sites that read an input."""

    @property
    def is_fused(self) -> bool:
        """Whether its one module is a fused weight of experts, which the cloud has to compute."""
        return any(map(experts_of, self.layers))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable LoRA parameters of this site, in a fixed order."""
        parameters: list[nn.Parameter] = []
        for layer in self.layers:
            for name in active_names(layer):
                parameters += layer.lora_A[name].parameters()
                parameters += layer.lora_B[name].parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]


def shared_sites(description: pb.Description) -> list[Site]:
    """The sites that read an input, as the cloud numbers them."""
    return [
        Site(
            index=index,
            in_features=site.in_features,
            modules=tuple(
                Module(name=module.name, out_features=module.out_features, allowed=module.allowed)
                for module in site.modules
            ),
        )
        for index, site in enumerate(description.sites)
    ]


def match_sites(
    model: PeftModel, description: pb.Description, edge_layers: EdgeLayers
) -> tuple[tuple[ActiveSite, ...], dict[str, LoraLayer]]:
    """Pair every LoRA layer with the cloud's sites.

    Returns the sites that have adapters, and, by name, the LoRA layers inside edge layers. Raises
    UsageError for LoRA layers that the cloud cannot serve.
    """
    layers = {
        adapted_name(name, module): module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    here = {
        name: layers.pop(name) for name in list(layers) if not edge_layers.in_cloud(layer_of(name))
    }
    if fused := [name for name, layer in here.items() if experts_of(layer)]:
        raise UsageError(
            f"experts: {fused[0]} is in a layer that runs on the edge, where only linear modules "
            "are adapted: use fewer edge layers, or name the layers in target_parameters"
        )

    inputs = shared_sites(description)
    in_series = is_series(model.peft_config["default"])
    _leave_head(model, layers)
    sites = []
    for site in (*(output_sites(inputs) if in_series else inputs), *fused_sites(description)):
        modules = [i for i, module in enumerate(site.modules) if module.name in layers]
        for i in modules:
            if not site.modules[i].allowed:
                raise UsageError(
                    f"this server does not allow adapters on {site.modules[i].name}. It allows: "
                    f"{allowed_names(description)}."
                )

        if modules:
            names = tuple(site.modules[i].name for i in modules)
            sites.append(
                ActiveSite(
                    index=site.index,
                    in_features=site.in_features,
                    modules=tuple(modules),
                    layers=tuple(layers.pop(name) for name in names),
                    names=names,
                    depth=site.place,
                )
            )

    for name, layer in layers.items():  # those that no site took
        _refuse(name, layer, description)
    return tuple(sites), here


def _refuse(name: str, layer: LoraLayer, description: pb.Description) -> NoReturn:
    """Raises UsageError for a LoRA layer that sits where the server takes none."""
    if experts_of(layer):
        raise UsageError(
            f"experts: {name} cannot be adapted. This server allows: "
            f"{offered_experts(description)}."
        )
    raise UsageError(
        f"target module {name} cannot be adapted from the edge: it is not a "
        "linear module of the decoder that runs once for each token. This server allows: "
        f"{allowed_names(description)}."
    )


def _leave_head(model: PeftModel, layers: dict[str, LoraLayer]) -> None:
    """Take the LM head out of these layers: it is here, whole, and peft computes its adapter."""
    head = model.get_base_model().get_output_embeddings()
    bottleneck = isinstance(model.peft_config["default"], BottleneckConfig)
    for name in [name for name, layer in layers.items() if layer is head and not bottleneck]:
        del layers[name]


def refuse_head(model: PeftModel, description: pb.Description) -> None:
    """Raises UsageError for what `dlora train` cannot train: an adapter on the LM head, as its loss
    reads the head's weight; a classifier, which has none; a prompt, which makes its rows longer.
    """
    base = model.get_base_model()
    refuse_classifier(base, "training on text")
    if virtual_tokens(model):
        raise UsageError(
            "prompts are trained from Python, by any trainer (docs/adapters.md), and not by this "
            "command: use LoRA or a bottleneck adapter"
        )
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer):
        name = next(name for name, module in base.named_modules() if module is head)
        raise UsageError(
            f"target module {name}: the loss is computed from the LM head's weight, and an adapter "
            f"on it would not be trained. This server allows: {allowed_names(description)}."
        )


def allowed_names(description: pb.Description) -> str:
    """The last parts of the names of all modules that may be targeted."""
    names = {
        module.name.rpartition(".")[2]: None
        for site in description.sites
        for module in site.modules
        if module.allowed
    }
    return ", ".join(names) or "none"


def entries_of(description: pb.Description, names: Iterable[str]) -> list[pb.ActiveSite]:
    """Modules by their full names, as the cloud numbers them; the inverse of `names_of`."""
    wanted = set(names)
    entries = []
    for index, site in enumerate(description.sites):
        modules = [i for i, module in enumerate(site.modules) if module.name in wanted]
        if modules:
            entries.append(pb.ActiveSite(site=index, modules=modules))
    return entries


def names_of(description: pb.Description, entries: Sequence[pb.ActiveSite]) -> list[str]:
    """Full names of modules that are given by the cloud's numbers."""
    sites = description.sites
    return [sites[entry.site].modules[i].name for entry in entries for i in entry.modules]
