"""What a pass will cost in the cloud, known before it runs: memory and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dlora.cloud.pass_request import PassRequest
from dlora.formulas import attention_flops, backward_flops, forward_flops, pass_bytes
from dlora.protocol.sites import Site
from dlora.protocol.wire import payload_bytes

__all__ = ["FlopCount", "MemoryCost", "answer_bytes", "attention_of", "other_flops", "pass_flops"]


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Memory that passes need beside the weights, from what was measured at load."""

    bytes_per_token: float
    bytes_per_token_squared: float
    """Activations of a training step: both numbers are for one sequence."""

    cache_bytes_per_token: int
    """Keys and values of all layers."""

    num_layers: int
    """Layers that have a site."""

    cache_bytes_per_sequence: int = 0
    """States of recurrent layers. Where both are 0 the model is served without KV cache."""
    recompute: tuple[float, float] | None = None
    """The first two where layers run again in backward, without the edge's answers; None: they do
    not."""

    @property
    def has_cache(self) -> bool:
        """Whether the model is served with a KV cache."""
        return bool(self.cache_bytes_per_token or self.cache_bytes_per_sequence)

    @property
    def training(self) -> tuple[float, float]:
        """Bytes of a training step, (per token, per token squared) of a sequence."""
        return self.recompute or (self.bytes_per_token, self.bytes_per_token_squared)

    def of_pass(
        self, batch: int, length: int, *, training: bool, past: int = 0, cache_length: int = 0
    ) -> int:
        """Bytes of a pass over [batch, length] tokens, its stream's whole KV cache included."""
        if training:
            return int(pass_bytes(batch, length, *self.training, past))
        # Without backward only a layer's own tensors live at once.
        activations = pass_bytes(
            batch, length, self.bytes_per_token, self.bytes_per_token_squared, past
        )
        return int(2 * activations / max(1, self.num_layers)) + self.of_cache(batch, cache_length)

    def of_stream(self, stream: PassRequest, batch: int, length: int, past: int) -> int:
        """Bytes of a pass of this stream, with its adapter and the answers that are kept for it."""
        training, tokens = stream.training, batch * length
        cost = self.of_pass(
            batch, length, training=training, past=past, cache_length=stream.cache_length
        )
        if stream.hosted is not None:
            cost += stream.hosted.adapter_bytes(training=training)
            cost += stream.hosted.pass_bytes(tokens, training=training, recompute=stream.recompute)
        if stream.recompute:
            cost += sum(answer_bytes(stream, *active, tokens) for active in stream.active)
        return cost

    def of_cache(self, batch: int, cache_length: int) -> int:
        """Bytes of a KV cache with room for `cache_length` tokens of each sequence."""
        per_sequence = self.cache_bytes_per_sequence if cache_length else 0
        return batch * (cache_length * self.cache_bytes_per_token + per_sequence)


class FlopCount(TorchDispatchMode):
    """Counts matmul FLOPs by torch's own formulas: 2 per multiply-add."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            # This one and the next have no formula in torch.
            self.total += sdpa_flop_count(*(one.shape for one in args[:3]))
        elif "grouped_mm" in str(packet):  # experts: rows [S, in], weights [E, in, out]
            self.total += 2 * args[0].numel() * output.shape[-1]
        elif (formula := flop_registry.get(packet)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def other_flops(
    total: int, batch: int, length: int, sites: Sequence[Site], num_layers: int, config: Any
) -> float:
    """FLOPs a token of what is neither at a site nor attention: experts that ran, state updates.

    `total` is what a forward over [batch, length] tokens took.
    """
    known = forward_flops(sites, batch * length)
    known += num_layers * attention_flops(config, batch, length)
    return max(0.0, (total - known) / (batch * length))


def answer_bytes(request: PassRequest, site: Site, modules: Sequence[int], rows: int) -> int:
    """Bytes in which the edge answers at a site: deltas, or Z and B. Hosted there is no answer."""
    if request.hosted is not None:
        return 0
    widths = [site.modules[module].out_features for module in modules]
    if not request.factored:
        return sum(payload_bytes(request.codecs.deltas, rows, width) for width in widths)

    total = 0
    for width in widths:
        most = max(width, site.in_features)
        rank = min(request.rank or most, most)
        total += sum(payload_bytes(request.codecs.factors, n, rank) for n in (rows, width))
    return total


def pass_flops(
    request: PassRequest,
    sites: Sequence[Site],
    layers: Sequence[int],
    config: Any,
    other_per_token: float = 0.0,
) -> tuple[int, int]:
    """(forward, backward) matmul FLOPs of the model in one pass, without what adapters add.

    `sites` are those that read an input, `layers` the indices of all layers with a site.
    `other_per_token` is of `other_flops`, spread over those layers.
    Backward goes down to the lowest active site and computes input gradients only: the weights
    are frozen. Attention counts densely, its backward as twice its forward.
    """
    tokens = request.batch * request.length

    def in_cloud(layer: int) -> bool:
        """What is outside the layers is computed below named prefixes too, on zeros."""
        below = 0 <= layer < request.first_layer
        return not below and request.edge_layers.in_cloud(layer)

    attention = attention_of(request, config)
    sites = [site for site in sites if in_cloud(site.modules[0].layer)]

    here = [layer for layer in layers if in_cloud(layer)]
    other = other_per_token * tokens / max(1, len(layers))
    forward = forward_flops(sites, tokens) + attention * len(here) + int(other * len(here))
    if not request.has_backward:
        return forward, 0

    bottom = min((site for site, _ in request.active), key=lambda site: site.place, default=None)
    if bottom is None or request.probe or request.wants_input_grad:  # all the way down
        return forward, backward_flops(sites, None, tokens, attention) + int(other * len(here))

    # Of experts the site before them may be on the edge.
    lowest = bottom.place if any(site.index == bottom.place for site in sites) else None
    above = [layer for layer in here if layer >= bottom.modules[0].layer]
    return (
        forward,
        backward_flops(sites, lowest, tokens, attention) + int(other * len(above)),
    )


def attention_of(request: PassRequest, config: Any) -> int:
    """FLOPs of attention in one layer's forward."""
    return attention_flops(config, request.batch, request.length, request.past)
