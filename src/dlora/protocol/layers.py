"""Decoder layers that run on the edge: the first and the last few, around those of the cloud.

Both halves run the decoder's own forward over all of its layers. A layer that the other half holds
hands its input on; at the border hidden states come from the other half. So masks, positions and
rotary embeddings are made by the model's own code on both sides.

Shapes: B batch, T tokens, D width of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from dlora.errors import ModelError

__all__ = [
    "EdgeLayers",
    "KnownCloud",
    "LayerRunner",
    "check_weights",
    "files_for",
    "fill",
    "find_layers",
    "first_output",
    "layer_of",
    "layer_weights",
    "values_by_file",
    "without_dropout",
    "wrap_layers",
]


@dataclass(frozen=True)
class EdgeLayers:
    """Which of `count` decoder layers the edge holds: the first and the last so many."""

    first: int = 0
    last: int = 0
    count: int = 0

    def __bool__(self) -> bool:
        return bool(self.first or self.last)

    @property
    def end(self) -> int:
        """The cloud's layers are `first` to `end - 1`."""
        return self.count - self.last

    def in_cloud(self, layer: int) -> bool:
        """Whether the cloud runs this layer; what is outside the layers (-1) runs on the edge where
        it holds any.
        """
        return not self or self.first <= layer < self.end


class LayerRunner(Protocol):
    """Says what becomes of each layer in the pass that runs now."""

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Return `run(hidden_BTD)`, the layer's own output, or `skip(hidden_BTD)`."""


def layer_of(name: str) -> int:
    """The first number in a module's or parameter's name: its decoder layer, or -1."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def find_layers(decoder: nn.Module, count: int) -> nn.ModuleList | None:
    """The decoder's one list of `count` layers; None where there is not exactly one."""
    found = [
        one for one in decoder.children() if isinstance(one, nn.ModuleList) and len(one) == count
    ]
    return found[0] if len(found) == 1 else None


def first_output(output: Any) -> Tensor:
    """The hidden states of a layer's output, which is a tensor or a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def wrap_layers(
    layers: nn.ModuleList, runner: Callable[[], LayerRunner | None], in_tuple: bool
) -> None:
    """Let `runner()` decide about every layer; where it is None, the layers run as always.

    `in_tuple`: a layer's output is a tuple. A skipped layer keeps its place in a KV cache, with one
    number a token, so that every layer of the cache has the same length.
    """
    for index, layer in enumerate(layers):

        def forward(
            hidden_BTD: Tensor,
            *args: Any,
            index: int = index,
            own: Any = layer.forward,
            **kwargs: Any,
        ) -> Any:
            current = runner()
            if current is None:
                return own(hidden_BTD, *args, **kwargs)

            # What another layer handed on was unpacked by the decoder as it does with its own.
            _check_output(isinstance(hidden_BTD, Tensor) and hidden_BTD.dim() == 3, index, in_tuple)

            def skip(hidden_BTD: Tensor) -> Any:
                for one in (*args, *kwargs.values()):
                    if isinstance(one, Cache):
                        batch, length = hidden_BTD.shape[:2]
                        place = hidden_BTD.new_zeros(batch, 1, length, 1)
                        one.update(place, place, index)
                return (hidden_BTD, None) if in_tuple else hidden_BTD

            def run(hidden_BTD: Tensor) -> Any:
                output = own(hidden_BTD, *args, **kwargs)
                _check_output(isinstance(output, tuple) == in_tuple, index, in_tuple)
                return output

            return current.run_layer(index, hidden_BTD, run, skip)

        layer.forward = forward


def _check_output(fits: bool, index: int, in_tuple: bool) -> None:
    if not fits:  # the other half's word is not to be trusted
        raise ModelError(
            f"layer {index}: the server says that layers give "
            f"{'tuples' if in_tuple else 'tensors'}, which does not "
            "fit this architecture"
        )


class KnownCloud:
    """A `LayerRunner`: held layers run, and what comes out of the cloud's is known, [B, T, D]."""

    def __init__(self, edge_layers: EdgeLayers, exit_BTD: Tensor) -> None:
        self.edge_layers, self.exit_BTD = edge_layers, exit_BTD

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Run a held layer; hand on what is known at the first of the others, and what comes at the
        rest.
        """
        if not self.edge_layers.in_cloud(index):
            return run(hidden_BTD)
        return skip(self.exit_BTD if index == self.edge_layers.first else hidden_BTD)


def layer_weights(
    model: nn.Module, decoder: nn.Module, count: int, first: int, last: int
) -> Mapping[str, dict[str, Tensor]]:
    """What an edge needs to hold up to so many layers: file name -> {name in the model: tensor}.

    One file a layer, and one for all of the decoder beside layers and token embedding.
    """
    wanted = ["decoder.safetensors", *map(layer_file, (*range(first), *range(count - last, count)))]
    files = values_by_file(model, decoder)
    return {
        file: {
            name: value.detach().to("cpu").contiguous().clone()
            for name, value in files.get(file, {}).items()
        }
        for file in wanted
    }


def values_by_file(model: nn.Module, decoder: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The decoder's parameters and buffers but for the token embedding: file name -> {name in the
    model: tensor}.
    """
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    inputs: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embedding = {id(parameter) for parameter in inputs.parameters()}
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in decoder.state_dict(
        prefix=f"{prefix}." if prefix else "", keep_vars=True
    ).items():
        if id(value) not in embedding:
            layer = layer_of(name)
            files.setdefault("decoder.safetensors" if layer < 0 else layer_file(layer), {})[
                name
            ] = value
    return files


def layer_file(index: int) -> str:
    """The name of a layer's file."""
    return f"layer-{index:04}.safetensors"


def files_for(layers: EdgeLayers) -> list[str]:
    """The files that an edge wants for these layers."""
    edge_layers = (*range(layers.first), *range(layers.end, layers.count))
    return ["decoder.safetensors", *map(layer_file, edge_layers)] if layers else []


def check_weights(
    wanted: Mapping[str, Tensor], dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless a file has what `values_by_file` says, its parameters in the model's
    dtype.
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
    """Put weights into a model by name; return them. Raises KeyError or ValueError for what does
    not fit.
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


def without_dropout(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose base drops nothing, as in the cloud: held layers are never in
    training.
    """
    return {
        name: 0.0
        if isinstance(value, float) and re.search(r"dropout|pdrop|layerdrop", name)
        else value
        for name, value in values.items()
    }
