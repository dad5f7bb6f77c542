"""Checking what an edge asks for: a `Begin` or an `Extend` becomes a `PassRequest`, or an error.

Everything is checked before anything is allocated. UsageError is for what the edge's user can
mend, WireError for a broken edge, AdapterMissing for frozen modules that have to be put again.

Shapes: B batch, T tokens, N rows that travel, K kept rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlora.cloud.costs import MemoryCost
from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.hosted_request import check_hosted
from dlora.cloud.limits import Limits
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.prefixes import check_prefixes
from dlora.errors import AdapterMissing, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.codecs import codecs_of
from dlora.protocol.layers import EdgeLayers
from dlora.protocol.sites import Site
from dlora.protocol.wire import WIRE_DTYPES, unpack_mask

__all__ = ["RequestCheck"]

Modules = tuple[tuple[Site, tuple[int, ...]], ...]
"""Sites, and the indices of some of their modules."""


@dataclass(frozen=True, kw_only=True)
class RequestCheck:
    """What a loaded model serves. `begin` and `extend` check messages against it."""

    class_name: str
    model_id: str
    fingerprint: str
    limits: Limits
    memory: MemoryCost

    sites: tuple[Site, ...]  # those that read an input
    all_sites: tuple[Site, ...]
    """The same, and behind them those that read an output, and fused weights of experts."""
    num_layers: int
    """Decoder layers that edges may run some of; 0: they may run none."""

    takes_position_ids: bool
    deep_rollback: bool  # of a KV cache more than the last pass: no layer attends over a window
    rollback: bool = True  # tokens can be given back at all: no layer is recurrent
    whole_prompts: bool = False  # a cache takes tokens in one pass at first, then one by one

    frozen_store: FrozenStore
    prefix_store: FrozenStore | None = None
    device: torch.device  # of what goes in before the first layer
    devices: Mapping[str, torch.device] = field(
        default_factory=dict
    )  # of modules elsewhere, by name

    # ----------------------------------------------------------------- a stream's first request

    def begin(self, message: pb.Begin, owner: str, owner_bytes: int | None = None) -> PassRequest:
        """Check every field of a `Begin` of this owner, and what it costs.

        `owner_bytes`: what the owner may keep here, if there is a limit.
        """
        self._check_peer(message)
        self._check_cache(message)
        codecs = codecs_of(message)
        if unknown := codecs.dtypes - set(WIRE_DTYPES.values()):
            raise WireError(f"wire dtype number {min(unknown)} is not known")
        edge_layers = self._check_edge_layers(message)
        active = self._check_modules(message.sites, edge_layers)
        _check_gradients(message)

        without_tokens = PassRequest(
            codecs=codecs,
            training=message.training,
            batch=message.batch,
            embeddings=message.embeddings,
            # What depends on the tokens comes below, as it does for an `Extend`.
            length=0,
            mask_BT=None,
            position_ids_BT=None,
            rows_N=None,
            keep_K=torch.empty(0, dtype=torch.int64),
            # Adapters: the edge's, those that the cloud applies, and those to be measured.
            active=active,
            idle=self._check_idle(message.idle, active, owner, edge_layers),
            probe=self._check_modules(message.probe, edge_layers),
            factored=message.factored,
            rank=message.rank,
            hosted=check_hosted(
                message, active, self.frozen_store, owner, owner_bytes, self.devices
            ),
            cache_length=message.cache_length,
            rollback=message.rollback,
            edge_layers=edge_layers,
            wants_input_grad=message.wants_input_grad,
            drop_input_grads=message.drop_input_grads,
            recompute=self.limits.recompute and message.training,
        )
        _check_experts(without_tokens)
        request = self._with_tokens(without_tokens, message)
        prefixes = check_prefixes(message, active, edge_layers, self.prefix_store, owner)
        return dataclasses.replace(request, prefixes=prefixes)

    def _check_peer(self, message: pb.Begin) -> None:
        """Both halves have to speak the same protocol about the same model."""
        if message.protocol_version != PROTOCOL_VERSION:
            raise UsageError(
                f"the edge speaks protocol {message.protocol_version}, this cloud "
                f"{PROTOCOL_VERSION}: upgrade the older"
            )
        if message.fingerprint != self.fingerprint:
            raise UsageError(
                f"the edge expects the model {message.fingerprint[:12]!r}, this cloud serves "
                f"{self.fingerprint[:12]!r} "
                f"({self.model_id}): connect again to use it, or point the edge at the right server"
            )

    def _check_cache(self, message: pb.Begin) -> None:
        """Whether the stream may have the KV cache that it asks for."""
        if not message.cache_length:
            return
        if message.training or message.factored:
            raise WireError(
                "a KV cache is for generation on the plain or hosted wire, not for training"
            )
        if not self.memory.has_cache:
            raise UsageError(f"{self.class_name} is served without KV cache: use use_cache=False")
        if message.rollback and not self.rollback:
            raise WireError("rollback: the cache of this model cannot give tokens back")
        if message.cache_length > self.limits.max_length:
            raise UsageError(
                f"a KV cache of {message.cache_length} tokens is over this server's limit of "
                f"{self.limits.max_length}: ask for fewer new tokens"
            )

    def _check_edge_layers(self, message: pb.Begin) -> EdgeLayers:
        """The layers that this edge runs itself: no more than this server allows."""
        edge_layers = EdgeLayers(message.edge_first, message.edge_last, self.num_layers)
        if edge_layers.first > self.limits.edge_first or edge_layers.last > self.limits.edge_last:
            raise UsageError(
                f"this server lets edges hold the first {self.limits.edge_first} and the last "
                f"{self.limits.edge_last} layers, got {edge_layers.first} and {edge_layers.last}"
            )
        return edge_layers

    def _check_modules(self, entries: Sequence[pb.ActiveSite], edge_layers: EdgeLayers) -> Modules:
        """Sites and modules that exist, in ascending order, in the cloud, and allowed."""
        # Lengths first: a list of millions is never walked through.
        if len(entries) > len(self.all_sites):
            raise WireError(f"sites: got {len(entries)}, want at most {len(self.all_sites)}")

        checked = []
        previous = -1
        for entry in entries:
            if not previous < entry.site < len(self.all_sites):
                raise WireError(
                    f"sites: got {entry.site} after {previous}, want ascending, under "
                    f"{len(self.all_sites)}"
                )
            previous = entry.site

            site = self.all_sites[entry.site]
            modules = tuple(entry.modules[: len(site.modules) + 1])
            ascending = sorted(set(modules)) == list(modules)
            too_many = len(entry.modules) > len(site.modules)
            if not modules or too_many or not ascending or modules[-1] >= len(site.modules):
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
            checked.append((site, modules))
        return tuple(checked)

    def _check_idle(
        self,
        entries: Sequence[pb.IdleModule],
        active: Modules,
        owner: str,
        edge_layers: EdgeLayers,
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The frozen modules that a request refers to: (site, module) -> (A, B).

        Raises AdapterMissing if one of the owner's is not here, or not any more.
        """
        taken = {(site.index, module) for site, modules in active for module in modules}
        pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
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

            device = self.devices.get(module.name, self.device)
            pair = self.frozen_store.get(entry.hash, owner, device)
            if pair is None:
                raise AdapterMissing(
                    f"the frozen module of {module.name} is not here: put it and try again"
                )
            if (pair[0].shape[1], pair[1].shape[0]) != (site.in_features, module.out_features):
                raise WireError(f"idle: the frozen module of {module.name} has other widths")
            pairs[key] = pair
        return pairs

    # ----------------------------------------------------------------- later passes with a KV cache

    def extend(self, before: PassRequest, message: pb.Extend) -> PassRequest:
        """Check an `Extend` that comes after the pass `before`."""
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

        if self.whole_prompts and message.length > 1:
            raise WireError(f"extend: got {message.length} tokens, this cache takes one at a time")
        # The size is checked before tensors are made that are as large as it says.
        mask_BT, order, batch = before.mask_BT, None, len(message.order) or before.batch
        past = cached - message.drop
        self._check_size(batch, message.length, past, before)
        if message.order:
            if max(message.order) >= before.batch:
                raise WireError(
                    f"order: got {batch} rows up to {max(message.order)}, want rows under "
                    f"{before.batch}"
                )
            order = torch.tensor(message.order, dtype=torch.int64, device=self.device)
        if mask_BT is not None:
            mask_BT = mask_BT[:, :past] if order is None else mask_BT[:, :past][order]

        without_tokens = dataclasses.replace(
            before, batch=batch, mask_BT=mask_BT, past=past, drop=message.drop, order=order
        )
        return self._with_tokens(without_tokens, message)

    # ----------------------------------------------------------------- tokens of any request

    def _check_size(self, batch: int, length: int, past: int, stream: PassRequest) -> int:
        """What a pass of this stream costs in bytes, if that is within the limits."""
        limits, tokens, cache_length = self.limits, batch * length, stream.cache_length
        if tokens == 0:
            raise WireError(f"empty micro-batch: {batch} x {length} tokens")
        if past + length > limits.max_length:
            raise UsageError(
                f"a sequence of {past + length} tokens is over this server's limit of "
                f"{limits.max_length}: lower the maximum length"
            )
        if cache_length and past + length > cache_length:
            raise WireError(f"{past + length} tokens do not fit a KV cache of {cache_length}")

        cost = self.memory.of_stream(stream, batch, length, past)
        if tokens > limits.max_tokens or cost > limits.max_inflight_bytes:
            what = "activations" if not cache_length else "activations and KV cache"
            raise UsageError(
                f"a micro-batch of {batch} x {length} tokens is over this server's limits "
                f"({limits.max_tokens} tokens; it needs {cost / 2**20:.0f} MiB of {what}, "
                f"{limits.max_inflight_bytes / 2**20:.0f} are there): lower the batch "
                f"size{' and raise the accumulation' if stream.training else ''}"
            )
        return cost

    def _with_tokens(self, before: PassRequest, message: pb.Begin | pb.Extend) -> PassRequest:
        """`before` with the tokens of `message` behind its cached ones, checked."""
        batch, length, past = before.batch, message.length, before.past
        tokens = batch * length
        cost = self._check_size(batch, length, past, before)

        if len(message.keep) > tokens:
            raise WireError(f"keep: got {len(message.keep)} positions of {tokens} tokens")
        new_mask_BT = unpack_mask(message.attention_mask, batch, length)
        position_ids_BT = self._check_position_ids(message.position_ids, batch, length)
        keep_K = torch.tensor(message.keep, dtype=torch.int64)
        if len(keep_K) and (int(keep_K[-1]) >= tokens or bool((keep_K[1:] <= keep_K[:-1]).any())):
            raise WireError(f"keep: want ascending positions under {tokens}")

        # Where nothing is padded all rows travel, which None stands for.
        rows_N = None
        if new_mask_BT is not None and not message.dense:
            rows_N = new_mask_BT.reshape(-1).nonzero()[:, 0].to(self.device)

        return dataclasses.replace(
            before,
            length=length,
            mask_BT=_joined_mask(before.mask_BT, new_mask_BT, batch, length, past, self.device),
            position_ids_BT=position_ids_BT,
            rows_N=None if rows_N is not None and len(rows_N) == tokens else rows_N,
            keep_K=keep_K.to(self.device),
            embeddings=message.embeddings,
            cost_bytes=cost,
        )

    def _check_position_ids(
        self, position_ids: Sequence[int], batch: int, length: int
    ) -> Tensor | None:
        """[B, T] of positions under the limit; None where the edge leaves them to the model."""
        if not position_ids:
            return None
        tokens, max_length = batch * length, self.limits.max_length
        if len(position_ids) != tokens or max(position_ids) >= max_length:
            raise WireError(f"position_ids: want {tokens} values under {max_length}")
        if not self.takes_position_ids:
            raise UsageError(f"{self.class_name} takes no position_ids")
        ids = torch.tensor(position_ids, dtype=torch.int64)
        return ids.view(batch, length).to(self.device)


