"""What the link costs a run: said before the first step, and after the third where it is much."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from transformers import TrainerCallback

from dlora.edge.choose_parts import measured_rtt
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.errors import PeerError, PeerLost
from dlora.formulas import round_trips
from dlora.kill_revive.config import KillReviveConfig
from dlora.training.settings import TrainSettings

__all__ = ["SayWaiting", "faster", "round_trips_of"]

log = logging.getLogger(__name__)

_SAID_AFTER: Final = 3
"""Steps of this part of a run; the first of them warms up and does not count."""
_MUCH: Final = 0.5
"""Of a step's seconds."""


class SayWaiting(TrainerCallback):
    """One line on the link before the first step, and one where most of a step waits for it.

    Waiting is what the edge waited while the cloud did not compute: round trips, bytes, queues.
    """

    def __init__(self, settings: TrainSettings, model: SplitModel) -> None:
        self.settings, self.model = settings, model
        self.steps, self.seconds, self.cost = 0, 0.0, Meter()
        self._before, self._start = Meter(), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what the link takes, once; begin to count."""
        if self.steps == 0:
            self._say_link()
        self._before, self._start = self.model.meter.copy(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count; after the third step say what waited, where that is most of it."""
        self.steps += 1
        if 1 < self.steps <= _SAID_AFTER:
            self.seconds += time.perf_counter() - self._start
            self.cost.add(self.model.meter - self._before)
        if self.steps == _SAID_AFTER:
            self._say_waiting()

    def _say_link(self) -> None:
        try:
            rtt_s = measured_rtt(self.model.link)
        except (PeerLost, PeerError):  # the step will wait for it, and say so
            return
        number = round_trips_of(self.model) * self.settings.gradient_accumulation_steps
        log.info(
            "a round trip takes %.1f ms; a step waits for %d of them, %.2f s, and for its bytes",
            *(1000 * rtt_s, number, number * rtt_s),
        )

    def _say_waiting(self) -> None:
        waited_s = self.cost.wait_s - self.cost.cloud_s
        if waited_s <= _MUCH * self.seconds:
            return
        counted = _SAID_AFTER - 1
        log.warning(
            "%.0f %% of a step is waiting for the link: %.1f of %.1f s. %s",
            *(100 * waited_s / self.seconds, waited_s / counted, self.seconds / counted),
            faster(self.settings),
        )


def round_trips_of(model: SplitModel) -> int:
    """Those of a training micro-batch that follow each other, with the sites that are active."""
    return round_trips(
        len(model.active_set.exchanged()),
        hosted=model.options.wire == "hosted",
        input_grad=model.trains_before_cloud,
        drop_input_grads=model.options.input_grad == "drop",
    )


def faster(settings: TrainSettings) -> str:
    """What would wait less than these settings, and where all choices stand."""
    ways, kr = [], settings.kill_revive
    if settings.wire != "hosted" and _may_be_hosted(kr):
        ways.append("--wire hosted --upload_consent (the cloud then sees the adapter itself)")
    if settings.wire == "hosted" and settings.gradient_accumulation_steps == 1:
        ways.append("--gradient_accumulation_steps 4 (the adapter goes up once a step)")
    in_parts = settings.wire != "hosted" and settings.batch_size > 1 and not settings.record
    if in_parts and settings.in_flight == 1:
        ways.append("--in_flight auto")
    said = f"Faster: {', or '.join(ways)}. " if ways else ""
    return f"{said}`dlora plan --server {settings.server} --link here` compares all ways."


def _may_be_hosted(kr: KillReviveConfig | None) -> bool:
    return kr is None or (kr.idle != "edge" and kr.policy != "output")
