"""The cloud half: a frozen model whose PEFT deltas the edge computes.

    hidden -> [site: x -> wire -> deltas] -> hidden            arXiv:2404.05182

The model's own code runs untouched. Hooks on its linear modules call the edge at active
sites and return at once everywhere else. Knows nothing of data, adapters or training.

At load: trace the sites, put the hooks on, measure what a pass costs. Whoever serves the model lets
an edge try it (`trial.py`). Then a request is checked (`check`) and computed (`run`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dlora.cloud import load_checks
from dlora.cloud.caches import is_recurrent, measure_cache, new_cache
from dlora.cloud.costs import FlopCount, attention_of, other_flops, pass_flops
from dlora.cloud.describe import (
    Findings,
    describe_experts,
    describe_layers,
    describe_limits,
    describe_site,
    head_width,
)
from dlora.cloud.exchange import Pipe
from dlora.cloud.experts import find_experts
from dlora.cloud.frozen_store import FrozenStore, check_frozen_shape
from dlora.cloud.hooks import install_hooks
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.layers import CloudLayers
from dlora.cloud.leftovers import attributes_of, keep_apart
from dlora.cloud.limits import Limits
from dlora.cloud.measure import measure_memory
from dlora.cloud.parts import Parts
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.passes import Pass
from dlora.cloud.placement import device_of, share_offloaded
from dlora.cloud.quantize import give_back, quantization
from dlora.cloud.reasons import why_not
from dlora.cloud.requests import RequestCheck
from dlora.cloud.trace import TracedPass, trace
from dlora.cloud.zero_edge import sample_ids
from dlora.errors import DLoRAError, ModelError, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.decoder import called_outside, last_hidden
from dlora.protocol.sites import Site, output_sites
from dlora.protocol.weights import weight_of
from dlora.protocol.wire import WIRE_DTYPES

__all__ = ["CloudModel", "Limits"]


class CloudModel:
    """A transformers decoder-only model, frozen, hooked, measured and checked.

    `model_id` is the public name that edges write into their adapters. `allowed` decides by
    full module name which modules edges may adapt. Raises ModelError, which names the architecture
    and the reason, for a model that cannot be split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        model_id: str,
        allowed: Callable[[str], bool] = lambda name: True,
        limits: Limits | None = None,
    ) -> None:
        self.model_id = model_id
        self.findings = Findings()
        """Of a trial of the edge's half."""
        try:
            load_checks.check_kind(model)
            self.model = model.eval().requires_grad_(False)
            # Reading every weight takes as long as a few passes: it goes on beside them.
            with ThreadPoolExecutor(1, thread_name_prefix="dlora-fingerprint") as pool:
                self._prepare(limits or Limits(), allowed, pool)
        except DLoRAError:
            raise
        except Exception as error:
            name = type(model).__name__
            raise ModelError(f"{name} cannot be split: {why_not(model, error)}") from error

    def _prepare(self, limits: Limits, allowed: Callable[[str], bool], pool: Executor) -> None:
        """Trace, hook, check and measure the model."""
        model = self.model
        self.config_json = _public_config(model)
        fingerprint = pool.submit(_fingerprint, self.config_json, model, _weights(model))
        self.limits = _within_model(limits, model, share_offloaded(model))
        ids_BT = sample_ids(model, 2, min(8, self.limits.max_length))
        before = attributes_of(model)
        self.parts = parts = Parts.of(model, ids_BT)
        self.embedding = parts.lookups.embedding
        self.called_outside = called_outside(model, parts.decoder, ids_BT)
        self.called_outside |= parts.lookups.tables.keys()

        # Where adapters may sit, and the hooks that ask the edge there.
        self.cache_cost, cached = measure_cache(parts, ids_BT)
        counted = _CountedPass(parts, ids_BT)
        passes = self._traced_passes(counted)
        traced = trace(model, parts.decoder, [*passes, *([cached] if cached else [])], allowed)
        self.sites, self.unusable = traced.sites, traced.unusable
        if keep_apart(model, before):  # a cache may have worked by what a pass left
            self.cache_cost, _ = measure_cache(parts, ids_BT)
        linear = (*traced.sites, *output_sites(traced.sites))
        self.experts = find_experts(parts, traced.sites, len(linear), passes, allowed)
        """Fused weights of experts, which are adapted on the hosted wire."""
        self.all_sites = (*linear, *self.experts)
        # Modules outside the layers, such as OPT's projections of the embedding, have layer -1.
        self.layers_with_sites = sorted(
            {module.layer for site in self.sites for module in site.modules} - {-1}
        )
        install_hooks(model, self.sites, self.all_sites, parts.lookups)
        self.layers = CloudLayers(parts, self.limits, ids_BT)

        self.hidden_width = counted.hidden_BTD.shape[-1]
        load_checks.check_rounded(parts, ids_BT, counted.hidden_BTD)
        self.memory = measure_memory(
            *(parts, self.sites, len(self.layers_with_sites), self.layers),
            *(self.cache_cost, self.limits, ids_BT),
        )
        self.other_flops = other_flops(
            *(counted.flops, *ids_BT.shape, self.sites, len(self.layers_with_sites), model.config)
        )
        load_checks.check_layers(parts, self.sites, self.layers, self.limits, ids_BT)

        self.fingerprint = fingerprint.result()
        self.frozen_store = FrozenStore(self.limits.max_adapter_bytes, parts.weight.device)
        self.prefix_store = load_checks.prefix_store(parts, self.layers, self.limits, ids_BT)
        self.stores = [store for store in (self.frozen_store, self.prefix_store) if store]
        self.requests = self._request_check()
        give_back()  # what loading and measuring have left

    def _traced_passes(self, counted: _CountedPass) -> list[TracedPass]:
        """Passes to watch, of two shapes."""
        batch, length = counted.ids_BT.shape
        passes = [TracedPass(run=counted, batch=batch, length=length)]
        if self.limits.max_length > length:
            ids_BT = sample_ids(self.model, 1, min(21, self.limits.max_length))
            run = partial(self.parts.run, ids_BT)
            passes.append(TracedPass(run=run, batch=1, length=ids_BT.shape[1]))
        return passes

    def without_limits(self) -> CloudModel:
        """The same model for a trial, which is small: without limits on what passes may take."""
        other = copy.copy(self)
        other.limits = dataclasses.replace(
            self.limits, max_tokens=2**20, max_message_bytes=2**30, max_inflight_bytes=2**40
        )
        other.requests = other._request_check()
        return other

    def serve_as(self, findings: Findings) -> None:
        """Let edges do what a trial has found, before anything is served."""
        self.findings = findings
        if findings.no_cache:
            self.memory = dataclasses.replace(
                self.memory, cache_bytes_per_token=0, cache_bytes_per_sequence=0
            )
        self.requests = self._request_check()

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
            takes_position_ids="position_ids"
            in inspect.signature(type(self.parts.decoder).forward).parameters,
            deep_rollback=self.memory.has_cache and not any(new_cache(self.model).is_sliding),
            rollback=self.memory.has_cache and not is_recurrent(self.model),
            whole_prompts=self.cache_cost.whole_prompts,
            frozen_store=self.frozen_store,
            prefix_store=self.prefix_store,
            device=self.parts.weight.device,
            devices=_other_devices(self.model, self.all_sites, self.parts.weight.device),
        )

    # ----------------------------------------------------------------- description

    def describe(self) -> pb.Description:
        """What `Describe` answers, but for the edge files, which the server adds."""
        kind = quantization(self.model)
        dtype = str(self.parts.weight.dtype).removeprefix("torch.")
        return pb.Description(
            protocol_version=PROTOCOL_VERSION,
            model_id=self.model_id,
            fingerprint=self.fingerprint,
            config_json=self.config_json,
            compute_dtype=f"{dtype}, {kind} weights" if kind else dtype,
            embedding_width=sum(self.parts.lookups.widths),
            tables=self.parts.lookups.tables,
            hidden_width=self.hidden_width,
            head_width=head_width(self.model, self.hidden_width),
            sites=[describe_site(self.model, site) for site in self.sites],
            experts=[describe_experts(site) for site in self.experts],
            wire_dtypes=WIRE_DTYPES.values(),
            layers=describe_layers(self.layers, self.limits),
            limits=describe_limits(self.limits, self.memory, self.requests),
            full_head=self.findings.full_head,
            all_rows=self.findings.all_rows,
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
        again = running.layers_again.intersection(self.layers_with_sites)
        backward += len(again) * attention_of(request, self.model.config)
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
        cache = new_cache(self.model)
        if request.rollback:
            cache.activate_past_recording()

        while True:
            tokens = request.batch * request.length
            adapter_macs = tokens * sum(a.numel() + b.numel() for a, b in request.idle.values())
            kept_bytes = self.memory.of_cache(request.batch, request.cache_length)
            if request.hosted is not None:
                adapter_macs += tokens * request.hosted.macs
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
            self.parts,
            request,
            pipe,
            layer_width=self.layers.width,
            hosted=hosted,
            cache=cache,
            flops=flops,
        )

    def flops(self, request: PassRequest) -> tuple[int, int]:
        """(forward, backward) matmul FLOPs of the model in one pass; `pass_flops` says how."""
        return pass_flops(
            request, self.sites, self.layers_with_sites, self.model.config, self.other_flops
        )


