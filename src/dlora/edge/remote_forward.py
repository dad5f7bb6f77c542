"""What stands in for the forward of the decoder that is in the cloud."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.edge.kv_cache import CloudCache
from dlora.errors import UsageError
from dlora.protocol.decoder import CACHE_NAMES, DecoderOutput, decoders_of, named_arguments
from dlora.protocol.lookups import Lookups

__all__ = ["stand_in"]

# Arguments of a decoder's forward that change nothing here, or are honoured before it is called.
_HARMLESS_ARGUMENTS: Final = frozenset(
    "return_dict num_items_in_batch logits_to_keep cache_position fused_lm_head tokenizer labels "
    "vocab_size".split()
)


def stand_in(model: Any, base: PreTrainedModel, runs_itself: Callable[[], bool]) -> None:
    """Put the cloud in the place of a base model's decoder, whatever part of it the head calls.

    `model` is the `SplitModel`, whose module imports this one. Where `runs_itself`, for layers that
    are here, inner parts of the decoder run as always.
    """
    for decoder in decoders_of(base):
        decoder.forward = partial(_remote_forward, model, decoder, runs_itself)


def _remote_forward(
    model: Any, decoder: nn.Module, runs_itself: Callable[[], bool], *args: Any, **kwargs: Any
) -> Any:
    """Stands in for the decoder's forward.

    Raises UsageError, by name, for what would change the result unnoticed.
    """
    if runs_itself():
        return type(decoder).forward(decoder, *args, **kwargs)
    others = named_arguments(decoder, args, kwargs)
    input_ids, inputs_embeds, attention_mask, position_ids, use_cache = (
        others.pop(name, None)
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache")
    )
    caches = [others.pop(name, None) for name in CACHE_NAMES]
    cache = next((cache for cache in caches if cache is not None), None)

    # Heads ask for a cache in training as well, and use none.
    if cache is None and use_cache and not torch.is_grad_enabled() and model.has_cache:
        cache = CloudCache()
    if cache is not None and not isinstance(cache, CloudCache):
        raise UsageError(
            f"past_key_values: got a {type(cache).__name__}, want a dlora.CloudCache: "
            "keys and values stay in the cloud"
        )
    for name, value in others.items():
        says_nothing = value is None or value is False or (isinstance(value, dict) and not value)
        if name not in _HARMLESS_ARGUMENTS and not says_nothing:
            raise UsageError(f"argument {name} is not supported by a split model")
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
    ):
        raise UsageError("attention_mask: want a [batch, length] tensor of 0 and 1")

    if inputs_embeds is None:
        if input_ids is None:
            raise UsageError("got neither input_ids nor inputs_embeds")
        inputs_embeds = _embed(input_ids, model.lookups)
    elif model.lookups.tables:
        raise UsageError(
            "inputs_embeds: this model looks up more than embeddings by token ids: pass input_ids"
        )
    hidden = model.run_decoder(inputs_embeds, attention_mask, position_ids, cache)
    return DecoderOutput(last_hidden_state=hidden, past_key_values=cache, cache_params=cache)


def _embed(ids_BT: Tensor, lookups: Lookups) -> Tensor:
    """Embeddings of tokens, [B, T, D]. Raises UsageError for ids that have none."""
    largest, rows = int(ids_BT.max()) if ids_BT.numel() else 0, lookups.num_rows
    if largest >= rows:
        raise UsageError(
            f"token {largest} has no row among the embedding's {rows}: take it out of the text"
        )
    return lookups(ids_BT.view(-1, ids_BT.shape[-1]))
