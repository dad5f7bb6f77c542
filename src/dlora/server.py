"""The gRPC server around a `CloudModel`: streams, admission, compute slots, shutdown.

A micro-batch is a stream; its compute runs on a worker thread, the network on one asyncio
loop. All state of a micro-batch goes with its stream.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from transformers import PreTrainedTokenizerBase

from dlora.cloud import CloudModel
from dlora.edge_files import describe_files, write_edge_files
from dlora.errors import AdapterMissing, ModelError, PeerLost, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.wire import PROTOCOL_VERSION, RETRY_AFTER_KEY, channel_options

__all__ = ["Server", "ServerOptions"]

log = logging.getLogger(__name__)

SERVICE: Final = "dlora.v1.DLoRA"
_CHUNK_BYTES: Final = 1 << 20
# The frames go strictly in turn, so an honest edge never has more than one or two waiting.
_MAX_UNREAD_FRAMES: Final = 4


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits of the server as a whole; those of one micro-batch are `cloud.Limits`."""

    max_streams: int = 64
    """Micro-batches in flight."""
    compute_slots: int = 1
    """Micro-batches that compute at the same moment; the others wait or talk."""
    edge_timeout_s: float = 120.0
    """How long a micro-batch waits for its edge before it is dropped."""
    grace_s: float = 5.0
    """How long shutdown waits for streams to be told."""


class Server:
    """Serve one model. `start` returns the port; `stop` ends streams with UNAVAILABLE.

    Runs its event loop on a thread of its own, so that tests and notebooks can use it as a
    context manager: `with Server(cloud) as server: connect(server.address)`.
    """

    def __init__(
        self,
        cloud: CloudModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        options: ServerOptions | None = None,
    ) -> None:
        self.host, self.port = host, port
        self.options = options or ServerOptions()
        self._folder = tempfile.TemporaryDirectory(prefix="dlora-serve-")
        write_edge_files(cloud.model, tokenizer, Path(self._folder.name))
        self._servicer = _Servicer(cloud, Path(self._folder.name), self.options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dlora-grpc", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None

    @property
    def address(self) -> str:
        """host:port that edges connect to."""
        return f"{self.host}:{self.port}"

    def start(self) -> int:
        """Bind and serve; return the port. Raises UsageError if the port is taken."""
        self._thread.start()
        try:
            self.port = self._run(self._start())
        except BaseException:
            self.stop()
            raise
        return self.port

    async def _start(self) -> int:
        options = channel_options(self._servicer.cloud.limits.max_message_bytes)
        # Without this, a second server could silently share the port.
        self._server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        rpc.add_DLoRAServicer_to_server(self._servicer, self._server)
        try:
            port = self._server.add_insecure_port(f"{self.host}:{self.port}")
        except RuntimeError as error:
            raise UsageError(f"cannot listen on {self.host}:{self.port}: is it in use? Try another --port.") from error
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    def stop(self) -> None:
        """Refuse new streams, end those in flight with UNAVAILABLE, free everything."""
        if self._loop.is_closed():
            return
        if self._server is not None:
            self._run(self._stop())
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._servicer.close()
        self._folder.cleanup()

    async def _stop(self) -> None:
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        self._servicer.shut_down()
        if self._server is not None:
            await self._server.stop(self.options.grace_s)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Busy(PeerLost):
    """The server has no room now; the edge is told when to try again."""


class _Servicer(rpc.DLoRAServicer):
    """Async handlers; the same class can be hosted by any server that speaks grpc.aio."""

    def __init__(self, cloud: CloudModel, folder: Path, options: ServerOptions) -> None:
        self.cloud, self.folder, self.options = cloud, folder, options
        self.description = cloud.describe()
        self.description.software_version = version("dlora")
        self.description.edge_files.extend(describe_files(folder))
        self.slots = threading.Semaphore(options.compute_slots)
        self.workers = ThreadPoolExecutor(options.max_streams, thread_name_prefix="dlora-compute")
        self.pipes: set[_GrpcPipe] = set()
        self.inflight_bytes = 0
        self.lock = threading.Lock()
        self.stopping = False

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        if request.protocol_version != PROTOCOL_VERSION:
            message = f"the edge speaks protocol {request.protocol_version}, this cloud {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{message}: upgrade the older of the two")
        return self.description

    async def FetchEdgeFiles(self, request: pb.FetchEdgeFilesRequest, context: Any) -> AsyncIterator[pb.FileChunk]:
        if request.fingerprint != self.cloud.fingerprint:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the served model has changed: connect again")
        size = min(_CHUNK_BYTES, self.cloud.limits.max_message_bytes // 2)  # room for the frame around it
        for info in self.description.edge_files:
            with (self.folder / info.name).open("rb") as file:
                while data := await asyncio.to_thread(file.read, size):
                    yield pb.FileChunk(name=info.name, data=data)

    async def PutAdapter(self, request: pb.PutAdapterRequest, context: Any) -> pb.PutAdapterReply:
        try:
            return await asyncio.to_thread(self.cloud.put_adapter, request)
        except (UsageError, WireError) as error:
            await self._abort(context, error)

    async def Step(self, requests: AsyncIterator[pb.EdgeFrame], context: Any) -> AsyncIterator[pb.CloudFrame]:
        if self.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        if len(self.pipes) >= self.options.max_streams:
            await self._abort(context, _Busy(f"all {self.options.max_streams} streams are taken", retry_after_s=1.0))
        pipe = _GrpcPipe(self.slots, self.options.edge_timeout_s, self._reserve)
        self.pipes.add(pipe)
        reader = asyncio.create_task(pipe.read(requests))
        work = asyncio.get_running_loop().run_in_executor(self.workers, self._work, pipe)
        try:
            while (frame := await pipe.outbox.get()) is not None:
                yield frame
            error = await work
            if error is not None:
                await self._abort(context, error)
        finally:
            # Also reached when the edge cancels or vanishes: wakes the worker wherever it waits.
            pipe.close("the edge closed the stream")
            reader.cancel()
            self.pipes.discard(pipe)

    def _work(self, pipe: _GrpcPipe) -> BaseException | None:
        """On a worker thread: one stream, from its first frame to its last. Returns the error, if any."""
        try:
            frame = pipe.receive()
            if frame.WhichOneof("kind") != "begin":
                raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'begin'")
            self.cloud.run(self.cloud.plan(frame.begin), pipe)
            return None
        except Exception as error:
            # An edge that goes by itself, after an answer or a loss without backward, wants no status.
            return None if isinstance(error, PeerLost) and pipe.left else error
        finally:
            self._reserve(pipe, 0)
            pipe.release_slot()
            pipe.finish()

    def _reserve(self, pipe: _GrpcPipe, cost_bytes: int) -> None:
        """Let the stream hold so many bytes, in place of what it held."""
        limit = self.cloud.limits.max_inflight_bytes
        with self.lock:
            free = limit - self.inflight_bytes + pipe.reserved_bytes
            if cost_bytes > free:
                raise _Busy(
                    f"busy: this micro-batch needs {cost_bytes / 2**20:.0f} MiB of activations, "
                    f"{free / 2**20:.0f} MiB are free",
                    retry_after_s=0.5,
                )
            self.inflight_bytes += cost_bytes - pipe.reserved_bytes
            pipe.reserved_bytes = cost_bytes

    async def _abort(self, context: Any, error: BaseException) -> NoReturn:
        """End the stream with the status that tells the edge whether to try again."""
        trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, _Busy):
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            trailing = ((RETRY_AFTER_KEY, str(int(1000 * (error.retry_after_s or 1.0)))),)
        elif isinstance(error, AdapterMissing):
            code = grpc.StatusCode.NOT_FOUND
        elif isinstance(error, PeerLost):
            code = grpc.StatusCode.UNAVAILABLE if self.stopping else grpc.StatusCode.DEADLINE_EXCEEDED
        elif isinstance(error, UsageError):
            code = grpc.StatusCode.FAILED_PRECONDITION
        elif isinstance(error, (WireError, ModelError)):
            code = grpc.StatusCode.INVALID_ARGUMENT
        else:
            code = grpc.StatusCode.INTERNAL
            log.error("a micro-batch failed", exc_info=error)
            await context.abort(code, f"the server failed on this micro-batch ({type(error).__name__}); see its log")
        log.info("stream ended: %s: %s", code.name, error)
        await context.abort(code, str(error), trailing)
        raise AssertionError("unreachable: abort raises")

    def shut_down(self) -> None:
        """Wake every worker; their streams end with UNAVAILABLE."""
        self.stopping = True
        for pipe in list(self.pipes):
            pipe.close("the server is shutting down")

    def close(self) -> None:
        """Wait for the workers to notice."""
        self.workers.shutdown(cancel_futures=True)


