"""The gRPC server around a `CloudModel`: its thread, its event loop, start and stop.

The network runs on one asyncio loop, on a thread of its own; compute runs on worker threads. What
is answered is in `service.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, Final

import grpc
from transformers import PreTrainedTokenizerBase

from dlora.cloud.model import CloudModel
from dlora.files import ScratchFolder
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.address import LOOPBACK_ADDRESS
from dlora.protocol.files import write_edge_files
from dlora.protocol.layer_files import write_layer_files
from dlora.server.access_log import AccessLog
from dlora.server.gate import Gate, server_options
from dlora.server.identities import Identities
from dlora.server.service import Service
from dlora.server.settings import ServerOptions
from dlora.server.tenants import Tenancy
from dlora.server.tls import TlsFiles, add_port

__all__ = ["Server", "ServerOptions", "TlsFiles"]

# How often a shutdown looks whether the last stream has ended.
_DRAIN_POLL_S: Final = 0.05


class Server:
    """Serve one model. `start` returns the port; `stop` ends streams with UNAVAILABLE.

    With `identities` only their tenants are answered; `tls` encrypts. With `access_log` one JSON
    line for every call says who did how much, never what. Runs its event loop on a thread of its
    own, so that tests and notebooks can use it as a context manager: `with Server(cloud) as server:
    connect(server.address)`.
    """

    def __init__(
        self,
        cloud: CloudModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        host: str = LOOPBACK_ADDRESS,
        port: int = 0,
        options: ServerOptions | None = None,
        tls: TlsFiles | None = None,
        identities: Identities | None = None,
        access_log: Path | None = None,
    ) -> None:
        """Raises UsageError if the access log cannot be opened."""
        self.host, self.port, self.tls = host, port, tls
        self.options = options or ServerOptions()
        lines = None if access_log is None else AccessLog(access_log)

        # What edges may fetch is written once, and read for each of them.
        self._folder = ScratchFolder("dlora-served-")
        self._layers = ScratchFolder("dlora-served-")
        folders = Path(self._folder.name), Path(self._layers.name)
        write_edge_files(cloud.model, tokenizer, folders[0], cloud.called_outside)
        write_layer_files(cloud.model, cloud.limits.edge_first, cloud.limits.edge_last, folders[1])

        self._service = Service(cloud, folders, self.options, identities, lines)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dlora-grpc", daemon=True
        )
        self._server: grpc.aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port that edges connect to."""
        return f"{self.host}:{self.port}"

    @property
    def description(self) -> pb.Description:
        """What is served, as edges get it."""
        return self._service.description

    @property
    def tenancy(self) -> Tenancy:
        """What tenants use now, for whoever shows it to the provider."""
        return self._service.tenancy

    @property
    def kept_bytes(self) -> dict[str, int]:
        """By tenant: modules and prefixes that are kept for later requests."""
        kept = [store.owned_bytes() for store in self._service.cloud.stores]
        return {name: sum(one.get(name, 0) for one in kept) for one in kept for name in one}

    @property
    def queue_length(self) -> int:
        """Streams that wait for a compute slot."""
        return self._service.slots.queue_length

    @property
    def lost_log_lines(self) -> int:
        """Lines of the access log that could not be written."""
        access_log = self._service.access_log
        return 0 if access_log is None else access_log.lost_lines

    def reopen_log(self) -> None:
        """Go on in a new file of the access log's name, where there is one."""
        if self._service.access_log is not None:
            self._loop.call_soon_threadsafe(self._service.access_log.reopen)

    @property
    def is_ready(self) -> bool:
        """Whether new streams are taken."""
        return self._server is not None and not self._service.draining

    def start(self) -> int:
        """Bind and serve; return the port.

        Raises UsageError if the port is taken or a file of `tls` cannot be read.
        """
        self._thread.start()
        try:
            self.port = self._run(self._start())
        except BaseException:
            self.stop()
            raise
        return self.port

    async def _start(self) -> int:
        service = self._service
        gate = Gate(
            service.handlers,
            service.identities,
            timeout_s=self.options.edge_timeout_s,
            is_ready=lambda: self.is_ready,
            on_stranger=service.tenancy.count_failed_login,
        )
        options = server_options(
            service.cloud.limits.max_message_bytes,
            service.description.limits.max_message_bytes,
            self.options.max_streams,
        )
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((gate,))

        port = add_port(server, f"{self.host}:{self.port}", self.tls)
        await server.start()
        self._server = server
        self._watch = asyncio.create_task(self._service.watch())
        return port

    def stop(self) -> None:
        """Refuse new streams, give those in flight `drain_s`, end the rest with UNAVAILABLE.

        Frees all; a second call does nothing.
        """
        if self._loop.is_closed():
            return
        if self._server is not None:
            self._run(self._stop())
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._service.close()
        self._folder.cleanup()
        self._layers.cleanup()

    async def _stop(self) -> None:
        self._service.draining = True
        end = time.monotonic() + self.options.drain_s
        while self._service.calls and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_POLL_S)

        if self._watch is not None:
            self._watch.cancel()
        self._service.shut_down()
        if self._server is not None:
            await self._server.stop(self.options.grace_s)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
