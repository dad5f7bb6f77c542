"""Bytes and round trips of a training micro-batch, from shapes: what a plan says of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dlora.edge.experts import experts_of
from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.formulas import round_trips, step_traffic
from dlora.protocol.channel import MODULE_FRAMES
from dlora.protocol.codecs import mix
from dlora.protocol.layers import layer_of
from dlora.protocol.wire import payload_bytes
from dlora.training.calibrate import widths
from dlora.training.settings import PlanSettings

__all__ = ["Traffic", "hosted_transfer_s", "staged_s", "traffic"]

# Bytes of messages beside the data of tensors.
_TENSOR_BYTES: Final = 17
_FRAME_BYTES: Final = 8  # around a frame's tensors
_COMPUTE_BYTES: Final = 5  # in the cloud's frames: how long they took
_BEGIN_BYTES: Final = 40  # in the first frame, beside what grows with the batch
_HASH_BYTES: Final = 34  # of a module that the cloud has kept


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What crosses the wire for a micro-batch, as the edge sees it."""

    sent: int
    received: int
    round_trips: int
    modules_sent: int = 0
    """Of the bytes sent: a hosted adapter."""
    modules_received: int = 0
    """Of the bytes received: its gradients."""
    module_frames: int = 1


def traffic(
    settings: PlanSettings,
    model: SplitModel,
    sites: Sequence[ActiveSite],
    *,
    parts: int = 1,
    by_hash: bool = False,
) -> Traffic:
    """A micro-batch with these active sites; each of `parts` has its frames and factors B.

    `by_hash`: the cloud has kept the hosted adapter.
    """
    if parts == 1:
        return _of_part(settings, model, sites, by_hash)
    each, more = divmod(settings.batch_size, parts)
    costs = [
        _of_part(replace(settings, batch_size=each + (number < more)), model, sites, False)
        for number in range(parts)
    ]
    return Traffic(
        sent=sum(one.sent for one in costs),
        received=sum(one.received for one in costs),
        round_trips=sum(one.round_trips for one in costs),
    )


def _of_part(
    settings: PlanSettings, model: SplitModel, sites: Sequence[ActiveSite], by_hash: bool
) -> Traffic:
    rows, hosted = settings.batch_size * settings.length, settings.wire == "hosted"
    kept = rows if model.edge_layers.last else settings.batch_size * settings.supervised
    first = model.edge_layers.first
    input_grad = any(layer_of(name) < first for name, _ in model.edge_layer_adapters())

    def payload(sites: Sequence[ActiveSite]) -> tuple[int, int]:
        return step_traffic(
            *(rows, kept, *widths(model)),
            _shapes(sites, settings.r),
            settings.wire_dtype,
            factored=settings.wire == "factored",
            hosted=hosted,
            input_grad=input_grad,
            drop_input_grads=settings.input_grad == "drop",
        )

    sent, received = payload(sites)
    if not (sites or input_grad):  # then the cloud has no backward
        ends = mix(settings.wire_dtype, settings.wire).ends
        sent -= payload_bytes(ends, kept, widths(model)[1])
    framing = _framing(settings, sites, input_grad)

    # In Begin: the mask, the fingerprint, kept positions, and the rest of it.
    about = rows + len(model.link.description.fingerprint) + 2 * kept + _BEGIN_BYTES
    total = replace(framing, sent=sent + framing.sent + about, received=received + framing.received)
    if not hosted:
        return total

    # The adapter is what there is more with sites than without.
    modules = sum(len(site.layers) for site in sites)
    around = modules * (2 * _TENSOR_BYTES + _FRAME_BYTES)
    modules_sent, modules_received = (
        whole - ends + around for whole, ends in zip(payload(sites), payload([]), strict=True)
    )
    if by_hash:
        without = total.sent - modules_sent + modules * _HASH_BYTES
        total, modules_sent = replace(total, sent=without), 0
    return replace(
        total,
        modules_sent=modules_sent,
        modules_received=modules_received,
        module_frames=max(1, min(MODULE_FRAMES, modules)),
    )


def _shapes(sites: Sequence[ActiveSite], r: int) -> list[tuple[int, list[tuple[int, int]]]]:
    return [
        (site.in_features, [(one.out_features, r * max(1, experts_of(one))) for one in site.layers])
        for site in sites
    ]


def _framing(settings: PlanSettings, sites: Sequence[ActiveSite], input_grad: bool) -> Traffic:
    """Round trips, and the bytes around tensors.

    Forward: deltas up, x down. Backward: dx up, if at all, and delta gradients down. At the ends:
    Begin, hidden states and their gradient, Done.
    """
    hosted, modules = settings.wire == "hosted", sum(len(site.layers) for site in sites)
    answers = modules * (2 if settings.wire == "factored" else 1)
    tensors, frames = answers + len(sites) + 1, 2 * len(sites) + 1
    dropped = settings.input_grad == "drop"
    unsent = max(0, len(sites) - 1) if dropped else 0  # frames of one tensor
    if hosted:  # A and B of every module, in frames of their own, and their gradients
        tensors, frames = answers * 2 + 1, 1 + answers
    return Traffic(
        sent=(tensors - unsent) * _TENSOR_BYTES + (frames - unsent) * _FRAME_BYTES,
        received=tensors * _TENSOR_BYTES
        + frames * _FRAME_BYTES
        + (2 if hosted else 2 * len(sites) + 2) * _COMPUTE_BYTES,
        round_trips=round_trips(
            len(sites), hosted=hosted, input_grad=input_grad, drop_input_grads=dropped
        ),
    )


def staged_s(transfer_s: float, compute_s: float, frames: int) -> float:
    """Seconds that a transfer in frames adds to a computation in as many stages of equal length.

    A stage needs its frame, or makes it, so one frame is always waited for. The way of the others
    is hidden while a stage takes as long as a frame.
    """
    frame_s, stage_s = transfer_s / frames, compute_s / frames
    return frame_s + (frames - 1) * max(0.0, frame_s - stage_s)


def hosted_transfer_s(
    wire: Traffic, up_s: float, down_s: float, forward_s: float, backward_s: float
) -> float:
    """Seconds of a hosted micro-batch in which the halves wait for bytes.

    `up_s` and `down_s` are a byte's; the cloud computes for `forward_s` and `backward_s`. Waited
    for are what is sent before and behind the adapter, hidden states, and what of the adapter and
    its gradients does not fit behind computing.
    """
    in_turns_s = (wire.sent - wire.modules_sent) * up_s
    in_turns_s += (wire.received - wire.modules_received) * down_s
    return (
        in_turns_s
        + staged_s(wire.modules_sent * up_s, forward_s, wire.module_frames)
        + staged_s(wire.modules_received * down_s, backward_s, wire.module_frames)
    )
