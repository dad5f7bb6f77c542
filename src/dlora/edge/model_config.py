"""A cloud's configuration of its model, read as an architecture and nothing else.

Only fields that the configuration's own class has are taken. Nothing in it may name a place where
code or weights come from: what is built from it is built from this machine's transformers alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Final

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dlora.edge.description import MAX_LAYERS, MAX_WIDTH
from dlora.errors import ModelError, PeerError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import without_dropout
from dlora.protocol.text import clean_text

__all__ = ["read_config"]

_DTYPES: Final = ("float32", "float16", "bfloat16")
# Names of code, of repositories, or of kernels that transformers would fetch; at every depth.
_NEVER: Final = frozenset(
    "auto_map quantization_config _name_or_path name_or_path _commit_hash custom_pipelines "
    "attn_implementation experts_implementation".split()
)
_NEVER_PREFIXES: Final = ("_attn_implementation", "_experts_implementation")
_LEGACY: Final = frozenset(("rope_theta", "rope_scaling", "model_type"))
_MAX_DEPTH: Final = 8
_MAX_NUMBER: Final = 2**31
_MAX_VOCABULARY: Final = 2**23


def read_config(description: pb.Description, *, dropout: bool = True) -> PreTrainedConfig:
    """The configuration of the served model; without dropout where layers run here.

    Raises ModelError for a type that transformers does not know, PeerError for values that no
    model has. What transformers itself refuses comes as it is: a `wall` is around this.
    """
    values = json.loads(description.config_json)
    if not isinstance(values, dict):
        raise PeerError("the cloud's configuration is no table of names and values")
    model_type = values.get("model_type")
    if (
        not isinstance(model_type, str)
        or model_type not in CONFIG_MAPPING
        or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise ModelError(
            "this transformers does not know model type "
            f"{clean_text(model_type, 80)!r}: upgrade transformers"
        )

    config_class = CONFIG_MAPPING[model_type]
    known = _fields(config_class)
    values = _plain({name: value for name, value in values.items() if name in known})
    values = values if dropout else without_dropout(values)
    config: PreTrainedConfig = config_class.from_dict(values)
    _check_sizes(config, description)
    return config


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The names that a configuration of this class writes."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return names | set(config_class().to_dict()) | set(config_class.attribute_map) | _LEGACY


def _plain(value: Any, depth: int = 0) -> Any:
    """Plain values without names of code and repositories. Raises PeerError for others."""
    if depth > _MAX_DEPTH:
        raise PeerError("the cloud's configuration is nested too deeply")
    if isinstance(value, dict):
        return {
            name: _dtype(inner) if name in ("dtype", "torch_dtype") else _plain(inner, depth + 1)
            for name, inner in value.items()
            if name not in _NEVER and not name.startswith(_NEVER_PREFIXES)
        }
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]

    # json reads NaN and infinity, and numbers of any length.
    if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER and value != math.inf:
        raise PeerError(f"the cloud's configuration has the number {clean_text(value, 40)}")
    if isinstance(value, str) and ("/" in value or len(value) > 200):
        raise PeerError(f"the cloud's configuration names a place: {clean_text(value, 80)!r}")
    return value


def _dtype(value: Any) -> str | None:
    """The name of a dtype. Raises PeerError for one that is not on the list."""
    if value is not None and value not in _DTYPES:
        raise PeerError(
            f"the cloud's configuration has dtype {clean_text(value, 40)!r}, want one of "
            f"{', '.join(_DTYPES)}"
        )
    return None if value is None else str(value)


def _check_sizes(config: PreTrainedConfig, description: pb.Description) -> None:
    """Raises PeerError unless layers and widths are those of the description, and can be."""
    text, count = config.get_text_config(), description.layers.count
    layers = getattr(text, "num_hidden_layers", None)
    for what, value, most in (
        ("layers", layers, MAX_LAYERS),
        ("width", getattr(text, "hidden_size", None), MAX_WIDTH),
        ("vocabulary", getattr(text, "vocab_size", None), _MAX_VOCABULARY),
    ):
        if value is None:  # some architectures call it otherwise
            continue
        if not isinstance(value, int) or not 0 < value <= most:
            shown = clean_text(value, 40)
            raise PeerError(f"the cloud's configuration: {what}: got {shown}, want 1 to {most}")
    if count and layers != count:
        raise PeerError(f"the cloud's configuration has {layers} layers, its description {count}")
