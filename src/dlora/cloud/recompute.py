"""Layers that run again in backward: whether a model's gradients stay what they are, and what is
kept meanwhile.

How it is done is in `passes.py`. Here it is tried and measured at load, before anything is served.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import torch
from torch import Tensor, nn

from dlora.cloud.parts import Parts
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.passes import Pass
from dlora.cloud.zero_edge import ZeroEdge, probe_request, sample_ids
from dlora.errors import ModelError
from dlora.protocol.sites import Site
from dlora.protocol.weights import is_offloaded
from dlora.protocol.wire import decode

__all__ = ["check_recompute", "measure_recompute", "per_token", "saved_by_layer"]

# Largest difference of gradients, as a share of the largest. The same operations on the same
# tensors give the same bits; 1e-6 leaves room for kernels whose sums have no fixed order.
_TOLERANCE: Final = 1e-6
_OUTSIDE: Final = -1
"""In place of a layer's number: what is saved outside of the layers."""


class _GradientEdge(ZeroEdge):
    """An edge whose adapters are zero, and whose loss is not."""

    def hidden_grad(self, rows: int, width: int) -> Tensor:
        """[rows, width] of every sign and size."""
        return torch.arange(rows * width).view(rows, width).mul(0.7).cos()


class _ForwardEdge(ZeroEdge):
    """An edge that leaves before backward."""

    def hidden_grad(self, rows: int, width: int) -> Tensor:
        """What autograd has saved is known by now."""
        raise _NoBackward


class _NoBackward(Exception):
    """The forward pass was all that was wanted."""


def check_recompute(parts: Parts, sites: Sequence[Site], ids_BT: Tensor) -> None:
    """Compare gradients of the embeddings with those of a step that keeps everything.

    Where weights are loaded for each call a step that keeps everything would keep them all: there
    the second run is only tried.

    Raises ModelError if they differ, or if layers cannot run again.
    """
    name = parts.name
    asked = probe_request(parts, sites, ids_BT, training=True)
    asked = dataclasses.replace(asked, wants_input_grad=True)
    offloaded = any(map(is_offloaded, parts.model.modules()))
    want_ND = None if offloaded else _entry_grad(parts, asked)
    try:
        got_ND = _entry_grad(parts, dataclasses.replace(asked, recompute=True))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"recompute: layers of {name} cannot run twice: {reason}") from error
    if want_ND is None:
        return

    gap, scale = (got_ND - want_ND).abs().max().item(), want_ND.abs().max().item()
    if not gap <= _TOLERANCE * scale:
        raise ModelError(
            f"recompute: gradients of {name} differ by {gap:.3g} (largest {scale:.3g}) when its "
            "layers run again in backward: serve it without"
        )


def _entry_grad(parts: Parts, request: PassRequest) -> Tensor:
    """The gradient of the embeddings, [N, D]."""
    running = Pass(parts, request, _GradientEdge(request))
    running.run()
    if running.entry_grad is None:
        raise AssertionError("the gradient was asked for")
    return decode(running.entry_grad, list(running.entry_grad.shape), "gradient")


def measure_recompute(
    parts: Parts, sites: Sequence[Site], layers: nn.ModuleList, max_length: int
) -> tuple[float, float]:
    """Bytes that a training step holds, (per token, per token squared) of a sequence.

    What each layer reads, all that the largest layer saves while backward is in it, and what is
    saved outside of the layers. Answers of edges come on top: they depend on the request.
    """
    lengths, sizes = [min(16, max_length), min(64, max_length)], []
    for length in lengths:
        request = probe_request(parts, sites, sample_ids(parts.model, 1, length), training=True)
        inputs: list[int] = []
        saved = saved_by_layer(parts, request, layers, inputs)
        outside = saved.pop(_OUTSIDE, 0)
        sizes.append(sum(inputs) + max(saved.values(), default=0) + outside)
    return per_token(lengths, sizes)


def saved_by_layer(
    parts: Parts,
    request: PassRequest,
    layers: Sequence[nn.Module] | nn.ModuleList = (),
    inputs: list[int] | None = None,
) -> Counter[int]:
    """Bytes that autograd saves in a step with zero adapters, weights excluded.

    By the number of the layer; -1 for what is in none of `layers`. `inputs` gets the bytes that go
    into each of them.
    """
    weights = {
        p.untyped_storage().data_ptr() for p in (*parts.model.parameters(), *parts.model.buffers())
    }
    saved: dict[int, tuple[int, int]] = {}
    current = [_OUTSIDE]

    def keep(tensor: Tensor) -> Tensor | None:
        storage = tensor.untyped_storage()
        # Weights that were loaded for this call alone are not held here either.
        if storage.data_ptr() in weights or isinstance(tensor._base, nn.Parameter):
            return None
        if isinstance(tensor, nn.Parameter):
            return None
        saved.setdefault(storage.data_ptr(), (current[0], storage.nbytes()))
        return tensor

    with (
        suppress(_NoBackward),
        _numbered(layers, current, [] if inputs is None else inputs),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        Pass(parts, request, _ForwardEdge(request)).run()

    found: Counter[int] = Counter()
    for layer, size in saved.values():
        found[layer] += size
    return found


@contextmanager
def _numbered(
    layers: Sequence[nn.Module] | nn.ModuleList, current: list[int], inputs: list[int]
) -> Iterator[None]:
    """Keep the number of the layer that runs in `current`, and add what it reads to `inputs`."""
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):

            def enter(_: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
                current[0] = number
                inputs.append(args[0].nbytes)

            def leave(_: nn.Module, args: object, output: object) -> None:
                current[0] = _OUTSIDE

            hooks.enter_context(layer.register_forward_pre_hook(enter))
            hooks.enter_context(layer.register_forward_hook(leave))
        yield


def per_token(lengths: Sequence[int], sizes: Sequence[int]) -> tuple[float, float]:
    """(a, b) of size = a T + b T^2, from the sizes of two lengths; b is not negative."""
    (t0, t1), (s0, s1) = lengths, sizes
    if t0 == t1:
        return s0 / t0, 0.0
    b = max(0.0, (s1 / t1 - s0 / t0) / (t1 - t0))
    return max(s0 / t0, s1 / t1) - b * (t0 if s0 / t0 > s1 / t1 else t1), b
