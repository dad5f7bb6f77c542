"""The gRPC server around a `CloudModel`: who may call, streams, admission, compute slots, shutdown.

A micro-batch is a stream; its compute runs on a worker thread, the network on one asyncio
loop. All state of a micro-batch goes with its stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from transformers import PreTrainedTokenizerBase

from dlora.cloud.model import CloudModel
from dlora.errors import AdapterMissing, ModelError, PeerLost, UsageError, WireError
from dlora.files import check_private
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.channel import (
    PROTOCOL_VERSION,
    RETRY_AFTER_KEY,
    TOKEN_KEY,
    TOKEN_PREFIX,
    channel_options,
)
from dlora.protocol.files import describe_files, write_edge_files
from dlora.protocol.layer_files import write_layer_files
from dlora.server.identities import LOCAL, Credential, Identities
from dlora.server.tenants import Busy, FairSlots, Tenancy, Tenant

__all__ = ["Server", "ServerOptions", "TlsFiles", "add_port", "caller"]

log = logging.getLogger(__name__)

SERVICE: Final = "dlora.v1.DLoRA"
_CHUNK_BYTES: Final = 1 << 20
# The frames go strictly in turn, so an honest edge never has more than one or two waiting.
_MAX_UNREAD_FRAMES: Final = 4
# A revoked identity is refused and its streams are cut after at most so long.
_REFRESH_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits of the server as a whole; those of one micro-batch are `cloud.Limits`."""

    max_streams: int = 64
    """Micro-batches in flight."""
    compute_slots: int = 1
    """Micro-batches that compute at the same moment; the others wait or talk."""
    edge_timeout_s: float = 120.0
    """How long a micro-batch waits for its edge before it is dropped."""
    drain_s: float = 0.0
    """How long shutdown lets streams in flight go on, while it refuses new ones."""
    grace_s: float = 5.0
    """How long shutdown waits for streams to be told."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of the server's TLS; read again when they change."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Authority of client certificates; given, every client has to show one."""

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises UsageError for files that cannot be read, or a key that others can read."""
        check_private(self.key)
        try:
            pair = self.key.read_bytes(), self.certificate.read_bytes()
            roots = None if self.client_ca is None else self.client_ca.read_bytes()
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def stamp(self) -> tuple[int, ...]:
        """Changes when a file does."""
        files = (self.certificate, self.key, *(() if self.client_ca is None else (self.client_ca,)))
        return tuple(file.stat().st_mtime_ns for file in files)


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that take up changed files with the next handshake; a bad change is logged and
    passed over.
    """
    seen = tls.stamp()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            if (stamp := tls.stamp()) != seen:
                found = tls.read()
                seen = stamp
                log.info("took up the certificate in %s", tls.certificate)
                return found
        except (OSError, UsageError) as error:
            log.error("the certificate is as it was: %s", error)
        return None

    return grpc.dynamic_ssl_server_credentials(
        tls.read(),
        fetch,  # type: ignore[arg-type]  # the stubs forget that None means "as it was"
        require_client_authentication=tls.client_ca is not None,
    )


