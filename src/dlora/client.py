"""The edge's gRPC connection to a cloud."""

from __future__ import annotations

import hashlib
import logging
import queue
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tqdm.auto import tqdm

from dlora.cache import default_cache
from dlora.edge_files import ALLOWED_FILES
from dlora.errors import AdapterMissing, PeerError, PeerLost, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.wire import PROTOCOL_VERSION, RETRY_AFTER_KEY, channel_options

__all__ = ["GrpcLink", "connect"]

log = logging.getLogger(__name__)

# Longer than the server's own wait for an edge, so that the server's clearer status comes first.
_FRAME_TIMEOUT_S: Final = 180.0
_MAX_EDGE_FILES_BYTES: Final = 32 * 2**30
_TRY_AGAIN: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)


def connect(
    address: str, *, timeout_s: float = 5.0, frame_timeout_s: float = _FRAME_TIMEOUT_S, cache: Path | None = None
) -> GrpcLink:
    """Connect to `dlora serve` at host:port and check that both speak the same protocol.

    `cache` holds embedding, head and tokenizer of the models seen so far (default
    ~/.cache/dlora, or $DLORA_CACHE). Raises PeerLost if nothing answers within `timeout_s`,
    PeerError if what answers is no DLoRA server of this version.
    """
    if not re.fullmatch(r"\[?[\w.:-]+\]?:\d{1,5}", address):
        raise UsageError(f"server: got {address!r}, want host:port, for example 127.0.0.1:50051")
    return GrpcLink(address, timeout_s, frame_timeout_s, cache or default_cache())


