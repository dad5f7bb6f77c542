"""The cloud's end of one stream: frames between the network and the worker that computes.

            asyncio loop                              worker thread
 network -> read() -> inbox ----------------------->  receive()  waits, without a compute slot
 network <- next_frame() <- outbox <----------------  send()     computes, with a compute slot

A frame is read from the network only when the worker asks for it, and parsed by the worker, with
its slot. Either side may end first: a call that closes wakes the worker wherever it waits, `finish`
ends the loop's side after the frames that are queued already.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from dlora.errors import DLoRAError, PeerLost, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.message_parts import Rules, check_message
from dlora.protocol.prefixes import num_rows
from dlora.server.calls import Call
from dlora.server.frames import Awaited
from dlora.server.place import Place

__all__ = ["StreamPipe"]

_MAX_UNSENT: Final = 4
"""Frames that wait for the network: no edge makes a server hold more of its gradients."""


class StreamPipe:
    """What a pass in the cloud sees of its edge (`Pipe`), with slots, quotas and counters.

    The worker holds a compute slot, except while it waits for the edge or gives way to others.
    """

    def __init__(self, place: Place, call: Call, awaited: Awaited, rules: Rules) -> None:
        """`awaited` says how large the edge's frames may be, `rules` what may be in them."""
        self.place, self.call, self._awaited, self._rules = place, call, awaited, rules
        self._rows = 0  # of the pass that is computed now
        self._entry_bytes = 0  # of the frame that began it
        self._is_in_pass = False

        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[pb.CloudFrame | None] = asyncio.Queue()
        self._inbox: queue.SimpleQueue[bytes | DLoRAError | None] = queue.SimpleQueue()
        self._unsent = threading.BoundedSemaphore(_MAX_UNSENT)
        self._wanted = asyncio.Event()
        self._expected = 0  # frames that the loop reads without being asked
        self._due = 0  # of them, those that the worker has not taken
        self.has_left = False  # the edge closed its half in good order
        call.on_close(self._wake)

    # ----------------------------------------------------------------- on the loop

    async def read(self) -> None:
        """Move frames from the network to the worker, as it asks for them, until the call ends.

        An end of any kind closes the call.
        """
        try:
            while self.call.closed is None:
                if self._expected:
                    self._expected -= 1
                else:
                    await self._wanted.wait()
                    self._wanted.clear()
                if (message := await self.call.read()) is None:
                    break
                self._awaited.check(len(message))
                self.place.count(received=len(message))
                self.place.hold(len(message))
                self._inbox.put(message)
                del message
        except DLoRAError as error:
            self._inbox.put(error)  # the worker ends the stream with it
        except Exception as error:
            self.call.close(f"the edge is gone: {error}")
        else:
            self.has_left = self.call.closed is None
            self.call.close("the edge closed the stream")

    async def next_frame(self) -> pb.CloudFrame | None:
        """The next frame for the edge; None when there is none to come.

        Raises PeerLost if the call is cut meanwhile, whatever the worker is at.
        """
        frame = await self._next()
        if frame is not None:
            self._take_back()
        return frame

    async def _next(self) -> pb.CloudFrame | None:
        with contextlib.suppress(asyncio.QueueEmpty):
            return self._outbox.get_nowait()
        waiting = asyncio.ensure_future(self._outbox.get())
        try:
            frame: pb.CloudFrame | None = await self.call.wait(waiting, None, "got nothing")
            return frame
        except PeerLost:
            if self.has_left:
                return None
            raise
        finally:
            waiting.cancel()

    def _wake(self) -> None:
        """Wake the worker and the reader, wherever they wait."""
        self._inbox.put(None)
        self._take_back()
        self._wanted.set()

    def _take_back(self) -> None:
        """Make room for one more frame that waits to be sent."""
        with contextlib.suppress(ValueError):  # there is all of it
            self._unsent.release()

    # ----------------------------------------------------------------- on the worker

    def admit(self, cost_bytes: int) -> None:
        """Reserve memory for what the stream now needs, and take a compute slot.

        A pass has room for the frame that began it and for the largest of the others. Raises Busy
        if there is no room now, UsageError if the tenant may never have this much.
        """
        if self._is_in_pass:
            self.place.admit(cost_bytes + self._entry_bytes, self._awaited.room)
        else:
            self.place.admit(cost_bytes, 0)
        if not self.place.has_slot:
            self.place.take_slot()

    def expect(self, frames: int) -> None:
        """Read so many frames as they come, and no others, until the worker has taken them."""
        if frames:
            self._due = frames
            self._on_loop(self._expect, frames)

    def _expect(self, frames: int) -> None:
        self._expected = frames - 1  # and one for which the reader is woken
        self._wanted.set()

    def send(self, frame: pb.CloudFrame) -> None:
        """Queue a frame for the edge. Raises PeerLost if the stream is closed.

        A backward that goes one way is ahead of its edge: then this waits, without a compute slot.
        """
        if not self.call.closed and not self._unsent.acquire(blocking=False):
            self._wait_unsent()
        if self.call.closed:
            raise PeerLost(self.call.closed)
        if frame.WhichOneof("kind") == "hidden":
            self.place.count_tokens(self._rows)
            self._is_in_pass = False
        self._awaited.sent(frame)
        self._to_loop(frame)

    def _wait_unsent(self) -> None:
        """Wait until the edge has read some of what is queued. Raises PeerLost if it does not."""
        self.place.release_slot()
        if not self._unsent.acquire(timeout=self.call.timeout_s):
            raise PeerLost(f"the edge read nothing for {self.call.timeout_s:.0f} s")
        self.place.take_slot()

    def breathe(self) -> float:
        """Let a tenant compute that is behind; return the seconds that it took. Raises PeerLost."""
        return self.place.breathe()

    def receive(self) -> pb.EdgeFrame:
        """Wait for the edge's next frame, without a compute slot meanwhile.

        Raises PeerLost when the stream is closed or no frame comes in time, Busy if there is no
        room for it, WireError for one that cannot be what was asked for.
        """
        try:
            message = self._inbox.get_nowait()  # one that was expected, or the end
        except queue.Empty:
            message = self._wait_frame()
        self._due = max(0, self._due - 1)
        if message is None:
            raise PeerLost(self.call.closed or "the edge closed the stream")
        if isinstance(message, DLoRAError):
            raise message
        if not self.place.has_slot:
            self.place.take_slot()
        return self._parse(message)

    def _wait_frame(self) -> bytes | DLoRAError | None:
        """What comes next, without a compute slot meanwhile. Raises PeerLost if nothing does."""
        start = time.monotonic()
        self.place.release_slot()
        if not self._due:
            self._on_loop(self._wanted.set)
        try:
            return self._inbox.get(timeout=self.call.timeout_s)
        except queue.Empty:
            raise PeerLost(f"the edge sent nothing for {self.call.timeout_s:.0f} s") from None
        finally:
            self.place.tenancy.count_compute(self.place.tenant, wait_s=time.monotonic() - start)

    def finish(self) -> None:
        """The worker is done: end the loop's side after the frames that are queued already."""
        self._to_loop(None)

    def _parse(self, message: bytes) -> pb.EdgeFrame:
        """A frame of bytes that hold no more than they may. Raises WireError."""
        check_message(message, self._rules, "frame")
        try:
            frame = pb.EdgeFrame.FromString(message)
        except DecodeError as error:
            raise WireError(f"got {len(message)} bytes that are no frame") from error

        # The first frame of a pass: its rows are counted as tokens when the pass is done.
        if self._awaited.received(frame, len(message)):
            is_begin = frame.WhichOneof("kind") == "begin"
            self._rows = num_rows(frame.begin if is_begin else frame.extend)
            self._entry_bytes, self._is_in_pass = len(message), True
        return frame

    def _to_loop(self, frame: pb.CloudFrame | None) -> None:
        self._on_loop(self._outbox.put_nowait, frame)

    def _on_loop(self, act: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(act, *args)
