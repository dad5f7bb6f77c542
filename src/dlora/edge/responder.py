"""The edge's end of a stream: sends frames, answers the cloud at every active site, counts.

What training (`micro_batch.py`) and generation (`kv_cache.py`) have in common. A frame that starts
a forward pass goes out; the cloud asks for deltas, site by site, and in the end sends the hidden
states that were asked for: that is one `ask`.

Shapes: N rows that travel (attended tokens), K kept rows of the last hidden states, D width of a
site's input, R rank, O width of a module's output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dlora.edge.hosted import HostedAdapter
from dlora.edge.link import Link, Stream, is_back
from dlora.edge.lora import FrozenModule, delta, factors, layer_flops
from dlora.edge.meter import Meter
from dlora.edge.sites import ActiveSite
from dlora.errors import AdapterMissing, PeerError, PeerLost, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION, PUT_BYTES
from dlora.protocol.codecs import Codecs, begin_fields
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.wire import decode, encode, largest

__all__ = ["Responder", "SiteForward", "Wait", "begin"]

_MOST_PUTS: Final = 3


@dataclass(frozen=True)
class Wait:
    """One wait of the edge: start and end on its clock, and how long the cloud says it computed.

    All in seconds.
    """

    start: float
    end: float
    cloud_s: float


@dataclass
class SiteForward:
    """What backward needs of one site's forward."""

    x_ND: Tensor
    answers: list[Tensor]
    """What the cloud has gradients for: deltas, or all Z and then all B."""
    wants_input_grad: bool


def begin(
    link: Link,
    sites: Sequence[ActiveSite],
    frozen: Sequence[FrozenModule],
    edge_layers: EdgeLayers,
    codecs: Codecs,
    **fields: Any,
) -> pb.Begin:
    """The first frame of a stream: what is the same in training and generation, and `fields`."""
    return pb.Begin(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=link.description.fingerprint,
        **begin_fields(codecs),
        sites=[pb.ActiveSite(site=site.index, modules=site.modules) for site in sites],
        idle=[
            pb.IdleModule(site=module.site, module=module.module, hash=module.hash)
            for module in frozen
        ],
        edge_first=edge_layers.first,
        edge_last=edge_layers.last,
        **fields,
    )


