"""What a pass will cost in the cloud, known before it runs: memory and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlora.cloud.pass_request import PassRequest
from dlora.formulas import attention_flops, backward_flops, forward_flops, pass_bytes
from dlora.protocol.sites import Site

__all__ = ["MemoryCost", "pass_flops"]


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Memory that passes need beside the weights, from what was measured at load."""

    bytes_per_token: float
    bytes_per_token_squared: float
    """Activations of a training step: both numbers are for one sequence."""

    cache_bytes_per_token: int
    """Keys and values of all layers; 0 where the model is served without KV cache."""

    num_layers: int
    """Layers that have a site."""

    def of_pass(
        self, batch: int, length: int, *, training: bool, past: int = 0, cache_length: int = 0
    ) -> int:
        """Bytes of a pass over [batch, length] tokens, its stream's whole KV cache included."""
        activations = pass_bytes(
            batch, length, self.bytes_per_token, self.bytes_per_token_squared, past
        )
        if training:
            return int(activations)
        # Without backward only a layer's own tensors live at once.
        return int(2 * activations / max(1, self.num_layers)) + self.of_cache(batch, cache_length)

    def of_cache(self, batch: int, cache_length: int) -> int:
        """Bytes of a KV cache with room for `cache_length` tokens of each sequence."""
        return batch * cache_length * self.cache_bytes_per_token


def pass_flops(
    request: PassRequest, sites: Sequence[Site], layers: Sequence[int], config: Any
) -> tuple[int, int]:
    """(forward, backward) matmul FLOPs of the model in one pass, without what adapters add.

    `sites` are those that read an input, `layers` the indices of all layers with a site.
    Backward goes down to the lowest active site and computes input gradients only: the weights
    are frozen. Attention counts densely, its backward as twice its forward.
    """
    tokens = request.batch * request.length

    def in_cloud(layer: int) -> bool:
        """What is outside the layers is computed below named prefixes too, on zeros."""
        below = 0 <= layer < request.first_layer
        return not below and request.edge_layers.in_cloud(layer)

    attention = attention_flops(config, request.batch, request.length, request.past)
    sites = [site for site in sites if in_cloud(site.modules[0].layer)]

    forward = forward_flops(sites, tokens) + attention * sum(map(in_cloud, layers))
    if not request.has_backward:
        return forward, 0

    all_the_way_down = request.probe or request.wants_input_grad
    lowest = None if all_the_way_down else min(site.place for site, _ in request.active)
    return forward, backward_flops(sites, lowest, tokens, attention)
