"""The adapter that the cloud computes itself for one stream, where the edge wants it so.

Its tensors came with the request and go with the stream. Their gradients travel in `Done`.

Shapes: B batch, T tokens, D width of what a module reads, R rank, O width of what it adds to.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.hosted_request import HostedModule, HostedRequest, HostedTensors
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.activations import activation_of
from dlora.protocol.wire import content_hash, decode, encode

__all__ = ["HostedAdapter"]


@dataclass(frozen=True)
class _Module:
    """One module at work; in training its tensors ask for gradients."""

    checked: HostedModule
    tensors: HostedTensors


class HostedAdapter:
    """The active modules of one stream, on `device`. Raises WireError for data that do not fit."""

    def __init__(self, request: HostedRequest, store: FrozenStore, training: bool) -> None:
        self.seed = request.seed
        self.modules: list[_Module] = []
        self._sites: dict[int, list[_Module]] = {}
        for checked in request.modules:
            tensors = checked.kept
            if tensors is None:
                tensors = _decoded(checked, store.device)
                if checked.message.keep:
                    key = content_hash(checked.message)
                    store.put_hosted(key, tensors, request.owner, request.owner_bytes)

            # Kept tensors are shared by streams: each has gradients of its own.
            a_RD, b_OR, a_bias, b_bias = (
                None if tensor is None else tensor.detach().requires_grad_(training)
                for tensor in tensors
            )
            if a_RD is None or b_OR is None:
                raise AssertionError("a checked module has both matrices")
            module = _Module(checked, (a_RD, b_OR, a_bias, b_bias))
            self.modules.append(module)
            self._sites.setdefault(checked.site, []).append(module)

    def macs(self, site: int, *, input_grad: bool) -> tuple[int, int]:
        """(forward, backward) multiply-adds of a row at a site.

        Backward makes the gradients of A and B, that at the rank and, if asked for, that of x.
        """
        modules = [module.checked for module in self._sites[site]]
        forward = sum(module.numel for module in modules)
        ranks = sum(module.rank * module.out_features for module in modules)
        inputs = sum(module.rank * module.in_features for module in modules)
        return forward, forward + ranks + (inputs if input_grad else 0)

    def deltas(self, site: int, x: Tensor, past: int) -> tuple[Tensor, ...]:
        """What each module of a site adds, [B, T, O] float32: B f(A dropout(x)).

        `past` tokens were there before: later passes of a stream draw other masks.
        """
        x = x.float()
        return tuple(self._delta(module, x, past) for module in self._sites[site])

    def _delta(self, module: _Module, x: Tensor, past: int) -> Tensor:
        a_RD, b_OR, a_bias, b_bias = module.tensors
        message = module.checked.message
        if any(part.p for part in message.dropouts):
            z_BTR = self._dropped(module, x, past)
            z_BTR = z_BTR if a_bias is None else z_BTR + a_bias
        else:
            z_BTR = nn.functional.linear(x, a_RD, a_bias)
        activation = activation_of(message.activation)
        return nn.functional.linear(
            z_BTR if activation is None else activation(z_BTR), b_OR, b_bias
        )

    def _dropped(self, module: _Module, x: Tensor, past: int) -> Tensor:
        """A dropout(x), [B, T, R]: masks depend on the edge's seed and on the place alone."""
        checked, a_RD = module.checked, module.tensors[0]
        generator = torch.Generator(x.device)
        place = f"{self.seed} {checked.site} {checked.module} {past}"
        digest = hashlib.sha256(place.encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

        parts, start = [], 0
        for part in checked.message.dropouts:
            rows = x
            if part.p:
                keep = 1.0 - part.p
                mask = torch.empty_like(x, requires_grad=False)
                rows = x * mask.bernoulli_(keep, generator=generator).div_(keep)
            parts.append(nn.functional.linear(rows, a_RD[start : start + part.rank]))
            start += part.rank
        return torch.cat(parts, dim=-1)

    def grads(self, dtype: pb.DType) -> list[pb.ModuleGrad]:
        """After backward: the gradients of every module, for `Done`."""
        messages = []
        for module in self.modules:
            # A module that nothing of the loss depends on has no gradient.
            names = ("a", "b", "a_bias", "b_bias")
            messages.append(
                pb.ModuleGrad(
                    **{
                        name: encode(
                            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, dtype
                        )
                        for name, tensor in zip(names, module.tensors, strict=True)
                        if tensor is not None
                    }
                )
            )
        return messages


def _decoded(checked: HostedModule, device: torch.device) -> HostedTensors:
    """The tensors of a module that came whole; `decode` checks their bytes first."""
    message, rank, width = checked.message, checked.rank, checked.out_features

    def bias(name: str, length: int) -> Tensor | None:
        if not message.HasField(name):
            return None
        return decode(getattr(message, name), (length,), f"{name} of the adapter").to(device)

    return (
        decode(message.a, (rank, checked.in_features), "A of the adapter").to(device),
        decode(message.b, (width, rank), "B of the adapter").to(device),
        bias("a_bias", rank),
        bias("b_bias", width),
    )
