"""The layers that run in the cloud, and the two ways to go through them.

Alone, as a micro-batch, which may be a training one; or behind the tokens of a KV cache.

Shapes: K kept positions, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dlora.edge.choose_parts import choose_parts
from dlora.edge.conditions import Conditions
from dlora.edge.hosted import HostedAdapter, KeptVersions
from dlora.edge.in_flight import InFlight, Part, PartCount
from dlora.edge.kv_cache import CloudCache
from dlora.edge.link import Link
from dlora.edge.lora import FrozenModule, drops_out, wire_rank
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import MicroBatch
from dlora.edge.options import SplitOptions
from dlora.edge.passes import PassInput
from dlora.edge.prefixes import KnownPrefixes, Prefixes, about, layer_below
from dlora.edge.responder import Responder, begin
from dlora.edge.sites import ActiveSite, entries_of
from dlora.formulas import round_trips
from dlora.protocol.layers import EdgeLayers

__all__ = ["CloudLayers", "Kept"]


@dataclass
class Kept:
    """What a cloud is believed to have kept for a model."""

    versions: KeptVersions = field(default_factory=KeptVersions)
    """Of the adapter, on the hosted wire."""
    prefixes: KnownPrefixes = field(default_factory=KnownPrefixes)


@dataclass(frozen=True, kw_only=True)
class CloudLayers:
    """The cloud's layers, with these sites active and these modules frozen."""

    link: Link
    meter: Meter
    options: SplitOptions
    edge_layers: EdgeLayers
    sites: Sequence[ActiveSite]
    frozen: Sequence[FrozenModule]
    kept: Kept
    part_count: PartCount
    """How many parts of a micro-batch go at once."""

    def _hosted(self) -> HostedAdapter | None:
        """The adapter as it travels, on the hosted wire."""
        if self.options.wire != "hosted":
            return None
        most_bytes = self.link.description.limits.max_message_bytes // 2
        versions = self.kept.versions
        return HostedAdapter(self.sites, self.options.codecs.factors, versions, most_bytes)

    def _prefixes(self, new: PassInput) -> Prefixes | None:
        """What these tokens are called below the lowest site, where the cloud is to keep that."""
        layer = layer_below(self.sites)
        if not self.options.cache_prefix or layer < 0 or new.dense:
            return None
        depends_on = about(self.link.description, layer, self.edge_layers, self.frozen)
        ends = self.options.codecs.ends
        return Prefixes.of(new, layer, depends_on, self.kept.prefixes, ends)

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
        probe_modules: Sequence[str],
    ) -> MicroBatch | InFlight:
        """A micro-batch that runs these tokens alone, as one or in parts; nothing is sent yet.

        What is probed goes as one: norms of sums are not sums of norms.
        """
        probes = probe_modules if training else ()
        if training and not self.part_count.number:
            self.part_count.pick(*self._choose_parts(new, wants_input_grad))
        if self.part_count.number <= 1 or new.batch == 1 or probes:
            micro_batch = MicroBatch(
                **self._begun(new, self.meter, training, wants_input_grad, probes)
            )
            micro_batch.noise = self.options.noise
            return micro_batch

        # Masks of dropout: those of a part, whenever it runs.
        drops = any(drops_out(layer) for site in self.sites for layer in site.layers)
        seed = int(torch.randint(2**62, ())) if drops else 0

        def make(part: PassInput, number: int) -> Part:
            generator = torch.Generator(part.entry_BTD.device).manual_seed(seed + number)
            return Part(
                **self._begun(part, Meter(), training, wants_input_grad), generator=generator
            )

        options = self.options
        return InFlight(new, make, self.part_count, options.retry, self.meter, options.noise)

    def _choose_parts(self, new: PassInput, wants_input_grad: bool) -> tuple[int, str]:
        """(number of parts, why) for micro-batches such as this one."""
        if self.options.wire == "hosted":
            return 1, "auto: the hosted wire waits twice a micro-batch"

        def run() -> tuple[Meter, float]:
            now, meter, start = Conditions(new.entry_ND.device), Meter(), time.perf_counter()
            with torch.no_grad():
                arguments = self._begun(new, meter, training=False, wants_input_grad=False)
                MicroBatch(**arguments).forward()
            seconds = time.perf_counter() - start
            now.restore_rng()
            self.meter.add(meter)
            return meter, seconds

        trips = round_trips(
            len(self.sites),
            input_grad=wants_input_grad,
            drop_input_grads=self.options.input_grad == "drop",
        )
        return choose_parts(self.link, new.batch, trips, run)

    def _factored(self, training: bool) -> dict[str, Any]:
        """Fields of a first frame on the factored wire; none on the others."""
        if self.options.wire != "factored":
            return {}
        ranks = [wire_rank(layer) for site in self.sites for layer in site.layers]
        return {"factored": True, "rank": max(ranks, default=0) if training else 0}

    def _begun(
        self,
        new: PassInput,
        meter: Meter,
        training: bool,
        wants_input_grad: bool,
        probe_modules: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Arguments of a `MicroBatch` that runs these tokens, with its first frame."""
        hosted, probe = self._hosted(), entries_of(self.link.description, probe_modules)
        # Where gradients go further down, they need what would be left out.
        is_all_above = training and not wants_input_grad and not probe
        prefixes = self._prefixes(new) if is_all_above else None
        first = begin(
            self.link,
            self.sites,
            self.frozen,
            self.edge_layers,
            self.options.codecs,
            training=training,
            batch=new.batch,
            **self._factored(training),
            probe=probe,
            wants_input_grad=wants_input_grad,
            drop_input_grads=training and self.options.input_grad == "drop",
            **(hosted.fields(training=training) if hosted else {}),
            **(prefixes.fields() if prefixes else new.fields(self.options.codecs.ends)),
        )

        return {
            "link": self.link,
            "retry": self.options.retry,
            "meter": meter,
            "begin": first,
            "sites": self.sites,
            "device": new.entry_ND.device,
            "frozen": self.frozen,
            "edge_layers": self.edge_layers,
            "hosted": hosted,
            "prefixes": prefixes,
        }
