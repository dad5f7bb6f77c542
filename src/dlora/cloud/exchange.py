"""What a pass and its edge say to each other: tensors on this side, frames on the other.

The edge's answers are not trusted: every frame has to be of the awaited kind, for the awaited
site, in the awaited shape. Rows that nobody attends to do not travel.

Shapes: B batch, T tokens, N rows that travel, D width of a site's input, O of an output, R rank.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from dlora.cloud.costs import answer_bytes
from dlora.cloud.pass_request import PassRequest
from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode, encode, payload_bytes

__all__ = ["Exchange", "Pipe"]


class Pipe(Protocol):
    """The edge, as one stream sees it."""

    def admit(self, cost_bytes: int) -> None:
        """Make room for what the stream now needs, and for computing.

        Raises PeerLost if there is none.
        """

    def breathe(self) -> float:
        """Let others compute if it is their turn; return the seconds that they took.

        Called often while a pass computes. Raises PeerLost if the edge is gone, so that nothing
        more is computed for it.
        """

    def expect(self, frames: int) -> None:
        """So many frames come without being asked for: take them as they come, for `receive`."""

    def send(self, frame: pb.CloudFrame) -> None:
        """Queue a frame for the edge."""

    def receive(self) -> pb.EdgeFrame:
        """Wait for the edge's next frame. Raises PeerLost when it is gone or too slow."""


