"""Who may call: asked of every call before one byte of its message is read.

grpc.aio reads and parses the message of a unary call before it runs the handler. So here every call
is handled as a stream of bytes, whatever it is: the same on the wire, and read only by its handler.
Strangers get health alone, and that is answered without reading what they ask.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from dlora.protocol.channel import TOKEN_KEY, TOKEN_PREFIX, channel_options
from dlora.server.calls import Call
from dlora.server.identities import LOCAL, Credential, Identities
from dlora.server.sparse_log import SparseLog

__all__ = ["SERVICE_NAME", "Gate", "server_options"]

log = logging.getLogger(__name__)

SERVICE_NAME: Final = "dlora.v1.DLoRA"
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_MS: Final = 1000


def server_options(
    max_message_bytes: int, max_receive_bytes: int, max_streams: int
) -> list[tuple[str, int]]:
    """gRPC options of a server that strangers can reach, for so many streams in all.

    What is larger than `max_receive_bytes` is refused from its length, before it is read.
    """
    return [
        *channel_options(max_message_bytes, max_receive_bytes),
        # Without this, a second server could silently share the port.
        ("grpc.so_reuseport", 0),
        # Over the largest quota of streams: those beyond it are to get its words, and not to wait.
        ("grpc.max_concurrent_streams", max(128, 2 * max_streams)),
        # Connections that never say anything, or nothing any more.
        ("grpc.server_handshake_timeout_ms", 10 * _MS),
        ("grpc.max_connection_idle_ms", 300 * _MS),
        # What a peer never reads goes with its connection; edges connect again by themselves.
        ("grpc.max_connection_age_ms", 3_600 * _MS),
        ("grpc.max_connection_age_grace_ms", 600 * _MS),
        ("grpc.http2.max_ping_strikes", 2),
    ]


class Gate(grpc.GenericRpcHandler):
    """Hands every call of somebody known to its handler, and refuses all others."""

    def __init__(
        self,
        handlers: Mapping[str, Callable[[Call], Awaitable[None]]],
        identities: Identities | None,
        *,
        timeout_s: float,
        is_ready: Callable[[], bool],
        on_stranger: Callable[[], None] = lambda: None,
    ) -> None:
        """`handlers` by the call's name in the service; `is_ready` is what health answers."""
        self._handlers = {f"/{SERVICE_NAME}/{name}": run for name, run in handlers.items()}
        self._identities, self._timeout_s = identities, timeout_s
        self._is_ready, self._on_stranger = is_ready, on_stranger
        self._strangers = SparseLog(log, logging.WARNING)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Any call, known or not, as a stream of bytes in both directions."""
        method = handler_call_details.method

        async def answer(_messages: Any, context: Any) -> None:
            await self._answer(method, context)

        return grpc.stream_stream_rpc_method_handler(answer)

    async def _answer(self, method: str, context: Any) -> None:
        if method == _HEALTH:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
            if self._is_ready():
                status = health_pb2.HealthCheckResponse.SERVING
            await context.write(health_pb2.HealthCheckResponse(status=status).SerializeToString())
            return

        credential = await self._caller(method, context)
        handler = self._handlers.get(method)
        if handler is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such call")
            raise AssertionError("unreachable: abort raises")
        await handler(Call(context, method, credential, self._timeout_s))

    async def _caller(self, method: str, context: Any) -> Credential:
        """Who calls; ends the call if it is nobody that this server knows."""
        if self._identities is None:
            return LOCAL
        if self._identities.is_stale:
            # The reason is in the server's own log.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody can be let in at the moment")

        header = str(dict(context.invocation_metadata() or ()).get(TOKEN_KEY, ""))
        token = header.removeprefix(TOKEN_PREFIX) if header.startswith(TOKEN_PREFIX) else None
        certificates = context.auth_context().get("x509_pem_cert") or [None]
        credential = self._identities.authenticate(token, certificates[0])
        if credential is None:
            self._on_stranger()
            self._strangers.note(
                "stranger", f"refused a call of nobody known: {context.peer()[:80]}"
            )
            # The same words whatever was wrong with it.
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "no valid token or client certificate"
            )
            raise AssertionError("unreachable: abort raises")
        return credential
