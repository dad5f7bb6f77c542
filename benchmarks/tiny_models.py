"""A tiny random model of any architecture that transformers maps to a causal LM.

No list of models: the default configuration is shrunk field by field, by what a field is called.
Where that does not build, or does not run, a few changes are tried one after the other.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["VOCAB", "NotBuilt", "architectures", "build"]

VOCAB = 300
MOST_PARAMETERS = 4_000_000
LAYERS = 3
_UNUSED_ID = 3
"""Of special tokens: low ids are in no text of the checks."""
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What a field is, by its name: the first pattern that is found decides. A number shrinks to the
# one beside it, and never grows; None: it stays.
_SIZES: list[tuple[str, int | None]] = [
    (r"vocab_size|vocabulary_size", VOCAB),
    (r"(^|_)(id|ids|index|token)$|token_id|version|theta|_step$|freq|interval|period|offset", None),
    (r"nextn|mtp_|num_mtp|kv_shared_layers", 0),
    (r"shared_experts", 1),
    (r"n_group|topk_group|n_groups|expert_group|groups$|multiplier|num_stacks", 1),
    (r"experts?_per_tok|top_?k(_|$)|num_selected|top_k_experts|moe_k$", 2),
    (r"num_.*experts|n_.*experts|moe_num_experts|zero_expert_num", 4),
    (r"first_k_dense|num_dense_layers", 1),
    (r"rotary_dim|rope_head_dim", 8),
    (r"d_ssm$", 64),
    (r"head_?dim$|d_head$|dim_head$|head_size$|v_head_dim|kv_channels|key_dim$|value_dim$", 16),
    (r"rank", 16),
    (r"(key_value|kv|k_v|value|key)_heads$|num_key_value_groups|query_groups|kv_n_heads", 2),
    (r"heads?$", 4),
    (r"(moe|expert|shared|routed).*(intermediate|ffn|dim|size)", 32),
    (r"intermediate|ffn|n_inner|dff$|feed_forward|mlp_dim|dim_ff|d_inner|inner_dim", 96),
    (r"layers$|n_layer$|num_blocks|^depth$|encoder_layers", LAYERS),
    (r"position|n_ctx$|seq_len|seq_length|n_positions|context_length|max_seq", 256),
    (r"window|attention_chunk|chunk_length|local_attention|block_size|budget", 6),
    (r"state_size|d_state$|chunk_size|patch_size", 8),
    (r"conv|kernel|expand|ratio|stride|pool|scale|num_buckets|num_hashes|channels", None),
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding|width|dim$|_size$|model_dim", 64),
]
_LAYER_TYPES, _HYBRID = r"^layer_types$", ["linear_attention", "full_attention", "linear_attention"]
_HEADS = r"(key_value|kv)_heads$|num_key_value_groups|query_groups"
# Tried in this order where a configuration does not build or run.
_CHANGES: list[dict[str, Any]] = [
    {},
    {_HEADS: 4},
    {r"^head_dim$": 8, r"experts_per_tok": 2, _HEADS: 4},
    {r"^head_dim$": 16, r"shared_experts": 1},
    {r"^head_dim$": 16, r"shared_experts": 1, _HEADS: 4},
    {r"(mamba|ssm|linear).*heads$|^num_heads$": 8},
    {r"expand": 2, r"(mamba|ssm|linear).*heads$|^num_heads$": 8},
    {_HEADS: 1},
    {r"hidden_size|d_model": 128},
    {r"layers$|layers_block_type|layer_types": 4},
    {r"axial_pos_embds$": False},
    {r"attn_layer_period": 2, r"attn_layer_offset": 1},
    {_LAYER_TYPES: _HYBRID},
    {_LAYER_TYPES: _HYBRID, r"(mamba|ssm|linear).*heads$|^num_heads$": 8},
    {_LAYER_TYPES: ["conv", "full_attention", "conv"]},
    {r"^attn_layer_indices$": [1], r"(mamba|ssm|linear).*heads$|^num_heads$": 8},
    {r"experts_per_tok": 2, r"shared_experts": 1, r"routed_experts": 4},
]
_FILLED = r"head_dim|key_value_heads|shared_experts|routed_experts|experts_per_tok"
"""Fields that a change also fills where they are None."""


class NotBuilt(Exception):
    """No tiny configuration of an architecture runs; the message is the first reason."""


def architectures() -> list[str]:
    """Every model type that the installed transformers maps to a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of a few ten thousand parameters that runs. Raises NotBuilt."""
    reason = ""
    for changes in _CHANGES:
        try:
            config = _config(model_type, changes)
            _check_size(copy.deepcopy(config))
            model = _random(AutoModelForCausalLM.from_config(config), seed)
            _try(model)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            return model
    raise NotBuilt(reason)


def _config(model_type: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The default configuration, shrunk and then changed."""
    config_class = CONFIG_MAPPING[model_type]
    values = _shrunk(config_class().to_dict(), changes)
    return config_class(**values)


