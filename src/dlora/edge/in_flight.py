"""Parts of a micro-batch in flight: its rows travel as several streams, and their waits overlap.

A micro-batch that goes as one waits for a round trip at every site. Here its rows are split, each
part is a `MicroBatch` with a stream and a thread of its own, and while one part waits another is
computed. Nothing depends on which comes first: rows are split by a fixed rule, dropout draws the
masks of each part from a generator of its own, and gradients are added in the order of the parts.
So a run repeats bit for bit for the same number of parts. With another number sums are put together
differently, and differ in their last bits.

Shapes: B batch, N rows that travel, K kept rows of the last hidden states, D width.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn

from dlora.edge.link import RetryPolicy
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import MicroBatch, add_squares
from dlora.edge.noise import Noise
from dlora.edge.passes import PassInput
from dlora.edge.responder import Wait
from dlora.errors import AdapterMissing, PeerLost
from dlora.proto import dlora_pb2 as pb

__all__ = ["InFlight", "MakePart", "Part", "PartCount", "split"]

log = logging.getLogger(__name__)

_LOOK_UP_S: Final = 0.2
"""How soon a part that pauses notices that another has failed."""

MakePart = Callable[[PassInput, int], "Part"]
"""Makes the part with these rows and this number; nothing of it is sent yet."""


@dataclass
class PartCount:
    """How many parts of a micro-batch a model has in flight, and why."""

    number: int
    """0: it is still to be picked."""
    why: str = "as asked for"
    changed: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called when the number has changed."""

    @classmethod
    def asked(cls, in_flight: int | str) -> PartCount:
        """As an option says it: a number, or "auto"."""
        return cls(0, "auto") if in_flight == "auto" else cls(int(in_flight))

    def wants_all_rows(self, description: pb.Description) -> bool:
        """Whether padding travels: where it, or how long a part is, changes results.

        A part is as long as its own longest row, unless padding travels.
        """
        by_length = description.limits.whole_prompts and self.number != 1
        return bool(description.all_rows or by_length)

    def pick(self, number: int, why: str) -> None:
        """Settle the number for the rest of the run."""
        self.number, self.why = number, why
        log.info("in_flight %d: %s", number, why)
        self.changed()

    def lower(self, number: int, error: PeerLost) -> None:
        """Take fewer for the rest of the run, as the server has refused more."""
        log.warning(
            "in_flight is lowered from %d to %d for the rest of the run, as the server has no room "
            "for more streams: %s",
            *(self.number, number, error),
        )
        self.why = f"lowered from {self.number}: {error}"
        self.number = number
        self.changed()


def split(whole: PassInput, count: int) -> list[PassInput]:
    """The rows of a pass as `count` parts in the same order, balanced by the tokens that travel.

    There is at least one row in each, so with few rows there are fewer parts. A part is as long as
    its own longest row, where padding on the right does not travel.
    """
    tokens_B = (torch.ones_like(whole.keep_BT) if whole.dense else whole.attended_BT).sum(dim=1)
    before = [0, *tokens_B.cumsum(0).tolist()]
    count = max(1, min(count, whole.batch))

    # A part ends where its share of all tokens is nearest.
    ends = [0]
    for number in range(1, count):
        share = before[-1] * number / count
        possible = range(ends[-1] + 1, whole.batch - count + number + 1)
        ends.append(min(possible, key=lambda row: abs(before[row] - share)))
    ends.append(whole.batch)

    parts = []
    for start, end in pairwise(ends):
        part = replace(whole.rows(torch.arange(start, end)), all_rows=whole.dense)
        if not whole.dense:
            used = (part.attended_BT | part.keep_BT).any(dim=0).nonzero()
            part = part.columns(slice(int(used.max()) + 1 if len(used) else 1))
        parts.append(part)
    return parts


# ----------------------------------------------------------------- one part


class _Stopped(Exception):
    """Another part has failed: this one is given up."""


class _Refused(Exception):
    """The server had no room for this part's stream."""

    def __init__(self, error: PeerLost) -> None:
        super().__init__(str(error))
        self.error = error


