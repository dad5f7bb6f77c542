"""One micro-batch as the edge runs it: answers to the cloud, gradients of the adapter, retries.

Shapes: N rows that travel (attended tokens), K kept rows of the last hidden states.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.accounting import Meter, adapter_flops
from dlora.errors import PeerError, PeerLost, WireError
from dlora.link import Link, RetryPolicy, Stream
from dlora.proto import dlora_pb2 as pb
from dlora.wire import decode, encode, largest

__all__ = ["ActiveSite", "MicroBatch", "SplitForward"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ActiveSite:
    """The adapted modules of one site, in the cloud's order."""

    index: int
    in_features: int
    modules: tuple[int, ...]
    """Indices into the cloud's list of this site's modules."""
    layers: tuple[LoraLayer, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable LoRA parameters of this site, in a fixed order."""
        found: list[nn.Parameter] = []
        for layer in self.layers:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    found += [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]
        return [parameter for parameter in found if parameter.requires_grad]


@dataclass
class _Record:
    """What backward needs of one site's forward."""

    x: Tensor
    deltas: list[Tensor]
    wants_input_grad: bool


def delta(layer: LoraLayer, x: Tensor) -> Tensor:
    """What the layer's active adapters add to its base output: sum of scaling * B(A(dropout(x)))."""
    total: Tensor | None = None
    for name in layer.active_adapters:
        if name in layer.lora_A:
            lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
            part = lora_B(lora_A(layer.lora_dropout[name](x.to(lora_A.weight.dtype)))) * layer.scaling[name]
            total = part if total is None else total + part
    if total is None:
        raise WireError("a site without an active adapter was asked for a delta")
    return total


class MicroBatch:
    """Forward and backward of one micro-batch over a link, run again as a whole if the cloud is lost.

    `begin` is the complete first frame. A repeated run starts from the same random state, so
    that LoRA dropout draws the same masks.
    """

    def __init__(
        self,
        link: Link,
        retry: RetryPolicy,
        meter: Meter,
        begin: pb.Begin,
        sites: Sequence[ActiveSite],
        device: torch.device,
    ) -> None:
        self.link, self.retry, self.meter, self.begin, self.device = link, retry, meter, begin, device
        self.sites = {site.index: site for site in sites}
        self.num_rows = int(begin.embeddings.shape[0])
        self.kept = (len(begin.keep), int(link.description.hidden_width))
        self.stream: Stream | None = None
        self.records: dict[int, _Record] = {}
        self.rng = _rng_state(device)
        self.hidden_dtype = begin.wire_dtype

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the order in which `backward` returns their gradients."""
        return [parameter for site in self.sites.values() for parameter in site.parameters]

    def forward(self) -> Tensor:
        """Return the kept last hidden states, float32 [K, hidden_width]."""
        for wait in self.retry.attempts():
            try:
                return self._forward()
            except PeerLost as error:
                self._lost(error)
                wait(error)
        raise AssertionError("unreachable: attempts() ends by raising")

    def backward(self, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        """Take the gradient of the kept hidden states; return that of every trainable parameter."""
        for wait in self.retry.attempts():
            try:
                if self.stream is None:
                    after = _rng_state(self.device)
                    self._forward()
                    _set_rng_state(after, self.device)
                return self._backward(grad)
            except PeerLost as error:
                self._lost(error)
                wait(error)
        raise AssertionError("unreachable: attempts() ends by raising")

    def close(self) -> None:
        """Drop the stream, if any: the cloud frees what it holds for this micro-batch."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def __del__(self) -> None:
        self.close()

    # ----------------------------------------------------------------- one attempt

    def _forward(self) -> Tensor:
        self.close()
        self.records.clear()
        _set_rng_state(self.rng, self.device)
        self.stream = self.link.open()
        try:
            self._send(pb.EdgeFrame(begin=self.begin))
            while True:
                frame = self._receive()
                kind = frame.WhichOneof("kind")
                if kind == "input":
                    self._answer(frame.input)
                elif kind == "hidden":
                    break
                else:
                    raise WireError(f"the cloud sent frame {kind!r} in forward")
            hidden = self._decode(frame.hidden.hidden, self.kept, "last hidden states")
            if not (self.begin.training and self.sites):
                self._finish()
        except BaseException:
            self.close()
            raise
        self.meter.tokens += self.num_rows
        return hidden

    def _backward(self, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        grads: dict[nn.Parameter, Tensor] = {}
        try:
            self._send(pb.EdgeFrame(hidden_grad=pb.HiddenGrad(grad=encode(grad, self.begin.wire_dtype))))
            for _ in range(len(self.sites)):
                frame = self._receive()
                if frame.WhichOneof("kind") != "delta_grads":
                    raise WireError(f"the cloud sent frame {frame.WhichOneof('kind')!r} in backward")
                self._answer_backward(frame.delta_grads, grads)
            self._finish()
        except BaseException:
            self.close()
            raise
        return grads

    def _finish(self) -> None:
        frame = self._receive()
        if frame.WhichOneof("kind") != "done":
            raise WireError(f"the cloud sent frame {frame.WhichOneof('kind')!r}, want 'done'")
        self.meter.cloud_forward_flops += frame.done.forward_flops
        self.meter.cloud_backward_flops += frame.done.backward_flops
        self.meter.micro_batches += 1
        self.close()

    def _answer(self, message: pb.SiteInput) -> None:
        site = self._site(message.site, done=message.site in self.records)
        x = self._decode(message.x, (self.num_rows, site.in_features), f"input of site {site.index}")
        training = self.begin.training
        wants = training and message.wants_input_grad
        with torch.set_grad_enabled(training):
            x.requires_grad_(wants)
            deltas = [delta(layer, x) for layer in site.layers]
        self.records[site.index] = _Record(x if training else x[:0], deltas if training else [], wants)
        messages = [encode(one, self.begin.wire_dtype) for one in deltas]
        self._send(pb.EdgeFrame(deltas=pb.SiteDeltas(site=site.index, deltas=messages)))
        for layer in site.layers:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    self.meter.adapter_flops += adapter_flops(
                        self.num_rows,
                        layer.in_features,
                        layer.r[name],
                        layer.out_features,
                        training=training,
                        input_grad=wants,
                    )

    def _answer_backward(self, message: pb.DeltaGrads, grads: dict[nn.Parameter, Tensor]) -> None:
        site = self._site(message.site, done=message.site not in self.records)
        record = self.records.pop(site.index)
        if len(message.grads) != len(record.deltas):
            raise WireError(f"site {site.index}: got {len(message.grads)} gradients, want {len(record.deltas)}")
        received = [
            self._decode(one, tuple(delta.shape), f"delta gradient at site {site.index}")
            for one, delta in zip(message.grads, record.deltas, strict=True)
        ]
        parameters = site.parameters
        inputs: list[Tensor] = [*([record.x] if record.wants_input_grad else []), *parameters]
        found: list[Tensor] = []
        if inputs:
            outputs = [(delta, one) for delta, one in zip(record.deltas, received, strict=True) if delta.requires_grad]
            found = list(
                torch.autograd.grad(
                    [delta for delta, _ in outputs], inputs, [one.to(delta.dtype) for delta, one in outputs]
                )
            )
        if record.wants_input_grad:
            x_grad = encode(found.pop(0), self.begin.wire_dtype)
            self._send(pb.EdgeFrame(input_grad=pb.InputGrad(site=site.index, grad=x_grad)))
        grads.update(zip(parameters, found, strict=True))

    def _site(self, index: int, *, done: bool) -> ActiveSite:
        if index not in self.sites or done:
            raise WireError(f"the cloud asked for site {index}, which is {'done' if done else 'not active'}")
        return self.sites[index]

    def _decode(self, message: pb.Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        values = decode(message, shape, what).to(self.device)
        if not math.isfinite(largest(values)):
            raise PeerError(
                f"{what}: the cloud sent values that are not finite. The adapter is unchanged. Try wire dtype fp32 or "
                "bf16, a lower learning rate, or another server."
            )
        return values

    def _send(self, frame: pb.EdgeFrame) -> None:
        size = frame.ByteSize()
        limit = self.link.description.limits.max_message_bytes
        if size > limit:
            raise PeerError(
                f"a message of {size / 2**20:.0f} MiB is over the server's limit of {limit / 2**20:.0f} MiB: "
                "use a smaller batch or shorter sequences"
            )
        self.meter.sent_bytes += size
        self._open_stream().send(frame)

    def _receive(self) -> pb.CloudFrame:
        start = time.perf_counter()
        try:
            frame = self._open_stream().receive()
        finally:
            self.meter.wait_s += time.perf_counter() - start
        self.meter.received_bytes += frame.ByteSize()
        if frame.WhichOneof("kind") != "done":  # comes with what went before: no trip of its own
            self.meter.round_trips += 1
        return frame

    def _open_stream(self) -> Stream:
        if self.stream is None:
            raise PeerLost("the stream of this micro-batch is closed")
        return self.stream

    def _lost(self, error: PeerLost) -> None:
        self.close()
        self.meter.retries += 1
        log.warning("lost the cloud, the micro-batch runs again: %s", error)


class SplitForward(torch.autograd.Function):
    """The whole remote decoder as one node: adapter parameters in, kept hidden states out.

    Gradients leave as this node's own, so that a repeated micro-batch cannot count twice.
    """

    @staticmethod
    def forward(ctx: Any, micro_batch: MicroBatch, *parameters: Tensor) -> Tensor:
        ctx.micro_batch = micro_batch
        ctx.parameters = parameters
        return micro_batch.forward()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.micro_batch.backward(outputs[0])
        return (None, *(grads.get(parameter) for parameter in ctx.parameters))


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