def add_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Listen, encrypted or not; return the port. Raises UsageError if the port is taken."""
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(tls))
    except RuntimeError as error:
        raise UsageError(
            f"cannot listen on {address}: is it in use? Try another --port."
        ) from error


async def caller(identities: Identities | None, context: Any) -> Credential:
    """Who calls; ends the call if it is nobody that this server knows."""
    if identities is None:
        return LOCAL
    words = str(dict(context.invocation_metadata() or ()).get(TOKEN_KEY, ""))
    token = words.removeprefix(TOKEN_PREFIX) if words.startswith(TOKEN_PREFIX) else None
    shown = context.auth_context().get("x509_pem_cert") or [None]
    found = identities.authenticate(token, shown[0])
    if found is None:
        # The same words whatever was wrong with it.
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token or client certificate")
        raise AssertionError("unreachable: abort raises")
    return found


class Server:
    """Serve one model. `start` returns the port; `stop` ends streams with UNAVAILABLE.

    With `identities` only their tenants are answered; `tls` encrypts. With `audit` one JSON line
    for every stream says who did how much, never what. Runs its event loop on a thread of its own,
    so that tests and notebooks can use it as a context manager: `with Server(cloud) as server:
    connect(server.address)`.
    """

    def __init__(
        self,
        cloud: CloudModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        options: ServerOptions | None = None,
        tls: TlsFiles | None = None,
        identities: Identities | None = None,
        audit: Path | None = None,
    ) -> None:
        self.host, self.port, self.tls = host, port, tls
        self.options = options or ServerOptions()
        self._folder = tempfile.TemporaryDirectory(prefix="dlora-serve-")
        self._layers = tempfile.TemporaryDirectory(prefix="dlora-serve-")
        folders = Path(self._folder.name), Path(self._layers.name)
        write_edge_files(cloud.model, tokenizer, folders[0])
        write_layer_files(cloud.model, cloud.limits.edge_first, cloud.limits.edge_last, folders[1])
        self._servicer = _Servicer(cloud, folders, self.options, identities, audit)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dlora-grpc", daemon=True
        )
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port that edges connect to."""
        return f"{self.host}:{self.port}"

    @property
    def tenancy(self) -> Tenancy:
        """What tenants use now, for whoever shows it to the provider."""
        return self._servicer.tenancy

    @property
    def queue_length(self) -> int:
        """Streams that wait for a compute slot."""
        return self._servicer.slots.queue_length

    @property
    def is_ready(self) -> bool:
        """Whether new streams are taken."""
        return self._server is not None and not self._servicer.draining

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
        server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        rpc.add_DLoRAServicer_to_server(self._servicer, server)
        port = add_port(server, f"{self.host}:{self.port}", self.tls)
        await server.start()
        self._server = server
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.create_task(self._servicer.watch())
        return port

    def stop(self) -> None:
        """Refuse new streams, let those in flight go on for `drain_s`, end the rest with
        UNAVAILABLE, free all.
        """
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
        self._layers.cleanup()

    async def _stop(self) -> None:
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        self._servicer.draining = True
        end = time.monotonic() + self.options.drain_s
        while self._servicer.pipes and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self._watch is not None:
            self._watch.cancel()
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