def _sleep(this: weakref.ref[Part], sleep: Callable[[float], None], seconds: float) -> None:
    """A part's pause, which ends when another part has failed."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and (part := this()) and not part.stopped:
        sleep(min(left, _LOOK_UP_S))


class Puts:
    """Sees to it that what a server lacks is put there by one part, and not by each."""

    def __init__(self) -> None:
        self.lock, self.number = threading.Lock(), 0


class Part(MicroBatch):
    """One part, on a thread of its own; it has a meter of its own, too."""

    puts: Puts
    """The same for all parts."""
    gives_way = True
    """While others may hold streams and wait for this one: do not wait for room."""
    stopped = False
    own_squares: dict[tuple[int, int], float] | None = None
    """Sums of squared deltas of its rows, where they are asked for."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # No reference to itself: what is let go of has to end its stream at once.
        this, sleep = weakref.ref(self), self.retry.sleep
        self.retry = replace(self.retry, sleep=lambda seconds: _sleep(this, sleep, seconds))
        self.waits = []
        self.span = 0.0, 0.0
        """Start and end of the newest phase, on the clock of `Wait`."""

    def under_autocast(self) -> Tensor:
        """Forward with the autocast of the thread that made this part: it is of the thread."""
        with self.conditions.autocast():
            return self.forward()

    def stop(self) -> None:
        """Let its thread end, wherever it waits. Called by others."""
        self.stopped = True
        if (stream := self.stream) is not None:  # the thread itself lets go of it
            stream.close()

    def _forward_once(self) -> Tensor:
        self.puts_seen = self.puts.number
        return super()._forward_once()

    def opened(self) -> None:
        """Raises `_Stopped` where `stop` came before the stream was there to be closed."""
        if self.stopped:
            raise _Stopped

    def put_frozen(self, error: AdapterMissing) -> None:
        self.close()
        with self.puts.lock:
            if self.puts.number == self.puts_seen:
                super().put_frozen(error)
                self.puts.number += 1

    def _lost(self, error: PeerLost) -> None:
        if self.stopped:
            raise _Stopped from error
        if self.gives_way and error.retry_after_s is not None:
            self.note_lost(error)
            raise _Refused(error)
        super()._lost(error)


# ----------------------------------------------------------------- all of them


