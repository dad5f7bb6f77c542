"""An adapter folder's weights: read as they are, and refused where they are not the model's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from dlora.edge.ends import own_ends
from dlora.errors import UsageError
from dlora.protocol.text import clean_text

__all__ = ["check_adapter_weights", "put_adapter_weights", "read_adapter_weights"]

_NAMES: Final = ("adapter_model.safetensors", "adapter_model.bin")
_SHOWN: Final = 2


def read_adapter_weights(
    folder: str | Path, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a local adapter folder; asks no hub.

    Raises UsageError if there are none, or they cannot be read.
    """
    if not any((Path(folder) / name).is_file() for name in _NAMES):
        raise UsageError(f"the adapter in {folder} has no weights: {_NAMES[0]} is missing")
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device=str(device))
    except Exception as error:  # of safetensors, of pickle, of the system: cut, empty, no tensors
        raise UsageError(
            f"the adapter in {folder} cannot be read: {clean_text(error)}; is it a whole file?"
        ) from error
    if not weights:
        raise UsageError(f"the adapter in {folder} has no weights: its file is empty")
    return weights


def put_adapter_weights(model: PeftModel, weights: Mapping[str, Tensor], misfit: str) -> None:
    """Give the model's adapter these weights, and the model the embedding and head among them.

    Raises UsageError unless they are those of the adapter, by name and shape. `misfit` is how the
    message begins.
    """
    if check_adapter_weights(model, weights, misfit):
        own_ends(model.get_base_model())
    try:
        set_peft_model_state_dict(model, dict(weights))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{misfit}: {clean_text(error)}") from error


def check_adapter_weights(model: PeftModel, weights: Mapping[str, Tensor], misfit: str) -> bool:
    """Whether weights of the embedding or head themselves are beside the adapter's.

    Raises UsageError as `put_adapter_weights`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes a bottleneck's biases for broken matrices
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        known = get_peft_model_state_dict(model, save_embedding_layers=True)
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - known.keys())
    if missing or unknown:
        parts = [f"it lacks {', '.join(missing[:_SHOWN])}"] if missing else []
        parts += [f"it has unknown {', '.join(unknown[:_SHOWN])}"] if unknown else []
        raise UsageError(f"{misfit}: {' and '.join(parts)}")

    for name, tensor in weights.items():
        if tensor.shape != known[name].shape:
            raise UsageError(
                f"{misfit}: {name} has shape {list(tensor.shape)}, want {list(known[name].shape)}"
            )
    return not weights.keys() <= wanted.keys()
