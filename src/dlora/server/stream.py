"""The cloud's end of one stream: frames between the network and the worker that computes.

            asyncio loop                              worker thread
 network -> read() -> inbox ----------------------->  receive()  waits, without a compute slot
 network <- Service.Step <- outbox <----------------  send()     computes, with a compute slot

Either side may end first: `close` wakes the worker wherever it waits, `finish` ends the loop's side
after the frames that are queued already.
"""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections.abc import AsyncIterator
from typing import Final

from dlora.errors import PeerLost
from dlora.proto import dlora_pb2 as pb
from dlora.server.identities import Credential
from dlora.server.slots import FairSlots
from dlora.server.tenants import Busy, Tenancy, Tenant

__all__ = ["StreamPipe"]

# The frames go strictly in turn, so an honest edge never has more than one or two waiting.
_MAX_UNREAD_FRAMES: Final = 4


class StreamPipe:
    """What a pass in the cloud sees of its edge (`Pipe`), with slots, quotas and counters.

    The worker holds a compute slot, except while it waits for the edge or gives way to others.
    """

    def __init__(
        self,
        slots: FairSlots,
        timeout_s: float,
        tenancy: Tenancy,
        tenant: Tenant,
        credential: Credential,
    ) -> None:
        self.slots, self.timeout_s, self.tenancy, self.tenant = slots, timeout_s, tenancy, tenant
        self.credential = credential
        self.reserved_bytes = self.received_bytes = self.sent_bytes = self.tokens = 0
        self.compute_s = 0.0
        self.rows = 0  # of the pass that is computed now

        self.loop = asyncio.get_running_loop()
        self.outbox: asyncio.Queue[pb.CloudFrame | None] = asyncio.Queue()
        self.inbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()

        self.closed: str | None = None
        self.left = False  # the edge closed its half in good order
        self.revoked = False
        self.has_slot = False

    # ----------------------------------------------------------------- on the loop

    def count(self, received: int = 0, sent: int = 0) -> None:
        """Bytes of this stream and its tenant."""
        self.received_bytes += received
        self.sent_bytes += sent
        self.tenancy.count_traffic(self.tenant, received, sent)

    async def read(self, requests: AsyncIterator[pb.EdgeFrame]) -> None:
        """Move frames from the network to the worker; an end of any kind closes the pipe."""
        try:
            async for frame in requests:
                self.count(received=frame.ByteSize())
                if self.inbox.qsize() >= _MAX_UNREAD_FRAMES:
                    self.close(
                        f"the edge sent {_MAX_UNREAD_FRAMES} frames without waiting for answers"
                    )
                    return
                self.inbox.put(frame)
        except Exception as error:
            self.close(f"the edge is gone: {error}")
        else:
            self.left = self.closed is None
            self.close("the edge closed the stream")

    def close(self, reason: str) -> None:
        """Wake the worker, wherever it waits; the first reason counts."""
        self.closed = self.closed or reason
        self.inbox.put(None)

    # ----------------------------------------------------------------- on the worker

    def admit(self, cost_bytes: int) -> None:
        """Reserve memory for what the stream now needs, and take a compute slot.

        Raises Busy if there is no room now, UsageError if the tenant may never have this much.
        """
        self.tenancy.reserve(self.tenant, self.reserved_bytes, cost_bytes)
        self.reserved_bytes = cost_bytes
        if not self.has_slot:
            self.take_slot()

    def send(self, frame: pb.CloudFrame) -> None:
        """Queue a frame for the edge. Raises PeerLost if the stream is closed."""
        if self.closed:
            raise PeerLost(self.closed)
        if frame.WhichOneof("kind") == "hidden":
            self.tokens += self.rows
            self.tenancy.count_tokens(self.tenant, self.rows)
        self._to_loop(frame)

    def receive(self) -> pb.EdgeFrame:
        """Wait for the edge's next frame, without a compute slot meanwhile.

        Raises PeerLost when the stream is closed or no frame comes within `timeout_s`.
        """
        had_slot, start = self.has_slot, time.monotonic()
        self.release_slot()
        try:
            frame = self.inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            raise PeerLost(f"the edge sent nothing for {self.timeout_s:.0f} s") from None
        finally:
            self.tenancy.count_compute(self.tenant, wait_s=time.monotonic() - start)
        if frame is None:
            raise PeerLost(self.closed or "the edge closed the stream")

        # The first frame of a pass: its rows are counted as tokens when the pass is done.
        if (kind := frame.WhichOneof("kind")) in ("begin", "extend"):
            shape = getattr(frame, kind).embeddings.shape
            self.rows = int(shape[0]) if len(shape) else 0

        if had_slot:
            self.take_slot()
        return frame

    def breathe(self) -> float:
        """Let a tenant compute that is behind this one; return the seconds that it took.

        Raises PeerLost if the stream is closed, so that nothing more is computed for it.
        """
        if self.closed:
            raise PeerLost(self.closed)
        if not self.slots.asked_back(self):
            return 0.0

        # However long it takes: a pass that is given up in its middle would only come again.
        self.release_slot()
        return self.take_slot(math.inf)

    def take_slot(self, timeout_s: float | None = None) -> float:
        """Wait for a compute slot; give up when the stream closes meanwhile. Return the seconds.

        Raises PeerLost if it closes, Busy if there is no slot within `timeout_s`, by default that
        of the stream.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        start = time.monotonic()
        try:
            has_slot = self.slots.acquire(
                self.tenant.name,
                self.tenant.limits.weight,
                self,
                timeout_s,
                lambda: self.closed is not None,
            )
        finally:
            waited_s = time.monotonic() - start
            self.tenancy.count_compute(self.tenant, queue_s=waited_s)

        if not has_slot:
            if self.closed:
                raise PeerLost(self.closed)
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

    def free(self) -> None:
        """Reserve nothing any more."""
        self.tenancy.reserve(self.tenant, self.reserved_bytes, 0)
        self.reserved_bytes = 0

    def finish(self) -> None:
        """The worker is done: end the loop's side after the frames that are queued already."""
        self._to_loop(None)

    def _to_loop(self, frame: pb.CloudFrame | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, frame)
        except RuntimeError:  # the loop is closed: nobody is left to read
            self.closed = self.closed or "the server has stopped"
