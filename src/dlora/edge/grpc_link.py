"""The edge's gRPC connection to a cloud: one server, or several of the same model.

A channel reconnects by itself. What a link adds is the choice of a server: where one is lost, the
next is taken, and where all were lost the first address is asked again for its replicas.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dlora.edge.description import read_description
from dlora.edge.file_cache import cached_files
from dlora.edge.grpc_errors import call_error, connect_error
from dlora.edge.grpc_stream import GrpcStream, StreamServer
from dlora.edge.link import shown
from dlora.edge.server_address import check_address, check_replica, proxy_of, target_of
from dlora.edge.stall import without_stalls
from dlora.edge.tokenizer_trial import try_tokenizer
from dlora.errors import PeerError, PeerLost, UsageError, WireError
from dlora.files import check_private, default_cache, expand_homes, read_secret
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.address import is_loopback
from dlora.protocol.channel import PROTOCOL_VERSION, TOKEN_KEY, TOKEN_PREFIX, channel_options
from dlora.protocol.files import ALLOWED_FILES
from dlora.protocol.layer_files import is_layer_file
from dlora.protocol.text import clean_text

__all__ = ["Access", "GrpcLink", "connect"]

log = logging.getLogger(__name__)

# Longer than the server's own wait for an edge, so that the server's clearer status comes first.
_FRAME_TIMEOUT_S: Final = 180.0
_DESCRIBE: Final = f"/{pb.DESCRIPTOR.services_by_name['DLoRA'].full_name}/Describe"
_MAX_REPLICAS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Access:
    """How an edge shows who it is, and knows whom it talks to."""

    tls: bool = False
    """Encrypt, and trust the authorities that gRPC comes with. Any file below encrypts as well."""
    ca: Path | None = None
    """PEM file of the authority to trust instead."""
    certificate: Path | None = None
    """PEM file of a client certificate, with `key`."""
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    """Bearer token; sent over TLS, or to this machine itself, and never else."""
    token_file: Path | None = None
    """Where the token came from. It is read again when a server does not take it any more."""

    def __post_init__(self) -> None:
        """Raises UsageError for paths in a home that is not there."""
        expand_homes(self)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return () if self.token is None else ((TOKEN_KEY, TOKEN_PREFIX + self.token),)

    def renewed(self) -> Access:
        """The same with the token that the file holds now; as before if it cannot be read."""
        if self.token_file is None:
            return self
        try:
            return replace(self, token=read_secret(self.token_file))
        except UsageError as error:
            log.warning("the token stays as it was: %s", error)
            return self

    @property
    def encrypted(self) -> bool:
        """Whether anything here asks for TLS."""
        return bool(self.tls or self.ca or self.certificate)

    def proxy(self, address: str) -> str | None:
        """The variable that names the proxy on the way there, or None."""
        return proxy_of(address, encrypted=self.encrypted)

    def channel(self, address: str) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
        """A channel and the metadata of its calls.

        Raises UsageError for files that cannot be used, and for a token without TLS.
        """
        options = [
            *channel_options(),
            # To this machine, or in clear, there is no way through anybody else's.
            ("grpc.enable_http_proxy", int(self.proxy(address) is not None)),
            # gRPC would wait up to 2 minutes between its own attempts; RetryPolicy paces ours.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
        metadata = self.metadata
        if not self.encrypted:
            if metadata and not is_loopback(address):
                raise UsageError(
                    f"a token is not sent to {address} without TLS: others could read it. Give "
                    "tls_ca or tls"
                )
            return grpc.insecure_channel(target_of(address), options), metadata

        if (self.certificate is None) != (self.key is None):
            raise UsageError("a client certificate and its key go together: give both or neither")
        if self.key is not None:
            check_private(self.key)
        try:
            ca, key, certificate = (
                None if file is None else file.read_bytes()
                for file in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.secure_channel(target_of(address), credentials, options), metadata


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
    addresses = [part.strip() for part in address.split(",")]
    for part in addresses:
        check_address(part)
    folder = (cache or default_cache()).expanduser()
    return GrpcLink(addresses, access or Access(), timeout_s, frame_timeout_s, folder)


class GrpcLink:
    """A `Link` over gRPC, with one channel for each server."""

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
        self._asked = [_Server(address, access) for address in addresses]
        """The servers that were named."""
        self._servers = self._asked
        """Those in use: the same, or the replicas that one of them names."""
        self._current = self._losses = 0
        self._lock = threading.RLock()
        """Streams that are in flight together may be lost together."""
        try:
            self.description = self._find(timeout_s)
        except BaseException:
            self.close()
            raise

    __repr__ = shown

    def __deepcopy__(self, memo: object) -> GrpcLink:
        """Copies of a model share its link."""
        return self

    def _find(self, timeout_s: float, *, again: bool = False) -> pb.Description:
        """The description of the first server that answers; where it has replicas, use these."""
        for number, server in enumerate(self._asked):
            try:
                description = server.describe(timeout_s, again=again)
            except PeerLost:
                if number == len(self._asked) - 1:
                    raise
                continue
            if not description.replicas:
                self._servers, self._current = self._asked, number
            else:
                self._use_replicas(list(description.replicas))
            return description
        raise UsageError("server: got no address")

    def _use_replicas(self, addresses: list[str]) -> None:
        """Open channels to these, keep those that are open, close the others."""
        for address in addresses:
            check_replica(address, self._asked[0].address)

        kept: dict[str, _Server] = {}
        if self._servers is not self._asked:
            kept = {server.address: server for server in self._servers}
        self._servers = [
            kept.pop(address) if address in kept else _Server(address, self._access)
            for address in addresses[:_MAX_REPLICAS]
        ]
        for server in kept.values():
            server.channel.close()
        self._current = 0

    @property
    def address(self) -> str:
        """Of the server that is used now."""
        return self._servers[self._current].address

    def open(self) -> GrpcStream:
        with self._lock:
            if self._servers[self._current].refused:
                self._access = self._access.renewed()
                for server in {*self._servers, *self._asked}:
                    server.take(self._access)
            if self._servers is not self._asked and self._losses >= len(self._servers):
                self._losses = 0  # all replicas were tried: are there others?
                with contextlib.suppress(PeerLost):
                    self._find(self._timeout_s, again=True)
            return GrpcStream(self._servers[self._current], self.frame_timeout_s, self._lost)

    def _lost(self, server: StreamServer) -> None:
        """Take the next server, if that one is still in use."""
        with self._lock:
            if self._servers[self._current] is not server:
                return  # another stream has noticed
            self._losses += 1
            if len(self._servers) > 1:
                self._current = (self._current + 1) % len(self._servers)
                log.info("going on with %s", self.address)

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Let the cloud hold frozen modules."""
        server = self._servers[self._current]
        request = pb.PutAdapterRequest(fingerprint=self.description.fingerprint, modules=modules)
        try:
            server.stub.PutAdapter(request, timeout=self.frame_timeout_s, metadata=server.metadata)
        except grpc.RpcError as error:
            meaning = server.meaning(error)
            if isinstance(meaning, PeerLost):
                self._lost(server)
            raise meaning from error

    def ping(self) -> None:
        """Ask for the health of the server."""
        try:
            health_pb2_grpc.HealthStub(self._servers[self._current].channel).Check(
                health_pb2.HealthCheckRequest(), timeout=self.frame_timeout_s
            )
        except grpc.RpcError as error:
            raise call_error(error, self.address) from error

    def edge_files(self) -> Path:
        """Fetch the edge files once for each content; later calls and runs use the cache."""
        for info in self.description.edge_files:
            if info.name not in ALLOWED_FILES:
                name = clean_text(info.name, 80)
                raise WireError(
                    f"{self.address} offers a file {name!r}, which is not on the list of edge files"
                )
        folder = self._cached(self.description.edge_files, "embedding, head, tokenizer")
        try_tokenizer(folder, self.address)
        return folder

    def layer_files(self, names: Sequence[str]) -> Path:
        """The same for decoder layers that run here."""
        offered = {
            info.name: info for info in self.description.layers.files if is_layer_file(info.name)
        }
        if missing := [name for name in names if name not in offered]:
            raise WireError(f"{self.address} allows edge layers and does not offer {missing[0]}")
        return self._cached([offered[name] for name in names], "decoder layers", names)

    def _cached(self, infos: Sequence[pb.FileInfo], title: str, names: Sequence[str] = ()) -> Path:
        """A folder with these files; fetched where the cache does not have them."""

        def chunks() -> Iterator[pb.FileChunk]:
            server = self._servers[self._current]
            request = pb.FetchEdgeFilesRequest(
                fingerprint=self.description.fingerprint, names=names
            )
            # Enough for a slow line of 50 kB/s; a stall is noticed much earlier.
            timeout_s = 120 + sum(info.size for info in infos) / 50_000
            try:
                call = server.stub.FetchEdgeFiles(
                    request, timeout=timeout_s, metadata=server.metadata
                )
                yield from without_stalls(call, server.address)
            except grpc.RpcError as error:
                raise call_error(error, self.address) from error

        return cached_files(self.cache / "edge", infos, chunks, self.address, title)

    def close(self) -> None:
        for server in {*self._servers, *self._asked}:
            server.channel.close()


