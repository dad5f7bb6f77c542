"""The cloud half: a frozen model whose PEFT deltas the edge computes.

    hidden -> [site: x -> wire -> deltas] -> hidden            arXiv:2404.05182

The model's own code runs untouched. Hooks on its linear modules call the edge at active
sites and return at once everywhere else. Knows nothing of data, adapters or training.

At load: trace the sites, put the hooks on, compare the split with the whole model, measure what
a pass costs. Then a request is checked (`check`) and computed (`run`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dlora.cloud import load_checks
from dlora.cloud.costs import MemoryCost, pass_flops
from dlora.cloud.exchange import Pipe
from dlora.cloud.frozen_store import FrozenStore, check_frozen_shape
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.layers import CloudLayers
from dlora.cloud.limits import Limits
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.passes import Pass, current_pass
from dlora.cloud.quantize import give_back, quantization
from dlora.cloud.requests import RequestCheck
from dlora.cloud.trace import trace
from dlora.cloud.zero_edge import sample_ids
from dlora.errors import UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.sites import Module, output_sites
from dlora.protocol.wire import WIRE_DTYPES

__all__ = ["CloudModel", "Limits"]


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
        load_checks.check_kind(model)
        self.model = model.eval().requires_grad_(False)
        self.model_id = model_id
        self.decoder, self.embedding = model.get_decoder(), model.get_input_embeddings()
        self.limits = _within_model(limits or Limits(), model)

        # Where adapters may sit, and the hooks that ask the edge there.
        batch, length = 2, min(8, self.limits.max_length)
        ids_BT = sample_ids(model, batch, length)
        traced = trace(
            model,
            self.decoder,
            lambda: self.decoder(inputs_embeds=self.embedding(ids_BT), use_cache=False),
            batch,
            length,
            allowed,
        )
        self.sites, self.unusable = traced.sites, traced.unusable
        self.all_sites = (*traced.sites, *output_sites(traced.sites))
        # Modules outside the layers, such as OPT's projections of the embedding, have layer -1.
        self.layers_with_sites = sorted(
            {module.layer for site in self.sites for module in site.modules} - {-1}
        )
        self._install_hooks()
        self.layers = CloudLayers(model, self.limits, ids_BT)

        self.hidden_width = load_checks.check_split(model, self.sites, ids_BT)
        self.memory = self._measure(ids_BT)
        load_checks.check_layers(model, self.sites, self.layers, self.limits, ids_BT)

        self.config_json = _public_config(model)
        self.fingerprint = _fingerprint(self.config_json, model)
        self.frozen_store = FrozenStore(self.limits.max_adapter_bytes, self.embedding.weight.device)
        self.prefix_store = self._prefix_store(ids_BT)
        self.requests = self._request_check()
        give_back()  # what loading and measuring have left

    def _measure(self, ids_BT: Tensor) -> MemoryCost:
        """What passes will cost in memory."""
        per_token, per_token_squared = load_checks.measure_activations(
            self.model, self.sites, self.limits.max_length
        )
        return MemoryCost(
            bytes_per_token=per_token,
            bytes_per_token_squared=per_token_squared,
            cache_bytes_per_token=load_checks.measure_cache(self.model, ids_BT),
            num_layers=len(self.layers_with_sites),
        )

    def _prefix_store(self, ids_BT: Tensor) -> FrozenStore | None:
        """Where prefixes are kept; None for a model that cannot begin with them, or no room."""
        most_bytes = self.limits.max_prefix_bytes
        can = most_bytes and load_checks.can_begin_at_layers(self.model, self.layers, ids_BT)
        return FrozenStore(most_bytes, torch.device("cpu")) if can else None

    @property
    def stores(self) -> list[FrozenStore]:
        """Where anything is kept for an owner from one request to the next."""
        return [self.frozen_store, *([self.prefix_store] if self.prefix_store else [])]

    def _request_check(self) -> RequestCheck:
        """What requests are checked against, as plain values."""
        return RequestCheck(
            class_name=type(self.model).__name__,
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            limits=self.limits,
            memory=self.memory,
            sites=self.sites,
            all_sites=self.all_sites,
            num_layers=self.layers.count,
            takes_position_ids="position_ids" in inspect.signature(self.decoder.forward).parameters,
            deep_rollback=not any(DynamicCache(config=self.model.config).is_sliding),
            frozen_store=self.frozen_store,
            prefix_store=self.prefix_store,
            device=self.embedding.weight.device,
        )

    # ----------------------------------------------------------------- description

    def describe(self) -> pb.Description:
        """What `Describe` answers, but for the edge files, which the server adds."""
        weight, kind = self.embedding.weight, quantization(self.model)
        dtype = str(weight.dtype).removeprefix("torch.")
        sites = [
            pb.SiteInfo(
                in_features=site.in_features,
                modules=[self._describe_module(module) for module in site.modules],
            )
            for site in self.sites
        ]

        return pb.Description(
            protocol_version=PROTOCOL_VERSION,
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            config_json=self.config_json,
            compute_dtype=f"{dtype}, {kind} weights" if kind else dtype,
            embedding_width=weight.shape[1],
            hidden_width=self.hidden_width,
            sites=sites,
            wire_dtypes=WIRE_DTYPES.values(),
            layers=self._describe_layers(),
            limits=self._describe_limits(),
        )

    def _describe_module(self, module: Module) -> pb.ModuleInfo:
        weight = self.model.get_submodule(module.name).weight
        return pb.ModuleInfo(
            name=module.name,
            out_features=module.out_features,
            allowed=module.allowed,
            weight_norm=weight.float().norm().item(),
        )

    def _describe_layers(self) -> pb.DecoderLayers:
        return pb.DecoderLayers(
            count=self.layers.count,
            width=self.layers.width,
            in_tuple=self.layers.in_tuple,
            max_first=self.limits.edge_first,
            max_last=self.limits.edge_last,
        )

    def _describe_limits(self) -> pb.Limits:
        return pb.Limits(
            max_tokens=self.limits.max_tokens,
            max_length=self.limits.max_length,
            max_message_bytes=self.limits.max_message_bytes,
            max_inflight_bytes=self.limits.max_inflight_bytes,
            bytes_per_token=self.memory.bytes_per_token,
            bytes_per_token_squared=self.memory.bytes_per_token_squared,
            cache_bytes_per_token=self.memory.cache_bytes_per_token,
            deep_rollback=self.requests.deep_rollback,
            prefix_bytes=0 if self.prefix_store is None else self.prefix_store.max_bytes,
        )

    # ----------------------------------------------------------------- what edges ask for

    def put_adapter(
        self, request: pb.PutAdapterRequest, owner: str = "local", owner_bytes: int | None = None
    ) -> pb.PutAdapterReply:
        """Keep frozen modules for requests of the same owner that refer to them by hash.

        Raises UsageError or WireError for what cannot be kept.
        """
        if request.fingerprint != self.fingerprint:
            raise UsageError("the served model has changed: connect again")
        widths = {
            (site.in_features, module.out_features)
            for site in self.sites
            for module in site.modules
        }
        for module in request.modules:
            check_frozen_shape(module, widths)
        hashes = [self.frozen_store.put(module, owner, owner_bytes) for module in request.modules]
        return pb.PutAdapterReply(hashes=hashes)

    def check(
        self, begin: pb.Begin, owner: str = "local", owner_bytes: int | None = None
    ) -> PassRequest:
        """Check every field of a `Begin` of this owner, before anything is allocated.

        `owner_bytes`: what the owner may keep here, as for `put_adapter`.
        Raises UsageError for what the edge's user can mend, WireError for a broken edge,
        AdapterMissing for frozen modules, and PrefixMissing for sequences, that are not here.
        """
        return self.requests.begin(begin, owner, owner_bytes)

    def run(self, request: PassRequest, pipe: Pipe) -> None:
        """Compute one micro-batch, or pass after pass with a KV cache until the edge leaves.

        Talks to the edge at every active site. Raises PeerLost if the edge goes away,
        WireError if it sends what does not fit.
        """
        pipe.admit(request.cost_bytes)
        hosted = None
        if request.hosted is not None:
            pipe.expect(request.hosted.frames)
            hosted = HostedAdapter(request.hosted, self.frozen_store, request.has_backward)
        if request.cache_length:
            self._run_cached(request, pipe, hosted)
            return

        running = self._pass(request, pipe, hosted)
        running.run()

        forward, backward = self.flops(request)
        forward += 2 * running.forward_macs
        backward += 2 * running.backward_macs
        probe = [
            running.probe_norms.get((site.index, module), 0.0)
            for site, modules in request.probe
            for module in modules
        ]
        module_grads: list[pb.HostedTensors] = []
        if hosted and request.has_backward:
            module_grads.extend(hosted.rest(running.exchange))
        done = pb.Done(
            forward_flops=forward,
            backward_flops=backward,
            probe=probe,
            input_grad=running.entry_grad,
            module_grads=module_grads,
        )
        running.exchange.send(pb.CloudFrame(done=done))

    def _run_cached(self, request: PassRequest, pipe: Pipe, hosted: HostedAdapter | None) -> None:
        """Pass after pass; `receive` raises when the edge has left."""
        cache = DynamicCache(config=self.model.config)
        if request.rollback:
            cache.activate_past_recording()

        while True:
            tokens = request.batch * request.length
            adapter_macs = tokens * sum(a.numel() + b.numel() for a, b in request.idle.values())
            kept_bytes = self.memory.of_cache(request.batch, request.cache_length)
            if request.hosted is not None:
                adapter_macs += tokens * request.hosted.numel
                kept_bytes += request.hosted.adapter_bytes(training=False)
            flops = self.flops(request)[0] + 2 * adapter_macs
            self._pass(request, pipe, hosted, cache, flops).run()

            # What the pass needed is free again while the edge thinks; cache and adapter stay.
            pipe.admit(kept_bytes)
            frame = pipe.receive()
            if frame.WhichOneof("kind") != "extend":
                raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'extend'")

            request = self.requests.extend(request, frame.extend)
            pipe.admit(request.cost_bytes)
            if request.order is not None:
                cache.reorder_cache(request.order)
            if request.rollback:
                cache.crop(-request.drop)

    def _pass(
        self,
        request: PassRequest,
        pipe: Pipe,
        hosted: HostedAdapter | None,
        cache: DynamicCache | None = None,
        flops: int = 0,
    ) -> Pass:
        return Pass(
            self.decoder,
            self.embedding.weight,
            request,
            pipe,
            layer_width=self.layers.width,
            hosted=hosted,
            cache=cache,
            flops=flops,
        )

    def flops(self, request: PassRequest) -> tuple[int, int]:
        """(forward, backward) matmul FLOPs of the model in one pass; `pass_flops` says how."""
        return pass_flops(request, self.sites, self.layers_with_sites, self.model.config)

    # ----------------------------------------------------------------- hooks

    def _install_hooks(self) -> None:
        """One pair of hooks a module, which ask the pass of their thread, if there is one."""
        output_site = {
            site.modules[0].name: site.index for site in self.all_sites if site.reads_output
        }
        for site in self.sites:
            for index, info in enumerate(site.modules):
                module = self.model.get_submodule(info.name)
                _hook(module, site.index, index, output_site[info.name])


def _hook(module: nn.Module, site: int, index: int, output_site: int) -> None:
    """Hook the module number `index` of a site."""

    def before(module: nn.Module, args: tuple[Tensor]) -> None:
        if (current := current_pass()) is not None:
            current.before(site, index, args[0])

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if (current := current_pass()) is None:
            return output
        return current.after(site, index, args[0], output, output_site)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _within_model(limits: Limits, model: PreTrainedModel) -> Limits:
    """The limits with a sequence no longer than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(limits.max_length, positions or limits.max_length)
    return dataclasses.replace(limits, max_length=max_length)


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
