"""The access log: a JSON line for every stream says who did how much, and never what.

{"time": ISO TIME, "tenant": NAME, "identity": ID, "status": GRPC STATUS, "seconds": S,
 "compute_s": S, "received_bytes": N, "sent_bytes": N, "tokens": N}
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from dlora.errors import UsageError
from dlora.server.stream import StreamPipe

__all__ = ["AccessLog"]

log = logging.getLogger(__name__)


class AccessLog:
    """Appends to a file that nobody else can read."""

    def __init__(self, file: Path) -> None:
        """Raises UsageError if the file cannot be opened."""
        self.file = file
        self._is_failing = False
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UsageError(f"access log {file}: {error.strerror}") from error

    def write(self, pipe: StreamPipe, status: str, seconds: float) -> None:
        """Add the line of a stream that has ended.

        A line that cannot be written is lost, and the server's own log says so: a full disk must
        not end the work of edges.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "tenant": pipe.credential.tenant,
            "identity": pipe.credential.id,
            "status": status,
            "seconds": round(seconds, 3),
            "compute_s": round(pipe.compute_s, 3),
            "received_bytes": pipe.received_bytes,
            "sent_bytes": pipe.sent_bytes,
            "tokens": pipe.tokens,
        }

        try:
            os.write(self._descriptor, f"{json.dumps(line)}\n".encode())
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                log.error("access log %s: %s; its lines are lost", self.file, error.strerror)
            self._is_failing = True

    def close(self) -> None:
        """Close the file; nothing is written after that."""
        os.close(self._descriptor)
