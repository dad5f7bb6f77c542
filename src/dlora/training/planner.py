"""What a training step will cost, before anything is trained: bytes, round trips, seconds.

Bytes and round trips follow from shapes. Seconds are put together from what is measured over random
tokens: a forward pass at all planned sites, a training step at the lowest of them alone, one site's
share of work on this machine, and the link, unless it is given. No data and no adapter are needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from dlora.edge.choose_parts import best_parts, measured_rtt, on_one_machine, stations
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link
from dlora.edge.load import get_peft_model
from dlora.edge.lora import delta, factors
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.errors import UsageError
from dlora.formulas import seconds_in_flight, step_traffic
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import Codecs
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import decode, encode, payload_bytes
from dlora.training.settings import PlanSettings

__all__ = ["Prediction", "check", "plan"]

# Bytes of messages beside the data of tensors.
_TENSOR_BYTES: Final = 17
_FRAME_BYTES: Final = 8  # around a frame's tensors
_COMPUTE_BYTES: Final = 5  # in the cloud's frames: how long they took
_BEGIN_BYTES: Final = 40  # in the first frame, beside what grows with the batch


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One optimizer step of one micro-batch."""

    active_sites: int
    sent_bytes: int
    received_bytes: int
    round_trips: int
    cloud_s: float
    edge_s: float
    wire_s: float
    """Tensors to messages and back on the edge; the cloud's part of it is in `cloud_s`."""
    link_s: float
    """Round trips and transfer, in which both halves wait: measured, or as given where slower."""
    in_flight: int
    """Parts of the micro-batch that go at once: as asked for, or the best."""
    seconds: float
    """All of it. Of one part the halves take turns; of several one waits while another works."""


def plan(settings: PlanSettings, link: Link) -> tuple[SplitModel, Prediction]:
    """Build the adapter that is asked for, with `settings.sites` active, and predict a step of it.

    Raises UsageError if the adapter has fewer sites.
    """
    config = LoraConfig(r=settings.r, target_modules=settings.targets)
    model = get_peft_model(
        link,
        config,
        wire=settings.wire,
        wire_dtype=settings.wire_dtype,
        input_grad=settings.input_grad,
        upload_consent=settings.upload_consent,
        device=settings.device,
        edge_layers=settings.edge_layers,
        head_positions="supervised",
    )
    if settings.sites is not None:
        if not 1 <= settings.sites <= len(model.sites):
            raise UsageError(f"sites: got {settings.sites}, this adapter has {len(model.sites)}")
        chosen = [
            model.sites[int((i + 0.5) * len(model.sites) / settings.sites)]
            for i in range(settings.sites)
        ]
        model.set_active([name for site in chosen for name in site.names])
    prediction = _predict(settings, model)
    model.set_options(in_flight=prediction.in_flight)
    return model, prediction


def _predict(settings: PlanSettings, model: SplitModel) -> Prediction:
    """Predict a step of batch_size x length tokens, of which `supervised` a row have a label."""
    rows = settings.batch_size * settings.length
    supervised = settings.batch_size * settings.supervised
    sites = [(site, _active(model, site)) for site in model.sites]
    sites = [(site, layers) for site, layers in sites if layers]
    sent, received, round_trips = _traffic(settings, model, sites)

    # What is left of waiting when round trips are taken off is the time of bytes.
    measured = _calibrate(settings, model, sites[0][0] if sites else None)
    rtt_s, per_byte_s = measured_rtt(model.link), 0.0
    if measured.bytes:
        of_bytes_s = measured.transfer_s - measured.round_trips * rtt_s
        per_byte_s = max(0.0, of_bytes_s / measured.bytes)
    round_trips_s = round_trips * (rtt_s if settings.rtt_ms is None else settings.rtt_ms / 1000)
    transfer_s = 0.0
    for size, mbit in ((sent, settings.up_mbit), (received, settings.down_mbit)):
        transfer_s += size * max(per_byte_s, 8 / (mbit * 1e6) if mbit else 0.0)

    # One site stands for all; hosted ones are the cloud's. The input gradients of edge layers cost
    # about what their forward does.
    hosted = settings.wire == "hosted"
    timed = [] if hosted else sites[:1]
    sites_s = sum(_edge_site(settings, site, rows) for site, _ in timed) * len(sites)
    edge_s = sites_s + _edge_head(model, supervised) + 2 * measured.edge_layers_s
    wire_s = (sent + received) * _conversion(model.options.codecs, rows, _widths(model)[0])

    # Over another link than the one there is, the halves are on two machines.
    together = settings.rtt_ms is None and on_one_machine(model.link, rtt_s)
    work = stations(measured.cloud_s, edge_s + wire_s, transfer_s, together=together)
    parts = _parts(settings, round_trips_s, work)
    if parts > 1:
        sent, received, round_trips = _traffic_in_parts(settings, model, sites, parts)
    return Prediction(
        active_sites=len(sites),
        sent_bytes=sent,
        received_bytes=received,
        round_trips=round_trips,
        cloud_s=measured.cloud_s,
        edge_s=edge_s,
        wire_s=wire_s,
        link_s=round_trips_s + transfer_s,
        in_flight=parts,
        seconds=seconds_in_flight(parts, round_trips_s, work),
    )


