"""The adapter that the cloud computes itself for one stream, where the edge wants it so.

Its tensors come behind the request, in a few frames, while the cloud computes already: a site waits
for its own alone. They go with the stream. In backward their gradients are sent as they are there,
also in a few frames, so that the way of most of them is hidden behind computing.

Shapes: B batch, T tokens, D width of what a module reads, R rank, O width of what it adds to,
E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from dlora.cloud.exchange import Exchange
from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.hosted_request import HostedModule, HostedRequest, HostedTensors
from dlora.cloud.low_rank import Count, LowRank
from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.activations import activation_of
from dlora.protocol.channel import MODULE_FRAMES
from dlora.protocol.wire import content_hash, decode, encode

__all__ = ["HostedAdapter"]

_FIELDS: Final = ("a", "b", "a_bias", "b_bias")


class _Module:
    """One module at work; in training its tensors ask for gradients."""

    def __init__(self, number: int, checked: HostedModule) -> None:
        self.number, self.checked = number, checked
        self.tensors: HostedTensors | None = None
        """None: they are still under way."""
        self.missing_grads = 0

    def set(self, tensors: HostedTensors, *, training: bool) -> None:
        """Take what has come, or what was kept: that is shared by streams, and each has gradients
        of its own.
        """
        a, b, a_bias, b_bias = (
            None
            if tensor is None
            else tensor.detach().to(self.checked.device).requires_grad_(training)
            for tensor in tensors
        )
        if a is None or b is None:
            raise AssertionError("a checked module has both matrices")
        self.tensors = (a, b, a_bias, b_bias)
        self.missing_grads = len(self.leaves)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that there are."""
        return [tensor for tensor in self.tensors or () if tensor is not None]


