"""GGUF files: what transformers' older reader leaves out of a model without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transformers import PreTrainedModel
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

__all__ = ["unused_of_gguf"]

_SCALING: Final = ".rope.scaling.type"
_PLAIN_ROPE: Final = ("none", "default")


def unused_of_gguf(file: Path, model: PreTrainedModel) -> list[str]:
    """Tensors of the file, and a scaling of positions, that the model which was read has not.

    The newer reader, for some architectures, tells of tensors itself: as `unexpected_keys`.
    """
    metadata, tensors = read_gguf_metadata(str(file))
    architecture = metadata["general.architecture"]
    unused = []
    if not is_gguf_arch_supported(architecture):
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
        known = get_gguf_hf_weights_map(model, processor)
        # Experts of all in one tensor are known without the end of their name.
        unused = [
            name for name in tensors if not {name, name.removesuffix(".weight")} & known.keys()
        ]

    scaling = metadata.get(f"{architecture}{_SCALING}", "none")
    rope = getattr(model.config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kinds = {part.get("rope_type", "default") for part in parts}
    if scaling not in _PLAIN_ROPE and kinds <= {"default"}:
        unused.append(f"{architecture}{_SCALING} = {scaling}")
    return sorted(unused)
