"""What both halves must agree on about a gRPC channel: version, size of a message, metadata.

No torch here, so that settings can take their defaults from it.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MISSING_KEY",
    "MISSING_PREFIX",
    "PROTOCOL_VERSION",
    "RETRY_AFTER_KEY",
    "TOKEN_KEY",
    "TOKEN_PREFIX",
    "channel_options",
]

PROTOCOL_VERSION: Final = 2
MAX_MESSAGE_BYTES: Final = 256 * 2**20
"""Of one frame, where a server sets no limit of its own."""

RETRY_AFTER_KEY: Final = "retry-after-ms"
"""Trailing metadata beside RESOURCE_EXHAUSTED: the server is busy, and when to ask again."""

MISSING_KEY: Final = "missing"
MISSING_PREFIX: Final = "prefix"
"""Trailing metadata beside NOT_FOUND, where it is no module that is missing."""

MODULE_FRAMES: Final = 8
"""In which a hosted adapter travels, if it has so many modules, and its gradients come back: the
fewer, the longer is waited for the first.
"""
PUT_BYTES: Final = 32 * 2**20
"""Frozen modules travel in messages of about this size."""
TOKEN_KEY: Final = "authorization"  # noqa: S105  # the name of a header, no secret
TOKEN_PREFIX: Final = "Bearer "  # noqa: S105  # the same
"""Metadata of every call, where a token says who calls."""


def channel_options(
    max_message_bytes: int = MAX_MESSAGE_BYTES, max_receive_bytes: int | None = None
) -> list[tuple[str, int]]:
    """gRPC options for servers and channels of this protocol.

    `max_receive_bytes`: of a message that comes, if other than of one that goes.
    """
    return [
        # gRPC's own limit acts before a message is allocated; its default of 4 MiB is under one
        # frame.
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes or max_message_bytes),
        # A peer behind a dead link is noticed after at most 30 s, and NAT entries stay alive.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # Neither sent nor taken: a few bytes can be inflated to any size, before anybody looks.
        ("grpc.default_compression_algorithm", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]