class Responder:
    """One stream with the cloud at a time, and the answers to what it asks."""

    def __init__(
        self,
        link: Link,
        meter: Meter,
        sites: Sequence[ActiveSite],
        codecs: Codecs,
        device: torch.device,
        *,
        factored: bool = False,
        frozen: Sequence[FrozenModule] = (),
        edge_layers: EdgeLayers | None = None,
        hosted: HostedAdapter | None = None,
    ) -> None:
        self.link, self.meter, self.codecs, self.device = link, meter, codecs, device
        self.hosted = hosted
        self.sites = {site.index: site for site in sites}
        self.factored, self.frozen = factored, frozen
        self.edge_layers = edge_layers or EdgeLayers()

        self.output_squares: dict[tuple[int, int], float] | None = None
        """If not None: the sum of squares of each (site, module)'s delta in the newest forward."""
        self.waits: list[Wait] | None = None
        """If not None: every wait is noted here."""

        self.generator: torch.Generator | None = None
        """Draws the masks of dropout; None: that of the process does."""
        self.stream: Stream | None = None
        self.forwards: dict[int, SiteForward] = {}
        """By site: what was answered in the forward pass that runs or ran last."""
        self.times_put = 0
        self._lost_at: float | None = None
        """Since when the cloud is waited for, on the clock of `Wait`."""
        self._awaits = False
        """Whether the cloud's next frame answers one that was sent."""

    def close(self) -> None:
        """Drop the stream, if any: the cloud frees what it holds for it."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def note_lost(self, error: PeerLost) -> None:
        """Drop a stream that was lost; a server that comes back is given what it needs again."""
        self.close()
        self.meter.retries += 1
        self._lost_at = self._lost_at or time.perf_counter()
        if not isinstance(error, AdapterMissing):
            self.times_put = 0

    def __del__(self) -> None:
        self.close()

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states that come back: the decoder's last, or between layers."""
        description = self.link.description
        return int(description.layers.width if self.edge_layers else description.hidden_width)

    def put_frozen(self, error: AdapterMissing) -> None:
        """Give the cloud its frozen modules again. Raises PeerError if it keeps losing them."""
        self.close()
        self.times_put += 1
        if self.times_put > _MOST_PUTS:
            raise PeerError(
                f"{error}. It was put there {_MOST_PUTS} times: is the server's room for adapters "
                "too small?"
            )

        most_bytes = min(PUT_BYTES, self.link.description.limits.max_message_bytes // 2)
        group: list[pb.FrozenModule] = []
        for module in self.frozen:
            group.append(module.message)
            if sum(message.ByteSize() for message in group) > most_bytes:
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

        Returns the kept last hidden states, float32 [K, hidden_width], and the FLOPs that the
        cloud's last frame says. Raises PeerLost, PeerError or WireError.
        """
        self.forwards.clear()
        if self.output_squares is not None:
            self.output_squares.clear()
        self.send(frame)
        if self.hosted is not None and frame.WhichOneof("kind") == "begin":
            for tensors in self.hosted.frames():
                self.send(tensors)
        while (kind := (reply := self.receive()).WhichOneof("kind")) == "input":
            self._answer(reply.input, num_rows, training)
        if kind != "hidden":
            raise WireError(f"the cloud sent frame {kind!r} in forward")

        shape = (num_kept, self.hidden_width)
        hidden_KD = self.decode(reply.hidden.hidden, shape, "last hidden states")
        self.times_put = 0  # the server had all modules
        self.meter.tokens += num_rows
        return hidden_KD, reply.hidden.forward_flops

    def _answer(self, message: pb.SiteInput, num_rows: int, training: bool) -> None:
        """Send the deltas of one site, or their factors, and keep what backward needs."""
        site = self.site(message.site, done=message.site in self.forwards)
        shape = (num_rows, site.in_features)
        x_ND = self.decode(message.x, shape, f"input of site {site.index}")
        wants = training and message.wants_input_grad
        with torch.set_grad_enabled(training):
            x_ND.requires_grad_(wants)
            if self.factored:
                pairs = [factors(layer, x_ND, self.generator) for layer in site.layers]
                answers = [z_NR for z_NR, _ in pairs] + [b_OR for _, b_OR in pairs]
            else:
                answers = [delta(layer, x_ND, self.generator) for layer in site.layers]
        self.forwards[site.index] = (
            SiteForward(x_ND, answers, wants) if training else SiteForward(x_ND[:0], [], wants)
        )

        if self.output_squares is not None:
            self._note_squares(self.output_squares, site, answers)
        dtype = self.codecs.factors if self.factored else self.codecs.deltas
        messages = [encode(answer, dtype) for answer in answers]
        count = len(site.layers)
        deltas = pb.SiteDeltas(site=site.index, deltas=messages[:count], factors=messages[count:])
        self.send(pb.EdgeFrame(deltas=deltas))

        for layer in site.layers:
            self.meter.adapter_flops += layer_flops(
                layer, num_rows, training=training, input_grad=wants, factored=self.factored
            )

    def _note_squares(
        self, squares: dict[tuple[int, int], float], site: ActiveSite, answers: Sequence[Tensor]
    ) -> None:
        """Note the sum of squares of each module's delta in this forward."""
        for number, module in enumerate(site.modules):
            factor = answers[len(site.layers) + number] if self.factored else None
            squares[site.index, module] = _square(answers[number], factor)

    def site(self, index: int, *, done: bool) -> ActiveSite:
        """The active site that the cloud speaks of. Raises WireError if none, or done before."""
        if index not in self.sites or done or self.hosted is not None:
            why = "not active" if index not in self.sites else "done" if done else "its own to do"
            raise WireError(f"the cloud asked for site {index}, which is {why}")
        return self.sites[index]

    def decode(self, message: pb.Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        """A tensor of the cloud, on the edge's device.

        Raises WireError for another shape, and PeerError for values that are not finite.
        """
        values = decode(message, shape, what).to(self.device)
        if not math.isfinite(largest(values)):
            raise PeerError(
                f"{what}: the cloud sent values that are not finite. The adapter is unchanged. Try "
                "wire dtype fp32 or bf16, a lower learning rate, or another server."
            )
        return values

    def send(self, frame: pb.EdgeFrame) -> None:
        """Send and count. Raises PeerError for what the server would not take."""
        size = frame.ByteSize()
        limit = self.link.description.limits.max_message_bytes
        if size > limit:
            raise PeerError(
                f"a message of {size / 2**20:.0f} MiB is over the server's limit of "
                f"{limit / 2**20:.0f} MiB: use a smaller batch or shorter sequences"
                f"{' or a lower rank, as the adapter travels too' if self.hosted else ''}"
            )
        self.meter.sent_bytes += size
        self._open_stream().send(frame)
        self._awaits = True

    def receive(self) -> pb.CloudFrame:
        """Wait for a frame; count it, the time and the round trip."""
        start, cloud_s = time.perf_counter(), 0.0
        try:
            frame = self._open_stream().receive()
            cloud_s = frame.compute_s
            if self._lost_at is not None:
                is_back(time.perf_counter() - self._lost_at)
                self._lost_at = None
        finally:
            end = time.perf_counter()
            # The cloud's word may be anything, "not a number" among it: that becomes 0.
            wait = Wait(start, end, min(cloud_s, end - start) if cloud_s > 0 else 0.0)
            if self.waits is not None:
                self.waits.append(wait)
            self.meter.wait_s += end - start
            self.meter.cloud_s += wait.cloud_s

        self.meter.received_bytes += frame.ByteSize()
        self.meter.round_trips += self._awaits  # others come with what went before
        self._awaits = False
        return frame

    def _open_stream(self) -> Stream:
        if self.stream is None:
            raise PeerLost("the stream is closed")
        return self.stream


def _square(delta: Tensor, factor: Tensor | None) -> float:
    """Sum of squares of a delta, or of Z B^T without making it."""
    delta = delta.detach()
    if factor is None:
        return float(delta.square().sum())
    factor = factor.detach()
    return float(((delta.T @ delta) * (factor.T @ factor)).sum())
