"""Several servers of one model, placed and supervised by Ray, behind one address.

The front answers `Describe` with the addresses of its replicas, the least busy first, and nothing
else: edges then talk to a replica directly, as every frame through a proxy would cost more than the
exchange. A replica is a Ray actor around a plain `Server`; Ray starts it again when it dies.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.address import is_loopback
from dlora.protocol.channel import PROTOCOL_VERSION, channel_options
from dlora.server.identities import Identities
from dlora.server.server import ServerOptions, TlsFiles, add_port, caller

__all__ = ["Front", "ReplicaSettings", "Scaling", "scale"]

log = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_START_S: Final = 600.0  # a large model takes minutes to load


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What a replica serves, in plain values that travel to any node."""

    load: dict[str, Any]
    """Arguments of `load_cloud`, but for the limits."""
    limits: dict[str, int]
    options: ServerOptions
    host: str
    """Address to listen on, on the replica's own node."""
    ports: tuple[int, int] = (0, 0)
    """The first free one of these, both included; 0: any."""
    public_host: str | None = None
    """Address that edges get; default: the node's, or loopback where `host` is loopback."""
    tls: TlsFiles | None = None
    identities: Any = None
    audit: Any = None
    threads: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas there are."""

    least: int = 1
    most: int = 1
    queue: float = 1.0
    """More are started while over so many streams a replica wait for a compute slot."""
    patience_s: float = 10.0
    """For how long it has to be so; idle replicas go after six times as long."""

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that do not fit together."""
        if not 1 <= self.least <= self.most:
            raise UsageError(
                f"replicas: got {self.least} to {self.most}, want 1 or more, and the least first"
            )


def scale(
    scaling: Scaling, now: int, queued: int, streams: int, busy_s: float, idle_s: float
) -> int:
    """How many replicas there should be: a pure function of how many there are and for how long
    what was so.
    """
    if queued > scaling.queue * now and busy_s >= scaling.patience_s:
        return min(now + 1, scaling.most)
    if streams < now and not queued and idle_s >= 6 * scaling.patience_s:
        return max(now - 1, scaling.least)
    return max(scaling.least, min(now, scaling.most))


def _replica_class() -> Any:
    import ray

    class Replica:
        """A Ray actor that serves. Restarted by Ray it loads again, on a new port."""

        def __init__(self, settings: ReplicaSettings) -> None:
            import torch

            from dlora.cloud.load import load_cloud
            from dlora.cloud.model import Limits
            from dlora.server.server import Server

            if settings.threads:
                torch.set_num_threads(settings.threads)
            cloud, loaded = load_cloud(**settings.load, limits=Limits(**settings.limits))

            def start(port: int) -> Server:
                server = Server(
                    cloud,
                    loaded.tokenizer,
                    host=settings.host,
                    port=port,
                    options=settings.options,
                    tls=settings.tls,
                    identities=None
                    if settings.identities is None
                    else Identities(settings.identities),
                    audit=settings.audit,
                )
                server.start()
                return server

            first, last = settings.ports
            for port in range(first, last + 1):
                try:
                    self.server = start(port)
                    break
                except UsageError:
                    if port == last:
                        raise
            public = settings.public_host
            if public is None:
                public = settings.host
                if not is_loopback(public):
                    public = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            self.address = f"{public}:{self.server.port}"

        def describe(self) -> tuple[str, bytes]:
            """(address, description) of this replica."""
            description: pb.Description = self.server._servicer.description
            return self.address, description.SerializeToString()

        def load(self) -> tuple[str, int, int]:
            """(address, streams in flight, streams that wait for a slot): also a sign of life."""
            return self.address, self.server.tenancy.streams, self.server.queue_length

        def drain(self) -> None:
            """Let streams in flight finish, refuse new ones."""
            self.server.stop()

    return ray.remote(Replica)


@dataclass
class _Known:
    actor: Any
    address: str
    streams: int = 0
    queued: int = 0


