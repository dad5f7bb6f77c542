"""The gRPC calls: what is refused and how, and each call from begin to end.

Handlers run on one asyncio loop. A micro-batch, or an answer with its KV cache, is one `Step` call:
a `StreamPipe` carries its frames, and a worker thread runs the cloud's side of it. All its state
goes with its stream. Who calls is asked before, in `gate.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Final

from dlora.cloud.model import CloudModel
from dlora.errors import PeerLost, UsageError, WireError, clear_frames
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.files import describe_files
from dlora.protocol.message_parts import check_message
from dlora.server.access_log import AccessLog
from dlora.server.calls import Call
from dlora.server.frames import Awaited, largest_message, rules_of
from dlora.server.identities import Identities
from dlora.server.place import Place
from dlora.server.refusals import Refusal, ShuttingDown, refusal_of, status_of
from dlora.server.settings import ServerOptions
from dlora.server.slots import FairSlots
from dlora.server.sparse_log import SparseLog
from dlora.server.stream import StreamPipe
from dlora.server.tenants import Busy, Tenancy, Tenant

__all__ = ["SMALL_BYTES", "Service", "answer_describe"]

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1 << 20
SMALL_BYTES: Final = 1 << 16
"""Requests without tensors are never larger."""
_MOST_BESIDE: Final = 8
"""Calls of one tenant, at the same time, that take no place among its streams (yet)."""
_POLL_S: Final = 0.2
# A revoked identity is refused, and its streams are cut, after at most this long.
_REFRESH_S: Final = 1.0


async def read_request(call: Call, most_bytes: int) -> bytes:
    """The one message of a call that has one. Raises WireError for none, or a larger one."""
    message = await call.read(call.timeout_s)
    if message is None or len(message) > most_bytes:
        size = "none" if message is None else f"{len(message)} bytes"
        raise WireError(f"{call.name}: got {size}, want a message of at most {most_bytes} bytes")
    return message


async def answer_describe(call: Call, describe: Callable[[], bytes]) -> None:
    """Answer `Describe`. Raises UsageError for an edge that speaks another version."""
    request = pb.DescribeRequest.FromString(await read_request(call, SMALL_BYTES))
    theirs = request.protocol_version
    if theirs != PROTOCOL_VERSION:
        raise UsageError(
            f"the edge speaks protocol {theirs}, this cloud {PROTOCOL_VERSION}: upgrade the older "
            "of the two"
        )
    await call.write(describe())


class Service:
    """Handlers of every call, for a `Gate`."""

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
        # Edges learn here what the server takes.
        limits = self.description.limits
        limits.max_message_bytes = min(limits.max_message_bytes, largest_message(self.description))
        self._rules = rules_of(self.description)

        self.tenancy = Tenancy(
            options.max_streams,
            cloud.limits.max_inflight_bytes,
            None if identities is None else identities.limits,
            known=tuple if identities is None else identities.tenants,
        )
        self.slots = FairSlots(options.compute_slots)
        self.workers = ThreadPoolExecutor(options.max_streams, thread_name_prefix="dlora-compute")
        self.calls: set[Call] = set()
        self.pipes: set[StreamPipe] = set()
        self._beside: Counter[str] = Counter()
        self._refusals = SparseLog(log, logging.INFO, lines=10)
        self.draining = self.stopping = False
        self.access_log = access_log

    @property
    def handlers(self) -> dict[str, Callable[[Call], Awaitable[None]]]:
        """Call -> what answers it; whatever goes wrong there ends with a status."""

        def guarded(handle: Callable[[Call], Awaitable[None]]) -> Callable[[Call], Awaitable[None]]:
            async def run(call: Call) -> None:
                self.calls.add(call)
                refusal = None
                try:
                    await handle(call)
                except Exception as error:
                    refusal = refusal_of(error, call, is_stopping=self.stopping)
                finally:
                    self.calls.discard(call)
                if refusal is not None:
                    await self._refuse(call, refusal)

            return run

        return {
            "Describe": guarded(self._describe),
            "FetchEdgeFiles": guarded(self._fetch_edge_files),
            "PutAdapter": guarded(self._put_adapter),
            "Step": guarded(self._step),
        }

    # ----------------------------------------------------------------- calls

    async def _describe(self, call: Call) -> None:
        """What is served. No place: an edge has to connect before it can wait for one."""
        with self._beside_places(call):
            tenant = self.tenancy.tenant(call.credential.tenant)
            described = _described(self.description, self.options.max_streams, tenant)
            await answer_describe(call, lambda: described)
            self.tenancy.count_traffic(tenant, sent=len(described))

    async def _fetch_edge_files(self, call: Call) -> None:
        """The edge's files in chunks, or the named files of layers."""
        with self._beside_places(call):
            await self._wait_room(call)
        async with self._place(call) as place:
            message = await read_request(call, SMALL_BYTES)
            place.count(received=len(message))
            files = self._files(pb.FetchEdgeFilesRequest.FromString(message))

            # Half of the limit leaves room for the frame around a chunk.
            limits = self.cloud.limits
            size = min(_CHUNK_BYTES, limits.max_message_bytes // 2, limits.max_inflight_bytes // 16)
            place.hold(size)
            for path in files:
                with path.open("rb") as file:
                    while data := await asyncio.to_thread(file.read, size):
                        chunk = pb.FileChunk(name=path.name, data=data).SerializeToString()
                        place.count(sent=len(chunk))
                        await call.write(chunk)

    def _files(self, request: pb.FetchEdgeFilesRequest) -> list[Path]:
        """What a request asks for. Raises UsageError or WireError."""
        if request.fingerprint != self.cloud.fingerprint:
            raise UsageError("the served model has changed: connect again")
        if not request.names:
            return [self.folder / info.name for info in self.description.edge_files]
        # Only names that were offered become paths.
        names = set(request.names)
        if unknown := names - {info.name for info in self.description.layers.files}:
            raise WireError(f"no such file: {min(unknown)[:80]}")
        return [self.layers_folder / name for name in sorted(names)]

    async def _put_adapter(self, call: Call) -> None:
        """Keep frozen modules for the tenant."""
        async with self._place(call) as place:
            message = await read_request(call, self.cloud.limits.max_message_bytes)
            place.count(received=len(message))
            place.hold(len(message))
            place.work = asyncio.get_running_loop().run_in_executor(
                self.workers, self._put, message, place
            )
            reply = await call.wait(place.work, None, "waited")
            place.count(sent=len(reply))
            await call.write(reply)

    def _put(self, message: bytes, place: Place) -> bytes:
        """On a worker thread, with its slot: checking modules is computing as well."""
        tenant = place.tenant
        room_bytes = self._room_bytes(tenant)
        place.take_slot()
        try:
            check_message(message, self._rules.put, "PutAdapter")
            request = pb.PutAdapterRequest.FromString(message)
            return self.cloud.put_adapter(request, tenant.name, room_bytes).SerializeToString()
        finally:
            place.release_slot()

    async def _step(self, call: Call) -> None:
        """One stream: a micro-batch, or an answer with its KV cache."""
        async with self._place(call) as place:
            pipe = StreamPipe(place, call, Awaited(self.description), self._rules.frame)
            self.pipes.add(pipe)
            reader = asyncio.create_task(pipe.read())
            place.work = asyncio.get_running_loop().run_in_executor(self.workers, self._work, pipe)
            try:
                while (frame := await pipe.next_frame()) is not None:
                    # The edge may hang up as soon as it has this frame.
                    place.is_done = frame.WhichOneof("kind") == "done"
                    message = frame.SerializeToString()
                    del frame
                    place.count(sent=len(message))
                    await call.write(message)
                if (failure := await place.work) is not None:
                    raise failure
            finally:
                # Also reached when the edge cancels or vanishes: wakes the worker and the reader.
                call.close("the edge closed the stream")
                self.pipes.discard(pipe)
                reader.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _work(self, pipe: StreamPipe) -> BaseException | None:
        """On a worker thread: one stream, from its first frame to its last.

        Returns the error, if any.
        """
        try:
            frame = pipe.receive()
            if frame.WhichOneof("kind") != "begin":
                raise WireError(f"got frame {frame.WhichOneof('kind')!r}, want 'begin'")
            tenant = pipe.place.tenant
            request = self.cloud.check(frame.begin, tenant.name, self._room_bytes(tenant))
            self.cloud.run(request, pipe)
            return None
        except Exception as error:
            clear_frames(error)
            # An edge that goes by itself, after an answer or a loss without backward, wants no
            # status.
            return None if isinstance(error, PeerLost) and pipe.has_left else error
        finally:
            pipe.place.release_slot()
            pipe.place.free()
            pipe.finish()

    # ----------------------------------------------------------------- places, refusals

    @contextlib.contextmanager
    def _beside_places(self, call: Call) -> Iterator[None]:
        """What a tenant may do without a place, a few at a time. Raises Busy."""
        name = call.credential.tenant
        if self._beside[name] >= _MOST_BESIDE:
            raise Busy("busy: too many calls at the same time", retry_after_s=1.0)
        self._beside[name] += 1
        try:
            yield
        finally:
            self._beside[name] -= 1

    def _room_bytes(self, tenant: Tenant) -> int | None:
        """What a tenant may keep here; None: no limit but the server's."""
        return None if self.identities is None else int(tenant.limits.adapter_mib * 2**20)

    async def _wait_room(self, call: Call) -> None:
        """Wait a while for room for one more stream: edges fetch their files once, and do not ask
        again. Raises PeerLost if the call is cut meanwhile.
        """
        tenant = self.tenancy.tenant(call.credential.tenant)
        end = time.monotonic() + self.options.edge_timeout_s
        while not self.tenancy.has_room(tenant) and time.monotonic() < end:
            await call.wait(asyncio.ensure_future(asyncio.sleep(_POLL_S)), None, "waited")

    @contextlib.asynccontextmanager
    async def _place(self, call: Call) -> AsyncIterator[Place]:
        """A place for a call, given back when its handler and its worker have ended.

        Raises Busy if there is none, ShuttingDown where no new calls are taken.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        place = Place(self.tenancy, self.slots, self.tenancy.tenant(call.credential.tenant), call)
        started, status = time.monotonic(), "CANCELLED"

        def close(_work: object = None) -> None:
            place.free()
            self.tenancy.close_stream(place.tenant, status)
            if self.access_log is not None:
                self.access_log.write(place, status, time.monotonic() - started)

        try:
            yield place
            status = "OK"
        except Exception as error:
            status = status_of(error, call, is_stopping=self.stopping).name
            raise
        finally:
            status = "OK" if place.is_done else status
            if place.work is None or place.work.done():
                close()
            else:
                place.work.add_done_callback(close)

    async def _refuse(self, call: Call, refusal: Refusal) -> None:
        """End the call with a status, when the peer has room for one."""
        await self._wait_unread(call)
        kind = f"{call.name} ended: {refusal.code.name}"
        self._refusals.note(kind, f"{kind}: {refusal.text}")
        await call.abort(refusal.code, refusal.text, refusal.trailing)

    async def _wait_unread(self, call: Call) -> None:
        """Wait for a peer that does not read: its last message stays with gRPC, and counts."""
        if unread_bytes := call.unread_bytes:
            tenant = self.tenancy.tenant(call.credential.tenant)
            self.tenancy.keep(tenant, unread_bytes)
            try:
                await call.leave()
            finally:
                self.tenancy.keep(tenant, -unread_bytes)

    # ----------------------------------------------------------------- while it runs, and the end

    async def watch(self) -> None:
        """Take up changes of the identities; cut the calls of those no longer valid.

        Ends with the loop alone: whatever goes wrong, the last good identities stay in force for a
        while (`Identities.is_stale`), and the log says it once for each kind of error.
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
                self._cut_unchecked(self.identities)

    def _cut_revoked(self, identities: Identities) -> None:
        self._cut_unchecked(identities)
        for call in list(self.calls):
            if not identities.is_valid(call.credential):
                call.is_revoked = True
                call.close("this identity is no longer valid")
        for store in self.cloud.stores:
            store.keep_owners(identities.tenants())

    def _cut_unchecked(self, identities: Identities) -> None:
        """Where nobody knows any longer who was revoked, nobody goes on."""
        if identities.is_stale:
            for call in list(self.calls):
                call.is_unchecked = True
                call.close("the server cannot check identities at the moment")

    def shut_down(self) -> None:
        """Wake every worker; their streams end with UNAVAILABLE."""
        self.draining = self.stopping = True
        for call in list(self.calls):
            call.close("the server is shutting down")

    def close(self) -> None:
        """Wait for the workers to notice."""
        self.workers.shutdown(cancel_futures=True)
        if self.access_log is not None:
            self.access_log.close()


def _described(description: pb.Description, most: int, tenant: Tenant) -> bytes:
    """The description as a message, with the streams of `most` that a tenant may have."""
    told = pb.Description()
    told.CopyFrom(description)
    told.limits.max_streams = min(most, tenant.limits.max_streams)
    return told.SerializeToString()
