"""One training micro-batch as the edge runs it: forward, backward, and again if the cloud is lost.

Autograd sees a single node, `SplitForward`. Its forward and backward drive a `MicroBatch`, which
holds the stream and what backward needs. A stream that is lost at any point is replaced by a new
one, on which forward runs again with the same random numbers.

Shapes: N rows that travel (attended tokens), K kept rows of the last hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlora.edge.conditions import Conditions
from dlora.edge.hosted import HostedAdapter
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.lora import FrozenModule
from dlora.edge.meter import Meter
from dlora.edge.noise import Noise
from dlora.edge.prefixes import Prefixes
from dlora.edge.responder import Responder, SiteForward, Wait
from dlora.edge.sites import ActiveSite, names_of
from dlora.errors import AdapterMissing, PeerError, PeerLost, PrefixMissing, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import codecs_of
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.prefixes import num_rows
from dlora.protocol.wire import encode, largest

__all__ = ["MicroBatch", "Node", "add_squares", "as_node", "check_finite"]


class MicroBatch(Responder):
    """Forward and backward of one micro-batch, run again as a whole if the cloud is lost.

    `begin` is the complete first frame. A repeated run starts from the same random state and under
    the same autocast, so that LoRA dropout draws the same masks and adapters round as before.
    """

    def __init__(
        self,
        link: Link,
        retry: RetryPolicy,
        meter: Meter,
        begin: pb.Begin,
        sites: Sequence[ActiveSite],
        device: torch.device,
        frozen: Sequence[FrozenModule] = (),
        edge_layers: EdgeLayers | None = None,
        hosted: HostedAdapter | None = None,
        prefixes: Prefixes | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            link,
            meter,
            sites,
            codecs_of(begin),
            device,
            factored=begin.factored,
            frozen=frozen,
            edge_layers=edge_layers,
            hosted=hosted,
        )
        self.retry, self.begin = retry, begin
        self.prefixes, self.generator = prefixes, generator
        self.conditions, self.repeats = Conditions(device, generator), False
        self.input_grad: Tensor | None = None
        """After backward, where `begin` asks for it: gradient of what went in, [N, D]."""
        self.on_probe: Callable[[Sequence[pb.ActiveSite], Sequence[float]], None] | None = None
        """Called with the modules of `Begin.probe` and their norms of g^T x, after backward."""
        self.on_outputs: Callable[[Mapping[tuple[int, int], float]], None] | None = None
        """Called with `output_squares`, after backward."""
        self.noise = Noise()
        """What is added to the gradient of the kept hidden states."""

    def measure(
        self,
        waits: list[Wait],
        probe_norms: list[dict[str, float]],
        output_squares: dict[tuple[int, int], float] | None,
    ) -> None:
        """Note waits as they come. Once it is done, add to the others what `Begin` asks for.

        `probe_norms` gets norms of g^T x by full name, `output_squares`, if not None, sums of
        squared deltas by (site, module).
        """
        self.waits = waits
        if self.begin.probe:
            self.on_probe = partial(_note_probe, self.link.description, probe_norms)
        if output_squares is not None:
            self.output_squares = {}
            self.on_outputs = partial(add_squares, output_squares)

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
        grad = self.noise.on_tail(grad)
        now: Conditions | None = None
        try:
            for wait in self.retry.attempts():
                try:
                    if self.stream is None:
                        # Noted once: an attempt that fails leaves the state of its forward behind.
                        now = now or Conditions(self.device, self.generator)
                        with self.conditions.autocast():
                            self._forward()
                    return self._backward(grad)
                except PeerLost as error:
                    self._lost(error)
                    wait(error)
        finally:
            if now is not None:
                now.restore_rng()
        raise AssertionError("unreachable: attempts() ends by raising")

    # -------------------------------------- one attempt

    def _forward(self) -> Tensor:
        while True:
            try:
                return self._forward_once()
            except AdapterMissing as missing:
                # Each is done a few times at most.
                if not self._send_whole(missing):
                    self.put_frozen(missing)

    def _send_whole(self, missing: AdapterMissing) -> bool:
        """Send what was only named the next time; false if nothing of that kind was."""
        if isinstance(missing, PrefixMissing):
            return self.prefixes is not None and self.prefixes.send_whole(self.begin)
        return self.hosted is not None and self.hosted.send_whole(self.begin)

    def _forward_once(self) -> Tensor:
        self.close()
        # Only then: other threads may draw from the same generator.
        if self.repeats:
            self.conditions.restore_rng()
        self.repeats = True
        self.stream = self.link.open()
        try:
            self.opened()
            rows, kept = num_rows(self.begin), len(self.begin.keep)
            frame = pb.EdgeFrame(begin=self.begin)
            hidden, _ = self.ask(frame, rows, kept, training=self.begin.training)
            if self.prefixes is not None:
                self.prefixes.found()
            has_backward = bool(self.sites) or self.begin.wants_input_grad
            if not (self.begin.training and has_backward):
                self._finish()
        except BaseException:
            self.close()
            raise
        return hidden

    def opened(self) -> None:
        """Called when there is a stream, before anything is sent."""

    def _backward(self, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        grads: dict[nn.Parameter, Tensor] = {}
        check_finite(grad, "the gradient of the loss")
        try:
            message = pb.HiddenGrad(grad=encode(grad, self.codecs.ends))
            self.send(pb.EdgeFrame(hidden_grad=message))
            for _ in range(0 if self.hosted else len(self.sites)):
                frame = self.receive()
                kind = frame.WhichOneof("kind")
                if kind != "delta_grads":
                    raise WireError(f"the cloud sent frame {kind!r} in backward")
                self._answer_backward(frame.delta_grads, grads)
            self._finish(grads)
        except BaseException:
            self.close()
            raise
        return grads

    def _finish(self, grads: dict[nn.Parameter, Tensor] | None = None) -> None:
        """Take the last frame, with what the cloud has counted and measured.

        After backward a hosted adapter's gradients go into `grads`: some come before it, the rest
        in it.
        """
        module_grads: list[pb.HostedTensors] = []
        frame = self.receive()
        while grads is not None and self.hosted and frame.WhichOneof("kind") == "module_grads":
            # No more frames than modules, so that it ends.
            if not frame.module_grads.modules or len(module_grads) == len(self.hosted.places):
                raise WireError("the cloud sent more gradients than there are modules")
            module_grads.append(frame.module_grads)
            frame = self.receive()
        if frame.WhichOneof("kind") != "done":
            raise WireError(f"the cloud sent frame {frame.WhichOneof('kind')!r}, want 'done'")
        self.meter.cloud_forward_flops += frame.done.forward_flops
        self.meter.cloud_backward_flops += frame.done.backward_flops

        if self.on_probe is not None:
            norms = frame.done.probe
            probed = sum(len(entry.modules) for entry in self.begin.probe)
            if len(norms) != probed:
                raise WireError(f"the cloud sent {len(norms)} probe norms, want {probed}")
            if not all(0 <= norm < math.inf for norm in norms):
                raise WireError("the cloud sent a probe norm that is negative or not finite")
            self.on_probe(self.begin.probe, norms)

        if self.hosted is not None and grads is not None:
            grads.update(
                self.hosted.gradients([*module_grads, *frame.done.module_grads], self.decode)
            )
            for grad in grads.values():
                check_finite(grad, "a gradient of the adapter")
        if self.begin.wants_input_grad:
            shape = tuple(self.begin.embeddings.shape)
            self.input_grad = self.decode(
                frame.done.input_grad, shape, "gradient of the cloud's input"
            )
        # Only now, as a micro-batch that the cloud lost runs again and must not count twice.
        if self.on_outputs is not None and self.output_squares is not None:
            self.on_outputs(self.output_squares)
        self.meter.micro_batches += 1
        self.close()

    def _answer_backward(self, message: pb.DeltaGrads, grads: dict[nn.Parameter, Tensor]) -> None:
        """Take one site's gradients, note those of its parameters, send that of its input."""
        site = self.site(message.site, done=message.site not in self.forwards)
        forward = self.forwards.pop(site.index)
        messages = [*message.grads, *message.factor_grads]
        if len(messages) != len(forward.answers):
            raise WireError(
                f"site {site.index}: got {len(messages)} gradients, want {len(forward.answers)}"
            )
        received = [
            self.decode(part, tuple(answer.shape), f"delta gradient at site {site.index}")
            for part, answer in zip(messages, forward.answers, strict=True)
        ]

        parameters = site.parameters
        inputs = [*([forward.x_ND] if forward.wants_input_grad else []), *parameters]
        computed = _gradients(forward, received, inputs)
        for grad in computed:
            check_finite(grad, f"a gradient at site {site.index}")

        if forward.wants_input_grad:
            x_grad = encode(computed.pop(0), self.codecs.dx)
            self.send(pb.EdgeFrame(input_grad=pb.InputGrad(site=site.index, grad=x_grad)))
        grads.update(zip(parameters, computed, strict=True))

    def _lost(self, error: PeerLost) -> None:
        self.note_lost(error)


