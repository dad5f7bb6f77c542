"""The gRPC calls: who may call, what is refused and how, and each stream from begin to end.

Handlers run on one asyncio loop. A micro-batch, or an answer with its KV cache, is one `Step` call:
a `StreamPipe` carries its frames, and a worker thread runs the cloud's side of it. All its state
goes with its stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc

from dlora.cloud.model import CloudModel
from dlora.errors import AdapterMissing, ModelError, PeerLost, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.channel import PROTOCOL_VERSION, RETRY_AFTER_KEY, TOKEN_KEY, TOKEN_PREFIX
from dlora.protocol.files import describe_files
from dlora.server.access_log import AccessLog
from dlora.server.identities import LOCAL, Credential, Identities
from dlora.server.settings import ServerOptions
from dlora.server.slots import FairSlots
from dlora.server.stream import StreamPipe
from dlora.server.tenants import Busy, Tenancy, Tenant

__all__ = ["SERVICE_NAME", "Service", "caller", "check_protocol"]

log = logging.getLogger(__name__)

SERVICE_NAME: Final = "dlora.v1.DLoRA"
_CHUNK_BYTES: Final = 1 << 20
# A revoked identity is refused, and its streams are cut, after at most this long.
_REFRESH_S: Final = 1.0


async def caller(identities: Identities | None, context: Any) -> Credential:
    """Who calls; ends the call if it is nobody that this server knows."""
    if identities is None:
        return LOCAL
    header = str(dict(context.invocation_metadata() or ()).get(TOKEN_KEY, ""))
    token = header.removeprefix(TOKEN_PREFIX) if header.startswith(TOKEN_PREFIX) else None
    certificates = context.auth_context().get("x509_pem_cert") or [None]

    credential = identities.authenticate(token, certificates[0])
    if credential is None:
        # The same words whatever was wrong with it.
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token or client certificate")
        raise AssertionError("unreachable: abort raises")
    return credential


async def check_protocol(request: pb.DescribeRequest, context: Any) -> None:
    """End the call of an edge that speaks another version of the protocol."""
    theirs = request.protocol_version
    if theirs != PROTOCOL_VERSION:
        message = f"the edge speaks protocol {theirs}, this cloud {PROTOCOL_VERSION}"
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, f"{message}: upgrade the older of the two"
        )


class Service(rpc.DLoRAServicer):
    """Async handlers; the same class can be hosted by any server that speaks grpc.aio."""

    def __init__(
        self,
        cloud: CloudModel,
        folders: tuple[Path, Path],
        options: ServerOptions,
        identities: Identities | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        """`folders` hold what edges may fetch: their own files, and the layers for those that run
        some themselves.
        """
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
        self.pipes: set[StreamPipe] = set()
        self.draining = self.stopping = False
        self.access_log = access_log

    # ----------------------------------------------------------------- calls

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        """What is served."""
        await caller(self.identities, context)
        await check_protocol(request, context)
        return self.description

    async def FetchEdgeFiles(
        self, request: pb.FetchEdgeFilesRequest, context: Any
    ) -> AsyncIterator[pb.FileChunk]:
        """The edge's files in chunks, or the named files of layers."""
        tenant = await self._tenant(context)
        if request.fingerprint != self.cloud.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the served model has changed: connect again"
            )
        files = [self.folder / info.name for info in self.description.edge_files]
        if request.names:
            # Only names that were offered become paths.
            names = set(request.names)
            if unknown := names - {info.name for info in self.description.layers.files}:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"no such file: {min(unknown)[:80]}"
                )
            files = [self.layers_folder / name for name in sorted(names)]

        # Half of the limit leaves room for the frame around a chunk.
        size = min(_CHUNK_BYTES, self.cloud.limits.max_message_bytes // 2)
        for path in files:
            with path.open("rb") as file:
                while data := await asyncio.to_thread(file.read, size):
                    self.tenancy.count_traffic(tenant, sent=len(data))
                    yield pb.FileChunk(name=path.name, data=data)

    async def PutAdapter(self, request: pb.PutAdapterRequest, context: Any) -> pb.PutAdapterReply:
        """Keep frozen modules for the tenant."""
        tenant = await self._tenant(context)
        self.tenancy.count_traffic(tenant, received=request.ByteSize())
        room_bytes = None if self.identities is None else tenant.limits.adapter_mib << 20
        try:
            return await asyncio.to_thread(self.cloud.put_adapter, request, tenant.name, room_bytes)
        except (UsageError, WireError) as error:
            await self._abort(context, error)

    async def Step(
        self, requests: AsyncIterator[pb.EdgeFrame], context: Any
    ) -> AsyncIterator[pb.CloudFrame]:
        """One stream: a micro-batch, or an answer with its KV cache."""
        credential = await caller(self.identities, context)
        tenant = self.tenancy.tenant(credential.tenant)
        if self.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        try:
            self.tenancy.open_stream(tenant)
        except Busy as error:
            await self._abort(context, error)

        started, status = time.monotonic(), "CANCELLED"
        pipe = StreamPipe(self.slots, self.options.edge_timeout_s, self.tenancy, tenant, credential)
        self.pipes.add(pipe)
        reader = asyncio.create_task(pipe.read(requests))
        work = asyncio.get_running_loop().run_in_executor(self.workers, self._work, pipe)

        try:
            while (frame := await pipe.outbox.get()) is not None:
                pipe.count(sent=frame.ByteSize())
                if frame.WhichOneof("kind") == "done":
                    status = "OK"  # the edge may hang up as soon as it has this frame
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
            if self.access_log is not None:
                self.access_log.write(pipe, status, time.monotonic() - started)

    def _work(self, pipe: StreamPipe) -> BaseException | None:
        """On a worker thread: one stream, from its first frame to its last.

        Returns the error, if any.
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

    # ----------------------------------------------------------------- who calls, and refusals

    async def _tenant(self, context: Any) -> Tenant:
        """The tenant that calls; ends the call if it is nobody's."""
        return self.tenancy.tenant((await caller(self.identities, context)).tenant)

    def _status(self, error: BaseException, pipe: StreamPipe | None = None) -> grpc.StatusCode:
        """The status that tells the edge whether to try again."""
        if pipe is not None and pipe.revoked:
            return grpc.StatusCode.UNAUTHENTICATED
        # Both are kinds of PeerLost, so they come before it.
        if isinstance(error, Busy):
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        if isinstance(error, AdapterMissing):
            return grpc.StatusCode.NOT_FOUND

        if isinstance(error, PeerLost) and self.stopping:
            return grpc.StatusCode.UNAVAILABLE
        if isinstance(error, PeerLost):
            return grpc.StatusCode.DEADLINE_EXCEEDED
        if isinstance(error, UsageError):
            return grpc.StatusCode.FAILED_PRECONDITION
        if isinstance(error, (WireError, ModelError)):
            return grpc.StatusCode.INVALID_ARGUMENT
        return grpc.StatusCode.INTERNAL

    async def _abort(
        self, context: Any, error: BaseException, pipe: StreamPipe | None = None
    ) -> NoReturn:
        """End the call with the status and the words of an error."""
        code = self._status(error, pipe)
        if code == grpc.StatusCode.INTERNAL:
            # A fault of this server: its details are for the provider's log alone.
            log.error("a micro-batch failed", exc_info=error)
            await context.abort(
                code, f"the server failed on this micro-batch ({type(error).__name__}); see its log"
            )

        trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, Busy):
            trailing = ((RETRY_AFTER_KEY, str(int(1000 * (error.retry_after_s or 1.0)))),)
        log.info("stream ended: %s: %s", code.name, error)
        await context.abort(code, str(error), trailing)
        raise AssertionError("unreachable: abort raises")

    # ----------------------------------------------------------------- while it runs, and the end

    async def watch(self) -> None:
        """Take up changes of the identities; cut the streams of those no longer valid.

        Ends with the loop alone: whatever goes wrong, the last good identities stay in force, and
        the log says it once for each kind of error.
        """
        logged: set[type[Exception]] = set()
        while self.identities is not None:
            await asyncio.sleep(_REFRESH_S)
            try:
                self.identities.refresh()
                self._cut_revoked(self.identities)
            except Exception as error:
                if type(error) not in logged:
                    log.exception("the identities were not looked at; trying again")
                logged.add(type(error))

    def _cut_revoked(self, identities: Identities) -> None:
        for pipe in list(self.pipes):
            if not identities.is_valid(pipe.credential):
                pipe.revoked = True
                pipe.close("this identity is no longer valid")

    def shut_down(self) -> None:
        """Wake every worker; their streams end with UNAVAILABLE."""
        self.draining = self.stopping = True
        for pipe in list(self.pipes):
            pipe.close("the server is shutting down")

    def close(self) -> None:
        """Wait for the workers to notice."""
        self.workers.shutdown(cancel_futures=True)
        if self.access_log is not None:
            self.access_log.close()
