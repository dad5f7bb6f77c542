"""The KV caches of a model: what they take, and whether they change what it says.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from dlora.cloud.load_checks import gap_between
from dlora.cloud.parts import Parts
from dlora.cloud.passes import seen_mask
from dlora.cloud.trace import TracedPass
from dlora.protocol.decoder import last_hidden
from dlora.protocol.text import clean_text

__all__ = ["CacheCost", "is_recurrent", "measure_cache", "new_cache"]

log = logging.getLogger(__name__)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for a stream of this model."""
    return DynamicCache(config=model.config)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a layer keeps what it has read in a state, which cannot give tokens back."""
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in new_cache(model).layers
    )


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """What a cache takes; nothing where the model is served without one."""

    bytes_per_token: int = 0
    bytes_per_sequence: int = 0
    """The states of recurrent layers."""
    whole_prompts: bool = False
    """It takes tokens in one pass at first, and then one by one."""

    def __bool__(self) -> bool:
        return bool(self.bytes_per_token or self.bytes_per_sequence)


def measure_cache(parts: Parts, ids_BT: Tensor) -> tuple[CacheCost, TracedPass | None]:
    """What a KV cache takes; nothing where it changes results, or cannot be used.

    And a pass behind a cache, to be watched.

    Passes with the cache are compared with one without: first two of several tokens, and where
    those differ one of all tokens but two, and those one by one.
    """
    length = ids_BT.shape[1]
    if length < 4:
        return CacheCost(), None
    reason: object = "with it, results differ"
    attempts = ((length // 2, length), False), ((length - 2, length - 1, length), True)
    for ends, whole_prompts in attempts:
        try:
            cost, last = _cache_cost(parts, ids_BT, ends)
        except Exception as error:  # caches of twenty kinds fail in as many ways
            reason = f"{type(error).__name__}: {clean_text(error)}"
            continue
        if cost:
            whole_prompts = whole_prompts or _rotates_by_length(parts.model.config)
            return dataclasses.replace(cost, whole_prompts=whole_prompts), last
    log.warning("%s is served without KV cache: %s", parts.name, reason)
    return CacheCost(), None


def _cache_cost(
    parts: Parts, ids_BT: Tensor, ends: Sequence[int]
) -> tuple[CacheCost, TracedPass | None]:
    """What a cache takes if passes that end there agree with one over all tokens.

    And the last of them, to be run once more.
    """
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, :2] = 0  # on the left, where batches of prompts are padded
    cache, want = new_cache(parts.model), parts.hidden(ids_BT, mask=mask_BT)
    again = None
    for start, end in pairwise((0, *ends)):
        seen_BT = seen_mask(mask_BT[:, :end], cache, end - start)
        run = partial(parts.run, ids_BT[:, start:end], mask=seen_BT)
        if end == ends[-1]:  # a cache takes tokens once
            again = TracedPass(
                run=partial(run, cache=copy.deepcopy(cache)),
                batch=len(ids_BT),
                length=end - start,
            )
        with torch.no_grad():
            got = last_hidden(run(cache=cache))
        if start and gap_between(got - want[:, start:end], want):
            return CacheCost(), None
    return _bytes_of(cache, ids_BT), again


def _bytes_of(cache: DynamicCache, ids_BT: Tensor) -> CacheCost:
    """Bytes of a cache that holds these tokens: of what grows with them, and of what does not."""
    batch, tokens = ids_BT.shape[0], ids_BT.numel()
    per_token = per_sequence = 0.0
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            per_sequence += sum(state.nbytes for state in states if state is not None) / batch
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            for value in vars(layer).values():
                if isinstance(value, Tensor) and value.dim() > 1 and value.numel():
                    kept = value.shape[0] * value.shape[-2]  # a window keeps fewer than came
                    per_token += value.nbytes / min(tokens, kept)
    return CacheCost(
        bytes_per_token=math.ceil(per_token), bytes_per_sequence=math.ceil(per_sequence)
    )


def _rotates_by_length(config: Any) -> bool:
    """Whether how positions are rotated depends on how long the sequence is."""
    values = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [values, *(value for value in values.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in ("longrope", "dynamic") for one in nested)