class Node(Protocol):
    """What `SplitForward` needs of a micro-batch, whole or in parts."""

    input_grad: Tensor | None

    def forward(self) -> Tensor:
        """Return the kept last hidden states."""

    def backward(self, grad: Tensor) -> dict[nn.Parameter, Tensor]:
        """Take their gradient; return those of all trainable parameters."""


class SplitForward(torch.autograd.Function):
    """The whole remote decoder as one node.

    Its input and the adapter's parameters go in, kept hidden states come out. Gradients leave as
    this node's own, so that a repeated micro-batch cannot count twice.
    """

    @staticmethod
    def forward(ctx: Any, micro_batch: Node, entry_ND: Tensor, *parameters: Tensor) -> Tensor:
        ctx.dtype = entry_ND.dtype
        ctx.micro_batch = micro_batch
        ctx.parameters = parameters
        return micro_batch.forward()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.micro_batch.backward(outputs[0])
        entry = ctx.micro_batch.input_grad
        return (
            None,
            None if entry is None else entry.to(ctx.dtype),
            *(grads.get(parameter) for parameter in ctx.parameters),
        )


def as_node(micro_batch: Node, entry_ND: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Run a micro-batch forward as one node of autograd; float32 [K, hidden_width]."""
    run: Callable[..., Tensor] = SplitForward.apply
    return run(micro_batch, entry_ND, *parameters)


def _note_probe(
    description: pb.Description,
    all_norms: list[dict[str, float]],
    entries: Sequence[pb.ActiveSite],
    norms: Sequence[float],
) -> None:
    all_norms.append(dict(zip(names_of(description, entries), norms, strict=True)))


def add_squares(
    sums: dict[tuple[int, int], float], squares: Mapping[tuple[int, int], float]
) -> None:
    """Add sums of squared deltas by (site, module)."""
    for key, square in squares.items():
        sums[key] = sums.get(key, 0.0) + square


def _gradients(
    forward: SiteForward, received: Sequence[Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of a site's inputs, from those of its answers, through what forward kept."""
    if not inputs:
        return []
    outputs = [
        (answer, grad)
        for answer, grad in zip(forward.answers, received, strict=True)
        if answer.requires_grad
    ]
    answers = [answer for answer, _ in outputs]
    grads = [grad.to(answer.dtype) for answer, grad in outputs]
    return list(torch.autograd.grad(answers, inputs, grads))


def check_finite(grad: Tensor, what: str) -> None:
    """Raises PeerError unless all values are finite.

    Those of the cloud are, but may be so large that what follows from them is not.
    """
    if not math.isfinite(largest(grad)):
        raise PeerError(
            f"{what} is not finite: the learning rate is too high, or the cloud sent values "
            "without sense. The adapter is unchanged. Try a lower learning rate, or another server."
        )
