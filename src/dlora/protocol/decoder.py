"""Which part of a causal LM is its decoder, how it is called, and what stands in for its answer.

The decoder is found by what it is, not by a name. Everything outside it, and the token embedding,
is the edge's: heads, norms and scales between the two. No model's name is in here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dlora.errors import INSTEAD, ModelError

__all__ = [
    "CACHE_NAMES",
    "DecoderOutput",
    "cache_name",
    "called_outside",
    "decoder_of",
    "decoders_of",
    "edge_parameters",
    "embedding_of",
    "last_hidden",
    "named_arguments",
    "prefix_of",
    "run_decoder",
]

CACHE_NAMES: Final = ("past_key_values", "cache_params")
"""What a forward may call its KV cache, or its recurrent state."""


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The outermost model inside a causal LM that takes embeddings and holds their table.

    Outermost, as what lies around an inner one (masks, say) is then run by whoever runs the
    decoder. Raises ModelError where there is none.
    """
    if found := decoders_of(model):
        return found[0]
    raise ModelError(
        f"{type(model).__name__} has no decoder that takes the embeddings of tokens in place of "
        f"their ids: it cannot be split. {INSTEAD}"
    )


def decoders_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The same, and those inside it, outermost first: a head may call any of them."""
    embedding = embedding_of(model)
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module is not model
        and "inputs_embeds" in _parameters(module)
        and any(inner is embedding for inner in module.modules())
    ]


def embedding_of(model: PreTrainedModel) -> nn.Module:
    """The token embedding. Raises ModelError for a model without one table of them."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(
            f"{type(model).__name__} has no table of token embeddings to give to edges"
        )
    return embedding


def prefix_of(model: nn.Module, part: nn.Module) -> str:
    """The name of a part of a model, with a dot behind it; empty for the model itself."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def cache_name(module: nn.Module) -> str:
    """What this module's forward calls its cache."""
    return next((name for name in CACHE_NAMES if name in _parameters(module)), CACHE_NAMES[0])


def run_decoder(
    decoder: nn.Module, *, cache: Any = None, as_class: bool = False, **inputs: Any
) -> Any:
    """Call a decoder's forward, with a KV cache if one is given; what it returns.

    `as_class`: that of its class, where another one was put on the object.
    """
    inputs["use_cache"] = cache is not None
    if cache is not None:
        inputs[cache_name(decoder)] = cache
    known = _parameters(decoder)
    if not any(one.kind is one.VAR_KEYWORD for one in known.values()):
        inputs = {name: value for name, value in inputs.items() if name in known}
    return type(decoder).forward(decoder, **inputs) if as_class else decoder(**inputs)


def last_hidden(output: Any) -> Tensor:
    """The last hidden states [B, T, D] in what a decoder returns."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, tuple | list):
        hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ModelError(
            "the decoder returns no last hidden states of shape [batch, tokens, width]"
        )
    return hidden


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a module's own forward, all by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """What stands for a decoder's output: hidden states and cache.

    Whatever else a head reads (router logits, attentions) is None, which is what decoders return
    that were not asked for it.
    """

    cache_params: Any = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def edge_parameters(
    model: PreTrainedModel, decoder: nn.Module, called: set[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what is outside the decoder: parameters, and buffers that are saved.

    With `called`, names of modules, only those of the modules that one forward calls, of the LM
    head, and of modules inside the decoder that are named there.
    """
    inside = prefix_of(model, decoder)
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        name = f"{path}." if path else ""
        if name.startswith(inside) and (called is None or path not in called):
            continue
        if called is not None and module is not head and path and path not in called:
            continue
        for last, value in module._parameters.items():
            if value is not None:
                yield f"{name}{last}", value
        for last, buffer in module._buffers.items():
            if buffer is not None and last not in module._non_persistent_buffers_set:
                yield f"{name}{last}", buffer


@torch.no_grad()
def called_outside(model: PreTrainedModel, decoder: nn.Module, ids_BT: Tensor) -> set[str]:
    """Names of the modules outside the decoder that one forward over text calls."""
    inside, called = prefix_of(model, decoder), set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
        if not f"{path}.".startswith(inside)
    ]
    try:
        model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(module).forward).parameters