class _Servicer(rpc.DLoRAServicer):
    """Async handlers; the same class can be hosted by any server that speaks grpc.aio."""

    def __init__(
        self,
        cloud: CloudModel,
        folders: tuple[Path, Path],
        options: ServerOptions,
        identities: Identities | None = None,
        audit: Path | None = None,
    ) -> None:
        self.cloud, self.options, self.identities = cloud, options, identities
        self.folder, self.layers_folder = folders
        self.description = cloud.describe()
        self.description.software_version = version("dlora")
        self.description.edge_files.extend(describe_files(self.folder))
        self.description.layers.files.extend(describe_files(self.layers_folder))
        self.tenancy = Tenancy(
            options.max_streams,
            cloud.limits.max_inflight_bytes,
            None if identities is None else identities.limits,
        )
        self.slots = FairSlots(options.compute_slots)
        self.workers = ThreadPoolExecutor(options.max_streams, thread_name_prefix="dlora-compute")
        self.pipes: set[_GrpcPipe] = set()
        self.draining = self.stopping = False
        self.audit = None if audit is None else _open_private(audit)

    async def watch(self) -> None:
        """Take up changes of the identities, and cut the streams of those that are no longer
        valid.
        """
        while self.identities is not None:
            await asyncio.sleep(_REFRESH_S)
            self.identities.refresh()
            for pipe in list(self.pipes):
                if not self.identities.is_valid(pipe.credential):
                    pipe.revoked = True
                    pipe.close("this identity is no longer valid")

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        await caller(self.identities, context)
        if request.protocol_version != PROTOCOL_VERSION:
            theirs = request.protocol_version
            message = f"the edge speaks protocol {theirs}, this cloud {PROTOCOL_VERSION}"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{message}: upgrade the older of the two"
            )
        return self.description

    async def FetchEdgeFiles(
        self, request: pb.FetchEdgeFilesRequest, context: Any
    ) -> AsyncIterator[pb.FileChunk]:
        tenant = self.tenancy.tenant((await caller(self.identities, context)).tenant)
        if request.fingerprint != self.cloud.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the served model has changed: connect again"
            )
        size = min(
            _CHUNK_BYTES, self.cloud.limits.max_message_bytes // 2
        )  # room for the frame around it
        wanted = [self.folder / info.name for info in self.description.edge_files]
        if request.names:
            offered = {info.name for info in self.description.layers.files}
            if unknown := set(request.names) - offered:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"no such file: {min(unknown)[:80]}"
                )
            wanted = [self.layers_folder / name for name in sorted(set(request.names))]
        for one in wanted:
            with one.open("rb") as file:
                while data := await asyncio.to_thread(file.read, size):
                    self.tenancy.count_traffic(tenant, sent=len(data))
                    yield pb.FileChunk(name=one.name, data=data)

    async def PutAdapter(self, request: pb.PutAdapterRequest, context: Any) -> pb.PutAdapterReply:
        tenant = self.tenancy.tenant((await caller(self.identities, context)).tenant)
        self.tenancy.count_traffic(tenant, received=request.ByteSize())
        room = None if self.identities is None else tenant.limits.adapter_mib << 20
        try:
            return await asyncio.to_thread(self.cloud.put_adapter, request, tenant.name, room)
        except (UsageError, WireError) as error:
            await self._abort(context, error)

    async def Step(
        self, requests: AsyncIterator[pb.EdgeFrame], context: Any
    ) -> AsyncIterator[pb.CloudFrame]:
        credential = await caller(self.identities, context)
        tenant = self.tenancy.tenant(credential.tenant)
        if self.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        try:
            self.tenancy.open_stream(tenant)
        except Busy as error:
            await self._abort(context, error)
        started, status = time.monotonic(), "CANCELLED"
        pipe = _GrpcPipe(self.slots, self.options.edge_timeout_s, self.tenancy, tenant, credential)
        self.pipes.add(pipe)
        reader = asyncio.create_task(pipe.read(requests))
        work = asyncio.get_running_loop().run_in_executor(self.workers, self._work, pipe)
        try:
            while (frame := await pipe.outbox.get()) is not None:
                pipe.count(sent=frame.ByteSize())
                if frame.WhichOneof("kind") == "done":
                    status = "OK"  # the edge may hang up as soon as it has this one
                yield frame
            failure = await work
            status = "OK" if failure is None else self._status(failure, pipe).name
            if failure is not None:
                await self._abort(context, failure, pipe)
        finally:
            # Also reached when the edge cancels or vanishes: wakes the worker wherever it waits.
            pipe.close("the edge closed the stream")
            reader.cancel()
            self.pipes.discard(pipe)
            self.tenancy.close_stream(tenant, status)
            self._note(pipe, status, time.monotonic() - started)

    def _work(self, pipe: _GrpcPipe) -> BaseException | None:
        """On a worker thread: one stream, from its first frame to its last. Returns the error, if
        any.
        """
        try:
            frame = pipe.receive()
            if frame.WhichOneof("kind") != "begin":
                raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'begin'")
            self.cloud.run(self.cloud.check(frame.begin, pipe.tenant.name), pipe)
            return None
        except Exception as error:
            # An edge that goes by itself, after an answer or a loss without backward, wants no
            # status.
            return None if isinstance(error, PeerLost) and pipe.left else error
        finally:
            pipe.release_slot()
            pipe.free()
            pipe.finish()

    def _status(self, error: BaseException, pipe: _GrpcPipe | None = None) -> grpc.StatusCode:
        """The status that tells the edge whether to try again."""
        if pipe is not None and pipe.revoked:
            return grpc.StatusCode.UNAUTHENTICATED
        if isinstance(error, Busy):
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        if isinstance(error, AdapterMissing):
            return grpc.StatusCode.NOT_FOUND
        if isinstance(error, PeerLost):
            return (
                grpc.StatusCode.UNAVAILABLE if self.stopping else grpc.StatusCode.DEADLINE_EXCEEDED
            )
        if isinstance(error, UsageError):
            return grpc.StatusCode.FAILED_PRECONDITION
        return (
            grpc.StatusCode.INVALID_ARGUMENT
            if isinstance(error, (WireError, ModelError))
            else (grpc.StatusCode.INTERNAL)
        )

    async def _abort(
        self, context: Any, error: BaseException, pipe: _GrpcPipe | None = None
    ) -> NoReturn:
        """End the call."""
        code = self._status(error, pipe)
        trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, Busy):
            trailing = ((RETRY_AFTER_KEY, str(int(1000 * (error.retry_after_s or 1.0)))),)
        if code == grpc.StatusCode.INTERNAL:
            log.error("a micro-batch failed", exc_info=error)
            await context.abort(
                code, f"the server failed on this micro-batch ({type(error).__name__}); see its log"
            )
        log.info("stream ended: %s: %s", code.name, error)
        await context.abort(code, str(error), trailing)
        raise AssertionError("unreachable: abort raises")

    def _note(self, pipe: _GrpcPipe, status: str, seconds: float) -> None:
        """A line of the audit log: who did how much, and never what."""
        if self.audit is not None:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "tenant": pipe.credential.tenant,
                "identity": pipe.credential.id,
                "status": status,
                "seconds": round(seconds, 3),
                "compute_s": round(pipe.compute_s, 3),
                "received_bytes": pipe.received_bytes,
                "sent_bytes": pipe.sent_bytes,
                "tokens": pipe.tokens,
            }
            self.audit.write(json.dumps(line) + "\n")
            self.audit.flush()

    def shut_down(self) -> None:
        """Wake every worker; their streams end with UNAVAILABLE."""
        self.draining = self.stopping = True
        for pipe in list(self.pipes):
            pipe.close("the server is shutting down")

    def close(self) -> None:
        """Wait for the workers to notice."""
        self.workers.shutdown(cancel_futures=True)
        if self.audit is not None:
            self.audit.close()