class _GrpcPipe:
    """The cloud's end of one stream: an asyncio side that reads and writes, a worker side that waits.

    The worker holds a compute slot, except while it waits for the edge.
    """

    def __init__(self, slots: threading.Semaphore, timeout_s: float, reserve: Callable[[_GrpcPipe, int], None]) -> None:
        self.slots, self.timeout_s, self.reserve = slots, timeout_s, reserve
        self.reserved_bytes = 0
        self.loop = asyncio.get_running_loop()
        self.outbox: asyncio.Queue[pb.CloudFrame | None] = asyncio.Queue()
        self.inbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.closed: str | None = None
        self.left = False  # the edge closed its half in good order
        self.has_slot = False

    async def read(self, requests: AsyncIterator[pb.EdgeFrame]) -> None:
        """Move frames from the network to the worker; an end of any kind closes the pipe."""
        try:
            async for frame in requests:
                if self.inbox.qsize() >= _MAX_UNREAD_FRAMES:
                    self.close(f"the edge sent {_MAX_UNREAD_FRAMES} frames without waiting for answers")
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

    def finish(self) -> None:
        """The worker is done: end the asyncio side after the frames already queued."""
        self._to_loop(None)

    def send(self, frame: pb.CloudFrame) -> None:
        if self.closed:
            raise PeerLost(self.closed)
        self._to_loop(frame)

    def _to_loop(self, frame: pb.CloudFrame | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, frame)
        except RuntimeError:  # the loop is closed: nobody is left to read
            self.closed = self.closed or "the server has stopped"

    def admit(self, cost_bytes: int) -> None:
        self.reserve(self, cost_bytes)
        if not self.has_slot:
            self.take_slot()

    def receive(self) -> pb.EdgeFrame:
        held = self.has_slot
        self.release_slot()
        try:
            frame = self.inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            raise PeerLost(f"the edge sent nothing for {self.timeout_s:.0f} s") from None
        if frame is None:
            raise PeerLost(self.closed or "the edge closed the stream")
        if held:
            self.take_slot()
        return frame

    def take_slot(self) -> None:
        """Wait for a compute slot; give up when the stream closes meanwhile."""
        start = time.monotonic()
        while not self.slots.acquire(timeout=0.2):
            if self.closed:
                raise PeerLost(self.closed)
            if time.monotonic() - start > self.timeout_s:
                raise _Busy(f"no compute slot for {self.timeout_s:.0f} s", retry_after_s=5.0)
        self.has_slot = True

    def release_slot(self) -> None:
        if self.has_slot:
            self.has_slot = False
            self.slots.release()