class InFlight:
    """A micro-batch in parts: what `MicroBatch` is to autograd and to a model, for several.

    `make` makes the parts, anew where the server has room for fewer. `noise` is added to the
    gradient of the kept hidden states of all rows together.
    """

    def __init__(
        self,
        whole: PassInput,
        make: MakePart,
        count: PartCount,
        retry: RetryPolicy,
        meter: Meter,
        noise: Noise,
    ) -> None:
        self.whole, self.make, self.count = whole, make, count
        self.retry, self.meter, self.noise = retry, meter, noise
        self.parts: list[Part] = []
        self.input_grad: Tensor | None = None
        """After backward, where it is asked for: gradient of what went in, [N, D]."""
        self._waits: list[Wait] = []
        self._squares: dict[tuple[int, int], float] | None = None

    def measure(
        self,
        waits: list[Wait],
        probe_norms: list[dict[str, float]],
        output_squares: dict[tuple[int, int], float] | None,
    ) -> None:
        """As of `MicroBatch`; waits are those of the first part. Nothing in parts is probed."""
        self._waits, self._squares = waits, output_squares

    def forward(self) -> Tensor:
        """Return the kept last hidden states of all rows, in order: float32 [K, hidden_width].

        Raises what the first part of those that failed has raised.
        """
        refused_before = False
        for wait in self.retry.attempts():
            self._make_parts()
            outcomes = self._together([part.under_autocast for part in self.parts])
            refusals = [one.error for one in outcomes if isinstance(one, _Refused)]
            if not refusals:
                break

            # Those that have a stream would keep it for a backward that cannot come. A stream of
            # just before may not be over yet: only who is refused again takes fewer.
            self.close()
            if refused_before and (number := len(outcomes) - len(refusals)):
                self.count.lower(number, refusals[0])
            refused_before = True
            wait(refusals[0])

        for part in self.parts:
            part.gives_way = False
        return torch.cat(outcomes)

    def _make_parts(self) -> None:
        puts = Puts()
        pieces = split(self.whole, self.count.number)
        self.parts = [self.make(piece, number) for number, piece in enumerate(pieces)]
        for number, part in enumerate(self.parts):
            part.puts = puts
            part.own_squares = None if self._squares is None else {}
            part.measure(self._waits if number == 0 else [], [], part.own_squares)

    def backward(self, grad_KD: Tensor) -> dict[nn.Parameter, Tensor]:
        """Take the gradient of the kept hidden states; return that of every trainable parameter."""
        grad_KD = self.noise.on_tail(grad_KD)
        pieces = grad_KD.split([len(part.begin.keep) for part in self.parts])
        outcomes: list[Mapping[nn.Parameter, Tensor]] = self._together(
            [partial(part.backward, piece) for part, piece in zip(self.parts, pieces, strict=True)]
        )

        # In the order of the parts: a sum in another order has other last bits.
        grads: dict[nn.Parameter, Tensor] = {}
        for outcome in outcomes:
            for parameter, grad in outcome.items():
                grads[parameter] = grads[parameter] + grad if parameter in grads else grad
        rows = [part.input_grad for part in self.parts if part.input_grad is not None]
        self.input_grad = torch.cat(rows) if rows else None
        if self._squares is not None:
            for part in self.parts:
                add_squares(self._squares, part.own_squares or {})
        return grads

    def close(self) -> None:
        """Drop all streams."""
        for part in self.parts:
            part.close()

    # -------------------------------------- threads

    def _together(self, runs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each of these returns, one a part; or the `_Refused` that it raised.

        Raises the first error by part; the others were stopped. No thread is left.
        """
        outcomes: list[Any] = [None] * len(runs)
        waited, now = [len(part.waits or ()) for part in self.parts], time.perf_counter()
        for part in self.parts:
            part.span = now, now

        def work(number: int) -> None:
            part, start = self.parts[number], time.perf_counter()
            try:
                # Were backward to hand work to the thread of a device, it would wait for the one
                # that waits for it here.
                with torch.autograd.set_multithreading_enabled(False):
                    outcomes[number] = runs[number]()
            except BaseException as error:
                outcomes[number] = error
                if not isinstance(error, _Refused):
                    self._stop()
            part.span = start, time.perf_counter()

        threads = [
            threading.Thread(target=work, args=(number,), name="dlora-part", daemon=True)
            for number in range(len(runs))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            self._count(waited)

        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, _Stopped | _Refused):
                raise outcome
        return outcomes

    def _stop(self) -> None:
        for part in self.parts:
            part.stop()

    def _count(self, waited: Sequence[int]) -> None:
        """Move what the parts have counted into the meter; `waited`: waits that were counted."""
        cost = Meter()
        for part in self.parts:
            cost.add(part.meter)
            part.meter = Meter()

        spans = [
            (*part.span, (part.waits or [])[before:])
            for part, before in zip(self.parts, waited, strict=True)
        ]
        cost.wait_s = _joint_wait_s(spans)
        cost.cloud_s = min(cost.cloud_s, cost.wait_s)
        cost.micro_batches = int(cost.micro_batches == len(self.parts))
        self.meter.add(cost)


def _joint_wait_s(spans: Sequence[tuple[float, float, Sequence[Wait]]]) -> float:
    """Seconds in which no part was at work; of each its start, end, and waits in between."""
    busy: list[tuple[float, float]] = []
    for start, end, waits in spans:
        marks = [start, *(mark for wait in waits for mark in (wait.start, wait.end)), end]
        busy += zip(marks[::2], marks[1::2], strict=True)

    idle_s, until = 0.0, min(start for start, _, _ in spans)
    for start, end in sorted(busy):
        idle_s += max(0.0, start - until)
        until = max(until, end)
    return idle_s
