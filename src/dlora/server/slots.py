"""Compute slots, shared between tenants by weight.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): a tenant's virtual time advances by the
seconds that its streams compute, divided by its weight, and the waiting tenant whose virtual time
is lowest is next. Here a piece of work has no length that is known when it starts: it ends when
its stream waits for the edge, or when it is asked to give way and comes to a place where it can.

`FairQueue` decides, told what time it is; `FairSlots` lets threads wait.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["FairQueue", "FairSlots"]

# A tenant gives way to a waiting one once it is ahead by this much, in compute of the waiting one:
# the heavier that is, the sooner. An exchange takes milliseconds, handing over about 0.1 ms.
_AHEAD_S: Final = 0.001
# Streams of one tenant take turns of this length: longer than most exchanges, which finish sooner
# when they are not cut in pieces.
_TURN_S: Final = 0.02
# What a tenant that was away may have before those that went on computing get their next turn: a
# pause between two exchanges costs nothing, a long one saves nothing up.
_CREDIT_S: Final = 0.05
# How often whoever waits looks whether it still wants to.
_POLL_S: Final = 0.2


@dataclass(eq=False)
class _Place:
    """A stream that waits or computes."""

    tenant: str
    weight: float
    ticket: object
    began: float = 0.0
    """When it began to compute."""
    began_work_s: float = 0.0
    """The queue's work at that time."""
    asked_back: bool = False


class FairQueue:
    """Who computes, and who is next. Pure: every method is told the time, in seconds.

    A stream that is ahead of a waiting tenant is asked to give way, which it does at its next
    `breathe`. The other begins at once: an operation cannot be cut, and one on a long prompt takes
    as long as many exchanges. So up to twice `slots` streams compute, the surplus for the rest of
    one operation. Meanwhile they share what the slots are charged.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: list[_Place] = []  # in the order in which they came
        self.computing: dict[object, _Place] = {}
        self._charged: dict[str, float] = {}  # virtual time of each tenant, finished pieces only
        self._now = 0.0  # the virtual time at which a tenant that was away comes back
        # What a stream would have been charged that has computed since the beginning, and when
        # that was last brought up to date.
        self._work_s = self._worked_until = 0.0

    def wait(self, tenant: str, weight: float, ticket: object, now: float) -> None:
        """Queue a stream of a tenant of this weight; a tenant that was away saved nothing up."""
        self._work(now)
        # A stream that has to give way is ahead of all others: nobody is brought up to it.
        for place in self.computing.values():
            if not place.asked_back:
                credit = min(self._work_s - place.began_work_s, _CREDIT_S) / place.weight
                self._now = max(self._now, self._virtual(place.tenant) - credit)

        present = any(place.tenant == tenant for place in (*self.waiting, *self.computing.values()))
        if not present:
            self._charged[tenant] = max(self._charged.get(tenant, 0.0), self._now)
        self.waiting.append(_Place(tenant, weight, ticket))

    def drop(self, ticket: object) -> None:
        """A stream does not want to wait any more."""
        self.waiting = [place for place in self.waiting if place.ticket is not ticket]

    def grant(self, now: float) -> list[object]:
        """Let those compute that may; return their tickets. Ask for what is in their way."""
        granted = []
        self._work(now)
        while (place := self._next()) is not None and self._may_start(place):
            self.waiting.remove(place)
            self._now = max(self._now, self._virtual(place.tenant))
            place.began, place.began_work_s = now, self._work_s
            self.computing[place.ticket] = place
            granted.append(place.ticket)
        return granted

    def release(self, ticket: object, now: float) -> float:
        """End a stream's piece and charge it to its tenant; return its seconds."""
        self._work(now)
        place = self.computing.pop(ticket)
        self._charged[place.tenant] += (self._work_s - place.began_work_s) / place.weight
        return now - place.began

    def due(self, now: float) -> tuple[object | None, float]:
        """The ticket that is next, if any waits, and the seconds until `grant` may do more for it
        although nothing else happens: infinite if never.
        """
        self._work(now)
        if (head := self._next()) is None:
            return None, math.inf
        waits = [self._until_ahead_s(place, head) for place in self.computing.values()]
        wait_s = min((wait for wait in waits if wait > 0), default=math.inf)
        return head.ticket, wait_s / self._speed()

    def _work(self, now: float) -> None:
        """Bring what streams are charged up to date."""
        self._work_s += (now - self._worked_until) * self._speed()
        self._worked_until = now

    def _speed(self) -> float:
        """Of each stream that computes, as a share of a slot."""
        return min(1.0, self.slots / max(1, len(self.computing)))

    def _virtual(self, tenant: str) -> float:
        """A tenant's virtual time with what it computes at the moment."""
        running = sum(
            (self._work_s - place.began_work_s) / place.weight
            for place in self.computing.values()
            if place.tenant == tenant
        )
        return self._charged[tenant] + running

    def _next(self) -> _Place | None:
        """Who is next: of equal virtual times the one that came first."""
        virtual = {name: self._virtual(name) for name in {place.tenant for place in self.waiting}}
        return min(self.waiting, key=lambda place: virtual[place.tenant], default=None)

    def _until_ahead_s(self, place: _Place, waiting: _Place) -> float:
        """Work until a computing stream has to give way to a waiting one; 0 or less: it has."""
        if place.tenant == waiting.tenant:
            return place.began_work_s + _TURN_S - self._work_s
        ahead = self._virtual(place.tenant) - self._virtual(waiting.tenant)
        return (_AHEAD_S / waiting.weight - ahead) * place.weight

    def _may_start(self, waiting: _Place) -> bool:
        """Whether the stream that is next may compute; if not, those in its way are asked."""
        surplus = len(self.computing) - self.slots + 1
        if surplus <= 0:
            return True

        # Those furthest ahead are asked, and only as many as it takes.
        until = {place: self._until_ahead_s(place, waiting) for place in self.computing.values()}
        asked = sorted((p for p in until if until[p] <= 0), key=lambda p: until[p])[:surplus]
        for place in asked:
            place.asked_back = True

        # Streams of the same tenant wait for each other: they would only fill the surplus.
        others = [place for place in asked if place.tenant != waiting.tenant]
        return len(others) == surplus and len(self.computing) < 2 * self.slots


