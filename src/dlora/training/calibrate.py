"""What a plan is made of, measured once: passes over random tokens, one site's work, the link.

No data and no adapter are needed. Everything is the shortest time of a few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from dlora.edge.choose_parts import measured_rtt, on_one_machine
from dlora.edge.labels import IGNORE
from dlora.edge.lora import delta, factors
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import Codecs, mix
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import decode, encode
from dlora.training.plan_settings import PlanSettings

__all__ = [
    "Calibration",
    "HostedStep",
    "calibrate",
    "check",
    "evenly_spread",
    "hosted_step",
    "widths",
]

_PASSES: Final = 3
_PASSES_S: Final = 20.0
"""No pass is begun after so many seconds of the same."""


@dataclass(frozen=True)
class HostedStep:
    """Seconds of a training step over the hosted wire, at all sites."""

    sites: int
    forward_s: float
    """Of the cloud."""
    backward_s: float
    """Of the cloud."""
    edge_s: float
    """While the edge does not wait: the adapter to messages and back, head, loss, edge layers."""
    bytes: int
    """That crossed, both ways."""
    wire_dtype: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds on these two machines and the link between them."""

    wire: str
    """The wire that the passes went over."""
    sites: int
    """Active sites of the whole forward pass."""
    lowest: int
    """Decoder layer of the lowest of them; -1: of none."""
    forward_s: float
    """Of the cloud, in a forward pass at all of these sites."""
    lowest_forward_s: float
    """The same at the lowest alone."""
    lowest_s: float
    """Of the cloud, in a training step at the lowest site alone."""
    edge_layers_s: float
    """Forward of the layers on the edge."""
    site_s: Mapping[str, float]
    """By wire: one site's work on the edge, forward and backward, without messages."""
    head_s: float
    """LM head and loss, forward and backward."""
    per_byte_s: Mapping[str, float]
    """By wire dtype: from a tensor to a message's bytes and back to a tensor."""
    rtt_s: float
    transfer_per_byte_s: float
    """On the link there is, beside round trips."""
    together: bool
    """Both halves compute on one machine."""
    hosted: HostedStep | None
    """Of a hosted model: what plans of the hosted wire are made of."""


def calibrate(
    settings: PlanSettings,
    model: SplitModel,
    wire_dtypes: Sequence[str] = (),
) -> Calibration:
    """Measure with the model as it is: its wire, its active sites.

    `wire_dtypes` are those that will be planned with; none: that of the settings. What sites cost
    the cloud beside the layers' own work shows in forward, where all of them are, against forward
    with one; backward is taken to pay the same. How much longer backward takes than forward shows
    in a training step with one site alone, the lowest. The adapter is a fresh one: what is idle
    meanwhile loses nothing.
    """
    # One label a row: the edge's head has no part in this.
    batch = _random_batch(settings, model, supervised=1)
    rtt_s, sites = measured_rtt(model.link), model.active_set.exchanged()
    whole = [cost for _, cost in _passes(model, batch, training=False)]
    lowest_forward_s, lowest_s = _at_the_lowest(model, batch, sites)

    # Edge layers, as what the edge does when it does not wait. Without sites nothing of the hosted
    # wire's bytes hides behind computing either.
    bare: list[tuple[float, Meter]] = []
    if model.edge_layers or model.options.wire == "hosted":
        with model.disable_adapter():
            bare = list(_passes(model, batch, training=False))
    edge_layers_s = min((took - cost.wait_s for took, cost in bare), default=0.0)
    in_turns = [cost for _, cost in bare] if model.options.wire == "hosted" else whole

    rows = settings.batch_size * settings.length
    codecs = {name: mix(name, model.options.wire) for name in wire_dtypes or [settings.wire_dtype]}
    return Calibration(
        wire=model.options.wire,
        sites=len(sites),
        lowest=layer_of(sites[0].names[0]) if sites else -1,
        forward_s=min(cost.cloud_s for cost in whole),
        lowest_forward_s=lowest_forward_s,
        lowest_s=lowest_s,
        edge_layers_s=edge_layers_s if model.edge_layers else 0.0,
        site_s=_edge_site(settings, sites[0], rows) if sites else {},
        head_s=_edge_head(model, settings.batch_size * settings.supervised),
        per_byte_s={name: _conversion(one, rows, widths(model)[0]) for name, one in codecs.items()},
        rtt_s=rtt_s,
        transfer_per_byte_s=_of_bytes(in_turns, rtt_s),
        together=on_one_machine(model.link, rtt_s),
        hosted=hosted_step(settings, model) if model.options.wire == "hosted" else None,
    )


def hosted_step(settings: PlanSettings, model: SplitModel) -> HostedStep:
    """Run a step of a hosted model: there the cloud computes adapters, which no other wire shows.

    It takes two round trips, however many sites it has.
    """
    batch = _random_batch(settings, model, settings.supervised)
    forward_s = backward_s = edge_s = math.inf
    size = 0
    for took, cost in _passes(model, batch, training=True):
        first_s = sum(wait.cloud_s for wait in model.waits[:1])  # no wait: all layers are here
        forward_s = min(forward_s, first_s)
        backward_s = min(backward_s, cost.cloud_s - first_s)
        edge_s = min(edge_s, took - cost.wait_s)
        size = cost.sent_bytes + cost.received_bytes
    sites = len(model.active_set.exchanged())
    return HostedStep(sites, forward_s, backward_s, edge_s, size, settings.wire_dtype)


