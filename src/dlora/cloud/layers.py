"""The decoder's layers in the cloud, prepared so that edges may run the first and last few.

Every layer is wrapped once, at load. In a pass with edge layers the pass decides about each; in
all others the layers run as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.cloud.limits import Limits
from dlora.cloud.parts import Parts
from dlora.cloud.passes import current_pass
from dlora.cloud.quantize import quantization
from dlora.errors import ModelError, UsageError
from dlora.protocol.layers import LayerRunner, find_layers, first_output, num_layers, wrap_layers
from dlora.protocol.weights import is_offloaded

__all__ = ["CloudLayers"]


class CloudLayers:
    """The wrapped layers, and what an edge has to know about them.

    `count` is how many there are, `width` that of the hidden states between them, `in_tuple`
    whether a layer's output is a tuple. Where the decoder has no one list of layers, `count` is 0
    and edges run none. `ids_BT` are the tokens of one small forward.

    Raises ModelError or UsageError if edges may run layers and this model cannot give them.
    """

    def __init__(self, parts: Parts, limits: Limits, ids_BT: Tensor) -> None:
        self.count, self.width, self.in_tuple = 0, 0, False
        self.modules = nn.ModuleList()
        self._runner: LayerRunner | None = None

        model, count = parts.model, num_layers(parts.model.config)
        layers = find_layers(parts.decoder, parts.lookups.embedding, count)
        if parts.lookups.tables:  # they feed the layers in between
            layers = None
        _check_limits(model, limits, count, found=layers is not None)
        if layers is None:
            return

        output = _output_of(parts, layers[0], ids_BT)
        self.count, self.modules = count, layers
        self.in_tuple = isinstance(output, tuple | list)
        self.width = first_output(output).shape[-1]
        wrap_layers(layers, self._decide, self.in_tuple)

    def _decide(self) -> LayerRunner | None:
        """Who decides about the layers now; None: they run as always."""
        if self._runner is not None:
            return self._runner
        current = current_pass()
        if current is None:
            return None
        request = current.request
        if not (request.edge_layers or request.recompute or request.prefixes):
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
    if not found and limits.recompute:
        raise ModelError(
            f"recompute: found no list of {count} layers in {type(model).__name__}: serve it "
            "without"
        )
    if not found and (first or last):
        raise ModelError(
            f"edges cannot hold layers of {type(model).__name__}: found no list of {count}"
        )
    if not found:
        return
    if (first or last) and any(map(is_offloaded, model.modules())):
        raise UsageError("edge layers need weights that stay on a device: give it more max_memory")
    if (first or last) and quantization(model) is not None:
        raise UsageError(
            "edge layers of a low-bit base are not supported: serve it in full precision"
        )
    if first < 0 or last < 0 or first + last >= count:
        raise UsageError(
            f"edge layers: got {first} and {last} of {count}, want one at least to stay in the "
            "cloud"
        )


class _Seen(Exception):
    """A layer's output is known: the rest of the forward is not needed."""


def _output_of(parts: Parts, layer: nn.Module, ids_BT: Tensor) -> Any:
    """What a layer returns in a forward over these tokens."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Seen(output)

    with layer.register_forward_hook(stop):
        try:
            parts.hidden(ids_BT)
        except _Seen as seen:
            return seen.args[0]
    raise ModelError(f"the first layer of {parts.name} does not run in a forward")
