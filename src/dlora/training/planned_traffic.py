"""Bytes and round trips of a training micro-batch, from shapes: what a plan says of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dlora.edge.lora import wire_rank
from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.formulas import round_trips, step_traffic
from dlora.protocol.channel import MODULE_FRAMES
from dlora.protocol.codecs import mix
from dlora.protocol.wire import payload_bytes
from dlora.training.calibrate import widths
from dlora.training.plan_settings import PlanSettings

__all__ = ["Load", "Traffic", "hosted_transfer_s", "staged_s", "traffic"]

# Bytes of messages beside the data of tensors.
_TENSOR_BYTES: Final = 17
_FRAME_BYTES: Final = 8  # around a frame's tensors
_COMPUTE_BYTES: Final = 5  # in the cloud's frames: how long they took
_BEGIN_BYTES: Final = 40  # in the first frame, beside what grows with the batch
_HASH_BYTES: Final = 34  # of a module that the cloud has kept


@dataclass(frozen=True)
class Load:
    """What of a micro-batch travels: tokens, and those at which something is learned.

    Means over many micro-batches need not be whole numbers.
    """

    tokens: float
    supervised: float

    @classmethod
    def of(cls, settings: PlanSettings) -> Load:
        """That of rows which all have the planned length."""
        rows = settings.batch_size
        return cls(rows * settings.length, rows * settings.supervised)

    def share(self, part: float) -> Load:
        """A part of it, from 0 to 1."""
        return Load(self.tokens * part, self.supervised * part)


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
    load: Load | None = None,
    training: bool = True,
) -> Traffic:
    """A micro-batch with these active sites; each of `parts` has its frames and factors B.

    `by_hash`: the cloud has kept the hosted adapter. `load` is what travels, where rows differ in
    length. Without `training` there is a forward pass alone, as in an evaluation.
    """
    load = load or Load.of(settings)
    if parts == 1:
        return _of_part(settings, model, sites, load, by_hash=by_hash, training=training)
    each, more = divmod(settings.batch_size, parts)
    shares = [(each + (number < more)) / settings.batch_size for number in range(parts)]
    costs = [
        _of_part(settings, model, sites, load.share(share), by_hash=False, training=training)
        for share in shares
    ]
    return Traffic(
        sent=sum(one.sent for one in costs),
        received=sum(one.received for one in costs),
        round_trips=sum(one.round_trips for one in costs),
    )


def _of_part(
    settings: PlanSettings,
    model: SplitModel,
    sites: Sequence[ActiveSite],
    load: Load,
    *,
    by_hash: bool,
    training: bool,
) -> Traffic:
    rows, hosted = round(load.tokens), settings.wire == "hosted"
    kept = rows if model.edge_layers.last else round(load.supervised)
    input_grad = model.trains_before_cloud

    def payload(sites: Sequence[ActiveSite]) -> tuple[int, int]:
        return step_traffic(
            *(rows, kept, *widths(model)),
            _shapes(sites),
            settings.wire_dtype,
            factored=settings.wire == "factored",
            hosted=hosted,
            input_grad=input_grad,
            drop_input_grads=settings.input_grad == "drop",
            training=training,
        )

    sent, received = payload(sites)
    if training and not (sites or input_grad):  # then the cloud has no backward
        ends = mix(settings.wire_dtype, settings.wire).ends
        sent -= payload_bytes(ends, kept, widths(model)[1])
    framing = _framing(settings, sites, input_grad, training=training)

    # In Begin: the mask, the fingerprint, kept positions, and the rest of it.
    about = rows + len(model.link.description.fingerprint) + 2 * kept + _BEGIN_BYTES
    total = replace(framing, sent=sent + framing.sent + about, received=received + framing.received)
    if not hosted:
        return total

    # The adapter is what there is more with sites than without.
    modules = sum(len(site.layers) for site in sites)
    around = modules * (2 * _TENSOR_BYTES + _FRAME_BYTES)
    more = [with_ - ends + around for with_, ends in zip(payload(sites), payload([]), strict=True)]
    return _hosted(total, *more, modules=modules, by_hash=by_hash, training=training)


def _hosted(
    total: Traffic, sent: int, received: int, *, modules: int, by_hash: bool, training: bool
) -> Traffic:
    """The same, with the hosted adapter's part of it named; `by_hash`: it does not travel."""
    if by_hash:
        total, sent = replace(total, sent=total.sent - sent + modules * _HASH_BYTES), 0
    return replace(
        total,
        modules_sent=sent,
        modules_received=received if training else 0,
        module_frames=max(1, min(MODULE_FRAMES, modules)),
    )


def _shapes(sites: Sequence[ActiveSite]) -> list[tuple[int, list[tuple[int, int]]]]:
    """(input width, (output width, rank) of each module) of every site."""
    return [
        (site.in_features, [(one.out_features, wire_rank(one)) for one in site.layers])
        for site in sites
    ]


def _framing(
    settings: PlanSettings, sites: Sequence[ActiveSite], input_grad: bool, *, training: bool
) -> Traffic:
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
    both = Traffic(
        sent=(tensors - unsent) * _TENSOR_BYTES + (frames - unsent) * _FRAME_BYTES,
        received=tensors * _TENSOR_BYTES
        + frames * _FRAME_BYTES
        + (2 if hosted else 2 * len(sites) + 2) * _COMPUTE_BYTES,
        round_trips=round_trips(
            len(sites), hosted=hosted, input_grad=input_grad, drop_input_grads=dropped
        ),
    )
    if training:
        return both
    forward_trips = 1 if hosted else len(sites) + 1
    return Traffic(sent=both.sent // 2, received=both.received // 2, round_trips=forward_trips)


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