def _parts(settings: PlanSettings, round_trips_s: float, work: tuple[float, ...]) -> int:
    """Parts in flight: as asked for, or the best; hosted there is one, and no more than rows."""
    if settings.wire == "hosted":
        return 1
    if settings.in_flight == "auto":
        return best_parts(settings.batch_size, round_trips_s, work)[0]
    return min(settings.in_flight, settings.batch_size)


def _widths(model: SplitModel) -> tuple[int, int]:
    """Widths of what enters the cloud and of what leaves it."""
    description = model.link.description
    if model.edge_layers:
        return description.layers.width, description.layers.width
    return description.embedding_width, description.hidden_width


def _traffic(
    settings: PlanSettings, model: SplitModel, sites: Sequence[tuple[ActiveSite, list[LoraLayer]]]
) -> tuple[int, int, int]:
    """(sent bytes, received bytes, round trips) of a step with these active sites and layers."""
    rows = settings.batch_size * settings.length
    edge_layers, factored = model.edge_layers, settings.wire == "factored"
    hosted = settings.wire == "hosted"
    kept = rows if edge_layers.last else settings.batch_size * settings.supervised
    input_grad = any(layer_of(name) < edge_layers.first for name, _ in model.edge_layer_adapters())
    shapes = [
        (site.in_features, [(layer.out_features, settings.r) for layer in layers])
        for site, layers in sites
    ]
    sent, received = step_traffic(
        rows,
        kept,
        *_widths(model),
        shapes,
        settings.wire_dtype,
        factored=factored,
        hosted=hosted,
        input_grad=input_grad,
        drop_input_grads=settings.input_grad == "drop",
    )
    if not (sites or input_grad):  # then the cloud has no backward
        sent -= payload_bytes(model.options.codecs.ends, kept, _widths(model)[1])

    # Framing. Forward: deltas up, x down. Backward: dx up, if at all, and delta gradients down. At
    # the ends: Begin, hidden states and their gradient, Done.
    answers = sum(len(layers) for _, layers in sites) * (2 if factored else 1)
    tensors, frames = answers + len(sites) + 1, 2 * len(sites) + 1
    round_trips = 2 * len(sites) + 1 + input_grad
    unsent = 0  # frames of one tensor
    if settings.input_grad == "drop":  # backward goes one way
        round_trips = len(sites) + 1 + bool(sites or input_grad)
        unsent = max(0, len(sites) - 1)
    if hosted:  # A and B of every module, in Begin and in Done
        tensors, frames = answers * 2 + 1, 1 + answers
        round_trips = 2 if sites or input_grad else 1
    sent += (tensors - unsent) * _TENSOR_BYTES + (frames - unsent) * _FRAME_BYTES
    received += tensors * _TENSOR_BYTES + frames * _FRAME_BYTES
    received += (2 if hosted else 2 * len(sites) + 2) * _COMPUTE_BYTES

    # In Begin: the mask, the fingerprint, kept positions, and the rest of it.
    sent += rows + len(model.link.description.fingerprint) + 2 * kept + _BEGIN_BYTES
    return sent, received, round_trips


