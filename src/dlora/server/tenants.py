"""What tenants use of a server, and what they may: quotas, fair compute slots, counters.

A message that a tenant sees speaks of its own use alone, or of none: it must not tell that others
exist.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dlora.errors import PeerLost, UsageError
from dlora.server.identities import TenantLimits

__all__ = ["Busy", "FairSlots", "Tenancy", "Tenant"]

_HOUR_S = 3600.0
_MIB = 2**20
_NO_QUOTA = TenantLimits(
    max_streams=2**31, max_inflight_mib=2**31
)  # the server's own limits are reached first


class Busy(PeerLost):
    """The server has no room now; the edge is told when to try again."""

    def __init__(self, message: str, retry_after_s: float, reason: str = "busy") -> None:
        super().__init__(message, retry_after_s)
        self.reason = reason
        """For the provider's counters."""


@dataclass
class Tenant:
    """One tenant's use: now, and since the server started."""

    name: str
    limits: TenantLimits
    streams: int = 0
    inflight_bytes: int = 0
    allowance: float = 0.0
    """Bytes that may still travel before the tenant has to wait; below 0: too many have."""
    allowance_at: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    queue_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    """Status -> streams that ended so."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> refusals."""


class Tenancy:
    """Quotas of each tenant and of all together. Methods may be called from any thread."""

    def __init__(
        self,
        max_streams: int,
        max_inflight_bytes: int,
        limits: Callable[[str], TenantLimits] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits` gives those of a tenant; None: a tenant may have all that the server has."""
        self.max_streams, self.max_inflight_bytes = max_streams, max_inflight_bytes
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self.tenants: dict[str, Tenant] = {}
        self.streams = self.inflight_bytes = 0

    def tenant(self, name: str) -> Tenant:
        """A tenant's use, with its limits as they are now."""
        with self._lock:
            limits = _NO_QUOTA if self._limits is None else self._limits(name)
            found = self.tenants.get(name)
            if found is None:
                found = self.tenants[name] = Tenant(name, limits, allowance_at=self._clock())
                found.allowance = limits.mib_per_hour * _MIB
            found.limits = limits
            return found

    def open_stream(self, tenant: Tenant) -> None:
        """Count a stream in. Raises Busy if there is no room for it, or too much has travelled."""
        with self._lock:
            self._refill(tenant)
            if tenant.streams >= tenant.limits.max_streams:
                self._refuse(
                    tenant,
                    "streams",
                    f"busy: your quota of {tenant.limits.max_streams} streams is taken",
                    1.0,
                )
            if tenant.limits.mib_per_hour and tenant.allowance <= 0:
                wait = max(1.0, -tenant.allowance / (tenant.limits.mib_per_hour * _MIB / _HOUR_S))
                self._refuse(
                    tenant,
                    "traffic",
                    f"your quota of {tenant.limits.mib_per_hour:g} MiB an hour is used",
                    wait,
                )
            if self.streams >= self.max_streams:
                self._refuse(tenant, "server", "busy: all streams are taken", 1.0)
            tenant.streams += 1
            self.streams += 1

    def close_stream(self, tenant: Tenant, status: str) -> None:
        """Count it out."""
        with self._lock:
            tenant.streams -= 1
            self.streams -= 1
            tenant.finished[status] = tenant.finished.get(status, 0) + 1

    def reserve(self, tenant: Tenant, held: int, wanted: int) -> None:
        """Let a stream hold `wanted` bytes instead of `held`.

        Raises Busy if they are not free now, UsageError if the tenant may never have so many.
        """
        with self._lock:
            most = tenant.limits.max_inflight_mib * _MIB
            if wanted > most:
                raise UsageError(
                    f"this needs {wanted / _MIB:.0f} MiB of activations, your quota is "
                    f"{most / _MIB:.0f} MiB: use a "
                    "smaller batch or shorter sequences"
                )
            if wanted > held and tenant.inflight_bytes - held + wanted > most:
                self._refuse(
                    tenant,
                    "memory",
                    f"busy: your quota of {most / _MIB:.0f} MiB of activations is taken",
                    0.5,
                )
            if wanted > held and self.inflight_bytes - held + wanted > self.max_inflight_bytes:
                self._refuse(
                    tenant,
                    "server",
                    f"busy: no room now for {wanted / _MIB:.0f} MiB of activations",
                    0.5,
                )
            tenant.inflight_bytes += wanted - held
            self.inflight_bytes += wanted - held

    def count_traffic(self, tenant: Tenant, received: int = 0, sent: int = 0) -> None:
        """Bytes that have travelled."""
        with self._lock:
            self._refill(tenant)
            tenant.received_bytes += received
            tenant.sent_bytes += sent
            tenant.allowance -= received + sent

    def count_compute(
        self, tenant: Tenant, *, compute_s: float = 0.0, wait_s: float = 0.0, queue_s: float = 0.0
    ) -> None:
        """Seconds with a compute slot, seconds of waiting for the edge, seconds of waiting for a
        slot.
        """
        with self._lock:
            tenant.compute_s += compute_s
            tenant.wait_s += wait_s
            tenant.queue_s += queue_s

    def count_tokens(self, tenant: Tenant, tokens: int) -> None:
        """Rows of finished passes."""
        with self._lock:
            tenant.tokens += tokens

    def count_refusal(self, tenant: Tenant, reason: str) -> None:
        """A refusal that was decided elsewhere."""
        with self._lock:
            tenant.refused[reason] = tenant.refused.get(reason, 0) + 1

    def _refill(self, tenant: Tenant) -> None:
        now, rate = self._clock(), tenant.limits.mib_per_hour * _MIB
        tenant.allowance = min(
            rate, tenant.allowance + (now - tenant.allowance_at) * rate / _HOUR_S
        )
        tenant.allowance_at = now

    def _refuse(self, tenant: Tenant, reason: str, message: str, wait_s: float) -> None:
        tenant.refused[reason] = tenant.refused.get(reason, 0) + 1
        raise Busy(message, retry_after_s=wait_s, reason=reason)


class FairSlots:
    """Compute slots, given to the waiting tenant that has computed least (start-time fair
    queueing).

    A tenant's clock runs by the seconds it computes over its weight. One that comes back from a
    pause starts at the clock of those that compete now: it saved nothing up. Streams of one tenant
    go in turn.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.free = slots
        self._clock = clock
        self._changed = threading.Condition()
        self._virtual: dict[str, float] = {}
        self._now = 0.0  # virtual time: that of the tenant served last
        self._waiting: list[tuple[str, object]] = []
        self._holding: dict[object, tuple[str, float, float]] = {}

    @property
    def queue_length(self) -> int:
        """Streams that wait for a slot."""
        return len(self._waiting)

    def acquire(
        self,
        tenant: str,
        weight: float,
        ticket: object,
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> bool:
        """Wait for a slot, up to so long and not `cancelled`; `ticket` names the stream. False:
        there was none.
        """
        with self._changed:
            self._waiting.append((tenant, ticket))
            self._virtual[tenant] = max(self._virtual.get(tenant, 0.0), self._now)
            end = time.monotonic() + timeout_s
            try:
                while not (self.free > 0 and self._next() is ticket):
                    if cancelled() or time.monotonic() >= end:
                        return False
                    self._changed.wait(0.2)
            finally:
                self._waiting.remove((tenant, ticket))
                self._changed.notify_all()
            self.free -= 1
            self._now = max(self._now, self._virtual[tenant])
            self._holding[ticket] = (tenant, weight, self._clock())
            return True

    def release(self, ticket: object) -> float:
        """Give the slot back; return the seconds it was held."""
        with self._changed:
            tenant, weight, start = self._holding.pop(ticket)
            seconds = self._clock() - start
            self._virtual[tenant] = self._virtual.get(tenant, 0.0) + seconds / weight
            self.free += 1
            self._changed.notify_all()
            return seconds

    def _next(self) -> object:
        return min(self._waiting, key=lambda one: self._virtual[one[0]])[
            1
        ]  # the first of equals came first