class GrpcLink:
    """A `Link` over gRPC. One channel; reconnects by itself, and `open` works again when it has."""

    def __init__(self, address: str, timeout_s: float, frame_timeout_s: float, cache: Path) -> None:
        self.address = address
        self.frame_timeout_s = frame_timeout_s
        self.cache = cache
        self._channel = grpc.insecure_channel(
            address,
            options=[
                *channel_options(),
                # gRPC would wait up to 2 minutes between its own attempts; RetryPolicy paces ours.
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2_000),
            ],
        )
        self._stub = rpc.DLoRAStub(self._channel)
        try:
            request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
            self.description: pb.Description = self._stub.Describe(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            self._channel.close()
            raise _connect_error(error, address) from error
        if self.description.protocol_version != PROTOCOL_VERSION:
            self._channel.close()
            raise PeerError(
                f"{address} speaks protocol {self.description.protocol_version}, this edge {PROTOCOL_VERSION}: "
                "upgrade the older of the two"
            )

    def open(self) -> _GrpcStream:
        return _GrpcStream(self._stub, self.address, self.frame_timeout_s)

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Let the cloud hold frozen modules."""
        request = pb.PutAdapterRequest(fingerprint=self.description.fingerprint, modules=modules)
        try:
            self._stub.PutAdapter(request, timeout=self.frame_timeout_s)
        except grpc.RpcError as error:
            raise _stream_error(error, self.address) from error

    def ping(self) -> None:
        """Ask for the health of the server."""
        try:
            health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=self.frame_timeout_s
            )
        except grpc.RpcError as error:
            raise _stream_error(error, self.address) from error

    def edge_files(self) -> Path:
        """Fetch the edge files once for each content; later calls and runs use the cache."""
        infos = sorted(self.description.edge_files, key=lambda info: info.name)
        for info in infos:
            if info.name not in ALLOWED_FILES:
                raise WireError(
                    f"{self.address} offers a file {info.name[:80]!r}, which is not on the list of edge files"
                )
        digest = hashlib.sha256("".join(f"{info.name} {info.sha256}\n" for info in infos).encode()).hexdigest()
        folder = self.cache / "edge" / digest[:32]
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as partial:
                self._fetch(infos, files := Path(partial) / "files")
                try:
                    files.rename(folder)  # at once or not at all
                except OSError:
                    if not folder.is_dir():  # else another process was faster with the same content
                        raise
        return folder

    def _fetch(self, infos: list[pb.FileInfo], folder: Path) -> None:
        folder.mkdir()
        wanted = {info.name: info for info in infos}
        total = sum(info.size for info in infos)
        if total > _MAX_EDGE_FILES_BYTES:
            raise WireError(f"{self.address} offers {total} bytes of edge files, over {_MAX_EDGE_FILES_BYTES}")
        got = dict.fromkeys(wanted, 0)
        hashes = {name: hashlib.sha256() for name in wanted}
        request = pb.FetchEdgeFilesRequest(fingerprint=self.description.fingerprint)
        with tqdm(total=total, unit="B", unit_scale=True, desc="embedding, head, tokenizer") as bar:
            try:
                # Enough for a slow line of 50 kB/s; a cloud that stalls for longer is not waited for.
                for chunk in self._stub.FetchEdgeFiles(request, timeout=120 + total / 50_000):
                    if chunk.name not in wanted or got[chunk.name] + len(chunk.data) > wanted[chunk.name].size:
                        raise WireError(f"{self.address} sent more of {chunk.name[:80]!r} than it had announced")
                    with (folder / chunk.name).open("ab") as file:
                        file.write(chunk.data)
                    got[chunk.name] += len(chunk.data)
                    hashes[chunk.name].update(chunk.data)
                    bar.update(len(chunk.data))
            except grpc.RpcError as error:
                raise _stream_error(error, self.address) from error
        for name, info in wanted.items():
            if hashes[name].hexdigest() != info.sha256:
                raise WireError(f"{name} from {self.address}: {got[name]} of {info.size} bytes, SHA-256 does not match")

    def close(self) -> None:
        self._channel.close()


class _GrpcStream:
    """One `Step` call. A reader thread takes replies, so that every wait has a deadline."""

    def __init__(self, stub: Any, address: str, timeout_s: float) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.outbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.inbox: queue.SimpleQueue[pb.CloudFrame | Exception] = queue.SimpleQueue()
        self.call = stub.Step(self._requests())
        threading.Thread(target=self._read, name="dlora-reader", daemon=True).start()

    def _requests(self) -> Iterator[pb.EdgeFrame]:
        while (frame := self.outbox.get()) is not None:
            yield frame

    def _read(self) -> None:
        try:
            for frame in self.call:
                self.inbox.put(frame)
            self.inbox.put(PeerLost(f"{self.address} ended the stream"))
        except grpc.RpcError as error:
            self.inbox.put(_stream_error(error, self.address))

    def send(self, frame: pb.EdgeFrame) -> None:
        self.outbox.put(frame)

    def receive(self) -> pb.CloudFrame:
        try:
            frame = self.inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            raise PeerLost(f"{self.address} sent nothing for {self.timeout_s:.0f} s") from None
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()


def _connect_error(error: Any, address: str) -> Exception:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED or code == grpc.StatusCode.UNAVAILABLE:
        return PeerLost(f"no DLoRA server answers at {address}: is `dlora serve` running there, and is the port right?")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return PeerError(f"{address} is a gRPC server, but not a DLoRA server of this version: check host and port")
    return PeerError(f"{address} refused: {details}")


def _stream_error(error: Any, address: str) -> PeerError | PeerLost:
    """What a failed call means to the edge: try again, or not."""
    code, details = error.code(), error.details() or ""
    message = f"{address}: {details or code.name}"
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        hint = dict(error.trailing_metadata() or ()).get(RETRY_AFTER_KEY)
        if hint is not None and hint.isdigit():
            return PeerLost(message, retry_after_s=int(hint) / 1000)
        return PeerError(f"{message}. Use a smaller batch or shorter sequences.")
    if code == grpc.StatusCode.NOT_FOUND:
        return AdapterMissing(message)
    if code in _TRY_AGAIN or "RST_STREAM" in details:
        return PeerLost(message)
    return PeerError(message)
