"""One pass in the cloud: the decoder's forward and, in training, its backward.

Hooks on the model find the pass of their thread by `current_pass`. At an active site the pass
sends x to the edge and waits for deltas, which it adds to the modules' outputs; autograd brings
it back there in backward. Frozen modules are applied and probes taken on the way. At every hooked
module, forward and backward, the pass lets others compute if it is their turn, and ends if its edge
is gone.

Where layers are to run again in backward (torch.utils.checkpoint, arXiv:1604.06174) autograd keeps
of a layer its input alone. The hooks then run twice: the second time what the edge has answered is
there already, and nothing is sent.

Shapes: B batch, T tokens, D width of a site's input, O of an output, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from dlora.cloud.exchange import Exchange, Pipe
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.leftovers import own_attributes
from dlora.cloud.low_rank import LowRank
from dlora.cloud.parts import Parts
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.quantize import give_back
from dlora.cloud.trace import one_row_a_token
from dlora.errors import ModelError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.decoder import last_hidden, run_decoder
from dlora.protocol.layers import first_output

__all__ = ["Pass", "current_pass", "seen_mask"]

_thread = threading.local()
_ANY_ID: Final = 7
"""A token id that every vocabulary has, and that is seldom a special one."""
_FREED_BY_LAYER: Final = 12
"""A layer makes and frees about so many tensors of its input's size, where it keeps none."""
_WORTH_BYTES: Final = 64 * 2**20
"""Giving memory back takes about 10 ms; making so much of it takes a hundred times as long."""


def seen_mask(mask_BT: Tensor, cache: Cache | None, length: int) -> Tensor:
    """The mask that a pass over `length` new tokens gets, of that of all tokens [B, P + T].

    Where a cache holds states alone, no layer looks back at tokens: it is that of the new ones.
    """
    if cache is None or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return mask_BT
    return mask_BT[:, -length:]


def current_pass() -> Pass | None:
    """The pass that this thread computes: all passes share the model's hooks."""
    current: Pass | None = getattr(_thread, "current", None)
    return current


