"""What a training step will cost, before anything is trained: bytes, round trips, seconds.

Bytes and round trips follow from shapes. Seconds are put together from what was measured here over
random tokens: a forward pass at all planned sites, a training step at the lowest of them alone, one
site's share of work on this machine, and a link that is given or measured. No data and no adapter
are needed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from dlora.edge.link import Link
from dlora.edge.meter import Meter
from dlora.edge.model import IGNORE, SplitModel, get_peft_model
from dlora.edge.responder import ActiveSite, delta, factors
from dlora.errors import UsageError
from dlora.formulas import step_traffic
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import WIRE_DTYPES, decode, encode, payload_bytes
from dlora.training.settings import PlanSettings

__all__ = ["Prediction", "check", "plan"]

# Bytes of a protobuf tensor beside its data, and of the frame around its tensors.
_TENSOR_BYTES = 17
_FRAME_BYTES = 8
_COMPUTE_BYTES = 5  # of the cloud's frames: how long they took


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
    """Tensors to messages and back on the edge; what the cloud does of it is in `cloud_s`."""
    link_s: float
    """Round trips and transfer, in which both halves wait: as measured, or as given where that is
    slower.
    """

    @property
    def seconds(self) -> float:
        """All of it: the halves take turns."""
        return self.cloud_s + self.edge_s + self.wire_s + self.link_s


def plan(settings: PlanSettings, link: Link) -> tuple[SplitModel, Prediction]:
    """Build the adapter that is asked for, with so many sites active, and predict a step of it."""
    config = LoraConfig(r=settings.r, target_modules=settings.targets)
    model = get_peft_model(
        link,
        config,
        wire=settings.wire,
        wire_dtype=settings.wire_dtype,
        device=settings.device,
        edge_layers=settings.edge_layers,
    )
    model.head_positions = "supervised"
    if settings.sites is not None:
        if not 1 <= settings.sites <= len(model.sites):
            raise UsageError(f"sites: got {settings.sites}, this adapter has {len(model.sites)}")
        chosen = [
            model.sites[int((i + 0.5) * len(model.sites) / settings.sites)]
            for i in range(settings.sites)
        ]
        model.set_active([name for site in chosen for name in site.names])
    return model, _predict(settings, model)


def _predict(settings: PlanSettings, model: SplitModel) -> Prediction:
    """Predict a step of `batch_size` rows of `length` tokens, of which `supervised` have a
    label.
    """
    rows, supervised = (
        settings.batch_size * settings.length,
        settings.batch_size * settings.supervised,
    )
    edge_layers = model.edge_layers
    kept = rows if edge_layers.last else supervised
    active = [(site, _active(model, site)) for site in model.sites]
    active = [(site, modules) for site, modules in active if modules]
    description = model.link.description
    input_grad = any(layer_of(name) < edge_layers.first for name, _ in model.edge_layer_adapters())
    widths = (description.embedding_width, description.hidden_width)
    entry_width, exit_width = (description.layers.width,) * 2 if edge_layers else widths
    shapes = [
        (site.in_features, [(layer.out_features, settings.r) for layer in layers])
        for site, layers in active
    ]
    sent, received = step_traffic(
        rows,
        kept,
        entry_width,
        exit_width,
        shapes,
        settings.wire_dtype,
        factored=settings.wire == "factored",
        input_grad=input_grad,
    )
    if not (active or input_grad):  # then the cloud has no backward
        sent -= payload_bytes(WIRE_DTYPES[settings.wire_dtype], kept, exit_width)
    answers = sum(len(layers) for _, layers in active) * (2 if settings.wire == "factored" else 1)
    # Forward: deltas up, x down. Backward: dx up, delta gradients down. Ends: Begin, hidden and its
    # gradient, Done.
    sent += (answers + len(active) + 1) * _TENSOR_BYTES + (2 * len(active) + 1) * _FRAME_BYTES
    received += (answers + len(active) + 1) * _TENSOR_BYTES
    received += (2 * len(active) + 1) * _FRAME_BYTES + (2 * len(active) + 2) * _COMPUTE_BYTES
    sent += (
        rows + len(description.fingerprint) + 2 * kept + 40
    )  # mask, fingerprint, kept positions, the rest of Begin
    round_trips = 2 * len(active) + 1 + input_grad
    found = _calibrate(settings, model, active[0][0] if active else None)
    now_s = _measured_rtt(model.link)
    # What is left of waiting when round trips are taken off.
    per_byte = (
        max(0.0, found.transfer_s - found.round_trips * now_s) / found.bytes if found.bytes else 0.0
    )
    link_s = round_trips * (now_s if settings.rtt_ms is None else settings.rtt_ms / 1000)
    for size, mbit in ((sent, settings.up_mbit), (received, settings.down_mbit)):
        link_s += size * max(per_byte, 8 / (mbit * 1e6) if mbit else 0.0)
    return Prediction(
        active_sites=len(active),
        sent_bytes=sent,
        received_bytes=received,
        round_trips=round_trips,
        cloud_s=found.cloud_s,
        # The input gradients of held layers cost about what their forward does.
        edge_s=sum(_edge_site(settings, site, rows) for site, _ in active[:1]) * len(active)
        + _edge_head(model, supervised)
        + 2 * found.edge_layers_s,
        wire_s=(sent + received) * _conversion(settings, rows, entry_width),
        link_s=link_s,
    )


def check(settings: PlanSettings, model: SplitModel) -> tuple[Meter, float]:
    """Run a step over random tokens: what it cost, and seconds. The adapter's gradients are thrown
    away.
    """
    batch = _random_batch(settings, model, settings.supervised)
    runs = [_run(model, batch, training=True) for _ in range(3)]
    return runs[-1][1], min(seconds for seconds, _ in runs)


def _random_batch(
    settings: PlanSettings, model: SplitModel, supervised: int
) -> dict[str, torch.Tensor]:
    """Rows of random tokens, of which the last so many have a label."""
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocab, (settings.batch_size, settings.length)).to(model.device)
    labels = ids.clone()
    labels[:, : settings.length - supervised] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _run(
    model: SplitModel, batch: dict[str, torch.Tensor], *, training: bool
) -> tuple[float, Meter]:
    """Seconds and cost of a training step without an update, or of its forward pass alone."""
    model.train()
    before, start = model.meter.copy(), time.perf_counter()
    with torch.set_grad_enabled(training):
        loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, model.meter - before


def _active(model: SplitModel, site: ActiveSite) -> list[LoraLayer]:
    names = set(model.active_modules)
    return [layer for name, layer in zip(site.names, site.layers, strict=True) if name in names]


def _measured_rtt(link: Link) -> float:
    """The shortest of some calls that do next to nothing."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        link.ping()
        times.append(time.perf_counter() - start)
    return min(times)


