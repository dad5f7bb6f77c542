"""The edge's end of a stream: sends frames, answers the cloud at every active site, counts.

What training (`micro_batch.py`) and generation (`kv_cache.py`) have in common.

Shapes: N rows that travel (attended tokens), K kept rows of the last hidden states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.edge.link import Link, Stream
from dlora.edge.meter import Meter
from dlora.errors import AdapterMissing, PeerError, PeerLost, WireError
from dlora.formulas import adapter_flops
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.wire import content_hash, decode, encode, largest

__all__ = [
    "ActiveSite",
    "Frozen",
    "Record",
    "Responder",
    "Wait",
    "begin",
    "freeze",
    "layer_flops",
    "product_of",
]

_PUT_BYTES: Final = 32 * 2**20  # frozen modules travel in messages of about this size
_MOST_PUTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class ActiveSite:
    """The adapted modules of one site, in the cloud's order."""

    index: int
    in_features: int
    modules: tuple[int, ...]
    """Indices into the cloud's list of this site's modules."""
    layers: tuple[LoraLayer, ...]
    names: tuple[str, ...]
    """Full names of the modules."""
    depth: int
    """Its place in the forward pass, among the sites that read an input."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable LoRA parameters of this site, in a fixed order."""
        found: list[nn.Parameter] = []
        for layer in self.layers:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    found += [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]
        return [parameter for parameter in found if parameter.requires_grad]


@dataclass(frozen=True)
class FrozenModule:
    """An idle module that the cloud applies: where, and what."""

    site: int
    module: int
    message: pb.FrozenModule
    hash: bytes


def product_of(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A [R, in] and scaled B [out, R] of the sum of a layer's active adapters, detached,
    float32.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight.detach().float() for name in names])
    b = torch.cat(
        [layer.lora_B[name].weight.detach().float() * layer.scaling[name] for name in names], dim=1
    )
    return a, b


