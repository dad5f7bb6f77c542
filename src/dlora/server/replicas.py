"""Several servers of one model, placed and supervised by Ray, behind one address.

The front answers `Describe` with the addresses of its replicas, the least busy first, and nothing
else. Edges then talk to a replica directly: every frame through a proxy would cost more than the
exchange. A replica is a Ray actor (`replica.py`); Ray starts it again when it dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from dlora.errors import DLoRAError, PeerLost
from dlora.extras import missing_extra
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.address import LOOPBACK_ADDRESS, is_loopback
from dlora.protocol.channel import MAX_MESSAGE_BYTES
from dlora.server.calls import Call
from dlora.server.gate import Gate, server_options
from dlora.server.identities import Identities
from dlora.server.replica import Replica, ReplicaSettings
from dlora.server.scaling import Scaling, scale
from dlora.server.service import SMALL_BYTES, answer_describe
from dlora.server.tls import add_port

__all__ = ["Front"]

log = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_REFRESH_S: Final = 1.0  # a revoked identity is refused after at most this long
_ANSWER_S: Final = 5.0  # a replica that takes longer to say its load is being restarted
_START_S: Final = 600.0  # a large model takes minutes to load
_DRAIN_SPARE_S: Final = 30.0  # on top of what its streams may take


@dataclass
class _Known:
    """A replica as the front knows it."""

    actor: Any
    address: str
    """host:port; empty while it does not answer."""
    streams: int = 0
    queued: int = 0


class Front:
    """One address in front of the replicas; a context manager.

    `replace` starts every replica anew, one by one.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        scaling: Scaling,
        *,
        host: str = LOOPBACK_ADDRESS,
        port: int = 0,
        ray_address: str | None = None,
    ) -> None:
        """`ray_address` is that of a cluster; None: Ray on this machine alone.

        Raises UsageError without Ray, or for identities that cannot be read.
        """
        if is_loopback(host) and ray_address is None:
            # Edges come from this machine alone, so Ray's own ports are for it alone: without a
            # cluster its node has the loopback address. Read when Ray is imported.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", "replicas: Ray places them, which") from error
        self.ray, self.settings, self.scaling = ray, settings, scaling
        self.host, self.port, self.ray_address = host, port, ray_address
        self.replicas: list[_Known] = []
        self.description = pb.Description()
        self.identities = None if settings.identities is None else Identities(settings.identities)

        self._owns_ray = False
        self._stop = threading.Event()
        # Held by who changes the number of replicas or replaces them; never two at a time.
        self._changing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._serving = threading.Thread(
            target=self._loop.run_forever, name="dlora-front", daemon=True
        )
        self._supervising = threading.Thread(
            target=self._supervise, name="dlora-supervise", daemon=True
        )

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
            actors = [self._start() for _ in range(self.scaling.least)]  # they load side by side
            self.replicas = [self._ready(actor) for actor in actors]
            self._serving.start()
            self.port = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
            self._supervising.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._supervising.is_alive():
            self._supervising.join()
        if self._serving.is_alive():
            if self._watching is not None:
                self._loop.call_soon_threadsafe(self._watching.cancel)
            if self._server is not None:
                asyncio.run_coroutine_threadsafe(self._server.stop(1.0), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._serving.join()
        self._loop.close()

        for replica in self.replicas:
            self._drain(replica)
        if self._owns_ray:
            self.ray.shutdown()

    def replace(self) -> None:
        """A rolling update: for every replica a new one is started, and the old one then drained.

        Nothing is scaled meanwhile.
        """
        with self._changing:
            for old in list(self.replicas):
                new = self._launch()
                self.replicas = [new if known is old else known for known in self.replicas]
                self._drain(old)

    # ----------------------------------------------------------------- replicas

    def _start(self) -> Any:
        """A new actor, which begins to load."""
        options = {
            "num_cpus": self.settings.num_cpus,
            "num_gpus": self.settings.num_gpus,
            "max_restarts": -1,
        }
        # Two calls at a time: signs of life while it drains.
        actor_class = self.ray.remote(Replica).options(max_concurrency=2, **options)
        return actor_class.remote(self.settings)

    def _ready(self, actor: Any) -> _Known:
        """Wait until an actor serves."""
        address, message = self.ray.get(actor.describe.remote(), timeout=_START_S)
        description = pb.Description.FromString(message)
        before, now = self.description.fingerprint, description.fingerprint
        if before not in ("", now) and self.replicas:
            log.warning("replicas serve different models: %s and %s", before, now)
        self.description = description
        return _Known(actor, address)

    def _launch(self) -> _Known:
        """A new replica that serves."""
        actor = self._start()
        try:
            return self._ready(actor)
        except BaseException:
            self.ray.kill(actor)  # or Ray would start it again and again, for nobody
            raise

    def _drain(self, replica: _Known) -> None:
        """Let a replica finish its streams, and end it."""
        timeout_s = self.settings.options.drain_s + _DRAIN_SPARE_S
        try:
            self.ray.get(replica.actor.drain.remote(), timeout=timeout_s)
        except Exception as error:
            log.warning("a replica did not drain: %s", error)
        self.ray.kill(replica.actor)

    # ----------------------------------------------------------------- supervision

    def _supervise(self) -> None:
        """On a thread of its own: ask every replica for its load, and follow it with their number.

        A scaling that fails is logged and tried again when the load asks for it again.
        """
        busy = idle = time.monotonic()
        while not self._stop.wait(_POLL_S):
            for replica in list(self.replicas):
                self._ask(replica)

            # Since when the queue is too long, and since when there is a replica too many.
            now, count = time.monotonic(), len(self.replicas)
            queued = sum(replica.queued for replica in self.replicas)
            streams = sum(replica.streams for replica in self.replicas)
            busy = busy if queued > self.scaling.queue * count else now
            idle = idle if streams < count and not queued else now

            want = scale(self.scaling, count, queued, streams, now - busy, now - idle)
            # Not during a rolling update: the load will ask again.
            if want != count and self._changing.acquire(blocking=False):
                log.info("replicas: %d -> %d", count, want)
                busy = idle = now
                try:
                    if want > count:
                        self.replicas = [*self.replicas, self._launch()]
                    else:
                        *self.replicas, last = self.replicas
                        self._drain(last)
                except Exception as error:
                    log.error("scaling failed: %s", error)
                finally:
                    self._changing.release()

    def _ask(self, replica: _Known) -> None:
        """Its address and load; a replica that Ray has restarted has another address."""
        try:
            replica.address, replica.streams, replica.queued = self.ray.get(
                replica.actor.load.remote(), timeout=_ANSWER_S
            )
        except Exception as error:  # it is being restarted: edges are sent to the others
            replica.address = ""
            log.warning("a replica does not answer: %s", _first_line(error))

    # ----------------------------------------------------------------- the front's own service

    async def _serve(self) -> int:
        """Bind and answer; return the port."""
        gate = Gate(
            {"Describe": self._describe},
            self.identities,
            timeout_s=self.settings.options.edge_timeout_s,
            is_ready=lambda: any(replica.address for replica in self.replicas),
        )
        most_streams = self.settings.options.max_streams
        self._server = grpc.aio.server(
            options=server_options(MAX_MESSAGE_BYTES, SMALL_BYTES, most_streams)
        )
        self._server.add_generic_rpc_handlers((gate,))
        port = add_port(self._server, f"{self.host}:{self.port}", self.settings.tls)
        await self._server.start()
        if self.identities is not None:
            self._watching = asyncio.create_task(self._watch(self.identities))
        return port

    async def _watch(self, identities: Identities) -> None:
        """Take up changes of the identities."""
        while True:
            identities.refresh()
            await asyncio.sleep(_REFRESH_S)

    async def _describe(self, call: Call) -> None:
        """What is served, and where. Every other call is the replicas'."""
        try:
            await answer_describe(call, self._described)
        except PeerLost as error:
            await call.leave()
            await call.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except (DLoRAError, DecodeError) as error:
            await call.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _described(self) -> bytes:
        """The description with the replicas, the least busy first. Raises PeerLost without any."""
        alive = sorted(
            (replica for replica in self.replicas if replica.address),
            key=lambda replica: replica.streams + replica.queued,
        )
        if not alive:
            raise PeerLost("no replica is ready")

        description = pb.Description()
        description.CopyFrom(self.description)
        description.replicas.extend(replica.address for replica in alive)
        # Until it says its load itself: edges that come together are spread.
        alive[0].streams += 1
        return description.SerializeToString()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
