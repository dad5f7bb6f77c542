"""One micro-batch in the cloud: forward, backward, and an exchange with the edge at every active
site.

Shapes: B batch, T tokens, N rows that travel, K kept rows, D width of a site's input, O of an
output.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, first_output
from dlora.protocol.sites import Site
from dlora.protocol.wire import decode, encode

__all__ = ["Pipe", "Plan", "Step", "current_step"]

_thread = threading.local()


def current_step() -> Step | None:
    """The micro-batch that this thread computes: hooks are shared by all of them."""
    step: Step | None = getattr(_thread, "step", None)
    return step


class Pipe(Protocol):
    """The edge, as one stream sees it."""

    def admit(self, cost_bytes: int) -> None:
        """Make room for what the stream now needs, and for computing. Raises PeerLost if there is
        none.
        """

    def send(self, frame: pb.CloudFrame) -> None:
        """Queue a frame for the edge."""

    def receive(self) -> pb.EdgeFrame:
        """Wait for the edge's next frame. Raises PeerLost when it is gone or too slow."""


@dataclass(kw_only=True)
class Plan:
    """A checked `Begin` or `Extend`: everything one pass needs, nothing that is not validated."""

    dtype: pb.DType
    training: bool
    batch: int
    length: int
    mask_BT: Tensor | None
    """With a KV cache: [B, past + T]."""
    position_ids_BT: Tensor | None
    rows_N: Tensor | None
    """Flat positions of the rows that travel; None: all of them."""
    keep: Tensor
    active: tuple[tuple[Site, tuple[int, ...]], ...]
    embeddings: pb.Tensor
    factored: bool = False
    """Deltas come as Z = x A^T and B."""
    idle: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(site, module) -> (A, B) that the cloud applies itself."""
    probe: tuple[tuple[Site, tuple[int, ...]], ...] = ()
    """Modules whose norm of g^T x is asked for."""
    cost_bytes: int = 0
    past: int = 0
    """Tokens of each sequence that are in the KV cache already."""
    cache_length: int = 0
    """Tokens of each sequence that the KV cache may come to hold; 0: there is none."""
    rollback: bool = False
    drop: int = 0
    """Cached tokens to forget before the pass; `past` is without them."""
    order: Tensor | None = None
    """Rows of the cache, in their new order."""
    edge_layers: EdgeLayers = field(default_factory=EdgeLayers)
    """Layers that the edge runs; `embeddings` are then hidden states before the cloud's first
    layer.
    """
    wants_input_grad: bool = False
    """The gradient of `embeddings` goes back to the edge."""

    @property
    def num_rows(self) -> int:
        """N: the rows that travel in every tensor but the last hidden states."""
        return self.batch * self.length if self.rows_N is None else len(self.rows_N)

    @property
    def has_backward(self) -> bool:
        """Whether anything asks for a gradient."""
        return self.training and (bool(self.active) or self.wants_input_grad)


class Step:
    """One pass in the cloud: the forward, in training the backward, and the exchanges between.

    `cache` is the stream's KV cache, if it has one. `flops` are told to the edge with it.
    """

    def __init__(
        self,
        decoder: nn.Module,
        embedding: Tensor,
        plan: Plan,
        pipe: Pipe,
        cache: Cache | None = None,
        flops: int = 0,
        layer_width: int = 0,
    ) -> None:
        self.layer_width = layer_width
        self.decoder, self.plan, self.pipe, self.cache, self.flops = (
            decoder,
            plan,
            pipe,
            cache,
            flops,
        )
        self.embedding = (
            embedding  # its width, dtype and device are those of what goes into the decoder
        )
        self.modules = {site.index: modules for site, modules in plan.active}
        self.sites = {site.index: site for site, _ in plan.active}
        self.deltas: dict[int, tuple[Tensor, ...]] = {}
        # Multiply-adds beside the model's own: factors, idle modules, probes. Known when they are
        # done.
        self.forward_macs = self.backward_macs = 0
        self.probed = {(site.index, module) for site, modules in plan.probe for module in modules}
        self.probe_norms: dict[tuple[int, int], float] = {}
        self.input_grad: pb.Tensor | None = None
        self._entry: Tensor | None = (
            None  # where the edge holds layers: what goes into the cloud's first,
        )
        self._exit: Tensor | None = None  # and what comes out of its last
        self._resumed = 0.0
        # Frozen weights ask for no gradient: the lowest exchange needs an input that does.
        self.anchor = torch.zeros((), device=embedding.device, requires_grad=plan.training)

    def run(self) -> None:
        """Forward and, in training, backward. Raises WireError for frames that do not fit."""
        _thread.step, self._resumed = self, time.perf_counter()
        try:
            # On CUDA autograd would otherwise run backward on one thread a device, where a wait
            # for one edge blocks all others.
            with torch.autograd.set_multithreading_enabled(False):
                self._run()
        finally:
            _thread.step = None

    def send(self, frame: pb.CloudFrame) -> None:
        """Send a frame that says how long it took to compute."""
        frame.compute_s = time.perf_counter() - self._resumed
        self.pipe.send(frame)

    def _run(self) -> None:
        plan = self.plan
        entry_BTD = self._receive_entry()
        if plan.probe or plan.wants_input_grad:  # all the way down
            entry_BTD.requires_grad_(True)
        inputs: dict[str, Any] = {"inputs_embeds": entry_BTD}
        if plan.edge_layers:
            self._entry = entry_BTD
            inputs["inputs_embeds"] = self.embedding.new_zeros(
                plan.batch, plan.length, self.embedding.shape[1]
            )
        if plan.mask_BT is not None:
            inputs["attention_mask"] = plan.mask_BT
        if plan.position_ids_BT is not None:
            inputs["position_ids"] = plan.position_ids_BT
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        with torch.set_grad_enabled(plan.has_backward):
            hidden_BTD = self.decoder(**inputs, use_cache=self.cache is not None).last_hidden_state
            if self._exit is not None:
                hidden_BTD, self._exit = self._exit, None
            hidden = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[plan.keep]
        message = pb.Hidden(hidden=encode(hidden, plan.dtype), forward_flops=self.flops)
        self.send(pb.CloudFrame(hidden=message))
        if plan.has_backward:
            del hidden_BTD, inputs
            grad_message = self._receive("hidden_grad").grad
            grad = decode(grad_message, tuple(hidden.shape), "gradient of the last hidden states")
            hidden.backward(grad.to(hidden))
            if plan.wants_input_grad:
                found = torch.zeros_like(entry_BTD) if entry_BTD.grad is None else entry_BTD.grad
                self.input_grad = encode(self._gather(found), plan.dtype)

    def _receive_entry(self) -> Tensor:
        """[B, T, D]: embeddings, or hidden states before the cloud's first layer."""
        plan, width = self.plan, self.embedding.shape[1]
        if plan.edge_layers:
            width = self.layer_width
        rows = decode(plan.embeddings, (plan.num_rows, width), "embeddings")
        return self._scatter(rows.to(self.embedding.dtype))

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Skip the layers that the edge holds; put its hidden states in before the others, and note
        what comes out.
        """
        edge_layers = self.plan.edge_layers
        if not edge_layers.in_cloud(index):
            return skip(hidden_BTD)
        if index == edge_layers.first and self._entry is not None:
            hidden_BTD, self._entry = self._entry, None
        output = run(hidden_BTD)
        if index == edge_layers.end - 1:
            self._exit = first_output(output)
        return output

    def before(self, site: int, index: int, x: Tensor) -> None:
        """Before an active site's first module: exchange x for the deltas of all its active
        modules.
        """
        if self.modules.get(site, (-1,))[0] == index:
            self.deltas[site] = self._exchange(site, x)

    def _exchange(self, site: int, x: Tensor) -> tuple[Tensor, ...]:
        if self.plan.training:
            exchange: Callable[..., tuple[Tensor, ...]] = _Exchange.apply
            answers = exchange(x, self.anchor, self, site)
        else:
            self.send_input(site, x, wants_grad=False)
            answers = self.receive_deltas(site)
        if (
            self.plan.factored
        ):  # delta = Z B^T; autograd brings the gradients of both factors to the exchange
            count = len(answers) // 2
            answers = tuple(z @ b.T for z, b in zip(answers[:count], answers[count:], strict=True))
        return answers

    def after(self, site: int, index: int, x: Tensor, output: Tensor, output_site: int) -> Tensor:
        """After a module: its base output plus its deltas, in the base output's dtype as peft has
        it.

        An adapter in series reads that output at `output_site`.
        """
        modules = self.modules.get(site, ())
        if index in modules:
            delta = self.deltas[site][modules.index(index)]
            if index == modules[-1]:
                del self.deltas[site]
            output = (output + delta.view_as(output)).to(output.dtype)
        elif (frozen := self.plan.idle.get((site, index))) is not None:
            a, b = frozen
            macs = x.numel() // x.shape[-1] * (a.numel() + b.numel())
            self.forward_macs += macs
            self.backward_macs += macs if x.requires_grad else 0
            output = (output + (x.to(a.dtype) @ a.T) @ b.T).to(output.dtype)
        if output_site in self.modules:
            (delta,) = self._exchange(output_site, output)
            output = (output + delta.view_as(output)).to(output.dtype)
        if (site, index) in self.probed and output.requires_grad:
            kept = x.detach().reshape(-1, x.shape[-1])
            output.register_hook(
                lambda grad: self._probe(site, index, kept, grad.reshape(-1, grad.shape[-1]))
            )
        return output

    def _probe(self, site: int, index: int, x: Tensor, grad: Tensor) -> None:
        """Note the Frobenius norm of g^T x: by Gram matrices, or by the product where that is
        smaller.
        """
        (rows, d), o = x.shape, grad.shape[1]
        x, grad = x.float(), grad.float()
        if rows * rows * (d + o) <= rows * d * o:
            norm = ((x @ x.T) * (grad @ grad.T)).sum().clamp(min=0).sqrt()
            self.backward_macs += rows * rows * (d + o)
        else:
            norm = (grad.T @ x).norm()
            self.backward_macs += rows * d * o
        self.probe_norms[site, index] = norm.item()

    # What the autograd function below is made of.

    def send_input(self, site: int, x: Tensor, wants_grad: bool) -> None:
        x_ND = encode(self._gather(x), self.plan.dtype)
        self.send(pb.CloudFrame(input=pb.SiteInput(site=site, x=x_ND, wants_input_grad=wants_grad)))

    def receive_deltas(self, site: int) -> tuple[Tensor, ...]:
        """One delta for each active module, [B, T, O]; factored: all Z [B, T, R], then all B [O,
        R].
        """
        message = self._receive("deltas")
        modules = self._check_site(message, site)
        widths = [self._width(site, module) for module in modules]
        if len(message.deltas) != len(modules):
            raise WireError(f"site {site}: got {len(message.deltas)} deltas, want {len(modules)}")
        if len(message.factors) != (len(modules) if self.plan.factored else 0):
            raise WireError(
                f"site {site}: got {len(message.factors)} factors for {len(modules)} modules"
            )
        if not self.plan.factored:
            return tuple(self._rows(*one, site) for one in zip(message.deltas, widths, strict=True))
        ranks = [
            self._rank(z, width, site) for z, width in zip(message.deltas, widths, strict=True)
        ]
        for module, rank in zip(modules, ranks, strict=True):
            self.forward_macs += (
                macs := self.plan.batch * self.plan.length * rank * self._width(site, module)
            )
            self.backward_macs += 2 * macs if self.plan.training else 0
        return (
            *(self._rows(*one, site) for one in zip(message.deltas, ranks, strict=True)),
            *(
                decode(b, (width, rank), f"factor at site {site}").to(self.embedding.device)
                for b, width, rank in zip(message.factors, widths, ranks, strict=True)
            ),
        )

    def _rows(self, message: pb.Tensor, width: int, site: int) -> Tensor:
        return self._scatter(decode(message, (self.plan.num_rows, width), f"delta at site {site}"))

    def _rank(self, z: pb.Tensor, width: int, site: int) -> int:
        most = max(width, self.sites[site].in_features)
        if len(z.shape) != 2 or not 1 <= z.shape[1] <= most:
            raise WireError(
                f"delta at site {site}: got shape {list(z.shape)[:8]}, want a rank from 1 to {most}"
            )
        return int(z.shape[1])

    def send_delta_grads(self, site: int, grads: tuple[Tensor, ...]) -> None:
        count = len(self.modules[site])
        messages = [encode(self._gather(grad), self.plan.dtype) for grad in grads[:count]]
        factors = [encode(grad, self.plan.dtype) for grad in grads[count:]]
        frame = pb.DeltaGrads(site=site, grads=messages, factor_grads=factors)
        self.send(pb.CloudFrame(delta_grads=frame))

    def receive_input_grad(self, site: int, like: Tensor) -> Tensor:
        message = self._receive("input_grad")
        self._check_site(message, site)
        shape = (self.plan.num_rows, self.sites[site].in_features)
        return (
            self._scatter(decode(message.grad, shape, f"input gradient at site {site}"))
            .view_as(like)
            .to(like.dtype)
        )

    def _receive(self, kind: str) -> Any:
        frame = self.pipe.receive()
        self._resumed = time.perf_counter()
        if frame.WhichOneof("kind") != kind:
            raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want {kind!r}")
        return getattr(frame, kind)

    def _check_site(self, message: Any, site: int) -> tuple[int, ...]:
        if message.site != site:
            raise WireError(f"got an answer for site {message.site}, want {site}")
        return self.modules[site]

    def _width(self, site: int, module: int) -> int:
        return self.sites[site].modules[module].out_features

    def _gather(self, x: Tensor) -> Tensor:
        """[B, T, D] or [B * T, D] -> [N, D]."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.plan.rows_N is None else flat[self.plan.rows_N]

    def _scatter(self, rows: Tensor) -> Tensor:
        """[N, D] -> [B, T, D], zero where no row travelled."""
        plan = self.plan
        rows = rows.to(self.embedding.device)
        if plan.rows_N is not None:
            full = rows.new_zeros(plan.batch * plan.length, rows.shape[1])
            full[plan.rows_N] = rows
            rows = full
        return rows.view(plan.batch, plan.length, -1)


class _Exchange(torch.autograd.Function):
    """x goes to the edge and deltas come back; in backward their gradients go and that of x comes
    back.

    The cloud waits at once: base layers that run while the edge computes would hide little of
    the wait, and where both halves share cores they cost more than they hide.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, step: Step, site: int) -> tuple[Tensor, ...]:
        ctx.step, ctx.site, ctx.x = step, site, torch.empty_like(x, device="meta")
        step.send_input(site, x, ctx.needs_input_grad[0])
        return step.receive_deltas(site)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        ctx.step.send_delta_grads(ctx.site, grads)
        grad = ctx.step.receive_input_grad(ctx.site, ctx.x) if ctx.needs_input_grad[0] else None
        return grad, None, None, None