def _shrunk(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    num_layers, kinds = (
        LAYERS,
        [
            len(dict.fromkeys(value))
            for name, value in values.items()
            if _is_per_layer(name, value) and all(isinstance(one, str) for one in value)
        ],
    )
    if kinds and max(kinds) > 1:
        num_layers = max(LAYERS, max(kinds) + 1)
    num_layers = next((value for name, value in changes.items() if "layers$" in name), num_layers)

    made: dict[str, Any] = {}
    old_layers = values.get("num_hidden_layers")
    for name, value in values.items():
        if name in ("model_type", "architectures", "transformers_version", "per_layer_config"):
            continue
        if isinstance(value, list) and value and len(value) == old_layers:
            distinct = list(dict.fromkeys(map(str, value)))
            if len(distinct) == 1 and isinstance(value[0], int):
                value = value[0]
            elif not isinstance(value[0], str):
                value = value[:num_layers]
                made[name] = value
                continue
        made[name] = _one(name, value, num_layers, changes)
        for pattern, new in changes.items():
            fits = isinstance(value, int) and isinstance(new, bool) == isinstance(value, bool)
            fits = fits or (value is None and re.search(_FILLED, name) is not None)
            fits = fits or isinstance(new, list)
            if fits and re.search(pattern, name):
                made[name] = new
    return {name: value for name, value in made.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _one(name: str, value: Any, num_layers: int, changes: dict[str, Any]) -> Any:
    """A field's value in the tiny configuration; `_LEFT_OUT`: the class makes its own."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if name == "is_decoder":
        return True
    if name == "qk_head_dim":  # the sum of two others
        return _LEFT_OUT
    if isinstance(value, list) and len(set(map(str, value))) == 1 and isinstance(value[0], int):
        value = value[0]
    if isinstance(value, dict):
        return _shrunk(value, changes) if name.endswith("_config") else value
    if _is_per_layer(name, value):
        distinct = list(dict.fromkeys(value))
        if not all(isinstance(one, str) for one in distinct):
            return _LEFT_OUT
        if name.startswith("mlp"):  # dense layers come first
            return (distinct + [distinct[-1]] * num_layers)[:num_layers]
        return (distinct * num_layers)[:num_layers]
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value

    if re.search(r"token_(id|index)$", name) and value >= VOCAB:  # of images and sounds
        return _UNUSED_ID
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            if size == LAYERS and "layer" in pattern:
                size = num_layers
            return value if size is None else min(value, size)
    return value


def _is_per_layer(name: str, value: Any) -> bool:
    """Whether a field has an entry for each layer, or names some of them."""
    return isinstance(value, list) and bool(value) and bool(re.search("layer|block|_idxs", name))


def _check_size(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that is not tiny, before it is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters are no tiny model")


def _random(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with weights that are large enough that every path matters to the loss."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(0.08 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def _try(model: PreTrainedModel) -> None:
    """Raises whatever goes wrong in a forward with labels, or ValueError for what is no number."""
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    if not torch.isfinite(output.loss):
        raise ValueError("the loss is not finite")