def _open_private(file: Path) -> Any:
    """Append to a file that nobody else can read."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")
    except OSError as error:
        raise UsageError(f"audit log {file}: {error.strerror}") from error


class _GrpcPipe:
    """The cloud's end of one stream: an asyncio side that reads and writes, a worker side that
    waits.

    The worker holds a compute slot, except while it waits for the edge.
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
        self.rows = 0  # of the pass that is computed now
        self.compute_s = 0.0
        self.loop = asyncio.get_running_loop()
        self.outbox: asyncio.Queue[pb.CloudFrame | None] = asyncio.Queue()
        self.inbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.closed: str | None = None
        self.left = False  # the edge closed its half in good order
        self.revoked = False
        self.has_slot = False

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

    def finish(self) -> None:
        """The worker is done: end the asyncio side after the frames already queued."""
        self._to_loop(None)

    def send(self, frame: pb.CloudFrame) -> None:
        if self.closed:
            raise PeerLost(self.closed)
        if frame.WhichOneof("kind") == "hidden":
            self.tokens += self.rows
            self.tenancy.count_tokens(self.tenant, self.rows)
        self._to_loop(frame)

    def _to_loop(self, frame: pb.CloudFrame | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, frame)
        except RuntimeError:  # the loop is closed: nobody is left to read
            self.closed = self.closed or "the server has stopped"

    def admit(self, cost_bytes: int) -> None:
        self.tenancy.reserve(self.tenant, self.reserved_bytes, cost_bytes)
        self.reserved_bytes = cost_bytes
        if not self.has_slot:
            self.take_slot()

    def free(self) -> None:
        """Hold nothing any more."""
        self.tenancy.reserve(self.tenant, self.reserved_bytes, 0)
        self.reserved_bytes = 0

    def receive(self) -> pb.EdgeFrame:
        held, start = self.has_slot, time.monotonic()
        self.release_slot()
        try:
            frame = self.inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            raise PeerLost(f"the edge sent nothing for {self.timeout_s:.0f} s") from None
        finally:
            self.tenancy.count_compute(self.tenant, wait_s=time.monotonic() - start)
        if frame is None:
            raise PeerLost(self.closed or "the edge closed the stream")
        if (kind := frame.WhichOneof("kind")) in ("begin", "extend"):
            shape = getattr(frame, kind).embeddings.shape
            self.rows = int(shape[0]) if len(shape) else 0
        if held:
            self.take_slot()
        return frame

    def take_slot(self) -> None:
        """Wait for a compute slot; give up when the stream closes meanwhile."""
        start = time.monotonic()
        try:
            weight = self.tenant.limits.weight
            if not self.slots.acquire(
                self.tenant.name, weight, self, self.timeout_s, lambda: self.closed is not None
            ):
                if self.closed:
                    raise PeerLost(self.closed)
                self.tenancy.count_refusal(self.tenant, "queue")
                raise Busy(
                    f"no compute slot for {self.timeout_s:.0f} s", retry_after_s=5.0, reason="queue"
                )
        finally:
            self.tenancy.count_compute(self.tenant, queue_s=time.monotonic() - start)
        self.has_slot = True

    def release_slot(self) -> None:
        if self.has_slot:
            self.has_slot = False
            seconds = self.slots.release(self)
            self.compute_s += seconds
            self.tenancy.count_compute(self.tenant, compute_s=seconds)