class Exchange:
    """The frames of one pass. Every method that receives raises WireError for what does not fit.

    What goes in before the first layer is put on `device`.
    """

    def __init__(self, request: PassRequest, pipe: Pipe, device: torch.device) -> None:
        self.request, self.pipe, self.device = request, pipe, device
        self.modules = {site.index: modules for site, modules in request.active}
        self.sites = {site.index: site for site, _ in request.active}
        self._resumed = 0.0
        self._kept: dict[int, pb.SiteDeltas] = {}

    def start_clock(self) -> None:
        """From here to the next frame that is sent, the cloud computes."""
        self._resumed = time.perf_counter()

    def breathe(self, _: object = None) -> None:
        """Let others compute if it is their turn; also a hook of a tensor, called in backward.

        Raises PeerLost if the edge is gone.
        """
        self._resumed += self.pipe.breathe()

    def send(self, frame: pb.CloudFrame) -> None:
        """Send a frame that says how long it took to compute."""
        frame.compute_s = time.perf_counter() - self._resumed
        self.pipe.send(frame)
        self.start_clock()  # gradients are sent while more are computed

    def _receive(self, kind: str) -> Any:
        frame = self.pipe.receive()
        self.start_clock()
        if frame.WhichOneof("kind") != kind:
            raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want {kind!r}")
        return getattr(frame, kind)

    # ----------------------------------------------------------------- the two ends of the cloud

    def entry(self, width: int, dtype: torch.dtype) -> Tensor:
        """[B, T, width] that came with the request: embeddings, or hidden states of edge layers.

        Where it names prefixes, [B, T, D] of these.
        """
        prefixes = self.request.prefixes
        if prefixes is not None and prefixes.kept is not None:
            return self._scatter(torch.cat(prefixes.kept), self.device)
        shape = (self.request.num_rows, width)
        return self._scatter(
            decode(self.request.embeddings, shape, "embeddings").to(dtype), self.device
        )

    def keep_prefixes(self, entry_BTD: Tensor) -> None:
        """Keep what enters the layer of the request's prefixes, if that is what they are for."""
        prefixes = self.request.prefixes
        if prefixes is not None and prefixes.kept is None:
            prefixes.keep(self._gather(entry_BTD))

    def send_hidden(self, hidden: Tensor, flops: int) -> None:
        """Send the kept rows of the last hidden states."""
        message = pb.Hidden(hidden=encode(hidden, self.request.codecs.ends), forward_flops=flops)
        self.send(pb.CloudFrame(hidden=message))

    def receive_hidden_grad(self, hidden: Tensor) -> Tensor:
        """The gradient of those rows."""
        grad_message = self._receive("hidden_grad").grad
        grad = decode(grad_message, tuple(hidden.shape), "gradient of the last hidden states")
        return grad.to(hidden)

    def entry_grad(self, grad_BTD: Tensor) -> pb.Tensor:
        """The gradient of what came with the request, for `Done`."""
        return encode(self._gather(grad_BTD), self.request.codecs.ends)

    def receive_modules(self) -> pb.HostedTensors:
        """More tensors of a hosted adapter. Computing stops meanwhile, if they are not there."""
        started = time.perf_counter()
        frame = self.pipe.receive()
        self._resumed += time.perf_counter() - started
        if frame.WhichOneof("kind") != "modules":
            raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'modules'")
        return frame.modules

    # ----------------------------------------------------------------- at a site

    def send_input(self, site: int, x: Tensor, wants_grad: bool) -> None:
        """Send what a site reads, [B, T, D] or [B * T, D]."""
        x_ND = encode(self._gather(x), self.request.codecs.x)
        self.send(pb.CloudFrame(input=pb.SiteInput(site=site, x=x_ND, wants_input_grad=wants_grad)))

    def receive_deltas(self, site: int, device: torch.device) -> tuple[Tensor, ...]:
        """One delta for each active module, [B, T, O], on `device`.

        Factored: all Z [B, T, R], then all B [O, R].
        """
        message = self._receive("deltas")
        answers = self._answers(message, site, device)
        if self.request.recompute:
            self._keep(message, site)
        return answers

    def _keep(self, message: pb.SiteDeltas, site: int) -> None:
        """Keep an answer as it came, in the memory that was reserved for it."""
        tensors = (*message.deltas, *message.factors)
        got = sum(payload_bytes(tensor.dtype, *tensor.shape) for tensor in tensors)
        modules, rows = self.modules[site], self.request.num_rows
        most = answer_bytes(self.request, self.sites[site], modules, rows)
        if got > most:
            raise WireError(
                f"site {site}: got an answer of {got} bytes, the codec and rank of the request "
                f"make {most}"
            )
        self._kept[site] = message

    def deltas_again(self, site: int, device: torch.device) -> tuple[Tensor, ...]:
        """What `receive_deltas` gave there, once more; it is forgotten now."""
        return self._answers(self._kept.pop(site), site, device)

    def _answers(
        self, message: pb.SiteDeltas, site: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """The tensors of an answer. Raises WireError for what does not fit."""
        modules, factored = self._check_site(message, site), self.request.factored
        widths = [self.sites[site].modules[module].out_features for module in modules]
        if len(message.deltas) != len(modules):
            raise WireError(f"site {site}: got {len(message.deltas)} deltas, want {len(modules)}")
        if len(message.factors) != (len(modules) if factored else 0):
            raise WireError(
                f"site {site}: got {len(message.factors)} factors for {len(modules)} modules"
            )

        if not factored:
            return self._rows(message.deltas, widths, site, device)

        ranks = [
            self._rank(z, width, site) for z, width in zip(message.deltas, widths, strict=True)
        ]
        factors = (
            decode(b, (width, rank), f"factor at site {site}").to(device)
            for b, width, rank in zip(message.factors, widths, ranks, strict=True)
        )
        return (*self._rows(message.deltas, ranks, site, device), *factors)

    def send_delta_grads(self, site: int, grads: tuple[Tensor, ...]) -> None:
        """Send the gradients of what `receive_deltas` gave."""
        count, codecs = len(self.modules[site]), self.request.codecs
        dtype = codecs.factors if self.request.factored else codecs.delta_grads
        messages = [encode(self._gather(grad), dtype) for grad in grads[:count]]
        factors = [encode(grad, dtype) for grad in grads[count:]]
        frame = pb.DeltaGrads(site=site, grads=messages, factor_grads=factors)
        self.send(pb.CloudFrame(delta_grads=frame))

    def receive_input_grad(self, site: int, like: Tensor, device: torch.device) -> Tensor:
        """The adapters' part of the gradient of a site's input, in its shape and dtype."""
        message = self._receive("input_grad")
        self._check_site(message, site)
        shape = (self.request.num_rows, self.sites[site].in_features)
        grad_ND = decode(message.grad, shape, f"input gradient at site {site}")
        grad_BTD = self._scatter(grad_ND, device)
        return grad_BTD.view_as(like).to(like.dtype)

    def _check_site(self, message: Any, site: int) -> tuple[int, ...]:
        """The active modules of the site that an answer has to be for."""
        if message.site != site:
            raise WireError(f"got an answer for site {message.site}, want {site}")
        return self.modules[site]

    def _rank(self, z: pb.Tensor, width: int, site: int) -> int:
        """The rank that the edge's Z has. Raises WireError for one over both widths."""
        most = max(width, self.sites[site].in_features)
        if len(z.shape) != 2 or not 1 <= z.shape[1] <= most:
            raise WireError(
                f"delta at site {site}: got shape {list(z.shape)[:8]}, want a rank from 1 to {most}"
            )
        return int(z.shape[1])

    # ----------------------------------------------------------------- rows that travel

    def _rows(
        self, messages: Any, widths: list[int], site: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """[B, T, width] of each message."""
        return tuple(
            self._scatter(
                decode(message, (self.request.num_rows, width), f"delta at site {site}"), device
            )
            for message, width in zip(messages, widths, strict=True)
        )

    def _gather(self, x: Tensor) -> Tensor:
        """[B, T, D] or [B * T, D] -> [N, D]."""
        flat = x.reshape(-1, x.shape[-1])
        rows_N = self.request.rows_N
        return flat if rows_N is None else flat[rows_N.to(flat.device)]

    def _scatter(self, rows: Tensor, device: torch.device) -> Tensor:
        """[N, D] -> [B, T, D] on `device`, zero where no row travelled."""
        request, rows = self.request, rows.to(device)
        if request.rows_N is not None:
            full = rows.new_zeros(request.batch * request.length, rows.shape[1])
            full[request.rows_N.to(device)] = rows
            rows = full
        return rows.view(request.batch, request.length, -1)
