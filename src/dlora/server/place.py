"""What one call takes of the server: a place among its tenant's streams, memory, compute, traffic.

Every call that moves more than a few bytes has one, whatever it does: quotas cannot be gone around.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

from dlora.errors import PeerLost
from dlora.server.calls import Call
from dlora.server.slots import FairSlots
from dlora.server.tenants import Busy, Tenancy, Tenant

__all__ = ["Place"]


class Place:
    """Taken when it is made, on the loop; given back by `free` and `close`."""

    def __init__(self, tenancy: Tenancy, slots: FairSlots, tenant: Tenant, call: Call) -> None:
        """Raises Busy if there is no room for one more."""
        tenancy.open_stream(tenant)
        self.tenancy, self.slots, self.tenant, self.call = tenancy, slots, tenant, call
        self.timeout_s = call.timeout_s
        self.received_bytes = self.sent_bytes = self.tokens = 0
        self.compute_s = 0.0

        self.work: asyncio.Future[Any] | None = None
        """What its worker is at, if it has one: the place is taken until that has ended."""
        self.is_done = False  # the last frame is on its way: the edge may hang up
        self.has_slot = False
        self._reserved_bytes = self._pass_bytes = self._room_bytes = 0
        self._is_free = False
        self._lock = threading.Lock()

    # ----------------------------------------------------------------- traffic

    def count(self, received: int = 0, sent: int = 0) -> None:
        """Bytes of this call and its tenant. Raises Busy if too many have travelled."""
        self.received_bytes += received
        self.sent_bytes += sent
        self.tenancy.count_traffic(self.tenant, received, sent)
        self.tenancy.check_traffic(self.tenant)

    def count_tokens(self, tokens: int) -> None:
        """Rows of a finished pass."""
        self.tokens += tokens
        self.tenancy.count_tokens(self.tenant, tokens)

    # ----------------------------------------------------------------- memory

    def hold(self, frame_bytes: int) -> None:
        """Keep memory for the message that has just arrived, in place of the one before it.

        Room that a pass has for its frames is used first. Raises Busy if there is none, UsageError
        if the tenant may never have this much.
        """
        with self._lock:
            self._reserve(self._pass_bytes + max(0, frame_bytes - self._room_bytes))

    def admit(self, pass_bytes: int, room_bytes: int) -> None:
        """Reserve memory for what the stream now needs, with room in it for its frames.

        Raises as `hold` does.
        """
        with self._lock:
            self._reserve(pass_bytes + room_bytes)
            self._pass_bytes, self._room_bytes = pass_bytes + room_bytes, room_bytes

    def free(self) -> None:
        """Reserve nothing any more; what arrives later finds no room."""
        with self._lock:
            if not self._is_free:
                self._reserve(0)
            self._is_free = True

    def _reserve(self, wanted_bytes: int) -> None:
        if self._is_free:
            raise PeerLost("the stream has ended")
        self.tenancy.reserve(self.tenant, self._reserved_bytes, wanted_bytes)
        self._reserved_bytes = wanted_bytes

    # ----------------------------------------------------------------- compute

    def breathe(self) -> float:
        """Let a tenant compute that is behind this one; return the seconds that it took.

        Raises PeerLost if the call is closed, so that nothing more is computed for it.
        """
        if self.call.closed:
            raise PeerLost(self.call.closed)
        if not self.slots.asked_back(self):
            return 0.0

        # However long it takes: a pass that is given up in its middle would only come again.
        self.release_slot()
        return self.take_slot(math.inf)

    def take_slot(self, timeout_s: float | None = None) -> float:
        """Wait for a compute slot, on a worker; give up when the call closes meanwhile.

        Returns the seconds that it took. Raises PeerLost if the call closes, Busy if there is no
        slot within `timeout_s`, by default the call's.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        start = time.monotonic()
        try:
            has_slot = self.slots.acquire(
                self.tenant.name,
                self.tenant.limits.weight,
                self,
                timeout_s,
                lambda: self.call.closed is not None,
            )
        finally:
            waited_s = time.monotonic() - start
            self.tenancy.count_compute(self.tenant, queue_s=waited_s)

        if not has_slot:
            if self.call.closed:
                raise PeerLost(self.call.closed)
            self.tenancy.count_refusal(self.tenant, "queue")
            raise Busy(f"no compute slot for {timeout_s:.0f} s", retry_after_s=5.0, reason="queue")
        self.has_slot = True
        return waited_s

    def release_slot(self) -> None:
        """Give the compute slot back, if there is one."""
        if self.has_slot:
            self.has_slot = False
            seconds = self.slots.release(self)
            self.compute_s += seconds
            self.tenancy.count_compute(self.tenant, compute_s=seconds)
