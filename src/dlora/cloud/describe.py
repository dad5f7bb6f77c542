"""What a cloud says of its model, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from dlora.cloud.costs import MemoryCost
from dlora.cloud.layers import CloudLayers
from dlora.cloud.limits import Limits
from dlora.cloud.requests import RequestCheck
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.sites import Site
from dlora.protocol.weights import weight_of

__all__ = [
    "Findings",
    "describe_experts",
    "describe_layers",
    "describe_limits",
    "describe_site",
    "head_width",
]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What edges have to do otherwise for a model; the first two as `Description` says."""

    full_head: bool = False
    all_rows: bool = False
    no_cache: bool = False
    """Generate without a KV cache."""


def describe_site(model: PreTrainedModel, site: Site) -> pb.SiteInfo:
    """A site and its modules, with the norms of their weights."""
    modules = [
        pb.ModuleInfo(
            name=module.name,
            out_features=module.out_features,
            allowed=module.allowed,
            weight_norm=weight_of(model.get_submodule(module.name)).float().norm().item(),
        )
        for module in site.modules
    ]
    return pb.SiteInfo(in_features=site.in_features, modules=modules)


def describe_experts(site: Site) -> pb.FusedWeight:
    """A fused weight of experts."""
    (module,) = site.modules
    return pb.FusedWeight(
        name=module.name,
        experts=site.experts,
        in_features=site.in_features,
        out_features=module.out_features,
        transposed=site.transposed,
        allowed=module.allowed,
        site=site.depth,
        rows=site.rows,
    )


def head_width(model: PreTrainedModel, hidden_width: int) -> int:
    """Width of what the LM head reads, where it is another than the decoder's; else 0."""
    head = model.get_output_embeddings()
    width = 0 if head is None else int(head.weight.shape[-1])
    return 0 if width == hidden_width else width


def describe_layers(layers: CloudLayers, limits: Limits) -> pb.DecoderLayers:
    """The decoder's layers, and how many of them edges may hold."""
    return pb.DecoderLayers(
        count=layers.count,
        width=layers.width,
        in_tuple=layers.in_tuple,
        max_first=limits.edge_first,
        max_last=limits.edge_last,
    )


def describe_limits(limits: Limits, memory: MemoryCost, requests: RequestCheck) -> pb.Limits:
    """What a request may cost, and what a cache can do."""
    return pb.Limits(
        max_tokens=limits.max_tokens,
        max_length=limits.max_length,
        max_message_bytes=limits.max_message_bytes,
        max_inflight_bytes=limits.max_inflight_bytes,
        bytes_per_token=memory.training[0],
        bytes_per_token_squared=memory.training[1],
        cache_bytes_per_token=memory.cache_bytes_per_token,
        cache_bytes_per_sequence=memory.cache_bytes_per_sequence,
        deep_rollback=requests.deep_rollback,
        no_rollback=not requests.rollback,
        whole_prompts=requests.whole_prompts,
        prefix_bytes=requests.prefix_store.max_bytes if requests.prefix_store else 0,
    )
