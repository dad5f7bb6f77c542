"""What a training step will cost, before anything is trained: bytes, round trips, seconds.

Bytes and round trips follow from shapes (`planned_traffic.py`). Seconds are put together from what
is measured once (`calibrate.py`): a forward pass at all planned sites, a training step at the
lowest of them alone, a hosted step, one site's share of work on this machine, and the link, unless
it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from peft import LoraConfig
from torch import nn

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.choose_parts import best_parts, stations
from dlora.edge.link import Link
from dlora.edge.load import get_peft_model, load_adapter
from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite, refuse_head, shared_sites
from dlora.errors import PeerError, UsageError
from dlora.formulas import adapter_flops, forward_flops, seconds_in_flight
from dlora.kill_revive.config import OF_LORA
from dlora.kill_revive.units import check_measurable
from dlora.protocol.layers import layer_of
from dlora.training.calibrate import Calibration, calibrate, check, hosted_step
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_set import planned_sites
from dlora.training.planned_traffic import Load, hosted_transfer_s, traffic

__all__ = [
    "Prediction",
    "activate",
    "calibrated",
    "check",
    "line_of",
    "plan",
    "planned_model",
    "predict",
    "predict_evaluation",
]

log = logging.getLogger(__name__)

_STD: Final = 0.01
"""Of an adapter's weights where values do not matter."""
_FORWARD: Final = 1 / 3
"""Of the edge's work of a training step, what a forward pass takes: backward is twice as much."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One optimizer step, of one micro-batch or of several that are accumulated."""

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
    model = planned_model(settings, link)
    activate(settings, model)
    prediction = predict(settings, model, calibrate(settings, model))
    model.set_options(in_flight=prediction.in_flight)
    return model, prediction


def activate(settings: PlanSettings, model: SplitModel, load: Load | None = None) -> None:
    """Let the planned modules alone be active. Raises UsageError if the adapter has fewer."""
    if settings.sites is not None and not 1 <= settings.sites <= len(model.sites):
        raise UsageError(f"sites: got {settings.sites}, this adapter has {len(model.sites)}")
    chosen = [name for site in planned_sites(settings, model, load) for name in site.names]
    if len(chosen) < len(model.adapted_modules):
        model.set_active(chosen)


def planned_model(settings: PlanSettings, link: Link) -> SplitModel:
    """A model with the adapter that is asked for, at all of its sites.

    An adapter that exists has random weights in it: what is measured sends nothing of a user's.
    """
    options: dict[str, Any] = {
        "wire": settings.wire,
        "wire_dtype": settings.wire_dtype,
        "input_grad": settings.input_grad,
        "upload_consent": settings.upload_consent,
        "device": settings.device,
        "edge_layers": settings.edge_layers,
        "head_positions": "supervised",
    }
    if settings.adapter is not None:
        model = load_adapter(link, settings.adapter, **options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=_STD)
    else:
        model = get_peft_model(link, _planned_config(settings), **options)
    refuse_head(model, link.description)
    if settings.kr != "off":
        check_measurable(model)
    return model


def calibrated(
    settings: PlanSettings, model: SplitModel, wire_dtypes: Sequence[str] = ()
) -> Calibration:
    """Measure for choices of every wire: those of `model`, and a hosted step.

    Where the server refuses a hosted step, which takes it more memory than others, there is none.
    """
    measured = calibrate(settings, model, wire_dtypes)
    if measured.hosted is not None:
        return measured
    try:
        hosted = planned_model(replace(settings, wire="hosted", upload_consent=True), model.link)
        return replace(measured, hosted=hosted_step(settings, hosted))
    except (PeerError, UsageError) as error:
        log.info("no hosted step is planned: %s", error)
        return measured


def _planned_config(settings: PlanSettings) -> LoraConfig:
    """The adapter that is asked for, as far as its cost goes."""
    common: dict[str, Any] = {"r": settings.r, "target_modules": settings.targets}
    if settings.kind != "lora":
        return BottleneckConfig(kind=settings.kind, **common)
    more = {name: getattr(settings, name) or None for name in OF_LORA}
    return LoraConfig(rank_pattern=settings.rank_pattern, **more, **common)


