"""The access log: a JSON line for every call says who did how much, and never what.

{"time": ISO TIME, "call": NAME, "tenant": NAME, "identity": ID, "status": GRPC STATUS,
 "seconds": S, "compute_s": S, "received_bytes": N, "sent_bytes": N, "tokens": N}
"""

from __future__ import annotations

import json
import logging
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from dlora.errors import UsageError
from dlora.server.place import Place

__all__ = ["AccessLog"]

log = logging.getLogger(__name__)


class AccessLog:
    """Appends to a file that nobody else can read or write."""

    def __init__(self, file: Path) -> None:
        """Raises UsageError if the file cannot be opened, is a link, or is open to others."""
        self.file = file
        self.lost_lines = 0
        """Lines that could not be written."""
        self._is_failing = False
        self._descriptor = _open(file)

    def reopen(self) -> None:
        """Go on in a file of the same name: whoever rotates logs has moved the old one away.

        Where that fails the old one stays in use, and the log of the server says why.
        """
        try:
            fresh = _open(self.file)
        except UsageError as error:
            log.error("%s; its lines go where they went", error)
            return
        old, self._descriptor = self._descriptor, fresh
        os.close(old)

    def write(self, place: Place, status: str, seconds: float) -> None:
        """Add the line of a call that has ended.

        A line that cannot be written is lost and counted, and the server's own log says so: a full
        disk must not end the work of edges.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "call": place.call.name,
            "tenant": place.call.credential.tenant,
            "identity": place.call.credential.id,
            "status": status,
            "seconds": round(seconds, 3),
            "compute_s": round(place.compute_s, 3),
            "received_bytes": place.received_bytes,
            "sent_bytes": place.sent_bytes,
            "tokens": place.tokens,
        }

        try:
            os.write(self._descriptor, f"{json.dumps(line)}\n".encode())
            self._is_failing = False
        except OSError as error:
            self.lost_lines += 1
            if not self._is_failing:
                log.error("access log %s: %s; its lines are lost", self.file, error.strerror)
            self._is_failing = True

    def close(self) -> None:
        """Close the file; nothing is written after that."""
        os.close(self._descriptor)


def _open(file: Path) -> int:
    """A descriptor that appends to a private file. Raises UsageError."""
    # Nor wait for a reader, where somebody has put a pipe there.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        raise UsageError(f"access log {file}: {error.strerror}, want a file and no link") from error

    found = os.fstat(descriptor)
    wrong = ""
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        wrong = "it is no plain file"
    elif stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
        wrong = f"it is open to other users (mode {found.st_mode & 0o777:o}): chmod 600 it"
    elif stat.S_ISREG(found.st_mode) and found.st_uid != os.geteuid():
        wrong = "it belongs to another user"
    if wrong:
        os.close(descriptor)
        raise UsageError(f"access log {file}: {wrong}")
    return descriptor
