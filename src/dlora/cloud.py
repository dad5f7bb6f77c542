"""The cloud half: a frozen model whose PEFT deltas the edge computes.

    hidden -> [site: x -> wire -> deltas] -> hidden            arXiv:2404.05182

The model's own code runs untouched. Hooks on its linear modules call the edge at active
sites and return at once everywhere else. Knows nothing of data, adapters or training.

Shapes: B batch, T tokens, N rows that travel, D width of a site's input, O of an output.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.errors import ModelError, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.sites import Site, attention_flops, forward_flops, trace
from dlora.wire import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, decode, encode, unpack_mask

__all__ = ["CloudModel", "Limits", "Pipe", "Plan"]

# Largest difference allowed at load between the full model's logits and the split's, as a share
# of the largest logit. Equal arithmetic gives 0; 1e-4 leaves room for kernels that depend on shape.
_SPLIT_TOLERANCE: Final = 1e-4

_current = threading.local()  # .step: the micro-batch that this thread computes


class Pipe(Protocol):
    """The edge, as one micro-batch sees it."""

    def send(self, frame: pb.CloudFrame) -> None:
        """Queue a frame for the edge."""

    def receive(self) -> pb.EdgeFrame:
        """Wait for the edge's next frame. Raises PeerLost when it is gone or too slow."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one micro-batch may cost. Checked before anything is computed."""

    max_tokens: int = 16_384
    """Tokens of a micro-batch, padding included."""
    max_length: int = 8_192
    """Tokens of one sequence; the model's own limit applies too."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_inflight_bytes: int = 8 * 2**30
    """Activations held for all micro-batches in flight."""


@dataclass(kw_only=True)
class Plan:
    """A checked `Begin`: everything a micro-batch needs, nothing that is not validated."""

    dtype: pb.DType
    training: bool
    batch: int
    length: int
    mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    rows_N: Tensor | None
    """Flat positions of the rows that travel; None: all of them."""
    keep: Tensor
    active: tuple[tuple[Site, tuple[int, ...]], ...]
    embeddings: pb.Tensor
    cost_bytes: int = field(default=0)

    @property
    def num_rows(self) -> int:
        """N: the rows that travel in every tensor but the last hidden states."""
        return self.batch * self.length if self.rows_N is None else len(self.rows_N)


class CloudModel:
    """A transformers decoder-only model, frozen, hooked, measured and checked.

    `model_id` is the public name that edges write into their adapters. `allowed` decides by
    full module name which modules edges may adapt. Raises ModelError if the split does not
    give the full model's logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        model_id: str,
        allowed: Callable[[str], bool] = lambda name: True,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self.model = model.eval().requires_grad_(False)
        self.model_id = model_id
        self.decoder = _decoder_of(model)
        self.embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no LM head: only decoder-only causal LMs can be served")
        self.head = head
        self.device = self.embedding.weight.device
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ModelError("gradient checkpointing would run every exchange twice: disable it on the served model")
        model_length = getattr(model.config, "max_position_embeddings", None) or limits.max_length
        self.limits = Limits(
            max_tokens=limits.max_tokens,
            max_length=min(limits.max_length, model_length),
            max_message_bytes=limits.max_message_bytes,
            max_inflight_bytes=limits.max_inflight_bytes,
        )
        self.takes_position_ids = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self._traced_batch, self._traced_length = 2, min(8, self.limits.max_length)
        ids_BT = _sample_ids(model, self._traced_batch, self._traced_length).to(self.device)
        found = trace(
            model,
            self.decoder,
            lambda: self.decoder(inputs_embeds=self.embedding(ids_BT), use_cache=False),
            self._traced_batch,
            self._traced_length,
            allowed,
        )
        self.sites = found.sites
        self.unusable = found.unusable
        self._install_hooks()
        self.hidden_width = self._check_split(ids_BT)
        self.bytes_per_token, self.bytes_per_token_squared = self._measure_cost()
        self.config_json = _public_config(model)
        self.fingerprint = _fingerprint(self.config_json, model)

    # ----------------------------------------------------------------- description

    def describe(self) -> pb.Description:
        """What `Describe` answers, but for the edge files, which `server.py` adds."""
        return pb.Description(
            protocol_version=PROTOCOL_VERSION,
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            config_json=self.config_json,
            compute_dtype=str(self.embedding.weight.dtype).removeprefix("torch."),
            embedding_width=self.embedding.weight.shape[1],
            hidden_width=self.hidden_width,
            sites=[
                pb.SiteInfo(
                    in_features=site.in_features,
                    modules=[
                        pb.ModuleInfo(name=module.name, out_features=module.out_features, allowed=module.allowed)
                        for module in site.modules
                    ],
                )
                for site in self.sites
            ],
            wire_dtypes=[pb.FP32, pb.FP16, pb.BF16],
            limits=pb.Limits(
                max_tokens=self.limits.max_tokens,
                max_length=self.limits.max_length,
                max_message_bytes=self.limits.max_message_bytes,
                max_inflight_bytes=self.limits.max_inflight_bytes,
                bytes_per_token=self.bytes_per_token,
                bytes_per_token_squared=self.bytes_per_token_squared,
            ),
        )

    # ----------------------------------------------------------------- one micro-batch

    def plan(self, begin: pb.Begin) -> Plan:
        """Check every field of a `Begin` and say what it costs, before anything is allocated.

        Raises UsageError for what the edge's user can mend, WireError for a broken edge.
        """
        if begin.protocol_version != PROTOCOL_VERSION:
            raise UsageError(
                f"the edge speaks protocol {begin.protocol_version}, this cloud {PROTOCOL_VERSION}: upgrade the older"
            )
        if begin.fingerprint != self.fingerprint:
            raise UsageError(
                f"the edge expects the model {begin.fingerprint[:12]!r}, this cloud serves {self.fingerprint[:12]!r} "
                f"({self.model_id}): connect again to use it, or point the edge at the right server"
            )
        batch, length, tokens = begin.batch, begin.length, begin.batch * begin.length
        if tokens == 0:
            raise WireError(f"empty micro-batch: {batch} x {length} tokens")
        if length > self.limits.max_length:
            raise UsageError(
                f"a sequence of {length} tokens is over this server's limit of {self.limits.max_length}: "
                "lower the maximum length"
            )
        cost = self._cost_bytes(batch, length, begin.training)
        if tokens > self.limits.max_tokens or cost > self.limits.max_inflight_bytes:
            raise UsageError(
                f"a micro-batch of {batch} x {length} tokens is over this server's limits ({self.limits.max_tokens} "
                f"tokens; it needs {cost / 2**20:.0f} MiB of activations, {self.limits.max_inflight_bytes / 2**20:.0f} "
                "are there): lower the batch size and raise the accumulation"
            )
        if begin.wire_dtype not in (pb.FP32, pb.FP16, pb.BF16):
            raise WireError(f"wire dtype number {begin.wire_dtype} is not known")
        mask_BT = unpack_mask(begin.attention_mask, batch, length)
        position_ids_BT = None
        if begin.position_ids:
            if len(begin.position_ids) != tokens or max(begin.position_ids) >= self.limits.max_length:
                raise WireError(f"position_ids: want {tokens} values under {self.limits.max_length}")
            if not self.takes_position_ids:
                raise UsageError(f"{type(self.model).__name__} takes no position_ids")
            position_ids_BT = torch.tensor(begin.position_ids, dtype=torch.int64).view(batch, length).to(self.device)
        keep = torch.tensor(begin.keep, dtype=torch.int64)
        if len(keep) and (int(keep[-1]) >= tokens or bool((keep[1:] <= keep[:-1]).any())):
            raise WireError(f"keep: want ascending positions under {tokens}")
        rows_N = None if mask_BT is None or begin.dense else mask_BT.reshape(-1).nonzero()[:, 0].to(self.device)
        return Plan(
            dtype=begin.wire_dtype,
            training=begin.training,
            batch=batch,
            length=length,
            mask_BT=None if mask_BT is None else mask_BT.to(self.device),
            position_ids_BT=position_ids_BT,
            rows_N=None if rows_N is not None and len(rows_N) == tokens else rows_N,
            keep=keep.to(self.device),
            active=self._check_active(begin),
            embeddings=begin.embeddings,
            cost_bytes=cost,
        )

    def _check_active(self, begin: pb.Begin) -> tuple[tuple[Site, tuple[int, ...]], ...]:
        active = []
        previous = -1
        for entry in begin.sites:
            if not previous < entry.site < len(self.sites):
                raise WireError(f"sites: got {entry.site} after {previous}, want ascending, under {len(self.sites)}")
            previous = entry.site
            site, modules = self.sites[entry.site], tuple(entry.modules)
            if not modules or sorted(set(modules)) != list(modules) or modules[-1] >= len(site.modules):
                raise WireError(f"site {entry.site}: got modules {modules[:8]}, want ascending, 1 to {len(site.modules)}")
            for index in modules:
                if not site.modules[index].allowed:
                    raise UsageError(f"this server does not allow adapters on {site.modules[index].name}")
            active.append((site, modules))
        return tuple(active)

    def run(self, plan: Plan, pipe: Pipe) -> None:
        """Compute one micro-batch, talking to the edge at every active site.

        Raises PeerLost if the edge goes away, WireError if it sends what does not fit.
        """
        step = _Step(self, plan, pipe)
        _current.step = step
        try:
            # On CUDA autograd would otherwise run backward on one thread a device, where a wait
            # for one edge blocks all others.
            with torch.autograd.set_multithreading_enabled(False):
                step.run()
        finally:
            _current.step = None

    def flops(self, plan: Plan) -> tuple[int, int]:
        """(forward, backward) matmul FLOPs in the cloud of one micro-batch.

        Backward goes down to the lowest active site and computes input gradients only: the
        weights are frozen. Attention counts densely, its backward as twice its forward.
        """
        tokens = plan.batch * plan.length
        layers = sorted({module.layer for site in self.sites for module in site.modules})
        attention = attention_flops(self.model.config, plan.batch, plan.length)
        forward = forward_flops(self.sites, tokens) + attention * len(layers)
        if not (plan.training and plan.active):
            return forward, 0
        lowest = plan.active[0][0]
        above = [site for site in self.sites if site.index > lowest.index]
        layer = lowest.modules[0].layer
        # The first site of a layer feeds its attention; from any later one attention gets no gradient.
        reads_layer_input = all(site.modules[0].layer != layer for site in self.sites[: lowest.index])
        num_attention = sum(1 for one in layers if one > layer or (one == layer and reads_layer_input))
        return forward, forward_flops(above, tokens) + 2 * attention * num_attention

    def _cost_bytes(self, batch: int, length: int, training: bool) -> int:
        cost = batch * (self.bytes_per_token * length + self.bytes_per_token_squared * length * length)
        # Without backward only a layer's own tensors live at once.
        num_layers = max(1, len({module.layer for site in self.sites for module in site.modules}))
        return int(cost if training else 2 * cost / num_layers)

    # ----------------------------------------------------------------- set-up

    def _install_hooks(self) -> None:
        for site in self.sites:
            for index, info in enumerate(site.modules):
                module = self.model.get_submodule(info.name)

                def before(
                    module: nn.Module, args: tuple[Tensor], site: int = site.index, index: int = index
                ) -> None:
                    step: _Step | None = getattr(_current, "step", None)
                    if step is not None:
                        step.before(site, index, args[0])

                def after(
                    module: nn.Module,
                    args: tuple[Tensor],
                    output: Tensor,
                    site: int = site.index,
                    index: int = index,
                ) -> Tensor:
                    step: _Step | None = getattr(_current, "step", None)
                    return output if step is None else step.after(site, index, output)

                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)

    def _check_split(self, ids_BT: Tensor) -> int:
        """Compare split and full logits on padded input; return the width of the last hidden states."""
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[-1, ids_BT.shape[1] // 2 :] = 0
        with torch.no_grad():
            want = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            answers = _ZeroEdge()
            plan = self._probe_plan(ids_BT, mask_BT, training=False)
            self.run(plan, answers)
            hidden_width = answers.hidden.shape[1]
            output = self.decoder(inputs_embeds=self.embedding(ids_BT), attention_mask=mask_BT, use_cache=False)
            hidden = output.last_hidden_state
            hidden = hidden.new_zeros(hidden.shape).reshape(-1, hidden_width)
            split = decode(answers.hidden, list(answers.hidden.shape), "hidden").to(hidden)
            hidden[plan.keep] = split
            output.last_hidden_state = hidden.view(*ids_BT.shape, hidden_width)
            with _replaced_forward(self.decoder, output):
                got = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        seen = mask_BT.bool()
        difference = (got - want)[seen].abs().max().item()
        scale = want[seen].abs().max().item()
        if not difference <= _SPLIT_TOLERANCE * max(scale, 1e-6):
            raise ModelError(
                f"{type(self.model).__name__} cannot be split: its logits differ from the full model's by "
                f"{difference:.3g} (largest logit {scale:.3g}). It does more with token ids than embed them, or uses "
                "something other than the decoder's last hidden states."
            )
        return int(hidden_width)

    def _probe_plan(self, ids_BT: Tensor, mask_BT: Tensor | None, training: bool) -> Plan:
        tokens = ids_BT.numel()
        rows = torch.arange(tokens, device=self.device) if mask_BT is None else mask_BT.reshape(-1).nonzero()[:, 0]
        embeddings = self.embedding(ids_BT).reshape(tokens, -1)[rows]
        return Plan(
            dtype=pb.FP32,
            training=training,
            batch=ids_BT.shape[0],
            length=ids_BT.shape[1],
            mask_BT=mask_BT,
            position_ids_BT=None,
            rows_N=rows if len(rows) != tokens else None,
            keep=rows,
            active=tuple((site, tuple(range(len(site.modules)))) for site in self.sites),
            embeddings=encode(embeddings, pb.FP32),
        )

    def _measure_cost(self) -> tuple[float, float]:
        """Activation bytes that a training step holds: (per token, per token squared) of a sequence.

        Counts what autograd saves in two small steps with every site active, weights excluded.
        """
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        weights |= {b.untyped_storage().data_ptr() for b in self.model.buffers()}
        lengths = [min(16, self.limits.max_length), min(64, self.limits.max_length)]
        sizes = []
        for length in lengths:
            saved: dict[int, int] = {}

            def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            ids_BT = _sample_ids(self.model, 1, length).to(self.device)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self.run(self._probe_plan(ids_BT, None, training=True), _ZeroEdge())
            sizes.append(sum(saved.values()))
        (t0, t1), (s0, s1) = lengths, sizes
        if t0 == t1:
            return s0 / t0, 0.0
        # Solve size = a T + b T^2 from two points; b cannot be negative.
        b = max(0.0, (s1 / t1 - s0 / t0) / (t1 - t0))
        return max(s0 / t0, s1 / t1) - b * (t0 if s0 / t0 > s1 / t1 else t1), b


class _Step:
    """One micro-batch in the cloud: the forward, the backward, and the exchanges between."""

    def __init__(self, cloud: CloudModel, plan: Plan, pipe: Pipe) -> None:
        self.cloud, self.plan, self.pipe = cloud, plan, pipe
        self.modules = {site.index: modules for site, modules in plan.active}
        self.sites = {site.index: site for site, _ in plan.active}
        self.tokens: dict[int, Tensor] = {}
        self.deltas: dict[int, tuple[Tensor, ...]] = {}
        # Frozen weights ask for no gradient: the lowest exchange needs an input that does.
        self.anchor = torch.zeros((), device=cloud.device, requires_grad=plan.training)

    def run(self) -> None:
        plan, cloud = self.plan, self.cloud
        embeddings = decode(plan.embeddings, (plan.num_rows, cloud.embedding.weight.shape[1]), "embeddings")
        inputs: dict[str, Any] = {"inputs_embeds": self._scatter(embeddings.to(cloud.embedding.weight.dtype))}
        if plan.mask_BT is not None:
            inputs["attention_mask"] = plan.mask_BT
        if plan.position_ids_BT is not None:
            inputs["position_ids"] = plan.position_ids_BT
        training = plan.training and bool(plan.active)
        with torch.set_grad_enabled(training):
            hidden_BTD = cloud.decoder(**inputs, use_cache=False).last_hidden_state
            hidden = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[plan.keep]
        self.pipe.send(pb.CloudFrame(hidden=pb.Hidden(hidden=encode(hidden, plan.dtype))))
        if training:
            del hidden_BTD, inputs
            message = self._receive("hidden_grad").grad
            grad = decode(message, tuple(hidden.shape), "gradient of the last hidden states")
            hidden.backward(grad.to(hidden))
        forward, backward = cloud.flops(plan)
        self.pipe.send(pb.CloudFrame(done=pb.Done(forward_flops=forward, backward_flops=backward)))

    def before(self, site: int, index: int, x: Tensor) -> None:
        """Before an active site's first module: x leaves, while the base layer goes on computing."""
        if self.modules.get(site, (-1,))[0] == index:
            self.tokens[site] = _Ask.apply(x, self.anchor, self, site)

    def after(self, site: int, index: int, output: Tensor) -> Tensor:
        """After a module: its base output plus its delta, in the base output's dtype as peft has it."""
        modules = self.modules.get(site, ())
        if index not in modules:
            return output
        if site not in self.deltas:
            self.deltas[site] = _Answer.apply(self.tokens.pop(site), self, site)
        delta = self.deltas[site][modules.index(index)]
        if index == modules[-1]:
            del self.deltas[site]
        return (output + delta.view_as(output)).to(output.dtype)

    # The four halves of an exchange, called by the autograd functions below.

    def send_input(self, site: int, x: Tensor, wants_grad: bool) -> None:
        x_ND = encode(self._gather(x), self.plan.dtype)
        self.pipe.send(pb.CloudFrame(input=pb.SiteInput(site=site, x=x_ND, wants_input_grad=wants_grad)))

    def receive_deltas(self, site: int) -> tuple[Tensor, ...]:
        message = self._receive("deltas")
        modules = self._check_site(message, site)
        if len(message.deltas) != len(modules):
            raise WireError(f"site {site}: got {len(message.deltas)} deltas, want {len(modules)}")
        return tuple(
            self._scatter(decode(delta, (self.plan.num_rows, self._width(site, module)), f"delta at site {site}"))
            for delta, module in zip(message.deltas, modules, strict=True)
        )

    def send_delta_grads(self, site: int, grads: tuple[Tensor, ...]) -> None:
        messages = [encode(self._gather(grad), self.plan.dtype) for grad in grads]
        self.pipe.send(pb.CloudFrame(delta_grads=pb.DeltaGrads(site=site, grads=messages)))

    def receive_input_grad(self, site: int, like: Tensor) -> Tensor:
        message = self._receive("input_grad")
        self._check_site(message, site)
        shape = (self.plan.num_rows, self.sites[site].in_features)
        return self._scatter(decode(message.grad, shape, f"input gradient at site {site}")).view_as(like).to(like.dtype)

    def _receive(self, kind: str) -> Any:
        frame = self.pipe.receive()
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
        rows = rows.to(self.cloud.device)
        if plan.rows_N is not None:
            full = rows.new_zeros(plan.batch * plan.length, rows.shape[1])
            full[plan.rows_N] = rows
            rows = full
        return rows.view(plan.batch, plan.length, -1)


class _Ask(torch.autograd.Function):
    """First half of an exchange: x leaves in forward, its gradient comes back in backward.

    Split from `_Answer` so that base layers between the two run while the edge works, in both
    directions: autograd runs nodes in reverse order of creation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, step: _Step, site: int) -> Tensor:
        ctx.step, ctx.site, ctx.x = step, site, torch.empty_like(x, device="meta")
        step.send_input(site, x, ctx.needs_input_grad[0])
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = ctx.step.receive_input_grad(ctx.site, ctx.x)
        return grad, None, None, None


class _Answer(torch.autograd.Function):
    """Second half: deltas arrive in forward, their gradients leave in backward."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, step: _Step, site: int) -> tuple[Tensor, ...]:
        ctx.step, ctx.site, ctx.token = step, site, token
        return step.receive_deltas(site)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.step.send_delta_grads(ctx.site, grads)
        return torch.zeros_like(ctx.token), None, None


class _ZeroEdge:
    """An edge whose adapters are all zero: for the checks and measurements at load."""

    def __init__(self) -> None:
        self.answers: list[pb.EdgeFrame] = []
        self.hidden = pb.Tensor()
        self.widths: dict[int, int] = {}

    def send(self, frame: pb.CloudFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "input":
            self.answers.append(pb.EdgeFrame(deltas=pb.SiteDeltas(site=frame.input.site)))
            self.widths[frame.input.site] = frame.input.x.shape[1] if frame.input.wants_input_grad else 0
        elif kind == "hidden":
            self.hidden = frame.hidden.hidden
            grad = encode(torch.zeros(*self.hidden.shape), pb.FP32)
            self.answers.append(pb.EdgeFrame(hidden_grad=pb.HiddenGrad(grad=grad)))
        elif kind == "delta_grads" and (width := self.widths[frame.delta_grads.site]):
            grad = encode(torch.zeros(frame.delta_grads.grads[0].shape[0], width), pb.FP32)
            self.answers.append(pb.EdgeFrame(input_grad=pb.InputGrad(site=frame.delta_grads.site, grad=grad)))

    def receive(self) -> pb.EdgeFrame:
        frame = self.answers.pop(0)
        if frame.WhichOneof("kind") == "deltas":
            step: _Step = _current.step
            site = frame.deltas.site
            for module in step.modules[site]:
                zeros = torch.zeros(step.plan.num_rows, step.sites[site].modules[module].out_features)
                frame.deltas.deltas.append(encode(zeros, pb.FP32))
        return frame


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is not a decoder-only causal LM")
    return decoder


def _sample_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length] for checks, the same on every machine; low ids (specials) left out."""
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.arange(batch * length).view(batch, length) * 7919 % max(1, vocab - 8) + min(7, vocab - 1)


@contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    module.forward = lambda *args, **kwargs: output  # shadows the class's method
    try:
        yield
    finally:
        del module.forward


def _public_config(model: PreTrainedModel) -> str:
    """The model's configuration without paths of this machine."""
    config = model.config.to_dict()
    for key in ("_name_or_path", "quantization_config", "auto_map"):
        config.pop(key, None)
    return json.dumps(config, sort_keys=True)


def _fingerprint(config_json: str, model: PreTrainedModel) -> str:
    """SHA-256 over configuration and every weight: equal means the same function."""
    digest = hashlib.sha256(config_json.encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        data = weight.detach().to("cpu").contiguous()
        if data.numel():
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
