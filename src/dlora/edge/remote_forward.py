"""What stands in for the forward of the decoder that is in the cloud."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from dlora.edge.kv_cache import CloudCache
from dlora.errors import UsageError

__all__ = ["remote_forward"]

# Arguments of a decoder's forward that change nothing here, or are honoured before it is called.
_HARMLESS_ARGUMENTS: Final = frozenset(
    "return_dict num_items_in_batch logits_to_keep cache_position fused_lm_head tokenizer".split()
)


def remote_forward(
    model: Any,  # the `SplitModel`, whose module imports this one
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Stands in for the decoder's forward.

    Raises UsageError, by name, for what would change the result unnoticed.
    """
    if past_key_values is None and use_cache:
        past_key_values = CloudCache()
    if past_key_values is not None and not isinstance(past_key_values, CloudCache):
        raise UsageError(
            f"past_key_values: got a {type(past_key_values).__name__}, want a dlora.CloudCache: "
            "keys and values stay in the cloud"
        )
    for name, value in others.items():
        if name not in _HARMLESS_ARGUMENTS and value is not None and value is not False:
            raise UsageError(f"argument {name} is not supported by a split model")
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
    ):
        raise UsageError("attention_mask: want a [batch, length] tensor of 0 and 1")

    if inputs_embeds is None:
        if input_ids is None:
            raise UsageError("got neither input_ids nor inputs_embeds")
        inputs_embeds = _embed(input_ids, model.get_input_embeddings())
    hidden = model.run_decoder(inputs_embeds, attention_mask, position_ids, past_key_values)
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden, past_key_values=past_key_values
    )


def _embed(ids_BT: Tensor, embedding: nn.Module) -> Tensor:
    """Embeddings of tokens, [B, T, D]. Raises UsageError for ids that have none."""
    largest, rows = (
        int(ids_BT.max()) if ids_BT.numel() else 0,
        len(embedding.get_parameter("weight")),
    )
    if largest >= rows:
        raise UsageError(
            f"token {largest} has no row among the embedding's {rows}: take it out of the text"
        )
    embeddings_BTD: Tensor = embedding(ids_BT.view(-1, ids_BT.shape[-1]))
    return embeddings_BTD
