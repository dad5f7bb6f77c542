"""What an edge is told when its call fails: a status, words, and perhaps when to try again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import grpc
import torch
from google.protobuf.message import DecodeError

from dlora.errors import (
    AdapterMissing,
    ModelError,
    PeerLost,
    PrefixMissing,
    UsageError,
    WireError,
)
from dlora.protocol.channel import MISSING_KEY, MISSING_PREFIX, RETRY_AFTER_KEY
from dlora.server.calls import Call
from dlora.server.tenants import Busy

__all__ = ["Refusal", "ShuttingDown", "refusal_of", "status_of"]

log = logging.getLogger(__name__)

_OUT_OF_MEMORY_S: Final = 2.0
"""After which an edge may ask again when the machine had no memory left."""


class ShuttingDown(PeerLost):
    """No new calls are taken."""


@dataclass(frozen=True)
class Refusal:
    """How a call ends."""

    code: grpc.StatusCode
    """Says whether to try again: see docs/wire-protocol.md."""
    text: str
    wait_s: float | None = None
    missing: str = ""
    """What is not here, if it is no module."""

    @property
    def trailing(self) -> tuple[tuple[str, str], ...]:
        """Metadata that says when to try again, or with what."""
        if self.missing:
            return ((MISSING_KEY, self.missing),)
        return () if self.wait_s is None else ((RETRY_AFTER_KEY, str(int(1000 * self.wait_s))),)


def refusal_of(error: BaseException, call: Call, *, is_stopping: bool) -> Refusal:
    """How a call ends in which this went wrong. What only the provider may know is logged."""
    code = status_of(error, call, is_stopping=is_stopping)
    if code == grpc.StatusCode.INTERNAL:
        # A fault of this server: its details are for the provider's log alone.
        log.error("a micro-batch failed", exc_info=error)
        name = type(error).__name__
        return Refusal(code, f"the server failed on this micro-batch ({name}); see its log")
    if isinstance(error, Busy):
        return Refusal(code, str(error), error.retry_after_s or 1.0)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        log.error("out of memory: lower max_inflight_mib", exc_info=error)
        return Refusal(code, "no memory left for this micro-batch", _OUT_OF_MEMORY_S)
    if isinstance(error, PrefixMissing):
        return Refusal(code, str(error), missing=MISSING_PREFIX)
    return Refusal(code, str(error))


def status_of(error: BaseException, call: Call, *, is_stopping: bool) -> grpc.StatusCode:
    """The status that tells the edge whether to try again."""
    if call.is_revoked:
        return grpc.StatusCode.UNAUTHENTICATED
    # Kinds of PeerLost, so they come before it.
    if isinstance(error, Busy) or _is_out_of_memory(error):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, AdapterMissing):
        return grpc.StatusCode.NOT_FOUND

    if isinstance(error, PeerLost):
        is_ours = isinstance(error, ShuttingDown) or is_stopping or call.is_unchecked
        return grpc.StatusCode.UNAVAILABLE if is_ours else grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, UsageError):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, (WireError, ModelError, DecodeError)):
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.INTERNAL


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or the device, had no memory left: torch says it in three ways."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
