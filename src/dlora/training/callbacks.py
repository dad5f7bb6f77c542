"""What a run adds to transformers' training loop: costs, and two ways to stop.

The log of a step, and every checkpoint, know what the split cost (`AccountingCallback`). A signal
ends the run after the step that is under way (`StopOnSignal`). A gradient that is not finite ends
it before it is applied (`StopOnDivergence`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.edge.meter import Meter
from dlora.edge.responder import Wait
from dlora.errors import DivergedError, PeerLost
from dlora.files import write_json
from dlora.runs import checkpoint_of, read_kept

__all__ = ["AccountingCallback", "StopOnDivergence", "StopOnSignal", "time_line"]

log = logging.getLogger(__name__)

_METER_FILE: Final = "dlora_meter.json"
_LOOK_UP_S: Final = 0.2
"""How soon a signal is noticed while a lost server is waited for."""


class AccountingCallback(TrainerCallback):
    """Meters per log entry and in checkpoints. `total` spans all parts of a resumed run."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.before = Meter()  # of earlier parts of this run
        self.start = meter.copy()
        self.last, self.last_time = meter.copy(), time.monotonic()
        self.before_s, self.start_time = 0.0, self.last_time

    @property
    def total_s(self) -> float:
        """Seconds of all parts of this run."""
        return round(self.before_s + time.monotonic() - self.start_time, 1)

    @property
    def total(self) -> Meter:
        """Everything since the run's first step."""
        return self.before + (self.meter - self.start)

    def since_last_log(self) -> dict[str, float]:
        """Costs since the previous call, as numbers for the log."""
        now, snapshot = time.monotonic(), self.meter.copy()
        cost, seconds = snapshot - self.last, max(now - self.last_time, 1e-9)
        self.last, self.last_time = snapshot, now

        return {
            "seconds": seconds,
            "tokens_per_second": cost.tokens / seconds,
            "sent_mb": cost.sent_bytes / 1e6,
            "received_mb": cost.received_bytes / 1e6,
            "round_trips": cost.round_trips,
            "wait_seconds": cost.wait_s,
            "cloud_seconds": cost.cloud_s,
            "edge_adapter_gflops": cost.adapter_flops / 1e9,
            "edge_head_gflops": cost.head_flops / 1e9,
            "cloud_gflops": cost.cloud_flops / 1e9,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        """Take up the meter of the checkpoint that this run continues from."""
        folder = checkpoint_of(Path(args.output_dir), state.global_step)
        file = folder / _METER_FILE
        if state.global_step and file.is_file():
            self.before = Meter.from_saved(json.loads(file.read_text(encoding="utf-8")))
            self.before_s = float(read_kept(folder).get("seconds", 0.0))
        self.start, self.last = self.meter.copy(), self.meter.copy()
        self.last_time = self.start_time = time.monotonic()

    def save(self, folder: Path) -> None:
        """Keep the meter with a checkpoint."""
        write_json(folder / _METER_FILE, asdict(self.total))


def time_line(waits: Sequence[Wait]) -> list[list[Any]]:
    """The newest training micro-batch as [who, from, to] in seconds; who is edge, cloud or link.

    What the cloud did not compute of a wait is the link's (or a queue's), half of it before and
    half after. With parts in flight it is the first part's, beside which others are computed.
    """
    if not waits:  # the run ended in the first wait of a micro-batch
        return []
    spans: list[list[Any]] = []
    for wait, before in zip(waits, (None, *waits[:-1]), strict=True):
        zero, link_s = waits[0].start, (wait.end - wait.start - wait.cloud_s) / 2
        marks = [wait.start, wait.start + link_s, wait.end - link_s, wait.end]
        names = ["link", "cloud", "link"]

        # The edge worked between the wait before and this one.
        if before is not None:
            marks, names = [before.end, *marks], ["edge", *names]

        spans += [
            [name, round(start - zero, 6), round(end - zero, 6)]
            for name, start, end in zip(names, marks, marks[1:], strict=False)
            if end > start
        ]
    return spans


class StopOnSignal(TrainerCallback):
    """After a signal: save at the end of the step, then stop.

    While the server is lost no step ends: then what is finished is saved at once.
    """

    def __init__(self) -> None:
        self.asked = False
        """A signal has come."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Save and stop, if a signal has come."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Where a signal has broken an epoch off, do nothing that belongs to an epoch's end."""
        whole = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if self.asked and not whole:
            control.should_evaluate = control.should_save = False

    def sleep(self, seconds: float) -> None:
        """Wait before the next attempt to reach a lost server. Raises PeerLost after a signal."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_UP_S))
        if self.asked:
            raise PeerLost("stopped while the server was lost")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """First Ctrl-C, SIGTERM or SIGHUP: finish the step and save. Second: KeyboardInterrupt.

        A terminal that hangs up takes no more output: what is written then goes nowhere. Under
        `nohup` a SIGHUP stays without effect.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        terminals = [number for number in (1, 2) if os.isatty(number)]

        def handle(number: int, frame: Any) -> None:
            if number == signal.SIGHUP:
                _write_nowhere(terminals)
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            log.warning("finishing this step and saving; once more to stop at once")

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _write_nowhere(files: Sequence[int]) -> None:
    """Let writes to these open files succeed, and be lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in files:
        os.dup2(nowhere, number)
    os.close(nowhere)


class StopOnDivergence(TrainerCallback):
    """Refuse an update with gradients that are not finite: the adapter stays as it was."""

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Raises DivergedError."""
        for name, parameter in model.named_parameters() if model is not None else ():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise DivergedError(
                    f"step {state.global_step + 1}: the gradient of {name} is not finite. No "
                    "update was made with it, and saved checkpoints are fine. Lower "
                    "learning_rate, or use wire_dtype fp32."
                )