def layer_flops(
    layer: LoraLayer, rows: int, *, training: bool, input_grad: bool, factored: bool = False
) -> int:
    """FLOPs of a layer's active adapters on so many rows."""
    return sum(
        adapter_flops(
            rows,
            layer.lora_A[name].in_features,
            layer.r[name],
            layer.lora_B[name].out_features,
            training=training,
            input_grad=input_grad,
            factored=factored,
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    )


def freeze(site: int, module: int, layer: LoraLayer) -> FrozenModule:
    """The sum of a layer's active adapters as one frozen module, exact in float32."""
    a, b = product_of(layer)
    message = pb.FrozenModule(a=encode(a, pb.FP32), b=encode(b, pb.FP32))
    return FrozenModule(site, module, message, content_hash(message))


def begin(
    link: Link,
    sites: Sequence[ActiveSite],
    frozen: Sequence[FrozenModule],
    edge_layers: EdgeLayers,
    wire_dtype: pb.DType,
    **fields: Any,
) -> pb.Begin:
    """The first frame of a stream: what is the same in training and generation, and `fields`."""
    return pb.Begin(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=link.description.fingerprint,
        wire_dtype=wire_dtype,
        sites=[pb.ActiveSite(site=site.index, modules=site.modules) for site in sites],
        idle=[pb.IdleModule(site=one.site, module=one.module, hash=one.hash) for one in frozen],
        edge_first=edge_layers.first,
        edge_last=edge_layers.last,
        **fields,
    )


@dataclass(frozen=True)
class Wait:
    """One wait of the edge: from and to when on its clock, in seconds, and how long the cloud says
    it computed.
    """

    start: float
    end: float
    cloud_s: float


@dataclass
class Record:
    """What backward needs of one site's forward."""

    x: Tensor
    answers: list[Tensor]
    """What the cloud has gradients for: deltas, or all Z and then all B."""
    wants_input_grad: bool


def delta(layer: LoraLayer, x: Tensor) -> Tensor:
    """What the layer's active adapters add to its base output: sum of scaling *
    B(A(dropout(x))).
    """
    total: Tensor | None = None
    for name in layer.active_adapters:
        if name in layer.lora_A:
            lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
            part = (
                lora_B(lora_A(layer.lora_dropout[name](x.to(lora_A.weight.dtype))))
                * layer.scaling[name]
            )
            total = part if total is None else total + part
    if total is None:
        raise WireError("a site without an active adapter was asked for a delta")
    return total


def factors(layer: LoraLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum as Z [N, R] and scaled B [O, R], with Z B^T the delta; R sums the active
    adapters' ranks.
    """
    zs, bs = [], []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
            zs.append(lora_A(layer.lora_dropout[name](x.to(lora_A.weight.dtype))))
            bs.append(lora_B.weight * layer.scaling[name])
            if lora_B.bias is not None:  # one column more, of ones
                zs.append(zs[-1].new_ones(len(x), 1))
                bs.append(lora_B.bias[:, None] * layer.scaling[name])
    if not zs:
        raise WireError("a site without an active adapter was asked for a delta")
    return (zs[0], bs[0]) if len(zs) == 1 else (torch.cat(zs, dim=1), torch.cat(bs, dim=1))


def _square(delta: Tensor, factor: Tensor | None) -> float:
    """Sum of squares of a delta, or of Z B^T without making it."""
    delta = delta.detach()
    if factor is None:
        return float(delta.square().sum())
    factor = factor.detach()
    return float(((delta.T @ delta) * (factor.T @ factor)).sum())


class Responder:
    """One stream with the cloud at a time, and the answers to what it asks."""

    def __init__(
        self,
        link: Link,
        meter: Meter,
        sites: Sequence[ActiveSite],
        wire_dtype: pb.DType,
        device: torch.device,
        *,
        factored: bool = False,
        frozen: Sequence[FrozenModule] = (),
        edge_layers: EdgeLayers | None = None,
    ) -> None:
        self.edge_layers = edge_layers or EdgeLayers()
        self.link, self.meter, self.wire_dtype, self.device = link, meter, wire_dtype, device
        self.factored, self.frozen = factored, frozen
        self.output_squares: dict[tuple[int, int], float] | None = None
        """If not None: sums of squared deltas of each (site, module) are added here."""
        self.waits: list[Wait] | None = None
        """If not None: every wait is noted here."""
        self.times_put = 0
        self.sites = {site.index: site for site in sites}
        self.stream: Stream | None = None
        self.records: dict[int, Record] = {}

    def close(self) -> None:
        """Drop the stream, if any: the cloud frees what it holds for it."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def __del__(self) -> None:
        self.close()

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states that come back: the decoder's last, or those between
        layers.
        """
        description = self.link.description
        return int(description.layers.width if self.edge_layers else description.hidden_width)

    def put_frozen(self, error: AdapterMissing) -> None:
        """Give the cloud the frozen modules that it does not hold. Raises PeerError if it keeps
        losing them.
        """
        self.close()
        self.times_put += 1
        if self.times_put > _MOST_PUTS:
            raise PeerError(
                f"{error}. It was put there {_MOST_PUTS} times: is the server's room for adapters "
                "too small?"
            )
        group: list[pb.FrozenModule] = []
        for one in self.frozen:
            group.append(one.message)
            if sum(message.ByteSize() for message in group) > _PUT_BYTES:
                self._put(group)
                group = []
        self._put(group)

    def _put(self, group: list[pb.FrozenModule]) -> None:
        if group:
            self.link.put_adapter(group)
            self.meter.sent_bytes += sum(message.ByteSize() for message in group)
            self.meter.round_trips += 1

    def ask(
        self, frame: pb.EdgeFrame, num_rows: int, num_kept: int, *, training: bool
    ) -> tuple[Tensor, int]:
        """Send a frame that starts a forward pass, and answer until the cloud is through.

        Returns the kept last hidden states, float32 [K, hidden_width], and the cloud's FLOPs
        where it tells them here. Raises PeerLost, PeerError or WireError.
        """
        self.records.clear()
        self.send(frame)
        while (kind := (reply := self.receive()).WhichOneof("kind")) == "input":
            self._answer(reply.input, num_rows, training)
        if kind != "hidden":
            raise WireError(f"the cloud sent frame {kind!r} in forward")
        shape = (num_kept, self.hidden_width)
        hidden = self.decode(reply.hidden.hidden, shape, "last hidden states")
        self.meter.tokens += num_rows
        return hidden, reply.hidden.forward_flops

    def _answer(self, message: pb.SiteInput, num_rows: int, training: bool) -> None:
        site = self.site(message.site, done=message.site in self.records)
        x = self.decode(message.x, (num_rows, site.in_features), f"input of site {site.index}")
        wants = training and message.wants_input_grad
        with torch.set_grad_enabled(training):
            x.requires_grad_(wants)
            if self.factored:
                pairs = [factors(layer, x) for layer in site.layers]
                answers = [z for z, _ in pairs] + [b for _, b in pairs]
            else:
                answers = [delta(layer, x) for layer in site.layers]
        self.records[site.index] = Record(
            x if training else x[:0], answers if training else [], wants
        )
        messages, count = [encode(one, self.wire_dtype) for one in answers], len(site.layers)
        if self.output_squares is not None:
            for number, module in enumerate(site.modules):
                key = (site.index, module)
                size = _square(answers[number], answers[count + number] if self.factored else None)
                self.output_squares[key] = self.output_squares.get(key, 0.0) + size
        self.send(
            pb.EdgeFrame(
                deltas=pb.SiteDeltas(
                    site=site.index, deltas=messages[:count], factors=messages[count:]
                )
            )
        )
        for layer in site.layers:
            self.meter.adapter_flops += layer_flops(
                layer, num_rows, training=training, input_grad=wants, factored=self.factored
            )

    def site(self, index: int, *, done: bool) -> ActiveSite:
        """The active site that the cloud speaks of. Raises WireError if there is none or it was
        done before.
        """
        if index not in self.sites or done:
            raise WireError(
                f"the cloud asked for site {index}, which is {'done' if done else 'not active'}"
            )
        return self.sites[index]

    def decode(self, message: pb.Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        """A tensor of the cloud, on the edge's device. Raises WireError, or PeerError if it is not
        finite.
        """
        values = decode(message, shape, what).to(self.device)
        if not math.isfinite(largest(values)):
            raise PeerError(
                f"{what}: the cloud sent values that are not finite. The adapter is unchanged. Try "
                "wire dtype fp32 or "
                "bf16, a lower learning rate, or another server."
            )
        return values

    def send(self, frame: pb.EdgeFrame) -> None:
        """Send and count. Raises PeerError for what the server would not take."""
        size = frame.ByteSize()
        limit = self.link.description.limits.max_message_bytes
        if size > limit:
            raise PeerError(
                f"a message of {size / 2**20:.0f} MiB is over the server's limit of "
                f"{limit / 2**20:.0f} MiB: "
                "use a smaller batch or shorter sequences"
            )
        self.meter.sent_bytes += size
        self._open_stream().send(frame)

    def receive(self) -> pb.CloudFrame:
        """Wait for a frame; count it, the time and the round trip."""
        start, cloud_s = time.perf_counter(), 0.0
        try:
            frame = self._open_stream().receive()
            cloud_s = frame.compute_s
        finally:
            end = time.perf_counter()
            wait = Wait(
                start, end, min(cloud_s, end - start) if cloud_s > 0 else 0.0
            )  # not a number: 0
            if self.waits is not None:
                self.waits.append(wait)
            self.meter.wait_s += end - start
            self.meter.cloud_s += wait.cloud_s
        self.meter.received_bytes += frame.ByteSize()
        if frame.WhichOneof("kind") != "done":  # comes with what went before: no trip of its own
            self.meter.round_trips += 1
        return frame

    def _open_stream(self) -> Stream:
        if self.stream is None:
            raise PeerLost("the stream is closed")
        return self.stream
