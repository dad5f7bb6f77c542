"""What a server takes at once, by the limits that it announces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dlora.edge.description import has_cache
from dlora.edge.sites import ActiveSite
from dlora.proto import dlora_pb2 as pb

__all__ = ["fits_cache", "pass_tokens"]

_VALUE_BYTES: Final = 4
"""Of a value that travels, at most."""


def pass_tokens(description: pb.Description, exchanged: Iterable[ActiveSite]) -> int:
    """Tokens of one pass, padding included.

    The server limits them, and a message is to take half of its largest at most. `exchanged`: the
    sites that are asked for.
    """
    widths = [description.embedding_width, description.hidden_width, description.layers.width]
    for site in exchanged:
        widths += [site.in_features, sum(layer.out_features for layer in site.layers)]
    by_message = description.limits.max_message_bytes // (2 * _VALUE_BYTES * max(widths))
    return max(1, min(int(description.limits.max_tokens), by_message))


def fits_cache(limits: pb.Limits, rows: int, prompt: int, length: int) -> bool:
    """Whether so many rows are answered as one batch: prompts of `prompt` tokens, `length` in all.

    Their KV cache takes half of the server's memory at most, as others want some.
    """
    each = length * limits.cache_bytes_per_token + limits.cache_bytes_per_sequence
    return (
        length <= limits.max_length
        and rows * prompt <= limits.max_tokens
        and has_cache(limits)
        and rows * each <= limits.max_inflight_bytes // 2
    )
