"""One `Step` call of an edge: what it sends, and a bounded box of what it has not read yet."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import grpc

from dlora.edge.frame_size import parse_frame
from dlora.errors import AdapterMissing, DLoRAError, PeerError, PeerLost
from dlora.proto import dlora_pb2 as pb

__all__ = ["GrpcStream", "StreamServer"]

_STEP: Final = f"/{pb.DESCRIPTOR.services_by_name['DLoRA'].full_name}/Step"
_MAX_UNREAD: Final = 4
"""Frames. A cloud that waits for its answers has two on the way at most: the last gradients, and
what ends the stream."""


class StreamServer(Protocol):
    """What a stream needs of the server that it goes to."""

    address: str
    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]
    lock: threading.Lock
    """Whoever uses the channel, or takes another, has it: streams may be in flight together."""

    def leave(self, channel: grpc.Channel) -> None:
        """Make a new channel in place of this one, unless another stream has."""

    def meaning(self, error: Any) -> PeerError | PeerLost:
        """What a failed call means: try again, or not."""


class GrpcStream:
    """A `Stream`. A reader thread takes replies, so that every wait has a deadline."""

    def __init__(
        self, server: StreamServer, timeout_s: float, lost: Callable[[StreamServer], None]
    ) -> None:
        self.server, self.address = server, server.address
        self.timeout_s, self.lost = timeout_s, lost
        self.outbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.inbox: queue.SimpleQueue[bytes | DLoRAError] = queue.SimpleQueue()
        self.flooded: PeerError | None = None
        """The cloud sent more than it was asked for: this comes before all that is unread."""
        self._is_one_way = False
        self._taken, self._closed = threading.Event(), False

        # Bytes, and parsed where they are read: gRPC would parse whatever comes, on its own thread.
        with server.lock:
            self.channel = server.channel
            step: Any = self.channel.stream_stream(
                _STEP, request_serializer=pb.EdgeFrame.SerializeToString
            )
            self.call = step(self._requests(), metadata=server.metadata)
        threading.Thread(target=self._read, name="dlora-reader", daemon=True).start()

    def _requests(self) -> Iterator[pb.EdgeFrame]:
        while (frame := self.outbox.get()) is not None:
            yield frame

    def _read(self) -> None:
        """Take frames as they come, also while nobody waits for one."""
        try:
            for frame in self.call:
                if not self._has_room():
                    self._flood()
                    return
                self.inbox.put(frame)
            self.inbox.put(PeerLost(f"{self.address} ended the stream"))
        except grpc.RpcError as error:
            self.inbox.put(self.server.meaning(error))
        except Exception as error:  # whatever it is: one who waits has to hear of it
            self.inbox.put(PeerError(f"{self.address}: {type(error).__name__} in what it sent"))

    def _has_room(self) -> bool:
        """Whether one more frame may come. A backward that goes one way is ahead of its edge: it
        waits here, and the network holds the cloud back.
        """
        while self._is_one_way and self.inbox.qsize() >= _MAX_UNREAD and not self._closed:
            self._taken.wait()
            self._taken.clear()
        return self.inbox.qsize() < _MAX_UNREAD or self._closed

    def _flood(self) -> None:
        """End a stream whose cloud sends without being asked."""
        self.flooded = PeerError(
            f"{self.address} sent more than {_MAX_UNREAD} frames that nobody asked for: the stream "
            "was ended. Use another server."
        )
        self.call.cancel()
        while not self.inbox.empty():
            self.inbox.get()
        self.inbox.put(self.flooded)  # for one who waits already

    def send(self, frame: pb.EdgeFrame) -> None:
        """Queue a frame for the cloud."""
        if frame.WhichOneof("kind") == "begin":
            self._is_one_way = frame.begin.drop_input_grads or (
                frame.begin.hosted and frame.begin.training
            )
        self.outbox.put(frame)

    def receive(self) -> pb.CloudFrame:
        """Wait for the next frame. Raises PeerLost (try again) or PeerError (do not)."""
        if self.flooded is not None:
            raise self.flooded
        try:
            frame = self.inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            self.server.leave(self.channel)
            self.lost(self.server)
            raise PeerLost(f"{self.address} sent nothing for {self.timeout_s:.0f} s") from None
        self._taken.set()
        if isinstance(frame, PeerLost) and not isinstance(frame, AdapterMissing):
            self.lost(self.server)
        if isinstance(frame, DLoRAError):
            raise frame
        return parse_frame(frame)

    def close(self) -> None:
        """End the stream, finished or not."""
        self._closed = True
        self._taken.set()
        self.outbox.put(None)
        self.call.cancel()
