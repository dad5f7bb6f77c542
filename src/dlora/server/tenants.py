"""What tenants use of a server, and what they may: quotas and counters.

A message that a tenant sees speaks of its own use alone, or of none: it must not reveal that others
exist.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from dlora.errors import PeerLost, UsageError
from dlora.server.identities import TenantLimits

__all__ = ["Busy", "Tenancy", "Tenant"]

_HOUR_S = 3600.0
_MIB = 2**20
# The server's own limits are reached first.
_NO_QUOTA = TenantLimits(max_streams=2**31, max_inflight_mib=2**31)


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
    """Activations and KV caches reserved for its streams."""
    allowance: float = 0.0
    """Bytes that may still travel before the tenant has to wait; below 0: too many have."""
    allowance_at: float = 0.0
    """When the allowance was last brought up to date, on the tenancy's clock."""
    received_bytes: int = 0
    sent_bytes: int = 0
    tokens: int = 0
    """Rows of finished passes."""
    compute_s: float = 0.0
    wait_s: float = 0.0
    """For the edge's frames."""
    queue_s: float = 0.0
    """For compute slots."""
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
        known: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`limits` gives those of a tenant; None: a tenant may have all that the server has.

        `known` names the tenants for whom a minimum of streams and memory is kept free.
        """
        self.max_streams, self.max_inflight_bytes = max_streams, max_inflight_bytes
        self._limits, self._clock, self._known = limits, clock, known
        self._lock = threading.Lock()
        self.tenants: dict[str, Tenant] = {}
        self.streams = self.inflight_bytes = 0
        self.failed_logins = 0
        """Calls that nobody known made."""

    def tenant(self, name: str) -> Tenant:
        """A tenant's use, with its limits as they are now."""
        with self._lock:
            limits = _NO_QUOTA if self._limits is None else self._limits(name)
            tenant = self.tenants.get(name)
            if tenant is None:
                tenant = self.tenants[name] = Tenant(name, limits, allowance_at=self._clock())
                tenant.allowance = limits.mib_per_hour * _MIB
            tenant.limits = limits
            return tenant

    def has_room(self, tenant: Tenant) -> bool:
        """Whether there is room for one more stream now, whatever has travelled."""
        with self._lock:
            return tenant.streams < tenant.limits.max_streams and self.streams < self._room(
                tenant, tenant.streams, 1, is_memory=False
            )

    def open_stream(self, tenant: Tenant) -> None:
        """Count a stream in. Raises Busy if there is no room for it, or too much has travelled."""
        with self._lock:
            self._refill(tenant)
            limits = tenant.limits
            if tenant.streams >= limits.max_streams:
                message = f"busy: your quota of {limits.max_streams} streams is taken"
                self._refuse(tenant, "streams", message, 1.0)

            # Whoever is over comes back when the hourly rate has made up for it.
            if limits.mib_per_hour and tenant.allowance <= 0:
                wait_s = max(1.0, -tenant.allowance / (limits.mib_per_hour * _MIB / _HOUR_S))
                message = f"your quota of {limits.mib_per_hour:g} MiB an hour is used"
                self._refuse(tenant, "traffic", message, wait_s)

            if self.streams + 1 > self._room(tenant, tenant.streams, 1, is_memory=False):
                self._refuse(tenant, "server", "busy: all streams are taken", 1.0)
            tenant.streams += 1
            self.streams += 1

    def close_stream(self, tenant: Tenant, status: str) -> None:
        """Count a stream out that ended with a status."""
        with self._lock:
            tenant.streams -= 1
            self.streams -= 1
            tenant.finished[status] = tenant.finished.get(status, 0) + 1

    def reserve(self, tenant: Tenant, reserved_bytes: int, wanted_bytes: int) -> None:
        """Let a stream have `wanted_bytes` of memory instead of `reserved_bytes`.

        Raises Busy if they are not free now, UsageError if the tenant may never have this many.
        """
        with self._lock:
            quota = tenant.limits.max_inflight_mib * _MIB
            more = wanted_bytes - reserved_bytes
            if wanted_bytes > quota:
                raise UsageError(
                    f"this needs {wanted_bytes / _MIB:.0f} MiB of activations, your quota is "
                    f"{quota / _MIB:.0f} MiB: use a smaller batch or shorter sequences"
                )
            if more > 0 and wanted_bytes > (most := self._most_bytes(tenant)):
                raise UsageError(
                    f"this needs {wanted_bytes / _MIB:.0f} MiB of activations and frames, one "
                    f"tenant may have {most / _MIB:.0f} MiB here: use a smaller batch or shorter "
                    "sequences"
                )

            # Giving back is always possible, also for a tenant whose quota has shrunk.
            if more > 0 and tenant.inflight_bytes + more > quota:
                message = f"busy: your quota of {quota / _MIB:.0f} MiB of activations is taken"
                self._refuse(tenant, "memory", message, 0.5)
            room = self._room(tenant, tenant.inflight_bytes, more, is_memory=True)
            if more > 0 and self.inflight_bytes + more > room:
                message = f"busy: no room now for {wanted_bytes / _MIB:.0f} MiB of activations"
                self._refuse(tenant, "server", message, 0.5)

            tenant.inflight_bytes += more
            self.inflight_bytes += more

    def keep(self, tenant: Tenant, more_bytes: int) -> None:
        """Count memory that is taken already, whether there is room or not; below 0: it is free."""
        with self._lock:
            tenant.inflight_bytes += more_bytes
            self.inflight_bytes += more_bytes

    def check_traffic(self, tenant: Tenant) -> None:
        """Raises Busy in the middle of a stream that has overdrawn the hourly traffic.

        Streams in flight may use one more hour's worth: otherwise none would ever end where the
        allowance is nearly used. New ones wait until all of it is made up for.
        """
        with self._lock:
            self._refill(tenant)
            rate = tenant.limits.mib_per_hour * _MIB
            if rate and tenant.allowance < -rate:
                wait_s = -tenant.allowance / rate * _HOUR_S
                message = f"your quota of {tenant.limits.mib_per_hour:g} MiB an hour is used"
                self._refuse(tenant, "traffic", message, wait_s)

    def count_failed_login(self) -> None:
        """A call of nobody known."""
        with self._lock:
            self.failed_logins += 1

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
        """Seconds with a compute slot, of waiting for the edge, and of waiting for a slot."""
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

    def _share(self, total: int) -> int:
        """What is kept for each known tenant: half of the whole, in equal parts."""
        known = len(self._known())
        return total // 2 // known if known else 0

    def _room(self, tenant: Tenant, used: int, more: int, *, is_memory: bool) -> int:
        """Up to where all tenants together may come, for one that uses `used` and wants `more`.

        Within its own share a tenant may come up to the whole; beyond it what the others have not
        taken of theirs stays free.
        """
        total = self.max_inflight_bytes if is_memory else self.max_streams
        share = self._share(total)
        if not share or used + more <= share:
            return total
        others = set(self._known()) - {tenant.name}
        taken = sum(
            min(share, other.inflight_bytes if is_memory else other.streams)
            for other in self.tenants.values()
            if other.name in others
        )
        return total - share * len(others) + taken

    def _most_bytes(self, tenant: Tenant) -> int:
        """What one tenant may have when all others are idle."""
        others = len(set(self._known()) - {tenant.name})
        return self.max_inflight_bytes - self._share(self.max_inflight_bytes) * others

    def _refill(self, tenant: Tenant) -> None:
        """Bring the allowance up to date; an hour's worth is the most."""
        now, rate = self._clock(), tenant.limits.mib_per_hour * _MIB
        tenant.allowance = min(
            rate, tenant.allowance + (now - tenant.allowance_at) * rate / _HOUR_S
        )
        tenant.allowance_at = now

    def _refuse(self, tenant: Tenant, reason: str, message: str, wait_s: float) -> None:
        """Count a refusal and raise it as Busy."""
        tenant.refused[reason] = tenant.refused.get(reason, 0) + 1
        raise Busy(message, retry_after_s=wait_s, reason=reason)
