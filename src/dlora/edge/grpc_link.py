"""The edge's gRPC connection to a cloud."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tqdm.auto import tqdm

from dlora.errors import AdapterMissing, PeerError, PeerLost, UsageError, WireError
from dlora.files import check_private, default_cache
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.address import is_loopback
from dlora.protocol.channel import (
    PROTOCOL_VERSION,
    RETRY_AFTER_KEY,
    TOKEN_KEY,
    TOKEN_PREFIX,
    channel_options,
)
from dlora.protocol.files import ALLOWED_FILES
from dlora.protocol.layer_files import is_layer_file

__all__ = ["Access", "GrpcLink", "connect"]

log = logging.getLogger(__name__)

# Longer than the server's own wait for an edge, so that the server's clearer status comes first.
_FRAME_TIMEOUT_S: Final = 180.0
_MAX_EDGE_FILES_BYTES: Final = 32 * 2**30
_ADDRESS: Final = r"\[?[\w.:-]+\]?:\d{1,5}"
_MAX_REPLICAS: Final = 64
_TRY_AGAIN: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,  # never ours: gRPC's word for a connection that broke
)


@dataclass(frozen=True, kw_only=True)
class Access:
    """How an edge shows who it is, and knows whom it talks to."""

    tls: bool = False
    """Encrypt, and trust the authorities that gRPC comes with. Any of the files below says so as
    well.
    """
    ca: Path | None = None
    """PEM file of the authority to trust instead."""
    certificate: Path | None = None
    """PEM file of a client certificate, with `key`."""
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    """Bearer token; sent over TLS, or to this machine itself, and never else."""

    def channel(self, address: str) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
        """A channel and the metadata of its calls. Raises UsageError for files that cannot be
        used.
        """
        options = [
            *channel_options(),
            # gRPC would wait up to 2 minutes between its own attempts; RetryPolicy paces ours.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
        metadata = () if self.token is None else ((TOKEN_KEY, TOKEN_PREFIX + self.token),)
        if not (self.tls or self.ca or self.certificate):
            if metadata and not is_loopback(address):
                raise UsageError(
                    f"a token is not sent to {address} without TLS: others could read it. Give "
                    "tls_ca or tls"
                )
            return grpc.insecure_channel(address, options), metadata
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a client certificate and its key go together: give both or neither")
        if self.key is not None:
            check_private(self.key)
        try:
            ca, key, certificate = (
                None if one is None else one.read_bytes()
                for one in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        return grpc.secure_channel(
            address, grpc.ssl_channel_credentials(ca, key, certificate), options
        ), metadata


def connect(
    address: str,
    *,
    access: Access | None = None,
    timeout_s: float = 5.0,
    frame_timeout_s: float = _FRAME_TIMEOUT_S,
    cache: Path | None = None,
) -> GrpcLink:
    """Connect to `dlora serve` at host:port and check that both speak the same protocol.

    Several addresses, separated by commas, are servers of the same model: where one is lost the
    next is taken. `cache` holds embedding, head and tokenizer of the models seen so far
    (default ~/.cache/dlora, or $DLORA_CACHE). Raises PeerLost if nothing answers within
    `timeout_s`, PeerError if what answers is no DLoRA server of this version, or refuses.
    """
    addresses = [one.strip() for one in address.split(",")]
    for one in addresses:
        if not re.fullmatch(_ADDRESS, one):
            raise UsageError(f"server: got {one!r}, want host:port, for example 127.0.0.1:50051")
    return GrpcLink(
        addresses, access or Access(), timeout_s, frame_timeout_s, cache or default_cache()
    )


class GrpcLink:
    """A `Link` over gRPC. One channel for each server; reconnects by itself, and `open` works again
    when it has.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        access: Access,
        timeout_s: float,
        frame_timeout_s: float,
        cache: Path,
    ) -> None:
        self.frame_timeout_s, self._timeout_s, self._access = frame_timeout_s, timeout_s, access
        self.cache = cache
        self._asked = [_Server(one, access) for one in addresses]
        self._servers = self._asked
        self._current = self._losses = 0
        try:
            self.description = self._find(timeout_s)
        except BaseException:
            self.close()
            raise

    def _find(self, timeout_s: float) -> pb.Description:
        """The description of the first server that answers; where it names replicas, these are used
        from now on.
        """
        for number, server in enumerate(self._asked):
            try:
                found = server.describe(timeout_s)
            except PeerLost:
                if number == len(self._asked) - 1:
                    raise
                continue
            if not found.replicas:
                self._servers, self._current = self._asked, number
            else:
                self._use_replicas(list(found.replicas))
            return found
        raise UsageError("server: got no address")

    def _use_replicas(self, addresses: list[str]) -> None:
        """Open channels to these, keep those that are open, close the others."""
        for one in addresses:
            if not re.fullmatch(_ADDRESS, one):
                raise PeerError(
                    f"{self._asked[0].address} names a replica {one[:80]!r}, which is no address"
                )
        kept = (
            {}
            if self._servers is self._asked
            else {server.address: server for server in self._servers}
        )
        self._servers = [
            kept.pop(one) if one in kept else _Server(one, self._access)
            for one in addresses[:_MAX_REPLICAS]
        ]
        for server in kept.values():
            server.channel.close()
        self._current = 0

    @property
    def address(self) -> str:
        """Of the server that is used now."""
        return self._servers[self._current].address

    def open(self) -> _GrpcStream:
        if self._servers is not self._asked and self._losses >= len(
            self._servers
        ):  # all were tried: are there others?
            self._losses = 0
            with contextlib.suppress(PeerLost):
                self._find(self._timeout_s)
        return _GrpcStream(self._servers[self._current], self.frame_timeout_s, self._lost)

    def _lost(self, server: _Server) -> None:
        """Take the next server, if that one is still in use."""
        self._losses += 1
        if self._servers[self._current] is server and len(self._servers) > 1:
            self._current = (self._current + 1) % len(self._servers)
            log.info("going on with %s", self.address)

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Let the cloud hold frozen modules."""
        server = self._servers[self._current]
        request = pb.PutAdapterRequest(fingerprint=self.description.fingerprint, modules=modules)
        try:
            server.stub.PutAdapter(request, timeout=self.frame_timeout_s, metadata=server.metadata)
        except grpc.RpcError as error:
            if isinstance(found := _stream_error(error, server.address), PeerLost):
                self._lost(server)
            raise found from error

    def ping(self) -> None:
        """Ask for the health of the server."""
        try:
            health_pb2_grpc.HealthStub(self._servers[self._current].channel).Check(
                health_pb2.HealthCheckRequest(), timeout=self.frame_timeout_s
            )
        except grpc.RpcError as error:
            raise _stream_error(error, self.address) from error

    def edge_files(self) -> Path:
        """Fetch the edge files once for each content; later calls and runs use the cache."""
        for info in self.description.edge_files:
            if info.name not in ALLOWED_FILES:
                raise WireError(
                    f"{self.address} offers a file {info.name[:80]!r}, which is not on the list of "
                    "edge files"
                )
        return self._cached(self.description.edge_files, "embedding, head, tokenizer")

    def layer_files(self, names: Sequence[str]) -> Path:
        """The same for decoder layers that run here."""
        offered = {
            info.name: info for info in self.description.layers.files if is_layer_file(info.name)
        }
        if missing := [name for name in names if name not in offered]:
            raise WireError(f"{self.address} allows edge layers and does not offer {missing[0]}")
        return self._cached([offered[name] for name in names], "decoder layers", names)

    def _cached(self, infos: Sequence[pb.FileInfo], title: str, names: Sequence[str] = ()) -> Path:
        infos = sorted(infos, key=lambda info: info.name)
        digest = hashlib.sha256(
            "".join(f"{info.name} {info.sha256}\n" for info in infos).encode()
        ).hexdigest()
        folder = self.cache / "edge" / digest[:32]
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as partial:
                self._fetch(infos, files := Path(partial) / "files", title, names)
                try:
                    files.rename(folder)  # at once or not at all
                except OSError:
                    if not folder.is_dir():  # else another process was faster with the same content
                        raise
        return folder

    def _fetch(
        self, infos: list[pb.FileInfo], folder: Path, title: str, names: Sequence[str]
    ) -> None:
        folder.mkdir()
        wanted = {info.name: info for info in infos}
        total = sum(info.size for info in infos)
        if total > _MAX_EDGE_FILES_BYTES:
            raise WireError(
                f"{self.address} offers {total} bytes of edge files, over {_MAX_EDGE_FILES_BYTES}"
            )
        got = dict.fromkeys(wanted, 0)
        hashes = {name: hashlib.sha256() for name in wanted}
        request = pb.FetchEdgeFilesRequest(fingerprint=self.description.fingerprint, names=names)
        with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
            try:
                # Enough for a slow line of 50 kB/s; a cloud that stalls for longer is not waited
                # for.
                server = self._servers[self._current]
                timeout_s = 120 + total / 50_000
                for chunk in server.stub.FetchEdgeFiles(
                    request, timeout=timeout_s, metadata=server.metadata
                ):
                    if (
                        chunk.name not in wanted
                        or got[chunk.name] + len(chunk.data) > wanted[chunk.name].size
                    ):
                        raise WireError(
                            f"{self.address} sent more of {chunk.name[:80]!r} than it had announced"
                        )
                    with (folder / chunk.name).open("ab") as file:
                        file.write(chunk.data)
                    got[chunk.name] += len(chunk.data)
                    hashes[chunk.name].update(chunk.data)
                    bar.update(len(chunk.data))
            except grpc.RpcError as error:
                raise _stream_error(error, self.address) from error
        for name, info in wanted.items():
            if hashes[name].hexdigest() != info.sha256:
                raise WireError(
                    f"{name} from {self.address}: {got[name]} of {info.size} bytes, SHA-256 does "
                    "not match"
                )

    def close(self) -> None:
        for server in {*self._servers, *self._asked}:
            server.channel.close()


class _Server:
    """One server: its address, channel, and what every call to it carries."""

    def __init__(self, address: str, access: Access) -> None:
        self.address, self._access = address, access
        self.connect()

    def connect(self) -> None:
        """A channel of its own: also away from a connection that is half-open, which gRPC would go
        on using.
        """
        self.channel, self.metadata = self._access.channel(self.address)
        self.stub = rpc.DLoRAStub(self.channel)

    def describe(self, timeout_s: float) -> pb.Description:
        """What is served there. Raises PeerLost if nothing answers, PeerError if what answers will
        not do.
        """
        try:
            request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
            found: pb.Description = self.stub.Describe(
                request, timeout=timeout_s, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.RpcError as error:
            raise _connect_error(error, self.address) from error
        if found.protocol_version != PROTOCOL_VERSION:
            raise PeerError(
                f"{self.address} speaks protocol {found.protocol_version}, this edge "
                f"{PROTOCOL_VERSION}: "
                "upgrade the older of the two"
            )
        return found


class _GrpcStream:
    """One `Step` call. A reader thread takes replies, so that every wait has a deadline."""

    def __init__(self, server: _Server, timeout_s: float, lost: Callable[[_Server], None]) -> None:
        self.server, self.address, self.timeout_s, self.lost = (
            server,
            server.address,
            timeout_s,
            lost,
        )
        self.outbox: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.inbox: queue.SimpleQueue[pb.CloudFrame | Exception] = queue.SimpleQueue()
        self.call = server.stub.Step(self._requests(), metadata=server.metadata)
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
            self.server.channel.close()
            self.server.connect()
            self.lost(self.server)
            raise PeerLost(f"{self.address} sent nothing for {self.timeout_s:.0f} s") from None
        if isinstance(frame, PeerLost) and not isinstance(frame, AdapterMissing):
            self.lost(self.server)
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()


def _connect_error(error: Any, address: str) -> Exception:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED or code == grpc.StatusCode.UNAVAILABLE:
        if _listens(address):
            return PeerLost(
                f"{address} is there, but does not answer as a DLoRA server: does it want TLS "
                "(tls_ca or tls), another "
                "authority, a client certificate, or none of these? Does its certificate name this "
                "address?"
            )
        return PeerLost(
            f"no DLoRA server answers at {address}: is `dlora serve` running there, and is the "
            "port right?"
        )
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return PeerError(
            f"{address} does not know this edge ({details}): give token_file, or a client "
            "certificate"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return PeerError(
            f"{address} is a gRPC server, but not a DLoRA server of this version: check host and "
            "port"
        )
    return PeerError(f"{address} refused: {details}")


def _listens(address: str) -> bool:
    """Whether anything accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False


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