class HostedAdapter:
    """The active modules of one stream, each on the device of the linear that it sits on."""

    def __init__(self, request: HostedRequest, store: FrozenStore, training: bool) -> None:
        self.request, self.store, self.training = request, store, training
        self.modules = [_Module(number, one) for number, one in enumerate(request.modules)]
        self._sites: dict[int, list[_Module]] = {}
        for module in self.modules:
            self._sites.setdefault(module.checked.site, []).append(module)
            if module.checked.kept is not None:
                module.set(module.checked.kept, training=training)

        # Where tensors are still to come, in how many frames; and which gradients go together.
        self._arrived, self._frames = 0, request.frames
        size = -(-len(self.modules) // MODULE_FRAMES) or 1
        self._groups = [self.modules[i : i + size] for i in range(0, len(self.modules), size)]
        self._sent: set[int] = set()

    # ----------------------------------------------------------------- tensors come, gradients go

    def wait(self, exchange: Exchange, site: int | None = None) -> None:
        """Take frames until the tensors of a site are there; of all sites if none is named.

        Raises WireError for tensors that do not fit.
        """
        wanted = self.modules if site is None else self._sites[site]
        while self._frames and any(module.tensors is None for module in wanted):
            self.take(exchange.receive_modules())

    def take(self, message: pb.HostedTensors) -> None:
        """Tensors of modules that follow each other. Raises WireError for what does not fit."""
        self._frames -= 1
        end = message.first + len(message.modules)
        if message.first != self._arrived or not message.first < end <= len(self.modules):
            raise WireError(
                f"got modules {message.first} to {end}, want those from {self._arrived} on, of "
                f"{len(self.modules)}"
            )
        for tensors, module in zip(message.modules, self.modules[self._arrived : end], strict=True):
            decoded = _decoded(tensors, module.checked)
            if module.checked.message.keep:
                owner, owner_bytes = self.request.owner, self.request.owner_bytes
                self.store.put_hosted(content_hash(tensors), decoded, owner, owner_bytes)
            module.set(decoded, training=self.training)
        self._arrived = end
        if (end == len(self.modules)) != (self._frames == 0):
            raise WireError(
                f"got {end} of {len(self.modules)} modules, and {self._frames} frames are to come"
            )

    @contextmanager
    def sending_grads(self, exchange: Exchange) -> Iterator[None]:
        """A backward in which the gradients of each group are sent when the last is there.

        The hooks are taken off whatever happens: a tensor, its hook and the module that has the
        tensor are a circle that Python's garbage collector does not see.
        """
        hooks = [
            leaf.register_post_accumulate_grad_hook(self._hook(exchange, group, module))
            for group in self._groups[1:]  # backward comes to the first group last
            for module in group
            for leaf in module.leaves
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, exchange: Exchange, group: list[_Module], module: _Module) -> object:
        def arrived(_: Tensor) -> None:
            module.missing_grads -= 1
            if not any(one.missing_grads for one in group):
                exchange.send(pb.CloudFrame(module_grads=self._grads(group, exchange)))

        return arrived

    def rest(self, exchange: Exchange) -> Iterator[pb.HostedTensors]:
        """After backward: the gradients that were not sent, for `Done`."""
        for group in self._groups:
            if group[0].number not in self._sent:
                yield self._grads(group, exchange)

    def _grads(self, group: list[_Module], exchange: Exchange) -> pb.HostedTensors:
        """The gradients of modules that follow each other; they are forgotten here."""
        dtype = exchange.request.codecs.factors
        self._sent.add(group[0].number)
        messages = []
        for module in group:
            fields = {}
            for name, tensor in zip(_FIELDS, module.tensors or (), strict=True):
                if tensor is not None:
                    # A module that nothing of the loss depends on has no gradient.
                    grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                    fields[name] = encode(grad.T if name == "b" else grad, dtype)
                    tensor.grad = None
            messages.append(pb.ModuleTensors(**fields))
        return pb.HostedTensors(first=group[0].number, modules=messages)

    # ----------------------------------------------------------------- computing

    def macs(self, site: int, *, input_grad: bool) -> tuple[int, int]:
        """(forward, backward) multiply-adds of a row at a site.

        Backward makes the gradients of A and B, that at the rank and, if asked for, that of x. Of a
        fused weight it is a row of one expert.
        """
        modules = [module.checked for module in self._sites[site]]
        forward = sum(
            module.rank * (module.in_features + module.out_features) for module in modules
        )
        ranks = sum(module.rank * module.out_features for module in modules)
        inputs = sum(module.rank * module.in_features for module in modules)
        return forward, forward + ranks + (inputs if input_grad else 0)

    def fused(self, site: int, weight: Tensor, count: Count) -> LowRank:
        """A fused weight with the factors of its experts, [E, O, R] and [E, R, D], beside it.

        `weight` is [E, O, D]; or [E, D, O], and then both are turned.
        """
        (module,) = self._sites[site]
        if module.tensors is None:
            raise AssertionError("a site waits for its tensors")
        a, b, _, _ = module.tensors
        experts, rank = module.checked.experts, module.checked.rank
        a_ERD = a.view(experts, rank, -1)
        b_EOR = b.view(-1, rank, experts).permute(2, 0, 1)
        if module.checked.transposed:
            return LowRank(weight, a_ERD.mT, b_EOR.mT, count)
        return LowRank(weight, b_EOR, a_ERD, count)

    def deltas(self, site: int, x: Tensor, past: int) -> tuple[Tensor, ...]:
        """What each module of a site adds, [B, T, O] float32: B f(A dropout(x)).

        `past` tokens were there before: later passes of a stream draw other masks.
        """
        x = x.float()
        return tuple(self._delta(module, x, past) for module in self._sites[site])

    def _delta(self, module: _Module, x: Tensor, past: int) -> Tensor:
        if module.tensors is None:
            raise AssertionError("a site waits for its tensors")
        a_RD, b_OR, a_bias, b_bias = module.tensors
        x = x.to(a_RD.device)
        message = module.checked.message
        if any(part.p for part in message.dropouts):
            z_BTR = self._dropped(module.checked, a_RD, x, past)
            z_BTR = z_BTR if a_bias is None else z_BTR + a_bias
        else:
            z_BTR = nn.functional.linear(x, a_RD, a_bias)
        activation = activation_of(message.activation)
        return nn.functional.linear(
            z_BTR if activation is None else activation(z_BTR), b_OR, b_bias
        )

    def _dropped(self, checked: HostedModule, a_RD: Tensor, x: Tensor, past: int) -> Tensor:
        """A dropout(x), [B, T, R]: masks depend on the edge's seed and on the place alone."""
        generator = torch.Generator(x.device)
        place = f"{self.request.seed} {checked.site} {checked.module} {past}"
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


def _decoded(message: pb.ModuleTensors, checked: HostedModule) -> HostedTensors:
    """The tensors of a module that came; `decode` checks their bytes first."""

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        came = shape[::-1] if name == "b" else shape  # B travels turned
        values = decode(getattr(message, name), came, f"{name} of {checked.name}")
        return (values.T.contiguous() if name == "b" else values).to(checked.device)

    for name, shape in zip(_FIELDS, checked.shapes, strict=True):
        if message.HasField(name) != (shape is not None):
            raise WireError(f"{checked.name}: {name} is missing, or was not announced")
    a, b, a_bias, b_bias = (
        None if shape is None else tensor(name, shape)
        for name, shape in zip(_FIELDS, checked.shapes, strict=True)
    )
    if a is None or b is None:
        raise AssertionError("a module has both matrices")
    return a, b, a_bias, b_bias
