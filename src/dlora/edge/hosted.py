"""The edge's end of the hosted wire: active modules travel, the cloud computes with them.

`HostedAdapter` is the adapter of one micro-batch or stream: as messages on the way out, and as
gradients of peft's parameters on the way back. `KeptVersions` decides when the cloud is to keep
one, so that with gradient accumulation it travels once an optimizer step.

Shapes: D width of what a module reads, R rank (of all active adapters together), O width of what it
adds to, E experts. B travels turned, [R, O]: codecs that round rows together want long ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.experts import experts_of, joined
from dlora.edge.lora import active_names
from dlora.edge.sites import ActiveSite
from dlora.errors import UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.activations import activation_name
from dlora.protocol.channel import MODULE_FRAMES
from dlora.protocol.wire import content_hash, encode

__all__ = ["HostedAdapter", "KeptVersions", "check_hosted"]

_FIELDS: Final = ("a", "b", "a_bias", "b_bias")
_MOST_MISSES: Final = 3
"""A cloud that so often in a row has not what it was to keep has no room for it."""

Decode = Callable[[pb.Tensor, tuple[int, ...], str], Tensor]
"""`Responder.decode`."""


class KeptVersions:
    """What the cloud has kept of this model's adapter, and whether it is worth keeping.

    An adapter is kept when the version before it was trained with more than once: without gradient
    accumulation nothing stays in the cloud.
    """

    def __init__(self) -> None:
        self.version = b""
        self.kept = False
        self._uses = self._uses_before = self._misses = 0

    def choose(self, version: bytes, *, training: bool) -> tuple[bool, bool]:
        """(whether hashes will do, whether the cloud is to keep what it gets) for a micro-batch."""
        if version != self.version:
            self._uses_before = self._uses or self._uses_before
            self.version, self._uses, self.kept = version, 0, False
        self._uses += training
        if self.kept:
            return True, False
        self.kept = training and self._uses_before > 1 and self._misses < _MOST_MISSES
        return False, self.kept

    def missed(self) -> None:
        """The cloud has it no longer, or is another one."""
        self._misses += 1
        self.kept = self._misses < _MOST_MISSES

    def found(self) -> None:
        """The cloud had it."""
        self._misses = 0


class HostedAdapter:
    """The active modules of `sites`, as they are now, for one micro-batch or stream.

    `Begin` announces them; their tensors follow in frames of about the same size, of which the
    cloud needs only the first to begin.
    """

    def __init__(
        self,
        sites: Sequence[ActiveSite],
        dtype: pb.DType,
        versions: KeptVersions,
        most_bytes: int,
    ) -> None:
        """`most_bytes`: of a frame, unless a module alone is larger."""
        self.sites, self.versions, self.dtype = sites, versions, dtype
        self.most_bytes = most_bytes
        self._by_hash = False

    @cached_property
    def places(self) -> list[tuple[ActiveSite, int]]:
        """Every module in the cloud's order: its site, and its number there."""
        return [(site, number) for site in self.sites for number in range(len(site.layers))]

    @cached_property
    def messages(self) -> list[pb.ModuleTensors]:
        """The tensors of every module."""
        messages = []
        for site, number in self.places:
            with torch.no_grad():
                tensors = _tensors(site.layers[number])
            parts = {
                field: encode(tensor, self.dtype)
                for field, tensor in zip(_FIELDS, tensors, strict=True)
                if tensor is not None
            }
            messages.append(pb.ModuleTensors(**parts))
        return messages

    @cached_property
    def hashes(self) -> list[bytes]:
        """The content hash of every module."""
        return [content_hash(message) for message in self.messages]

    @cached_property
    def version(self) -> bytes:
        """Equal for the same modules with the same values."""
        digest = hashlib.sha256()
        for (site, number), key in zip(self.places, self.hashes, strict=True):
            digest.update(f"{site.index} {site.modules[number]} ".encode() + key)
        return digest.digest()

    def fields(self, *, training: bool) -> dict[str, Any]:
        """The fields of `Begin`. Draws the seed of dropout from torch's generator, if there is any.

        A training micro-batch may be sent by hash; so may what is measured in between.
        """
        self._by_hash, keep = self.versions.choose(self.version, training=training)
        modules = self._announced(keep)
        dropped = any(part.p for entry in modules for part in entry.dropouts)
        seed = int(torch.randint(2**62, ())) if dropped else 0
        frames = 0 if self._by_hash else len(self._slices)
        return {
            "hosted": True,
            "modules": modules,
            "module_frames": frames,
            "dropout_seed": seed,
        }

    def frames(self) -> Iterator[pb.EdgeFrame]:
        """What follows `Begin`: all tensors, unless the cloud has them."""
        for part in [] if self._by_hash else self._slices:
            tensors = pb.HostedTensors(first=part.start, modules=self.messages[part])
            yield pb.EdgeFrame(modules=tensors)

    def _announced(self, keep: bool) -> list[pb.HostedModule]:
        """Every module without its tensors."""
        return [
            pb.HostedModule(
                site=site.index,
                module=site.modules[number],
                rank=message.a.shape[0] // max(1, experts_of(site.layers[number])),
                a_bias=message.HasField("a_bias"),
                b_bias=message.HasField("b_bias"),
                hash=key if self._by_hash else b"",
                keep=keep,
                activation=activation_name(_activation(site.layers[number])),
                dropouts=_dropouts(site.layers[number]),
            )
            for (site, number), message, key in zip(
                self.places, self.messages, self.hashes, strict=True
            )
        ]

    @cached_property
    def _slices(self) -> list[slice]:
        """The modules that travel together."""
        sizes = [message.ByteSize() for message in self.messages]
        total, starts, sent, part, taken = sum(sizes), [0], 0, 0, 0
        for number, size in enumerate(sizes):
            if number and (sent * MODULE_FRAMES // total > part or taken + size > self.most_bytes):
                starts.append(number)
                part, taken = sent * MODULE_FRAMES // total, 0
            sent, taken = sent + size, taken + size
        return [slice(*pair) for pair in pairwise([*starts, len(sizes)])] if sizes else []

    def send_whole(self, begin: pb.Begin) -> bool:
        """Announce tensors in `begin` in place of their hashes; false if they are."""
        if not self._by_hash:
            return False
        self._by_hash = False
        self.versions.missed()
        del begin.modules[:]
        begin.modules.extend(self._announced(self.versions.kept))
        begin.module_frames = len(self._slices)
        return True

    def gradients(
        self, messages: Iterable[pb.HostedTensors], decode: Decode
    ) -> dict[nn.Parameter, Tensor]:
        """The gradients of all trainable parameters, from all frames that the cloud has sent.

        Raises WireError for others than were asked for, and what `decode` raises.
        """
        if self._by_hash:
            self.versions.found()
        by_number: dict[int, pb.ModuleTensors] = {}
        for frame in messages:
            for number, message in enumerate(frame.modules, frame.first):
                if number in by_number:
                    raise WireError(f"the cloud sent the gradients of module {number} twice")
                by_number[number] = message
        if by_number.keys() != set(range(len(self.places))):
            raise WireError(f"the cloud sent {len(by_number)} gradients, want {len(self.places)}")

        grads: dict[nn.Parameter, Tensor] = {}
        for number, (site, index) in enumerate(self.places):
            message = by_number[number]
            # What travelled is linear in the parameters: autograd takes the gradients apart.
            with torch.enable_grad():
                tensors = _tensors(site.layers[index])
            name = site.names[index]
            pairs = [
                (tensor, decode(getattr(message, field), tuple(tensor.shape), f"{field} of {name}"))
                for field, tensor in zip(_FIELDS, tensors, strict=True)
                if tensor is not None and tensor.requires_grad
            ]
            parameters = _trainable(site.layers[index])
            if parameters:
                outputs, received = zip(*pairs, strict=True)
                computed = torch.autograd.grad(outputs, parameters, received)
                grads.update(zip(parameters, computed, strict=True))
        return grads


def _tensors(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A [R, D], scaled B turned [R, O], and their biases if there are any, float32.

    The sum of the active adapters: A and turned B each one under the other. Of a fused weight A
    [E R, D] and turned B [R E, O].
    """
    if experts := experts_of(layer):
        pairs = (
            (layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float() * scaling)
            for name, scaling in ((name, layer.scaling[name]) for name in active_names(layer))
        )
        a, b = joined(pairs, experts)
        return a, b.T, None, None
    downs, ups, offsets, shifts = [], [], [], []
    for name in active_names(layer):
        lora_A, lora_B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        downs.append(lora_A.weight.float())
        ups.append(lora_B.weight.float() * scaling)
        if lora_A.bias is not None:
            offsets.append(lora_A.bias.float())
        if lora_B.bias is not None:
            shifts.append(lora_B.bias.float() * scaling)
    if offsets and len(offsets) != len(downs):
        raise AssertionError("bottleneck adapters stand alone")
    return (
        torch.cat(downs),
        torch.cat(ups, dim=1).T,
        torch.cat(offsets) if offsets else None,
        torch.stack(shifts).sum(dim=0) if shifts else None,
    )


def _activation(layer: LoraLayer) -> str | None:
    """What is between the two matrices of a bottleneck; None for LoRA."""
    names = {getattr(layer.lora_A[name], "activation", None) for name in active_names(layer)}
    if len(names) != 1:
        raise AssertionError("bottleneck adapters stand alone")
    found: str | None = names.pop()
    return found


def _dropouts(layer: LoraLayer) -> list[pb.HostedDropout]:
    """Each adapter has masks of its own; none at all outside training mode."""
    parts = []
    for name in active_names(layer):
        dropout, rank = layer.lora_dropout[name], layer.lora_A[name].out_features
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        parts.append(pb.HostedDropout(rank=rank, p=p))
    return parts if any(part.p for part in parts) else []


def _trainable(layer: LoraLayer) -> list[nn.Parameter]:
    """The layer's parameters that are in use and ask for gradients."""
    return [
        parameter
        for name in active_names(layer)
        for modules in (layer.lora_A, layer.lora_B)
        for parameter in modules[name].parameters()
        if parameter.requires_grad
    ]


def check_hosted(wire: str, idle: str, *, measures: bool) -> None:
    """Raises UsageError for what needs the cloud to ask at sites, on the hosted wire.

    `idle` is what becomes of idle modules; `measures`: sizes of deltas are asked for.
    """
    if wire != "hosted":
        return
    if idle == "edge":
        raise UsageError(
            "idle=edge: on the hosted wire the edge computes no module: use idle=drop or cloud"
        )
    if measures:
        raise UsageError(
            "policy=output measures deltas, which the hosted wire leaves to the cloud: use "
            "another policy, or wire=factored or plain"
        )