class Front:
    """One address in front of the replicas. A context manager; `replace` starts every replica anew,
    one by one.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        scaling: Scaling,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ray_address: str | None = None,
    ) -> None:
        """`ray_address` is that of a cluster; None: Ray on this machine alone. Raises UsageError
        without Ray.
        """
        try:
            import ray
        except ImportError as error:
            raise UsageError('replicas are placed by Ray: pip install "dlora[ray]"') from error
        self.ray, self.settings, self.scaling = ray, settings, scaling
        self.host, self.port, self.ray_address = host, port, ray_address
        self.replicas: list[_Known] = []
        self.description = pb.Description()
        self.identities = None if settings.identities is None else Identities(settings.identities)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._threads = [
            threading.Thread(target=self._loop.run_forever, name="dlora-front", daemon=True),
            threading.Thread(target=self._supervise, name="dlora-supervise", daemon=True),
        ]
        self._owns_ray = False

    @property
    def address(self) -> str:
        """host:port that edges are given."""
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Front:
        if not self.ray.is_initialized():
            self.ray.init(
                address=self.ray_address,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.WARNING,
            )
            self._owns_ray = True
        try:
            actors = [self._start() for _ in range(self.scaling.least)]
            self.replicas = [self._ready(actor) for actor in actors]
            self._threads[0].start()
            self.port = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
            self._threads[1].start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._threads[1].is_alive():
            self._threads[1].join()
        if self._threads[0].is_alive():
            asyncio.run_coroutine_threadsafe(self._server.stop(1.0), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._threads[0].join()
        self._loop.close()
        for one in self.replicas:
            self._drain(one)
        if self._owns_ray:
            self.ray.shutdown()

    def replace(self) -> None:
        """A rolling update: for every replica a new one is started, and then the old one
        drained.
        """
        for old in list(self.replicas):
            new = self._ready(self._start())
            with self._lock:
                self.replicas = [new if one is old else one for one in self.replicas]
            self._drain(old)

    # ----------------------------------------------------------------- replicas

    def _start(self) -> Any:
        options = {
            "num_cpus": self.settings.num_cpus,
            "num_gpus": self.settings.num_gpus,
            "max_restarts": -1,
        }
        # Two calls at a time: signs of life while it drains.
        return _replica_class().options(max_concurrency=2, **options).remote(self.settings)

    def _ready(self, actor: Any) -> _Known:
        address, description = self.ray.get(actor.describe.remote(), timeout=_START_S)
        found = pb.Description.FromString(description)
        if self.description.fingerprint not in ("", found.fingerprint) and self.replicas:
            log.warning(
                "replicas serve different models: %s and %s",
                self.description.fingerprint,
                found.fingerprint,
            )
        self.description = found
        return _Known(actor, address)

    def _drain(self, one: _Known) -> None:
        try:
            self.ray.get(one.actor.drain.remote(), timeout=self.settings.options.drain_s + 30)
        except Exception as error:
            log.warning("a replica did not drain: %s", error)
        self.ray.kill(one.actor)

    def _supervise(self) -> None:
        """Ask every replica for its load; one that Ray has restarted has another address. Scale."""
        busy = idle = time.monotonic()
        while not self._stop.wait(_POLL_S):
            for one in list(self.replicas):
                try:
                    one.address, one.streams, one.queued = self.ray.get(
                        one.actor.load.remote(), timeout=5.0
                    )
                except Exception as error:  # it is being restarted: edges are sent to the others
                    one.address = ""
                    log.warning("a replica does not answer: %s", str(error).splitlines()[0])
            now = time.monotonic()
            queued, streams = (
                sum(getattr(one, name) for one in self.replicas) for name in ("queued", "streams")
            )
            busy = busy if queued > self.scaling.queue * len(self.replicas) else now
            idle = idle if streams < len(self.replicas) and not queued else now
            want = scale(self.scaling, len(self.replicas), queued, streams, now - busy, now - idle)
            if want != len(self.replicas):
                log.info("replicas: %d -> %d", len(self.replicas), want)
                busy = idle = now
                if want > len(self.replicas):
                    self.replicas = [*self.replicas, self._ready(self._start())]
                else:
                    *self.replicas, last = self.replicas
                    self._drain(last)

    # ----------------------------------------------------------------- the front's own service

    async def _serve(self) -> int:
        self._server = grpc.aio.server(options=[*channel_options(), ("grpc.so_reuseport", 0)])
        answers = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(answers, self._server)
        rpc.add_DLoRAServicer_to_server(_FrontServicer(self), self._server)
        port = add_port(self._server, f"{self.host}:{self.port}", self.settings.tls)
        await self._server.start()
        await answers.set("", health_pb2.HealthCheckResponse.SERVING)
        return port


class _FrontServicer(rpc.DLoRAServicer):
    """`Describe`, with the replicas; everything else is theirs."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        if self.front.identities is not None:
            self.front.identities.refresh()
        await caller(self.front.identities, context)
        if request.protocol_version != PROTOCOL_VERSION:
            theirs = request.protocol_version
            message = f"the edge speaks protocol {theirs}, this cloud {PROTOCOL_VERSION}"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{message}: upgrade the older of the two"
            )
        alive = sorted(
            (one for one in self.front.replicas if one.address),
            key=lambda one: one.streams + one.queued,
        )
        if not alive:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is ready")
        found = pb.Description()
        found.CopyFrom(self.front.description)
        found.replicas.extend(one.address for one in alive)
        alive[0].streams += 1  # until its own word comes: edges that come together are spread
        return found
