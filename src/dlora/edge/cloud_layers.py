"""The layers that run in the cloud, and the two ways to go through them.

Alone, as a micro-batch, which may be a training one; or behind the tokens of a KV cache.

Shapes: K kept positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor

from dlora.edge.hosted import HostedAdapter, KeptVersions
from dlora.edge.kv_cache import CloudCache
from dlora.edge.link import Link
from dlora.edge.lora import FrozenModule
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import MicroBatch
from dlora.edge.options import SplitOptions
from dlora.edge.passes import PassInput
from dlora.edge.responder import Responder, begin
from dlora.edge.sites import ActiveSite, entries_of
from dlora.protocol.layers import EdgeLayers

__all__ = ["CloudLayers"]


@dataclass(frozen=True, kw_only=True)
class CloudLayers:
    """The cloud's layers, with these sites active and these modules frozen."""

    link: Link
    meter: Meter
    options: SplitOptions
    edge_layers: EdgeLayers
    sites: Sequence[ActiveSite]
    frozen: Sequence[FrozenModule]
    versions: KeptVersions
    """Which adapter a cloud has kept, on the hosted wire."""

    def _hosted(self) -> HostedAdapter | None:
        """The adapter as it travels, on the hosted wire."""
        if self.options.wire != "hosted":
            return None
        most_bytes = self.link.description.limits.max_message_bytes // 2
        return HostedAdapter(self.sites, self.options.codecs.factors, self.versions, most_bytes)

    def extend(self, new: PassInput, cache: CloudCache, here: Iterable[LoraLayer]) -> Tensor:
        """Run tokens behind those of a KV cache; return kept hidden states, float32 [K, D].

        `here`: LoRA layers in use inside edge layers.
        """
        responder = Responder(
            self.link,
            self.meter,
            self.sites,
            self.options.codecs,
            new.entry_ND.device,
            frozen=self.frozen,
            edge_layers=self.edge_layers,
            hosted=self._hosted(),
        )
        cache.bind(responder, here)
        return cache.forward(new, self.options.retry)

    def micro_batch(
        self,
        new: PassInput,
        *,
        training: bool,
        wants_input_grad: bool,
        probe_modules: Iterable[str],
    ) -> MicroBatch:
        """A micro-batch that runs these tokens alone, with its first frame; nothing is sent yet."""
        hosted = self._hosted()
        first = begin(
            self.link,
            self.sites,
            self.frozen,
            self.edge_layers,
            self.options.codecs,
            training=training,
            batch=new.batch,
            factored=self.options.wire == "factored",
            probe=entries_of(self.link.description, probe_modules) if training else [],
            wants_input_grad=wants_input_grad,
            drop_input_grads=training and self.options.input_grad == "drop",
            **(hosted.fields(training=training) if hosted else {}),
            **new.fields(self.options.codecs.ends),
        )

        micro_batch = MicroBatch(
            self.link,
            self.options.retry,
            self.meter,
            first,
            self.sites,
            new.entry_ND.device,
            self.frozen,
            self.edge_layers,
            hosted,
        )
        micro_batch.noise = self.options.noise
        return micro_batch
