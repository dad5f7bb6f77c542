"""One call on the network: its messages as bytes, a deadline on every wait, and how it is cut.

Nothing is read before the caller is known, and a message is read only when it is wanted: until then
HTTP/2's flow control keeps it with the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from dlora.errors import PeerLost
from dlora.server.identities import Credential

__all__ = ["Call"]


class Call:
    """A call of somebody who is known. All methods are of the event loop."""

    def __init__(self, context: Any, method: str, credential: Credential, timeout_s: float) -> None:
        """`context` is grpc.aio's; `timeout_s` is how long a peer may take to send or to read."""
        self.name = method.rpartition("/")[2]
        self.credential, self.timeout_s = credential, timeout_s
        self.closed: str | None = None
        """Why it was cut, if it was."""
        self.is_revoked = False
        self.is_unchecked = False
        """It was cut since identities cannot be read."""
        self.unread_bytes = 0
        """Of a message that the peer has not taken, and that gRPC still holds."""

        self._context = context
        self._cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing: asyncio.Future[None] | None = None
        self._then: list[Callable[[], None]] = []

    def close(self, reason: str) -> None:
        """Cut the call: whoever waits in it, on the loop or on a worker, stops. The first reason
        counts.
        """
        if self.closed is None:
            self.closed = reason
            if not self._cut.done():
                self._cut.set_result(None)
            for then in self._then:
                then()

    def on_close(self, then: Callable[[], None]) -> None:
        """Call this when the call is cut."""
        self._then.append(then)

    async def read(self, timeout_s: float | None = None) -> bytes | None:
        """The peer's next message; None when it has closed its half.

        Raises PeerLost if none comes in time or the call is cut.
        """
        # Never cancelled: gRPC would lose the memory of a message that comes later.
        reading = asyncio.ensure_future(self._context.read())
        message = await self.wait(reading, timeout_s, "sent nothing")
        return (
            message if isinstance(message, bytes) else None
        )  # gRPC's word for the end is no bytes

    async def write(self, message: bytes) -> None:
        """Send a message. Raises PeerLost if the peer does not take it in time, or the call is cut.

        After that nothing can be sent before it has: see `leave`.
        """
        self._writing = asyncio.ensure_future(self._context.write(message))
        self.unread_bytes = len(message)
        await self.wait(self._writing, self.timeout_s, "did not read")
        self._writing, self.unread_bytes = None, 0

    async def wait(self, future: asyncio.Future[Any], timeout_s: float | None, what: str) -> Any:
        """The result of something that goes on by itself if it is not waited for any longer."""
        future.add_done_callback(_look_away)
        await asyncio.wait(
            {future, self._cut}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if future.done():
            try:
                return future.result()
            except grpc.aio.BaseError as error:  # the connection broke, or the peer has cancelled
                raise PeerLost(f"the edge is gone: {error}") from error
        if self.closed is not None:
            raise PeerLost(self.closed)
        raise PeerLost(f"the edge {what} for {timeout_s:.0f} s")

    async def leave(self) -> None:
        """Wait until the peer has taken what was written, or is gone."""
        if self._writing is not None:
            with contextlib.suppress(Exception):
                await self._writing
            self._writing, self.unread_bytes = None, 0

    async def abort(
        self, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """End the call with a status."""
        with contextlib.suppress(grpc.aio.InternalError):  # nobody is left to be told
            await self._context.abort(code, text, trailing)


def _look_away(future: asyncio.Future[Any]) -> None:
    """Whoever did not wait for it does not want its error either."""
    if not future.cancelled():
        future.exception()
