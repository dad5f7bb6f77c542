"""Which of the cloud's sites an adapter sits at."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from dlora.edge.bottleneck import is_series
from dlora.edge.responder import ActiveSite
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, layer_of
from dlora.protocol.sites import Module, Site, output_sites

__all__ = ["allowed_names", "match_sites", "shared_sites"]


def shared_sites(description: pb.Description) -> list[Site]:
    """The sites that read an input, as the cloud numbers them."""
    return [
        Site(
            index=index,
            in_features=site.in_features,
            modules=tuple(
                Module(name=one.name, out_features=one.out_features, allowed=one.allowed)
                for one in site.modules
            ),
        )
        for index, site in enumerate(description.sites)
    ]


def match_sites(
    model: PeftModel, description: pb.Description, edge_layers: EdgeLayers
) -> tuple[tuple[ActiveSite, ...], dict[str, LoraLayer]]:
    """Pair every LoRA layer with the cloud's sites; return those, and the layers that the edge runs
    itself, by name.

    Raises UsageError for layers that the cloud cannot serve.
    """
    layers = {
        name: one
        for name, one in model.get_base_model().named_modules()
        if isinstance(one, LoraLayer)
    }
    here = {
        name: layers.pop(name) for name in list(layers) if not edge_layers.in_cloud(layer_of(name))
    }
    in_series = is_series(model.peft_config["default"])
    sites = []
    inputs = shared_sites(description)
    for site in output_sites(inputs) if in_series else inputs:
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
    if layers:
        raise UsageError(
            f"target module {next(iter(layers))} cannot be adapted from the edge: it is not a "
            "linear module of the "
            "decoder that runs once for each token. This server allows: "
            f"{allowed_names(description)}."
        )
    return tuple(sites), here


def allowed_names(description: pb.Description) -> str:
    """The last parts of the names of all modules that may be targeted."""
    names = {
        module.name.rpartition(".")[2]: None
        for site in description.sites
        for module in site.modules
        if module.allowed
    }
    return ", ".join(names) or "none"
