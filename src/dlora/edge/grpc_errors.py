"""What gRPC's status codes mean to an edge: give up, or try again."""

from __future__ import annotations

import socket
from typing import Any, Final

import grpc

from dlora.errors import AdapterMissing, PeerError, PeerLost, PrefixMissing
from dlora.protocol.channel import MISSING_KEY, MISSING_PREFIX, RETRY_AFTER_KEY
from dlora.protocol.text import clean_text

__all__ = ["call_error", "connect_error"]

_MAX_HINT_DIGITS: Final = 9
_MAX_PAUSE_S: Final = 300.0
"""Longer than this no server is left alone, whatever it says."""

_TRY_AGAIN: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,  # never ours: gRPC's word for a connection that broke
)


def connect_error(error: Any, address: str, proxy: str | None = None) -> PeerError | PeerLost:
    """What a failed first call means, in words that help to mend it.

    `proxy`: the variable of the environment that names a proxy on the way, if there is one.
    """
    code, details = error.code(), clean_text(error.details() or "no reason given")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED or code == grpc.StatusCode.UNAVAILABLE:
        if proxy is not None:
            return PeerLost(
                f"no DLoRA server answers at {address} through the proxy of ${proxy}: does it let "
                f"gRPC through? Without it: no_proxy={address.rpartition(':')[0]}"
            )
        if _listens(address):
            return PeerLost(
                f"{address} is there, but does not answer as a DLoRA server: does it want TLS "
                "(tls_ca or tls), another authority, a client certificate, or none of these? Does "
                "its certificate name this address?"
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


def call_error(error: Any, address: str) -> PeerError | PeerLost:
    """What any later failed call means: try again, or not."""
    code, details = error.code(), clean_text(error.details() or "")
    message = f"{address}: {details or code.name}"
    trailing = dict(error.trailing_metadata() or ())
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        hint = _pause_s(trailing.get(RETRY_AFTER_KEY))
        if hint is not None:
            return PeerLost(message, retry_after_s=hint)
        return PeerError(f"{message}. Use a smaller batch or shorter sequences.")
    if code == grpc.StatusCode.NOT_FOUND:
        is_prefix = trailing.get(MISSING_KEY) == MISSING_PREFIX
        return PrefixMissing(message) if is_prefix else AdapterMissing(message)
    if code in _TRY_AGAIN or "RST_STREAM" in details:
        return PeerLost(message)
    return PeerError(message)


def _pause_s(hint: str | bytes | None) -> float | None:
    """Seconds of a server's hint in milliseconds; None for what is no hint."""
    if not isinstance(hint, str) or not (hint.isascii() and hint.isdigit()):
        return None
    if len(hint) > _MAX_HINT_DIGITS:
        return _MAX_PAUSE_S
    return min(int(hint) / 1000, _MAX_PAUSE_S)