def _traffic_in_parts(
    settings: PlanSettings,
    model: SplitModel,
    sites: Sequence[tuple[ActiveSite, list[LoraLayer]]],
    parts: int,
) -> tuple[int, int, int]:
    """The same where the rows go in parts: each has its own frames, and its own factors B."""
    each, more = divmod(settings.batch_size, parts)
    costs = [
        _traffic(replace(settings, batch_size=each + (number < more)), model, sites)
        for number in range(parts)
    ]
    sent, received, round_trips = (sum(amounts) for amounts in zip(*costs, strict=True))
    return sent, received, round_trips


def check(settings: PlanSettings, model: SplitModel) -> tuple[Meter, float]:
    """Run a step over random tokens: (what it cost, seconds). Gradients are thrown away."""
    batch = _random_batch(settings, model, settings.supervised)
    runs = [_run(model, batch, training=True) for _ in range(3)]
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


def _active(model: SplitModel, site: ActiveSite) -> list[LoraLayer]:
    """The site's layers that are exchanged."""
    names = set(model.active_modules)
    return [layer for name, layer in zip(site.names, site.layers, strict=True) if name in names]


def _conversion(codecs: Codecs, rows: int, width: int) -> float:
    """Seconds a byte from a tensor to a message's bytes and back to a tensor."""
    x, best, size = torch.randn(rows, width), math.inf, 1
    for _ in range(3):
        start = time.perf_counter()
        data = encode(x, codecs.x).SerializeToString()
        decode(pb.Tensor.FromString(data), x.shape, "a probe")
        best, size = min(best, time.perf_counter() - start), len(data)
    return best / size


@dataclass
class _Measured:
    """The shortest times of some passes over random tokens."""

    cloud_s: float = math.inf
    """A training step: forward and backward of the cloud, with what it does at each site."""
    edge_layers_s: float = 0.0
    """Forward of the edge layers."""
    transfer_s: float = math.inf
    """Of a forward pass, with these bytes and round trips: the edge waited and the cloud did not
    compute."""
    bytes: int = 0
    round_trips: int = 0


def _calibrate(settings: PlanSettings, model: SplitModel, lowest: ActiveSite | None) -> _Measured:
    """Measure what the plan's time is made of; `lowest` is the lowest active site.

    What sites cost the cloud beside the layers' own work shows in forward, where all of them are,
    against forward with one; backward is taken to pay the same. How much longer backward takes
    than forward shows in a training step with one site alone, the lowest. The adapter is a fresh
    one: what is idle meanwhile loses nothing.
    """
    # One label a row: the edge's head has no part in this.
    batch = _random_batch(settings, model, supervised=1)
    measured = _Measured()

    # Forward, at all sites.
    forward_s = math.inf
    for _ in range(3):
        _, cost = _run(model, batch, training=False)
        forward_s = min(forward_s, cost.cloud_s)
        measured.transfer_s = min(measured.transfer_s, cost.wait_s - cost.cloud_s)
        measured.bytes = cost.sent_bytes + cost.received_bytes
        measured.round_trips = cost.round_trips

    # Forward and backward, at the lowest site. Its forward is over after two waits.
    whole, lowest_forward_s = model.active_modules, math.inf
    try:
        if lowest:
            model.set_active([name for name in lowest.names if name in whole])
        for _ in range(3):
            _, cost = _run(model, batch, training=True)
            measured.cloud_s = min(measured.cloud_s, cost.cloud_s)
            waits = model.waits[: 2 if lowest else 1]
            took = sum(wait.cloud_s for wait in waits) or cost.cloud_s
            lowest_forward_s = min(lowest_forward_s, took)
    finally:
        model.set_active(whole)
    measured.cloud_s += 2 * max(0.0, forward_s - lowest_forward_s)

    # Edge layers, as what the edge does when it does not wait.
    if model.edge_layers:
        with model.disable_adapter():
            passes = [_run(model, batch, training=False) for _ in range(3)]
        measured.edge_layers_s = min(took - cost.wait_s for took, cost in passes)
    return measured


def _edge_site(settings: PlanSettings, site: ActiveSite, rows: int) -> float:
    """Seconds of this machine for one site, forward and backward, without the wire's conversion."""
    x = torch.randn(rows, site.in_features, device=settings.device, requires_grad=True)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for layer in site.layers:
            if settings.wire == "factored":
                z, b = factors(layer, x)
                (z.sum() + b.sum()).backward()
            else:
                delta(layer, x).sum().backward()

        best = min(best, time.perf_counter() - start)
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
