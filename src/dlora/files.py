"""Files of every part: where caches live, and files that hold secrets, never open to other users of
the machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dlora.errors import UsageError

__all__ = ["check_private", "default_cache", "read_secret", "write_json", "write_private"]


def default_cache() -> Path:
    """Where downloads and conversions are kept between runs: $DLORA_CACHE, or ~/.cache/dlora."""
    return Path(os.environ.get("DLORA_CACHE") or Path.home() / ".cache" / "dlora")


def check_private(file: Path) -> None:
    """Raises UsageError for a file that cannot be read, or that others on this machine can read."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    if mode & 0o077:
        raise UsageError(
            f"{file} holds secrets and is open to other users (mode {mode & 0o777:o}): chmod 600 it"
        )


def read_secret(file: Path) -> str:
    """The text of a private file, without white space around it. Raises UsageError as
    `check_private` does.
    """
    check_private(file)
    try:
        return file.read_text().strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def write_private(file: Path, data: bytes, mode: int = 0o600) -> None:
    """Write at once or not at all; never open to others, not even for a moment."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(data)
    scratch.replace(file)


def write_json(file: Path, values: Any) -> None:
    """Write at once or not at all: a full disk must not cost the old file."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(values, indent=2) + "\n")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