class _Server:
    """One server: its address, channel, and what every call to it carries."""

    def __init__(self, address: str, access: Access) -> None:
        self.address, self._access, self.lock = address, access, threading.Lock()
        self.refused = False
        """It has not taken the token; another may come."""
        self._connect()

    def take(self, access: Access) -> None:
        """Show another token from now on."""
        self._access, self.metadata, self.refused = access, access.metadata, False

    def meaning(self, error: Any) -> PeerError | PeerLost:
        """What a failed call means. A token from a file may be replaced: that is waited for."""
        if error.code() != grpc.StatusCode.UNAUTHENTICATED or self._access.token_file is None:
            return call_error(error, self.address)
        self.refused = True
        return PeerLost(
            f"{self.address} does not take the token of {self._access.token_file}: it is read "
            "again, put a valid one there"
        )

    def leave(self, channel: grpc.Channel) -> None:
        """Make a new channel in place of this one, which is half-open: gRPC would keep it."""
        with self.lock:
            if self.channel is channel:
                channel.close()
                self._connect()

    def _connect(self) -> None:
        self.channel, self.metadata = self._access.channel(self.address)
        self.stub = rpc.DLoRAStub(self.channel)

    def describe(self, timeout_s: float, *, again: bool = False) -> pb.Description:
        """What is served there; `again` where it was asked before, with success.

        Raises PeerLost if nothing answers, PeerError if what answers will not do.
        """
        try:
            request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
            # Bytes: how many they are is looked at before they are parsed.
            describe: Any = self.channel.unary_unary(
                _DESCRIBE, request_serializer=pb.DescribeRequest.SerializeToString
            )
            data: bytes = describe(
                request, timeout=timeout_s, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.RpcError as error:
            if again and isinstance(meaning := self.meaning(error), PeerLost):
                raise meaning from error
            raise connect_error(error, self.address, self._access.proxy(self.address)) from error
        return read_description(data, self.address)