def _conversion(settings: PlanSettings, rows: int, width: int) -> float:
    """Seconds a byte to make a message of a tensor, serialise it, and make a tensor of it again."""
    x, best, size = torch.randn(rows, width), math.inf, 1
    for _ in range(3):
        start = time.perf_counter()
        data = encode(x, WIRE_DTYPES[settings.wire_dtype]).SerializeToString()
        decode(pb.Tensor.FromString(data), x.shape, "a probe")
        best, size = min(best, time.perf_counter() - start), len(data)
    return best / size


@dataclass
class _Measured:
    """The least of some passes over random tokens."""

    cloud_s: float = math.inf
    """A training step: forward and backward of the cloud, with what it does at each site."""
    edge_layers_s: float = 0.0
    """Forward of layers that the edge holds."""
    transfer_s: float = math.inf
    """Of a forward pass with so many bytes and round trips: what the edge waited and the cloud did
    not compute.
    """
    bytes: int = 0
    round_trips: int = 0


def _calibrate(settings: PlanSettings, model: SplitModel, lowest: ActiveSite | None) -> _Measured:
    """Measure what the plan's time is made of; `lowest` is the lowest active site.

    What sites cost the cloud beside the layers' own work shows in forward, where all of them are,
    against one; backward is taken to pay the same. How much longer backward takes than forward
    shows in a training step with one site alone, the lowest. The adapter is a fresh one: what is
    idle meanwhile loses nothing.
    """
    batch = _random_batch(
        settings, model, supervised=1
    )  # the edge's head has nothing to do with this
    whole, found = model.active_modules, _Measured()
    forward_s = math.inf
    for _ in range(3):
        _, cost = _run(model, batch, training=False)
        forward_s = min(forward_s, cost.cloud_s)
        found.transfer_s = min(found.transfer_s, cost.wait_s - cost.cloud_s)
        found.bytes, found.round_trips = cost.sent_bytes + cost.received_bytes, cost.round_trips
    one_s = math.inf
    try:
        if lowest:
            model.set_active([name for name in lowest.names if name in whole])
        for _ in range(3):
            _, cost = _run(model, batch, training=True)
            found.cloud_s = min(found.cloud_s, cost.cloud_s)
            one_s = min(
                one_s,
                sum(wait.cloud_s for wait in model.waits[: 2 if lowest else 1]) or cost.cloud_s,
            )
    finally:
        model.set_active(whole)
    found.cloud_s += 2 * max(0.0, forward_s - one_s)
    if model.edge_layers:
        with model.disable_adapter():
            passes = [_run(model, batch, training=False) for _ in range(3)]
        found.edge_layers_s = min(took - cost.wait_s for took, cost in passes)
    return found


def _edge_site(settings: PlanSettings, site: ActiveSite, rows: int) -> float:
    """Seconds of this machine for one site, forward and backward, conversion for the wire left
    out.
    """
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