class Pass:
    """The forward of a request, in training the backward, and the exchanges between.

    `parts` are the model's: what goes in is as wide as what it looks up, in the dtype and on the
    device of its embedding. `layer_width` is that between layers, for requests with edge layers.
    `hosted` is the adapter, where the cloud computes it: no site is asked for then. `cache`
    is the stream's KV cache, if it has one; the last hidden states then go with `flops`.
    """

    def __init__(
        self,
        parts: Parts,
        request: PassRequest,
        pipe: Pipe,
        *,
        layer_width: int = 0,
        hosted: HostedAdapter | None = None,
        cache: Cache | None = None,
        flops: int = 0,
    ) -> None:
        self.parts, self.embedding, self.request = parts, parts.weight, request
        self.layer_width, self.cache, self.flops = layer_width, cache, flops
        self.hosted = hosted
        self.exchange = Exchange(request, pipe, self.embedding.device)

        # Multiply-adds beside the model's own: factors, frozen modules, probes. Known afterwards.
        self.forward_macs = self.backward_macs = 0
        self.probe_norms: dict[tuple[int, int], float] = {}
        self.entry_grad: pb.Tensor | None = None
        self.layers_again: set[int] = set()
        """Layers that ran again in backward."""
        self._is_again, self._freed_bytes = False, 0

        self._probed = {
            (site.index, module) for site, modules in request.probe for module in modules
        }
        self._deltas: dict[int, tuple[Tensor, ...]] = {}
        # Where there are tables beside the embedding: what the edge has looked up in each.
        self._looked_up: list[Tensor] = []
        # What goes into the cloud's first layer, where that is not the embedding; and, with edge
        # layers, what comes out of its last.
        self._entry_BTD: Tensor | None = None
        self._exit_BTD: Tensor | None = None
        # Frozen weights ask for no gradient: the lowest exchange needs an input that does.
        self._anchor = torch.zeros((), device=self.embedding.device, requires_grad=request.training)

    def run(self) -> None:
        """Forward and, in training, backward. Raises WireError for frames that do not fit."""
        _thread.current = self
        self.exchange.start_clock()
        try:
            # On CUDA autograd would otherwise run backward on one thread a device, where a wait
            # for one edge blocks all others.
            with torch.autograd.set_multithreading_enabled(False), own_attributes():
                self._run()
        finally:
            _thread.current = None

    def _run(self) -> None:
        request, width = self.request, sum(self.parts.lookups.widths)
        entry_BTD = self.exchange.entry(
            self.layer_width if request.edge_layers else width, self.embedding.dtype
        )
        if request.probe or request.wants_input_grad:  # gradients go all the way down
            entry_BTD.requires_grad_(True)

        with torch.set_grad_enabled(request.has_backward):
            hidden_KD = self._forward(entry_BTD)
        if self.hosted is not None:
            self.hosted.wait(self.exchange)
        self.exchange.send_hidden(hidden_KD, self.flops)
        if not request.has_backward:
            return

        hosted = self.hosted
        with nullcontext() if hosted is None else hosted.sending_grads(self.exchange):
            hidden_KD.backward(self.exchange.receive_hidden_grad(hidden_KD))
        if request.wants_input_grad:
            grad_BTD = torch.zeros_like(entry_BTD) if entry_BTD.grad is None else entry_BTD.grad
            self.entry_grad = self.exchange.entry_grad(grad_BTD)

    def _forward(self, entry_BTD: Tensor) -> Tensor:
        """The kept rows of the last hidden states, or of what comes out of the cloud's last layer.

        With edge layers or named prefixes the decoder runs on zeros until `run_layer` puts the
        entry in.
        """
        request = self.request
        inputs: dict[str, Any] = {"inputs_embeds": entry_BTD}
        is_named = request.prefixes is not None and request.prefixes.kept is not None
        if request.edge_layers or is_named:
            self._entry_BTD = entry_BTD
            inputs["inputs_embeds"] = self.embedding.new_zeros(
                request.batch, request.length, self.embedding.shape[1]
            )
        elif self.parts.lookups.tables:
            # Ids of no meaning: what they look up is replaced, see `looked_up`.
            self._looked_up = self.parts.lookups.apart(entry_BTD)
            shape = request.batch, request.length
            ids_BT = torch.full(shape, _ANY_ID, device=self.embedding.device)
            inputs = {"input_ids": ids_BT}
        if request.mask_BT is not None:
            inputs["attention_mask"] = seen_mask(request.mask_BT, self.cache, request.length)
        if request.position_ids_BT is not None:
            inputs["position_ids"] = request.position_ids_BT

        hidden_BTD = last_hidden(run_decoder(self.parts.decoder, cache=self.cache, **inputs))
        if self._exit_BTD is not None:
            hidden_BTD, self._exit_BTD = self._exit_BTD, None
        rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return rows[request.keep_K.to(rows.device)]

    # ----------------------------------------------------------------- called by the model's hooks

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Skip the edge's layers and those below named prefixes; put the entry in before others."""
        request, edge_layers = self.request, self.request.edge_layers
        if index < request.first_layer or not edge_layers.in_cloud(index):
            return skip(hidden_BTD)

        if index == request.first_layer and self._entry_BTD is not None:
            hidden_BTD, self._entry_BTD = self._entry_BTD, None
        if request.prefixes is not None and index == request.prefixes.layer:
            self.exchange.keep_prefixes(hidden_BTD)

        if request.recompute:
            input_bytes = hidden_BTD.nbytes
            output = checkpoint(
                run,
                hidden_BTD,
                use_reentrant=False,
                preserve_rng_state=False,  # masks of dropout come from seeds of their own
                context_fn=lambda: (nullcontext(), self._again(index, input_bytes)),
            )
            self._give_back(input_bytes)
        else:
            output = run(hidden_BTD)
        if edge_layers and index == edge_layers.end - 1:
            self._exit_BTD = first_output(output)
        return output

    def looked_up(self, index: int, output: Tensor) -> Tensor:
        """What the edge has looked up in the table number `index`, in place of the cloud."""
        return self._looked_up[index] if self._looked_up else output

    @contextmanager
    def _again(self, index: int, input_bytes: int) -> Iterator[None]:
        """The second run of a layer. It ends where nothing more of it is needed."""
        self._give_back(input_bytes)  # what backward through the layer above has left
        self._is_again = True
        self.layers_again.add(index)
        try:
            yield
        finally:
            self._is_again = False
            self._deltas.clear()

    def _give_back(self, input_bytes: int) -> None:
        """Let the system have what layers have freed, once it is worth the time.

        glibc fits aligned blocks into no hole of their own size: without this a stream that waits
        holds several times what is kept for it.
        """
        self._freed_bytes += _FREED_BY_LAYER * input_bytes
        if self._freed_bytes >= _WORTH_BYTES and self.embedding.device.type == "cpu":
            self._freed_bytes = 0
            give_back()

    def before(self, site: int, index: int, x: Tensor) -> None:
        """Before a module: let others compute. Before the first active one of a site: exchange x
        for the deltas of all of them.
        """
        self.exchange.breathe()
        if index == 0 and x.requires_grad and not self._is_again:
            # And in backward, once a site: a hook changes no bit, and costs as much as a small
            # operation.
            x.register_hook(self.exchange.breathe)
        if self.exchange.modules.get(site, (-1,))[0] == index:
            self._deltas[site] = self._ask(site, x)

    def after(self, site: int, index: int, x: Tensor, output: Tensor, output_site: int) -> Tensor:
        """After a module: its base output plus its deltas, in the base output's dtype as in peft.

        An adapter in series reads that output at `output_site`.
        """
        if self._is_again:
            self.backward_macs += x.numel() * output.shape[-1]
        modules = self.exchange.modules.get(site, ())
        if index in modules:
            delta = self._deltas[site][modules.index(index)]
            if index == modules[-1]:
                del self._deltas[site]
            output = _plus(output, delta)
        elif (frozen := self.request.idle.get((site, index))) is not None:
            output = self._apply_frozen(x, output, *frozen)

        if output_site in self.exchange.modules:
            (delta,) = self._ask(output_site, output)
            output = _plus(output, delta)

        if (site, index) in self._probed and output.requires_grad:
            probed: Callable[..., Tensor] = _Probed.apply
            output = probed(output, x.detach(), partial(self._probe, site, index))
        return output

    def _ask(self, site: int, x: Tensor) -> tuple[Tensor, ...]:
        """The deltas at a site, each [B, T, O]: the edge's or, of a hosted adapter, its own.

        Raises ModelError where the module does not see one row for each token, as it did at load.
        """
        if not one_row_a_token(x, self.request.batch, self.request.length):
            raise ModelError(
                f"the module at site {site} got {list(x.shape)} for {self.request.batch} x "
                f"{self.request.length} tokens, not one row for each: leave it out of the adapter"
            )
        if self.hosted is not None:
            return self._compute(self.hosted, site, x)
        if self.request.training:
            apply: Callable[..., tuple[Tensor, ...]] = _Ask.apply
            answers = apply(x, self._anchor, self.exchange, site, self._is_again)
        else:
            self.exchange.send_input(site, x, wants_grad=False)
            answers = self.exchange.receive_deltas(site, x.device)
        if not self.request.factored:
            return answers

        # delta = Z B^T; autograd brings the gradients of both factors to the exchange.
        count, deltas = len(answers) // 2, []
        for z_BTR, b_OR in zip(answers[:count], answers[count:], strict=True):
            macs = z_BTR.numel() * b_OR.shape[0]
            self._count(macs, 2 * macs if self.request.training else 0)
            deltas.append(z_BTR @ b_OR.T)
        return tuple(deltas)

    def _compute(self, hosted: HostedAdapter, site: int, x: Tensor) -> tuple[Tensor, ...]:
        """The deltas of a hosted adapter at a site."""
        hosted.wait(self.exchange, site)
        self._count_rows(hosted, site, x.numel() // x.shape[-1], x)
        return hosted.deltas(site, x, self.request.past)

    def fused(self, module: nn.Module, sites: Mapping[str, int]) -> dict[str, LowRank]:
        """What this pass puts in the place of fused weights of experts, by parameter.

        `sites` are those of the module's. Only the cloud computes there.
        """
        self.exchange.breathe()
        if self.hosted is None:
            return {}
        found = {}
        for name, site in sites.items():
            if site in self.exchange.modules:
                self.hosted.wait(self.exchange, site)
                weight = module.get_parameter(name)
                count = partial(self._count_rows, self.hosted, site)
                found[name] = self.hosted.fused(site, weight, count)
        return found

    def _count_rows(self, hosted: HostedAdapter, site: int, rows: int, x: Tensor) -> None:
        """Count what a hosted adapter computes for so many rows at a site."""
        forward, backward = hosted.macs(site, input_grad=x.requires_grad)
        self._count(rows * forward, rows * backward if self.request.training else 0)

    def _apply_frozen(self, x: Tensor, output: Tensor, a_RD: Tensor, b_OR: Tensor) -> Tensor:
        """A module's output plus the delta of a frozen module of the edge."""
        macs = x.numel() // x.shape[-1] * (a_RD.numel() + b_OR.numel())
        self._count(macs, macs if x.requires_grad else 0)
        x = x.to(a_RD.device, a_RD.dtype)
        return _plus(output, (x @ a_RD.T) @ b_OR.T)

    def _probe(self, site: int, index: int, x: Tensor, grad: Tensor) -> None:
        """Note the Frobenius norm of g^T x, by Gram matrices where these are the smaller product.

        x is [..., D], grad [..., O].
        """
        x = x.to(grad.device).reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        (rows, d), o = x.shape, grad.shape[1]
        x, grad = x.float(), grad.float()
        if rows * rows * (d + o) <= rows * d * o:
            norm = ((x @ x.T) * (grad @ grad.T)).sum().clamp(min=0).sqrt()
            self.backward_macs += rows * rows * (d + o)
        else:
            norm = (grad.T @ x).norm()
            self.backward_macs += rows * d * o
        self.probe_norms[site, index] = norm.item()

    def _count(self, forward: int, backward: int) -> None:
        """Multiply-adds of both directions; a second run is all backward's."""
        if self._is_again:
            self.backward_macs += forward
        else:
            self.forward_macs += forward
            self.backward_macs += backward


def _plus(output: Tensor, delta: Tensor) -> Tensor:
    """Their sum, in the dtype and on the device of the first."""
    return (output + delta.to(output.device).view_as(output)).to(output.dtype)


class _Ask(torch.autograd.Function):
    """Forward: x goes to the edge, deltas come back. Backward: the same with their gradients.

    The cloud waits at once: base layers that run while the edge computes would hide little of
    the wait, and where both halves share cores they cost more than they hide.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, exchange: Exchange, site: int, is_again: bool
    ) -> tuple[Tensor, ...]:
        if is_again:  # backward is that of the first run
            return exchange.deltas_again(site, x.device)
        ctx.exchange, ctx.site, ctx.device = exchange, site, x.device
        ctx.x = torch.empty_like(x, device="meta")
        ctx.wants_grad = ctx.needs_input_grad[0] and not exchange.request.drop_input_grads
        exchange.send_input(site, x, ctx.wants_grad)
        return exchange.receive_deltas(site, x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        exchange, site = ctx.exchange, ctx.site
        exchange.send_delta_grads(site, grads)
        grad = None
        if ctx.wants_grad:
            grad = exchange.receive_input_grad(site, ctx.x, ctx.device)
        return grad, None, None, None, None


class _Probed(torch.autograd.Function):
    """An output that goes on as it is. In backward its gradient is noted, with what was read."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, note: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.note = note
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.note(*ctx.saved_tensors, *grads)
        return grads[0], None, None
