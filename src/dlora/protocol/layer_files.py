"""Files of decoder layers: what they are called, what is in them, and putting it into a model.

One file a layer, and one for all of the decoder beside layers and token embedding. The cloud
writes them for edges that run layers themselves; an edge trusts neither their names nor content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.protocol.decoder import decoder_of, prefix_of
from dlora.protocol.layers import EdgeLayers, layer_of, num_layers

__all__ = [
    "check_weights",
    "files_for",
    "fill",
    "is_layer_file",
    "layer_weights",
    "values_by_file",
    "write_layer_files",
]

DECODER_FILE: Final = "decoder.safetensors"


# ----------------------------------------------------------------- names


def layer_file(index: int) -> str:
    """The name of a layer's file."""
    return f"layer-{index:04}.safetensors"


def is_layer_file(name: str) -> bool:
    """Whether a peer's file name is exactly one of these, for at most 10,000 layers."""
    number = re.search(r"\d{4}", name)
    return name == DECODER_FILE or (number is not None and name == layer_file(int(number[0])))


def files_for(layers: EdgeLayers) -> list[str]:
    """The files that an edge wants for these layers."""
    edge_layers = (*range(layers.first), *range(layers.end, layers.count))
    return [DECODER_FILE, *map(layer_file, edge_layers)] if layers else []


# ----------------------------------------------------------------- contents


def values_by_file(model: nn.Module, decoder: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The decoder's parameters and buffers, the token embedding left out.

    Returns file name -> {name in the model: tensor}.
    """
    inputs: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embedding = {id(parameter) for parameter in inputs.parameters()}

    files: dict[str, dict[str, Tensor]] = {}
    for name, value in decoder.state_dict(prefix=prefix_of(model, decoder), keep_vars=True).items():
        if id(value) not in embedding:
            layer = layer_of(name)
            files.setdefault(DECODER_FILE if layer < 0 else layer_file(layer), {})[name] = value
    return files


def layer_weights(
    model: nn.Module, decoder: nn.Module, count: int, first: int, last: int
) -> Mapping[str, dict[str, Tensor]]:
    """Copies on the CPU of what an edge needs to run the `first` first and `last` last layers.

    Returns file name -> {name in the model: tensor}.
    """
    wanted = [DECODER_FILE, *map(layer_file, (*range(first), *range(count - last, count)))]
    files = values_by_file(model, decoder)
    return {
        file: {
            name: value.detach().to("cpu").contiguous().clone()
            for name, value in files.get(file, {}).items()
        }
        for file in wanted
    }


def write_layer_files(model: PreTrainedModel, first: int, last: int, folder: Path) -> None:
    """Write the layers that edges may run, and what else the decoder has.

    Writes nothing where edges may run none.
    """
    if first or last:
        count = num_layers(model.config)
        for name, weights in layer_weights(model, decoder_of(model), count, first, last).items():
            save_file(weights, folder / name)


def check_weights(
    wanted: Mapping[str, Tensor], dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless a file has exactly the names of `wanted`.

    `wanted` is of `values_by_file`. Parameters have to be in the model's dtype, or in float32.
    """
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"it lacks {missing[0]}")
    if foreign := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"it has {foreign[0]}, which is no part of it")

    for name, value in weights.items():
        # A model in half precision may keep some weights in full.
        if isinstance(wanted[name], nn.Parameter) and value.dtype not in (dtype, torch.float32):
            raise ValueError(f"{name}: got {value.dtype}, want {dtype}")


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Put weights into a model by name; return those that became parameters.

    Raises KeyError for a name that the model lacks, ValueError for another shape.
    """
    filled = []
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        have: Tensor | None = module._parameters.get(last)
        if have is None:
            have = module._buffers.get(last)
        if have is None:
            raise KeyError(name)
        if have.shape != value.shape:
            raise ValueError(f"{name}: got {list(value.shape)}, want {list(have.shape)}")

        if last in module._parameters:
            filled.append(nn.Parameter(value, requires_grad=False))
            setattr(module, last, filled[-1])
        else:
            setattr(module, last, value)
    return filled