class _CountedPass:
    """A forward of the decoder over tokens; matmul FLOPs and last hidden states of the first one.

    Those that come later are watched with trial adapters inside, which compute as well.
    """

    hidden_BTD: Tensor

    def __init__(self, parts: Parts, ids_BT: Tensor) -> None:
        self.parts, self.ids_BT = parts, ids_BT
        self.flops = 0

    def __call__(self) -> Any:
        """Run it; what the decoder returns."""
        with FlopCount() as count:
            output = self.parts.run(self.ids_BT)
        if not self.flops:
            self.flops, self.hidden_BTD = count.total, last_hidden(output).detach()
        return output


def _other_devices(
    model: PreTrainedModel, sites: Sequence[Site], first: torch.device
) -> dict[str, torch.device]:
    """Where modules and fused weights are that are not on the first device, by full name."""
    places = {
        module.name: model.get_parameter(module.name).device
        if site.experts
        else device_of(model.get_submodule(module.name))
        for site in sites
        for module in site.modules
    }
    return {name: device for name, device in places.items() if device != first}


def _within_model(limits: Limits, model: PreTrainedModel, offloaded: bool) -> Limits:
    """The limits with a sequence no longer than the model has positions for.

    A step must not keep weights that were loaded for it: with those, layers run again in backward.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # some say -1 for any number
        positions = limits.max_length
    max_length = min(limits.max_length, positions)
    recompute = limits.recompute or offloaded
    return dataclasses.replace(limits, max_length=max_length, recompute=recompute)


def _public_config(model: PreTrainedModel) -> str:
    """The model's configuration without paths of this machine."""
    config = model.config.to_dict()
    for key in ("_name_or_path", "quantization_config", "auto_map"):
        config.pop(key, None)
    return json.dumps(config, sort_keys=True)


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight and saved buffer by name; buffers as they are now, since passes may write."""
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: weight.clone() if name in buffers else weight
        for name, weight in model.state_dict().items()
    }


def _fingerprint(config_json: str, model: PreTrainedModel, weights: dict[str, Tensor]) -> str:
    """SHA-256 over configuration and every weight: equal means the same function."""
    digest = hashlib.sha256(config_json.encode())
    for name, weight in sorted(weights.items()):
        if weight.device.type == "meta":  # it is on disk, or in memory beside a GPU
            path, _, last = name.rpartition(".")
            weight = weight_of(model.get_submodule(path), last)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        data = weight.detach().to("cpu").contiguous()
        if data.numel():
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