def predict(
    settings: PlanSettings, model: SplitModel, measured: Calibration, load: Load | None = None
) -> Prediction:
    """Predict a step of batch_size x length tokens, of which `supervised` a row have a label.

    The choice is that of `settings`, whatever was measured: its wire, codecs, number of sites and
    parts in flight. Of several micro-batches the first alone carries a hosted adapter. `load` is
    what travels of a micro-batch, where `length` has padding in it.
    """
    sites = planned_sites(settings, model, load)
    first = _micro_batch(settings, model, sites, measured, load)
    more = settings.gradient_accumulation_steps - 1
    if not more:
        return first
    by_hash = settings.wire == "hosted"
    other = _micro_batch(settings, model, sites, measured, load, by_hash=by_hash)
    total: dict[str, Any] = {
        one.name: getattr(first, one.name) + more * getattr(other, one.name)
        for one in fields(Prediction)
    }
    return Prediction(**total | {"active_sites": first.active_sites, "in_flight": first.in_flight})


def predict_evaluation(
    settings: PlanSettings,
    model: SplitModel,
    measured: Calibration,
    load: Load,
    trained: Load | None = None,
) -> Prediction:
    """Predict a micro-batch of an evaluation, with `load` travelling: a forward pass alone.

    `trained` is what travels of one that is trained with.
    """
    sites = planned_sites(settings, model, trained)
    return _micro_batch(settings, model, sites, measured, load, training=False)


def _micro_batch(
    settings: PlanSettings,
    model: SplitModel,
    sites: Sequence[ActiveSite],
    measured: Calibration,
    load: Load | None = None,
    *,
    by_hash: bool = False,
    training: bool = True,
) -> Prediction:
    hosted = settings.wire == "hosted"
    wire = traffic(settings, model, sites, by_hash=by_hash, load=load, training=training)
    forward_s, backward_s = _cloud(settings, model, sites, measured)
    edge_s = measured.head_s + 2 * measured.edge_layers_s
    if not training and load is not None:
        forward_s *= load.tokens / (settings.batch_size * settings.length)
        backward_s = 0.0

    rtt_s, up_s, down_s = line_of(settings, measured)
    round_trips_s = wire.round_trips * rtt_s
    if hosted:
        transfers_s = [hosted_transfer_s(wire, up_s, down_s, forward_s, backward_s)]
    else:
        transfers_s = [wire.sent * up_s, wire.received * down_s]

    # One site stands for all; of hosted ones only messages are made here, which is more work than
    # their bytes. The input gradients of edge layers cost about what their forward does.
    wire_s = (wire.sent + wire.received) * measured.per_byte_s[settings.wire_dtype]
    if hosted and measured.hosted is not None:
        share = len(sites) / max(1, measured.hosted.sites)
        its_wire_s = measured.hosted.bytes * measured.per_byte_s[measured.hosted.wire_dtype]
        edge_s += share * max(0.0, measured.hosted.edge_s - edge_s - its_wire_s)
    elif not hosted:
        edge_s += len(sites) * measured.site_s.get(settings.wire, 0.0)
    edge_s *= 1.0 if training else _FORWARD

    # Over another link than the one there is, the halves are on two machines.
    together = settings.rtt_ms is None and measured.together
    cloud_s = forward_s + backward_s
    work = stations(cloud_s, edge_s + wire_s, *transfers_s, together=together)
    parts = _parts(settings, round_trips_s, work)
    if parts > 1:
        wire = traffic(settings, model, sites, parts=parts, load=load, training=training)
    return Prediction(
        active_sites=len(sites),
        sent_bytes=wire.sent,
        received_bytes=wire.received,
        round_trips=wire.round_trips,
        cloud_s=cloud_s,
        edge_s=edge_s,
        wire_s=wire_s,
        link_s=round_trips_s + sum(transfers_s),
        in_flight=parts,
        seconds=seconds_in_flight(parts, round_trips_s, work),
    )