def _at_the_lowest(
    model: SplitModel, batch: dict[str, torch.Tensor], sites: Sequence[ActiveSite]
) -> tuple[float, float]:
    """Seconds of the cloud with the lowest site alone: forward, and forward with backward."""
    active, forward_s, both_s = model.active_modules, math.inf, math.inf
    try:
        if sites:
            model.set_active(sites[0].names)
        for _, cost in _passes(model, batch, training=True):
            both_s = min(both_s, cost.cloud_s)
            # Forward is over after two waits; hosted, and without a site, after one.
            one = not sites or model.options.wire == "hosted"
            took = sum(wait.cloud_s for wait in model.waits[: 1 if one else 2]) or cost.cloud_s
            forward_s = min(forward_s, took)
    finally:
        model.set_active(active)
    return forward_s, both_s


def _of_bytes(costs: Sequence[Meter], rtt_s: float) -> float:
    """Seconds a byte: what is left of waiting when computing and round trips are taken off."""
    size = costs[0].sent_bytes + costs[0].received_bytes
    transfer_s = min(cost.wait_s - cost.cloud_s for cost in costs)
    return max(0.0, transfer_s - costs[0].round_trips * rtt_s) / max(1, size)


def evenly_spread(model: SplitModel, count: int) -> list[ActiveSite]:
    """So many of the cloud's sites with adapters, in their order."""
    return [model.sites[int((i + 0.5) * len(model.sites) / count)] for i in range(count)]


def widths(model: SplitModel) -> tuple[int, int]:
    """Widths of what enters the cloud and of what leaves it."""
    description = model.link.description
    if model.edge_layers:
        return description.layers.width, description.layers.width
    return description.embedding_width, description.hidden_width


# ----------------------------------------------------------------- passes over random tokens


def check(settings: PlanSettings, model: SplitModel) -> tuple[Meter, float]:
    """Run a step over random tokens: (what it cost, seconds). Gradients are thrown away."""
    batch = _random_batch(settings, model, settings.supervised)
    runs = [_run(model, batch, training=True) for _ in range(_PASSES)]
    return runs[-1][1], min(seconds for seconds, _ in runs)


def _random_batch(
    settings: PlanSettings, model: SplitModel, supervised: int
) -> dict[str, torch.Tensor]:
    """Rows of random tokens, of which the last `supervised` have a label."""
    vocab = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(0, vocab, (settings.batch_size, settings.length)).to(model.device)
    labels_BT = ids_BT.clone()
    labels_BT[:, : settings.length - supervised] = IGNORE
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": labels_BT,
    }


def _passes(
    model: SplitModel, batch: dict[str, torch.Tensor], *, training: bool
) -> Iterator[tuple[float, Meter]]:
    """What some passes took and cost; fewer where they take long."""
    start = time.perf_counter()
    for number in range(_PASSES):
        if number == 0 or time.perf_counter() - start < _PASSES_S:
            yield _run(model, batch, training=training)


def _run(
    model: SplitModel, batch: dict[str, torch.Tensor], *, training: bool
) -> tuple[float, Meter]:
    """Seconds and cost of a training step without an update, or of its forward pass alone."""
    model.train()
    model.forget_kept()
    before, start = model.meter.copy(), time.perf_counter()
    with torch.set_grad_enabled(training):
        loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, model.meter - before


# ----------------------------------------------------------------- work on the edge


def _conversion(codecs: Codecs, rows: int, width: int) -> float:
    """Seconds a byte from a tensor to a message's bytes and back to a tensor."""
    x, best, size = torch.randn(rows, width), math.inf, 1
    for _ in range(_PASSES):
        start = time.perf_counter()
        data = encode(x, codecs.x).SerializeToString()
        decode(pb.Tensor.FromString(data), x.shape, "a probe")
        best, size = min(best, time.perf_counter() - start), len(data)
    return best / size


def _edge_site(settings: PlanSettings, site: ActiveSite, rows: int) -> dict[str, float]:
    """By wire: seconds of this machine for one site, without the wire's conversion."""
    x = torch.randn(rows, site.in_features, device=settings.device, requires_grad=True)
    best = {"plain": math.inf, "factored": math.inf}
    for _ in range(_PASSES):
        for wire in best:
            start = time.perf_counter()
            for layer in site.layers:
                if wire == "factored":
                    z, b = factors(layer, x)
                    (z.sum() + b.sum()).backward()
                else:
                    delta(layer, x).sum().backward()

            best[wire] = min(best[wire], time.perf_counter() - start)
            for parameter in site.parameters:
                parameter.grad = None
    return best


def _edge_head(model: SplitModel, kept: int) -> float:
    """Seconds of the LM head and the loss on the supervised positions."""
    head = model.get_output_embeddings()
    if head is None or not kept:
        return 0.0
    best = math.inf
    for _ in range(2):
        hidden = torch.randn(
            kept, head.weight.shape[1], device=head.weight.device, requires_grad=True
        )
        start = time.perf_counter()
        logits = head(hidden.to(head.weight.dtype))
        torch.nn.functional.cross_entropy(
            logits.float(), torch.zeros(kept, dtype=torch.int64, device=logits.device)
        ).backward()
        best = min(best, time.perf_counter() - start)
    return best
