"""Decoder layers that run on the edge: the first and the last few, around those of the cloud.

Both halves run the decoder's own forward over all of its layers. A layer that the other half runs
hands its input on; at the border hidden states come from the other half. So masks, positions and
rotary embeddings are made by the model's own code on both sides.

Shapes: B batch, T tokens, D width of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Cache

from dlora.errors import ModelError

__all__ = [
    "CloudBetween",
    "EdgeLayers",
    "LayerRunner",
    "find_layers",
    "first_output",
    "layer_of",
    "num_layers",
    "without_dropout",
    "wrap_layers",
]


@dataclass(frozen=True)
class EdgeLayers:
    """Which of `count` decoder layers the edge runs: the first `first` and the last `last`."""

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
        """Whether the cloud runs this layer.

        What is outside the layers (-1) runs on the edge where the edge runs any.
        """
        return not self or self.first <= layer < self.end


class LayerRunner(Protocol):
    """Decides what becomes of each layer in the pass that runs now."""

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


def num_layers(config: Any) -> int:
    """Decoder layers of a configuration; 0 where it does not say."""
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return count if isinstance(count, int) else 0


def find_layers(decoder: nn.Module, embedding: nn.Module, count: int) -> nn.ModuleList | None:
    """The decoder's one list of `count` layers; None where there is not exactly one.

    It stands beside the token embedding, or beside a module that holds that.
    """
    beside = [
        child
        for module in decoder.modules()
        if any(inner is embedding for inner in module.modules())
        for child in module.children()
    ]
    lists = [
        child for child in beside if isinstance(child, nn.ModuleList) and 0 < count == len(child)
    ]
    return lists[0] if len(lists) == 1 else None


def first_output(output: Any) -> Tensor:
    """The hidden states of a layer's output, which is a tensor, a tuple or a list."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def wrap_layers(
    layers: nn.ModuleList, runner: Callable[[], LayerRunner | None], in_tuple: bool
) -> None:
    """Let `runner()` decide about every layer; where it is None, the layers run as always.

    `in_tuple`: a layer's output is a tuple. A skipped layer keeps its place in a KV cache, with one
    number a token, so that every layer of the cache has the same length. Layers that are wrapped
    already are wrapped anew, and copies of a layer run their own forward.
    """
    for index, layer in enumerate(layers):
        before = vars(layer).get("forward")  # somebody else's, on the layer; None: the class's
        before = getattr(before, "wraps", before)

        def forward(
            layer: nn.Module,
            hidden_BTD: Tensor,
            *args: Any,
            index: int = index,
            before: Any = before,
            **kwargs: Any,
        ) -> Any:
            current = runner()
            own = partial(type(layer).forward, layer) if before is None else before
            if current is None:
                return own(hidden_BTD, *args, **kwargs)

            # What another layer handed on was unpacked by the decoder as it does with its own.
            _check_output(isinstance(hidden_BTD, Tensor) and hidden_BTD.dim() == 3, index, in_tuple)

            def skip(hidden_BTD: Tensor) -> Any:
                for argument in (*args, *kwargs.values()):
                    if isinstance(argument, Cache):
                        batch, length = hidden_BTD.shape[:2]
                        place = hidden_BTD.new_zeros(batch, 1, length, 1)
                        argument.update(place, place, index)

                return (hidden_BTD, None) if in_tuple else hidden_BTD

            def run(hidden_BTD: Tensor) -> Any:
                output = own(hidden_BTD, *args, **kwargs)
                _check_output(isinstance(output, tuple | list) == in_tuple, index, in_tuple)
                return output

            return current.run_layer(index, hidden_BTD, run, skip)

        vars(forward)["wraps"] = before
        layer.forward = MethodType(forward, layer)


def _check_output(fits: bool, index: int, in_tuple: bool) -> None:
    if not fits:  # the other half's word is not to be trusted
        raise ModelError(
            f"layer {index}: the server says that layers give "
            f"{'tuples' if in_tuple else 'tensors'}, which does not "
            "fit this architecture"
        )


class CloudBetween:
    """A `LayerRunner`: edge layers run; `cloud` stands for all others, [B, T, D] -> [B, T, D]."""

    def __init__(self, edge_layers: EdgeLayers, cloud: Callable[[Tensor], Tensor]) -> None:
        self.edge_layers, self.cloud = edge_layers, cloud

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Run an edge layer; at the first of the others go through the cloud."""
        if not self.edge_layers.in_cloud(index):
            return run(hidden_BTD)
        return skip(self.cloud(hidden_BTD) if index == self.edge_layers.first else hidden_BTD)


def without_dropout(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose base drops nothing, as in the cloud: edge layers never train."""
    return {
        name: 0.0
        if isinstance(value, float) and re.search(r"dropout|pdrop|layerdrop", name)
        else value
        for name, value in values.items()
    }