def line_of(settings: PlanSettings, measured: Calibration) -> tuple[float, float, float]:
    """Seconds of (a round trip, a byte up, a byte down).

    A link that was given replaces round trips, and bytes where it is slower.
    """
    up_s, down_s = (
        max(measured.transfer_per_byte_s, 8 / (mbit * 1e6) if mbit else 0.0)
        for mbit in (settings.up_mbit, settings.down_mbit)
    )
    return measured.rtt_s if settings.rtt_ms is None else settings.rtt_ms / 1000, up_s, down_s


def _parts(settings: PlanSettings, round_trips_s: float, work: tuple[float, ...]) -> int:
    """Parts in flight: as asked for, or the best; hosted there is one, and no more than rows."""
    if settings.wire == "hosted":
        return 1
    if settings.in_flight == "auto":
        return best_parts(settings.batch_size, round_trips_s, work)[0]
    return min(settings.in_flight, settings.batch_size)


def _cloud(
    settings: PlanSettings, model: SplitModel, sites: Sequence[ActiveSite], measured: Calibration
) -> tuple[float, float]:
    """Seconds of the cloud: (forward, backward), with what it does at each site.

    What was measured holds for the sites and the wire that it was measured with. Fewer sites take
    their share of what sites cost, and backward ends at the lowest of them. Hosted, sites cost what
    a hosted step showed; factored, what the edge no longer computes comes to it.
    """
    forward_s = measured.lowest_forward_s
    backward_s = measured.lowest_s - measured.lowest_forward_s
    if sites and measured.lowest >= 0:
        top = model.link.description.layers.count - model.edge_layers.last
        depth = max(1, top - min(layer_of(site.names[0]) for site in sites))
        backward_s *= depth / max(1, top - measured.lowest)

    if settings.wire == "hosted" and measured.hosted is not None:
        one, share = measured.hosted, len(sites) / max(1, measured.hosted.sites)
        lowest_backward_s = measured.lowest_s - measured.lowest_forward_s
        forward_s += share * max(0.0, one.forward_s - measured.lowest_forward_s)
        backward_s += share * max(0.0, one.backward_s - lowest_backward_s)
        return forward_s, backward_s

    # Exchanges, of which one is in what was measured.
    if measured.sites > 1 and settings.wire != "hosted":
        each_s = max(0.0, measured.forward_s - measured.lowest_forward_s) / (measured.sites - 1)
        forward_s += each_s * max(0, len(sites) - 1)
        backward_s += each_s * max(0, len(sites) - 1)

    # Work that this wire leaves to the cloud and the plain one does not, at the cloud's speed.
    if settings.wire == "factored" and measured.wire == "plain":
        adapters, adapters_backward = _adapter_flops(settings, sites)
        speed_s = measured.lowest_forward_s / _frozen_flops(settings, model)
        forward_s += adapters * speed_s
        backward_s += adapters_backward * speed_s
    return forward_s, backward_s


def _frozen_flops(settings: PlanSettings, model: SplitModel) -> int:
    """FLOPs of the cloud's forward pass without adapters."""
    cloud = [
        site
        for site in shared_sites(model.link.description)
        if model.edge_layers.in_cloud(site.modules[0].layer)
    ]
    return max(1, forward_flops(cloud, settings.batch_size * settings.length))


def _adapter_flops(settings: PlanSettings, sites: Sequence[ActiveSite]) -> tuple[int, int]:
    """FLOPs that the cloud does for adapters on the factored wire: (forward, backward)."""
    rows, found = settings.batch_size * settings.length, []
    for training in (False, True):
        flops = 0
        for site in sites:
            for layer in site.layers:
                shape = (rows, site.in_features, settings.r, layer.out_features)
                flops += adapter_flops(*shape, training=training, input_grad=True)
                flops -= adapter_flops(*shape, training=training, input_grad=True, factored=True)
        found.append(flops)
    forward, both = found
    return forward, both - forward