def _check_experts(request: PassRequest) -> None:
    """Fused weights of experts are active on the hosted wire alone, and nothing else."""
    fused = [site.modules[0].name for site, _ in request.active if site.experts]
    if fused and request.hosted is None:
        raise UsageError(
            f"experts: an adapter on {fused[0]} is computed in the cloud: use wire=hosted"
        )
    if any(site.experts for site, _ in request.probe):
        raise WireError("probe: a fused weight of experts has no norm of g^T x")


def _joined_mask(
    cached_BP: Tensor | None,
    new_BT: Tensor | None,
    batch: int,
    length: int,
    past: int,
    device: torch.device,
) -> Tensor | None:
    """[B, past + T]: the masks of cached and of new tokens; None where neither has any."""
    new_BT = None if new_BT is None else new_BT.to(device)
    if not past or (new_BT is None and cached_BP is None):
        return new_BT
    ones = torch.ones(batch, past + length, dtype=torch.int64, device=device)
    cached = ones[:, :past] if cached_BP is None else cached_BP
    new = ones[:, past:] if new_BT is None else new_BT
    return torch.cat([cached, new], dim=1)


def _check_gradients(message: pb.Begin) -> None:
    """Raises WireError for gradients that no training step has."""
    if message.probe and not (message.training and message.sites):
        raise WireError("probe: wants a training step with an active site")
    if message.wants_input_grad and not message.training:
        raise WireError("wants_input_grad: wants a training step")
    if message.drop_input_grads and (message.hosted or not message.training):
        raise WireError("drop_input_grads: wants a training step, plain or factored")
