"""The decoder's layers in the cloud, prepared so that edges may run the first and last few.

Every layer is wrapped once, at load. In a pass with edge layers the pass decides about each; in
all others the layers run as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.cloud.limits import Limits
from dlora.cloud.passes import current_pass
from dlora.cloud.quantize import quantization
from dlora.errors import ModelError, UsageError
from dlora.protocol.layers import LayerRunner, find_layers, first_output, wrap_layers

__all__ = ["CloudLayers"]


class CloudLayers:
    """The wrapped layers, and what an edge has to know about them.

    `count` is how many there are, `width` that of the hidden states between them, `in_tuple`
    whether a layer's output is a tuple. Where the decoder has no one list of layers, `count` is 0
    and edges run none. `ids_BT` are the tokens of one small forward.

    Raises ModelError or UsageError if edges may run layers and this model cannot give them.
    """

    def __init__(self, model: PreTrainedModel, limits: Limits, ids_BT: Tensor) -> None:
        self.count, self.width, self.in_tuple = 0, 0, False
        self.modules = nn.ModuleList()
        self._runner: LayerRunner | None = None

        count = int(model.config.get_text_config().num_hidden_layers)
        layers = find_layers(model.get_decoder(), count)
        _check_limits(model, limits, count, found=layers is not None)
        if layers is None:
            return

        output = _output_of(model, layers[0], ids_BT)
        self.count, self.modules = count, layers
        self.in_tuple, self.width = isinstance(output, tuple), first_output(output).shape[-1]
        wrap_layers(layers, self._decide, self.in_tuple)

    def _decide(self) -> LayerRunner | None:
        """Who decides about the layers now; None: they run as always."""
        if self._runner is not None:
            return self._runner
        current = current_pass()
        if current is None or not (current.request.edge_layers or current.request.prefixes):
            return None
        return current

    @contextmanager
    def run_by(self, runner: LayerRunner) -> Iterator[None]:
        """Let `runner` decide, on all threads: for checks at load, before anything is served."""
        self._runner = runner
        try:
            yield
        finally:
            self._runner = None


def _check_limits(model: PreTrainedModel, limits: Limits, count: int, *, found: bool) -> None:
    """Raises ModelError or UsageError if edges may run layers that they cannot get."""
    first, last = limits.edge_first, limits.edge_last
    if not found and (first or last):
        raise ModelError(
            f"edges cannot hold layers of {type(model).__name__}: found no list of {count}"
        )
    if not found:
        return
    if (first or last) and quantization(model) is not None:
        raise UsageError(
            "edge layers of a low-bit base are not supported: serve it in full precision"
        )
    if first < 0 or last < 0 or first + last >= count:
        raise UsageError(
            f"edge layers: got {first} and {last} of {count}, want one at least to stay in the "
            "cloud"
        )


def _output_of(model: PreTrainedModel, layer: nn.Module, ids_BT: Tensor) -> Any:
    """What a layer returns in a forward over these tokens."""
    outputs: list[Any] = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with hook, torch.no_grad():
        embeddings = model.get_input_embeddings()(ids_BT)
        model.get_decoder()(inputs_embeds=embeddings, use_cache=False)
    return outputs[0]