class FairSlots:
    """A `FairQueue` for threads. Methods may be called from any of them."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = FairQueue(slots)
        self._clock = clock
        self._lock = threading.Lock()
        self._woken: dict[object, threading.Event] = {}  # of those that wait

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._queue.slots - len(self._queue.computing)

    @property
    def queue_length(self) -> int:
        """Streams that wait for a slot."""
        return len(self._queue.waiting)

    def acquire(
        self,
        tenant: str,
        weight: float,
        ticket: object,
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> bool:
        """Wait for a slot, up to `timeout_s` and while not `cancelled`; return whether it is there.

        `ticket` names the stream.
        """
        end, woken = self._clock() + timeout_s, threading.Event()
        with self._lock:
            self._queue.wait(tenant, weight, ticket, self._clock())
            self._woken[ticket] = woken
        try:
            while True:
                with self._lock:
                    self._grant()
                    woken.clear()
                    now = self._clock()
                    if ticket in self._queue.computing:
                        return True
                    if cancelled() or now >= end:
                        return False
                    # Only who is next has something to look at when time has passed.
                    head, due_s = self._queue.due(now)
                    pause_s = min(_POLL_S, end - now, due_s if head is ticket else _POLL_S)
                woken.wait(pause_s)
        finally:
            with self._lock:
                del self._woken[ticket]
                self._queue.drop(ticket)
                self._grant()

    def asked_back(self, ticket: object) -> bool:
        """Whether a stream that computes should let another. Cheap: called at every layer."""
        place = self._queue.computing.get(ticket)
        return place is not None and place.asked_back

    def release(self, ticket: object) -> float:
        """Give the slot back; return the seconds since it was acquired."""
        with self._lock:
            seconds = self._queue.release(ticket, self._clock())
            self._grant()
            return seconds

    def _grant(self) -> None:
        """Wake those that may compute, and whoever is next: it knows when to look again."""
        now = self._clock()
        for ticket in self._queue.grant(now):
            self._woken[ticket].set()
        head, _ = self._queue.due(now)
        if head is not None:
            self._woken[head].set()
