"""The cloud half: a frozen model whose PEFT deltas the edge computes.

    hidden -> [site: x -> wire -> deltas] -> hidden            arXiv:2404.05182

The model's own code runs untouched. Hooks on its linear modules call the edge at active
sites and return at once everywhere else. Knows nothing of data, adapters or training.

Shapes: B batch, T tokens, N rows that travel, D width of a site's input, O of an output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dlora.cloud.adapter_store import AdapterStore, check_frozen_shape
from dlora.cloud.quantize import give_back, quantization
from dlora.cloud.step import Pipe, Plan, Step, current_step
from dlora.errors import AdapterMissing, ModelError, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import (
    EdgeLayers,
    KnownCloud,
    LayerRunner,
    find_layers,
    first_output,
    wrap_layers,
)
from dlora.protocol.sites import (
    Site,
    attention_flops,
    backward_flops,
    forward_flops,
    output_sites,
    pass_bytes,
    trace,
)
from dlora.protocol.wire import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    WIRE_DTYPES,
    decode,
    encode,
    unpack_mask,
)

__all__ = ["CloudModel", "Limits"]

log = logging.getLogger(__name__)

# Largest difference allowed at load between the full model's results and the split's, as a share
# of the largest. Equal arithmetic gives 0; 1e-4 leaves room for kernels that depend on shape.
_SPLIT_TOLERANCE: Final = 1e-4


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
    max_adapter_bytes: int = 2**30
    """Frozen modules that edges let the cloud apply; the longest unused go first."""
    edge_first: int = 0
    """Edges may get and run so many of the first decoder layers themselves, and ..."""
    edge_last: int = 0
    """... so many of the last."""


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
        built_by_edges = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        if built_by_edges is not type(model):
            name = getattr(built_by_edges, "__name__", "nothing")
            raise ModelError(
                f"{type(model).__name__} cannot be split: edges build {name} from its "
                "configuration. "
                "Only decoder-only causal LMs that transformers itself brings can be served."
            )
        self.model = model.eval().requires_grad_(False)
        self.model_id = model_id
        self.decoder = _decoder_of(model)
        self.embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"{type(model).__name__} has no LM head: only decoder-only causal LMs can be served"
            )
        self.head = head
        self.device = self.embedding.weight.device
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ModelError(
                "gradient checkpointing would run every exchange twice: disable it on the served "
                "model"
            )
        model_length = (
            getattr(model.config.get_text_config(), "max_position_embeddings", None)
            or limits.max_length
        )
        self.limits = dataclasses.replace(limits, max_length=min(limits.max_length, model_length))
        self.adapters = AdapterStore(limits.max_adapter_bytes, self.device)
        self.takes_position_ids = (
            "position_ids" in inspect.signature(self.decoder.forward).parameters
        )
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
        self.all_sites = (*found.sites, *output_sites(found.sites))
        self.unusable = found.unusable
        # Modules outside the layers, such as OPT's projections of the embedding, have layer -1.
        self.layers = sorted(
            {module.layer for site in self.sites for module in site.modules} - {-1}
        )
        self._install_hooks()
        self._install_layers(ids_BT)
        self.hidden_width = self._check_split(ids_BT)
        self.bytes_per_token, self.bytes_per_token_squared = self._measure_cost()
        self.cache_bytes_per_token = self._check_cache(ids_BT)
        self.deep_rollback = not any(DynamicCache(config=self.model.config).is_sliding)
        self._check_layers(ids_BT)
        self.config_json = _public_config(model)
        self.fingerprint = _fingerprint(self.config_json, model)
        give_back()  # what loading and measuring have left

    # ----------------------------------------------------------------- description

    def describe(self) -> pb.Description:
        """What `Describe` answers, but for the edge files, which `server.py` adds."""
        kind = quantization(self.model)
        return pb.Description(
            protocol_version=PROTOCOL_VERSION,
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            config_json=self.config_json,
            compute_dtype=str(self.embedding.weight.dtype).removeprefix("torch.")
            + (f", {kind} weights" if kind else ""),
            embedding_width=self.embedding.weight.shape[1],
            hidden_width=self.hidden_width,
            sites=[
                pb.SiteInfo(
                    in_features=site.in_features,
                    modules=[
                        pb.ModuleInfo(
                            name=module.name,
                            out_features=module.out_features,
                            allowed=module.allowed,
                            weight_norm=self.model.get_submodule(module.name)
                            .weight.float()
                            .norm()
                            .item(),
                        )
                        for module in site.modules
                    ],
                )
                for site in self.sites
            ],
            wire_dtypes=WIRE_DTYPES.values(),
            layers=pb.DecoderLayers(
                count=self.num_layers,
                width=self.layer_width,
                in_tuple=self.layers_in_tuple,
                max_first=self.limits.edge_first,
                max_last=self.limits.edge_last,
            ),
            limits=pb.Limits(
                max_tokens=self.limits.max_tokens,
                max_length=self.limits.max_length,
                max_message_bytes=self.limits.max_message_bytes,
                max_inflight_bytes=self.limits.max_inflight_bytes,
                bytes_per_token=self.bytes_per_token,
                bytes_per_token_squared=self.bytes_per_token_squared,
                cache_bytes_per_token=self.cache_bytes_per_token,
                deep_rollback=self.deep_rollback,
            ),
        )

    # ----------------------------------------------------------------- one micro-batch

    def plan(self, begin: pb.Begin, owner: str = "local") -> Plan:
        """Check every field of a `Begin` of this owner and say what it costs, before anything is
        allocated.

        Raises UsageError for what the edge's user can mend, WireError for a broken edge.
        """
        if begin.protocol_version != PROTOCOL_VERSION:
            raise UsageError(
                f"the edge speaks protocol {begin.protocol_version}, this cloud "
                f"{PROTOCOL_VERSION}: upgrade the older"
            )
        if begin.fingerprint != self.fingerprint:
            raise UsageError(
                f"the edge expects the model {begin.fingerprint[:12]!r}, this cloud serves "
                f"{self.fingerprint[:12]!r} "
                f"({self.model_id}): connect again to use it, or point the edge at the right server"
            )
        if begin.cache_length:
            if begin.training or begin.factored:
                raise WireError("a KV cache is for generation on the plain wire, not for training")
            if not self.cache_bytes_per_token:
                raise UsageError(
                    f"{type(self.model).__name__} is served without KV cache: use use_cache=False"
                )
            if begin.cache_length > self.limits.max_length:
                raise UsageError(
                    f"a KV cache of {begin.cache_length} tokens is over this server's limit of "
                    f"{self.limits.max_length}: ask for fewer new tokens"
                )
        if begin.wire_dtype not in WIRE_DTYPES.values():
            raise WireError(f"wire dtype number {begin.wire_dtype} is not known")
        edge_layers = self._check_edge_layers(begin)
        active = self._check_active(begin.sites, edge_layers)
        if begin.probe and not (begin.training and active):
            raise WireError("probe: wants a training step with an active site")
        if begin.wants_input_grad and not begin.training:
            raise WireError("wants_input_grad: wants a training step")
        return self._plan_pass(
            begin,
            Plan(
                dtype=begin.wire_dtype,
                training=begin.training,
                batch=begin.batch,
                length=0,
                mask_BT=None,
                position_ids_BT=None,
                rows_N=None,
                keep=torch.empty(0, dtype=torch.int64),
                active=active,
                idle=self._check_idle(begin.idle, active, owner, edge_layers),
                probe=self._check_active(begin.probe, edge_layers),
                embeddings=begin.embeddings,
                factored=begin.factored,
                cache_length=begin.cache_length,
                rollback=begin.rollback,
                edge_layers=edge_layers,
                wants_input_grad=begin.wants_input_grad,
            ),
        )

    def _check_edge_layers(self, begin: pb.Begin) -> EdgeLayers:
        """The layers that this edge runs itself. Raises UsageError for more than this server
        allows.
        """
        edge_layers = EdgeLayers(begin.edge_first, begin.edge_last, self.num_layers)
        if edge_layers.first > self.limits.edge_first or edge_layers.last > self.limits.edge_last:
            raise UsageError(
                f"this server lets edges hold the first {self.limits.edge_first} and the last "
                f"{self.limits.edge_last} "
                f"layers, got {edge_layers.first} and {edge_layers.last}"
            )
        return edge_layers

    def extend(self, before: Plan, message: pb.Extend) -> Plan:
        """The same for an `Extend`, after the pass `before`."""
        cached = before.past + before.length
        if message.drop and not before.rollback:
            raise WireError("drop: this stream's KV cache was not asked to roll back")
        if message.drop > cached:
            raise WireError(f"drop: got {message.drop} tokens, the KV cache holds {cached}")
        if message.drop > before.length and not self.deep_rollback:
            raise WireError(
                f"drop: got {message.drop} tokens, attention over a window gives back the last "
                f"{before.length}"
            )
        mask_BT, order, batch = before.mask_BT, None, len(message.order) or before.batch
        self._check_size(
            batch, message.length, cached - message.drop, before.training, before.cache_length
        )
        if message.order:
            if max(message.order) >= before.batch:
                raise WireError(
                    f"order: got {batch} rows up to {max(message.order)}, want rows under "
                    f"{before.batch}"
                )
            order = torch.tensor(message.order, dtype=torch.int64, device=self.device)
        past = cached - message.drop
        if mask_BT is not None:
            mask_BT = mask_BT[:, :past] if order is None else mask_BT[:, :past][order]
        return self._plan_pass(
            message,
            dataclasses.replace(
                before, batch=batch, mask_BT=mask_BT, past=past, drop=message.drop, order=order
            ),
        )

    def _check_size(
        self, batch: int, length: int, past: int, training: bool, cache_length: int
    ) -> int:
        """What a pass costs in bytes. Raises UsageError or WireError if it is over the limits."""
        tokens = batch * length
        if tokens == 0:
            raise WireError(f"empty micro-batch: {batch} x {length} tokens")
        if past + length > self.limits.max_length:
            raise UsageError(
                f"a sequence of {past + length} tokens is over this server's limit of "
                f"{self.limits.max_length}: "
                "lower the maximum length"
            )
        if cache_length and past + length > cache_length:
            raise WireError(f"{past + length} tokens do not fit a KV cache of {cache_length}")
        cost = self._cost_bytes(batch, length, training, past, cache_length)
        if tokens > self.limits.max_tokens or cost > self.limits.max_inflight_bytes:
            what = "activations" if not cache_length else "activations and KV cache"
            raise UsageError(
                f"a micro-batch of {batch} x {length} tokens is over this server's limits "
                f"({self.limits.max_tokens} "
                f"tokens; it needs {cost / 2**20:.0f} MiB of {what}, "
                f"{self.limits.max_inflight_bytes / 2**20:.0f} "
                "are there): lower the batch "
                f"size{' and raise the accumulation' if training else ''}"
            )
        return cost

    def _plan_pass(self, message: pb.Begin | pb.Extend, before: Plan) -> Plan:
        """`before` with the tokens of `message` behind the cached ones, checked."""
        batch, length, past = before.batch, message.length, before.past
        tokens = batch * length
        cost = self._check_size(batch, length, past, before.training, before.cache_length)
        if len(message.keep) > tokens:
            raise WireError(f"keep: got {len(message.keep)} positions of {tokens} tokens")
        new_BT = unpack_mask(message.attention_mask, batch, length)
        position_ids_BT = None
        if message.position_ids:
            if (
                len(message.position_ids) != tokens
                or max(message.position_ids) >= self.limits.max_length
            ):
                raise WireError(
                    f"position_ids: want {tokens} values under {self.limits.max_length}"
                )
            if not self.takes_position_ids:
                raise UsageError(f"{type(self.model).__name__} takes no position_ids")
            position_ids_BT = (
                torch.tensor(message.position_ids, dtype=torch.int64)
                .view(batch, length)
                .to(self.device)
            )
        keep = torch.tensor(message.keep, dtype=torch.int64)
        if len(keep) and (int(keep[-1]) >= tokens or bool((keep[1:] <= keep[:-1]).any())):
            raise WireError(f"keep: want ascending positions under {tokens}")
        rows_N = (
            None
            if new_BT is None or message.dense
            else new_BT.reshape(-1).nonzero()[:, 0].to(self.device)
        )
        mask_BT = None if new_BT is None else new_BT.to(self.device)
        if past and (mask_BT is not None or before.mask_BT is not None):
            ones = torch.ones(batch, past + length, dtype=torch.int64, device=self.device)
            parts = (before.mask_BT, ones[:, :past]), (mask_BT, ones[:, past:])
            mask_BT = torch.cat([other if part is None else part for part, other in parts], dim=1)
        return dataclasses.replace(
            before,
            length=length,
            mask_BT=mask_BT,
            position_ids_BT=position_ids_BT,
            rows_N=None if rows_N is not None and len(rows_N) == tokens else rows_N,
            keep=keep.to(self.device),
            embeddings=message.embeddings,
            cost_bytes=cost,
        )

    def _check_idle(
        self,
        entries: Sequence[pb.IdleModule],
        active: tuple[tuple[Site, tuple[int, ...]], ...],
        owner: str,
        edge_layers: EdgeLayers,
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The frozen modules that a step refers to. Raises AdapterMissing if one is not here (any
        more).
        """
        taken = {(site.index, module) for site, modules in active for module in modules}
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        previous = (-1, -1)
        for entry in entries:
            key = (entry.site, entry.module)
            if key <= previous or key in taken or entry.site >= len(self.sites):
                raise WireError(
                    f"idle: got {key} after {previous}, want ascending modules that are not active"
                )
            previous, site = key, self.sites[entry.site]
            if entry.module >= len(site.modules):
                raise WireError(
                    f"idle: site {entry.site} has {len(site.modules)} modules, got {entry.module}"
                )
            module = site.modules[entry.module]
            if not module.allowed or not edge_layers.in_cloud(module.layer):
                raise UsageError(f"this server does not allow adapters on {module.name}")
            pair = self.adapters.get(entry.hash, owner)
            if pair is None:
                raise AdapterMissing(
                    f"the frozen module of {module.name} is not here: put it and try again"
                )
            if (pair[0].shape[1], pair[1].shape[0]) != (site.in_features, module.out_features):
                raise WireError(f"idle: the frozen module of {module.name} has other widths")
            found[key] = pair
        return found

    def put_adapter(
        self, request: pb.PutAdapterRequest, owner: str = "local", owner_bytes: int | None = None
    ) -> pb.PutAdapterReply:
        """Keep frozen modules for steps of the same owner that refer to them by hash."""
        if request.fingerprint != self.fingerprint:
            raise UsageError("the served model has changed: connect again")
        widths = {
            (site.in_features, module.out_features)
            for site in self.sites
            for module in site.modules
        }
        for one in request.modules:
            check_frozen_shape(one, widths)
        return pb.PutAdapterReply(
            hashes=[self.adapters.put(one, owner, owner_bytes) for one in request.modules]
        )

    def _check_active(
        self, entries: Sequence[pb.ActiveSite], edge_layers: EdgeLayers
    ) -> tuple[tuple[Site, tuple[int, ...]], ...]:
        # Lengths first: a list of millions is never walked through.
        if len(entries) > len(self.all_sites):
            raise WireError(f"sites: got {len(entries)}, want at most {len(self.all_sites)}")
        active = []
        previous = -1
        for entry in entries:
            if not previous < entry.site < len(self.all_sites):
                raise WireError(
                    f"sites: got {entry.site} after {previous}, want ascending, under "
                    f"{len(self.all_sites)}"
                )
            previous, site = entry.site, self.all_sites[entry.site]
            modules = tuple(entry.modules[: len(site.modules) + 1])
            if (
                not modules
                or sorted(set(modules)) != list(modules)
                or modules[-1] >= len(site.modules)
                or len(entry.modules) > len(site.modules)
            ):
                raise WireError(
                    f"site {entry.site}: got modules {modules[:8]}, want ascending, 1 to "
                    f"{len(site.modules)}"
                )
            if not edge_layers.in_cloud(site.modules[0].layer):
                raise WireError(f"site {entry.site} is in a layer that the edge holds")
            for index in modules:
                if not site.modules[index].allowed:
                    raise UsageError(
                        f"this server does not allow adapters on {site.modules[index].name}"
                    )
            active.append((site, modules))
        return tuple(active)

    def run(self, plan: Plan, pipe: Pipe) -> None:
        """Compute one micro-batch, or pass after pass with a KV cache until the edge closes the
        stream.

        Talks to the edge at every active site. Raises PeerLost if the edge goes away,
        WireError if it sends what does not fit.
        """
        pipe.admit(plan.cost_bytes)
        if plan.cache_length:
            self._run_cached(plan, pipe)
            return
        step = Step(self.decoder, self.embedding.weight, plan, pipe, layer_width=self.layer_width)
        step.run()
        forward, backward = self.flops(plan)
        forward += 2 * step.forward_macs
        backward += 2 * step.backward_macs if backward else 0
        probe = [
            step.probe_norms.get((site.index, module), 0.0)
            for site, modules in plan.probe
            for module in modules
        ]
        done = pb.Done(
            forward_flops=forward, backward_flops=backward, probe=probe, input_grad=step.input_grad
        )
        step.send(pb.CloudFrame(done=done))

    def _run_cached(self, plan: Plan, pipe: Pipe) -> None:
        cache = DynamicCache(config=self.model.config)
        if plan.rollback:
            cache.activate_past_recording()
        while True:
            idle_macs = (
                sum(a.numel() + b.numel() for a, b in plan.idle.values()) * plan.batch * plan.length
            )
            flops = self.flops(plan)[0] + 2 * idle_macs
            Step(
                self.decoder, self.embedding.weight, plan, pipe, cache, flops, self.layer_width
            ).run()
            # What the pass needed is free again while the edge thinks; the cache stays.
            pipe.admit(plan.batch * plan.cache_length * self.cache_bytes_per_token)
            frame = pipe.receive()
            if frame.WhichOneof("kind") != "extend":
                raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'extend'")
            plan = self.extend(plan, frame.extend)
            pipe.admit(plan.cost_bytes)
            if plan.order is not None:
                cache.reorder_cache(plan.order)
            if plan.rollback:
                cache.crop(-plan.drop)

    def flops(self, plan: Plan) -> tuple[int, int]:
        """(forward, backward) matmul FLOPs in the cloud of one micro-batch.

        Backward goes down to the lowest active site and computes input gradients only: the
        weights are frozen. Attention counts densely, its backward as twice its forward.
        """
        tokens = plan.batch * plan.length
        attention = attention_flops(self.model.config, plan.batch, plan.length, plan.past)
        sites = [site for site in self.sites if plan.edge_layers.in_cloud(site.modules[0].layer)]
        forward = forward_flops(sites, tokens) + attention * sum(
            map(plan.edge_layers.in_cloud, self.layers)
        )
        if not plan.has_backward:
            return forward, 0
        lowest = (
            None
            if plan.probe or plan.wants_input_grad
            else min(site.place for site, _ in plan.active)
        )
        return forward, backward_flops(sites, lowest, tokens, attention)

    def _cost_bytes(
        self, batch: int, length: int, training: bool, past: int = 0, cache_length: int = 0
    ) -> int:
        """Memory that a pass needs beside the weights, its stream's whole KV cache included."""
        cost = pass_bytes(batch, length, self.bytes_per_token, self.bytes_per_token_squared, past)
        if training:
            return int(cost)
        # Without backward only a layer's own tensors live at once.
        return (
            int(2 * cost / max(1, len(self.layers)))
            + batch * cache_length * self.cache_bytes_per_token
        )

    # ----------------------------------------------------------------- set-up

    def _install_hooks(self) -> None:
        behind = {site.modules[0].name: site.index for site in self.all_sites[len(self.sites) :]}
        for site in self.sites:
            for index, info in enumerate(site.modules):
                module, output_site = self.model.get_submodule(info.name), behind[info.name]

                def before(
                    module: nn.Module,
                    args: tuple[Tensor],
                    site: int = site.index,
                    index: int = index,
                ) -> None:
                    if (step := current_step()) is not None:
                        step.before(site, index, args[0])

                def after(
                    module: nn.Module,
                    args: tuple[Tensor],
                    output: Tensor,
                    site: int = site.index,
                    index: int = index,
                    output_site: int = output_site,
                ) -> Tensor:
                    step = current_step()
                    return (
                        output
                        if step is None
                        else step.after(site, index, args[0], output, output_site)
                    )

                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)

    def _install_layers(self, ids_BT: Tensor) -> None:
        """Find the decoder's layers, and let edges hold some where the provider allows it. Raises
        ModelError.
        """
        self.num_layers, self.layer_width, self.layers_in_tuple = 0, 0, False
        self._mirror: LayerRunner | None = (
            None  # while the load checks what an edge's half would do
        )
        count = int(self.model.config.get_text_config().num_hidden_layers)
        first, last = self.limits.edge_first, self.limits.edge_last
        layers = find_layers(self.decoder, count)
        if layers is None:
            if first or last:
                raise ModelError(
                    f"edges cannot hold layers of {type(self.model).__name__}: found no list of "
                    f"{count}"
                )
            return
        if (first or last) and quantization(self.model) is not None:
            raise UsageError(
                "edge layers of a low-bit base are not supported: serve it in full precision"
            )
        if first < 0 or last < 0 or first + last >= count:
            raise UsageError(
                f"edge layers: got {first} and {last} of {count}, want one at least to stay in the "
                "cloud"
            )
        self.num_layers = count
        seen: list[Any] = []
        with (
            layers[0].register_forward_hook(lambda module, args, output: seen.append(output)),
            torch.no_grad(),
        ):
            self.decoder(inputs_embeds=self.embedding(ids_BT), use_cache=False)
        self.layers_in_tuple, self.layer_width = (
            isinstance(seen[0], tuple),
            first_output(seen[0]).shape[-1],
        )

        def runner() -> LayerRunner | None:
            if self._mirror is not None:
                return self._mirror
            step = current_step()
            return step if step is not None and step.plan.edge_layers else None

        wrap_layers(layers, runner, self.layers_in_tuple)

    def _check_layers(self, ids_BT: Tensor) -> None:
        """Compare both halves with the whole model: some decoders pass more than hidden states from
        layer to layer.

        Every border is tried, from below and from above, and the two farthest ones together.
        """
        first, last = self.limits.edge_first, self.limits.edge_last
        layers = find_layers(self.decoder, self.num_layers)
        if not (first or last) or layers is None:
            return
        entries: list[Tensor] = []
        ends: list[Tensor] = []

        def decode_all() -> Tensor:
            output: Tensor = self.decoder(
                inputs_embeds=self.embedding(ids_BT), use_cache=False
            ).last_hidden_state
            return output

        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.enter_context(
                    layer.register_forward_pre_hook(lambda _, args: entries.append(args[0]))
                )
                hooks.enter_context(
                    layer.register_forward_hook(lambda _, args, out: ends.append(first_output(out)))
                )
            whole = decode_all()
        plan = self._probe_plan(ids_BT, None, training=False)
        splits = (
            {(k, 0) for k in range(1, first + 1)}
            | {(0, m) for m in range(1, last + 1)}
            | {(first, last)}
        )
        for split in sorted(splits):
            edge_layers = EdgeLayers(*split, self.num_layers)
            entry, end = entries[edge_layers.first].flatten(0, 1), ends[edge_layers.end - 1]
            answers = _ZeroEdge()
            active = tuple(
                one for one in plan.active if edge_layers.in_cloud(one[0].modules[0].layer)
            )
            self.run(
                dataclasses.replace(
                    plan, edge_layers=edge_layers, active=active, embeddings=encode(entry, pb.FP32)
                ),
                answers,
            )
            got = decode(answers.hidden, [ids_BT.numel(), self.layer_width], "hidden").to(end)
            self._mirror = KnownCloud(edge_layers, end)
            try:
                with torch.no_grad():
                    pairs = [("cloud", got, end.flatten(0, 1)), ("edge", decode_all(), whole)]
            finally:
                self._mirror = None
            for half, found, want in pairs:
                if gap := _gap(found - want, want):
                    raise ModelError(
                        f"edges cannot hold the first {edge_layers.first} and the last {edge_layers.last} layers "
                        "of "
                        f"{type(self.model).__name__}: the {half}'s half differs by {gap}. Its "
                        "layers share more than "
                        "hidden states."
                    )

    def _check_split(self, ids_BT: Tensor) -> int:
        """Compare split and full logits on padded input; return the width of the last hidden
        states.
        """
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[-1, ids_BT.shape[1] // 2 :] = 0
        with torch.no_grad():
            want = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            answers = _ZeroEdge()
            plan = self._probe_plan(ids_BT, mask_BT, training=False)
            self.run(plan, answers)
            hidden_width = answers.hidden.shape[1]
            output = self.decoder(
                inputs_embeds=self.embedding(ids_BT), attention_mask=mask_BT, use_cache=False
            )
            hidden = output.last_hidden_state
            hidden = hidden.new_zeros(hidden.shape).reshape(-1, hidden_width)
            split = decode(answers.hidden, list(answers.hidden.shape), "hidden").to(hidden)
            hidden[plan.keep] = split
            output.last_hidden_state = hidden.view(*ids_BT.shape, hidden_width)
            with _replaced_forward(self.decoder, output):
                got = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        seen = mask_BT.bool()
        if gap := _gap((got - want)[seen], want[seen]):
            raise ModelError(
                f"{type(self.model).__name__} cannot be split: its logits differ from the full "
                f"model's by {gap}. It "
                "does more with token ids than embed them, or uses something other than the "
                "decoder's last hidden "
                "states."
            )
        return int(hidden_width)

    def _probe_plan(self, ids_BT: Tensor, mask_BT: Tensor | None, training: bool) -> Plan:
        tokens = ids_BT.numel()
        rows = (
            torch.arange(tokens, device=self.device)
            if mask_BT is None
            else mask_BT.reshape(-1).nonzero()[:, 0]
        )
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
        """Activation bytes that a training step holds: (per token, per token squared) of a
        sequence.

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

    def _check_cache(self, ids_BT: Tensor) -> int:
        """Compare two passes with a KV cache with one without; return the cache's bytes for each
        token.

        0 where they differ or where the cache is not made of keys and values alone: edges then
        generate without it.
        """
        embeddings = self.embedding(ids_BT)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[-1, :2] = 0  # on the left, where batches of prompts are padded
        half = ids_BT.shape[1] // 2
        cache = DynamicCache(config=self.model.config)
        if not half or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            return 0
        with torch.no_grad():
            want = self.decoder(
                inputs_embeds=embeddings, attention_mask=mask_BT, use_cache=False
            ).last_hidden_state
            for start, end in ((0, half), (half, ids_BT.shape[1])):
                got = self.decoder(
                    inputs_embeds=embeddings[:, start:end],
                    attention_mask=mask_BT[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        if _gap(got - want[:, half:], want):
            log.warning(
                "%s is served without KV cache: with it, results differ", type(self.model).__name__
            )
            return 0
        held = sum(
            layer.keys.nbytes + layer.values.nbytes
            for layer in cache.layers
            if layer.is_initialized
        )
        return held // ids_BT.numel()


def _gap(difference: Tensor, values: Tensor) -> str:
    """How far results are apart, if that is more than equal arithmetic explains, or no number; else
    nothing.
    """
    largest, scale = difference.abs().max().item(), values.abs().max().item()
    return (
        ""
        if largest <= _SPLIT_TOLERANCE * max(scale, 1e-6)
        else f"{largest:.3g} (largest value {scale:.3g})"
    )


class _ZeroEdge:
    """An edge whose adapters are all zero: for the checks and measurements at load."""

    def __init__(self) -> None:
        self.answers: list[pb.EdgeFrame] = []
        self.hidden = pb.Tensor()
        self.widths: dict[int, int] = {}

    def admit(self, cost_bytes: int) -> None:
        """Nobody else is there."""

    def send(self, frame: pb.CloudFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "input":
            self.answers.append(pb.EdgeFrame(deltas=pb.SiteDeltas(site=frame.input.site)))
            self.widths[frame.input.site] = (
                frame.input.x.shape[1] if frame.input.wants_input_grad else 0
            )
        elif kind == "hidden":
            self.hidden = frame.hidden.hidden
            grad = encode(torch.zeros(*self.hidden.shape), pb.FP32)
            self.answers.append(pb.EdgeFrame(hidden_grad=pb.HiddenGrad(grad=grad)))
        elif kind == "delta_grads" and (width := self.widths[frame.delta_grads.site]):
            grad = encode(torch.zeros(frame.delta_grads.grads[0].shape[0], width), pb.FP32)
            self.answers.append(
                pb.EdgeFrame(input_grad=pb.InputGrad(site=frame.delta_grads.site, grad=grad))
            )

    def receive(self) -> pb.EdgeFrame:
        frame = self.answers.pop(0)
        if frame.WhichOneof("kind") == "deltas":
            step = current_step()
            if step is None:
                raise AssertionError("deltas are asked for inside a step")
            site = frame.deltas.site
            for module in step.modules[site]:
                zeros = torch.zeros(
                    step.plan.num_rows, step.sites[site].modules[module].out_features
                )
                frame.deltas.deltas.append(encode(zeros, pb.FP32))
        return frame


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is not a decoder-only causal LM")
    return decoder


def _sample_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length] for checks, the same on every machine; low ids (specials) left
    out.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.arange(batch * length).view(batch, length) * 7919 % max(1, vocab - 8) + min(
        7, vocab - 1
    )


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
