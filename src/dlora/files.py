"""Files of every part: where caches live, and files that hold secrets, never open to other users of
the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from dlora.errors import UsageError

__all__ = [
    "ScratchFolder",
    "check_private",
    "default_cache",
    "expand_homes",
    "read_secret",
    "sync_folder",
    "write_json",
    "write_private",
]

_YOUNG_S: Final = 60.0
"""A scratch folder that is younger may be one whose owner has not locked it yet."""


def default_cache() -> Path:
    """Where downloads and conversions are kept between runs: $DLORA_CACHE, or ~/.cache/dlora."""
    return Path(os.environ.get("DLORA_CACHE") or "~/.cache/dlora").expanduser()


def expand_homes(settings: Any) -> None:
    """Let `~` at the beginning of every path of a settings object be the home, in place.

    What is expanded in one place only is two places. Raises UsageError where there is no such home.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        paths = value if isinstance(value, list) else [value]
        if not any(isinstance(path, Path) for path in paths):
            continue
        try:
            homes = [path.expanduser() for path in paths]
        except RuntimeError:
            raise UsageError(
                f"{field.name}: got {str(value)!r}, want a path: no such home"
            ) from None
        object.__setattr__(settings, field.name, homes if isinstance(value, list) else homes[0])


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
        return file.read_text(encoding="utf-8").strip()
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
    """Write at once or not at all: a full disk, or a power cut, must not cost the old file."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as out:
            out.write(json.dumps(values, indent=2) + "\n")
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that is also removed where its process was killed: by the next one.

    Each is locked by the process that made it; folders of the same prefix whose lock is free are
    removed first. Without `parent` it is where temporary files are.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _remove_stale(prefix, parent)
        super().__init__(prefix=prefix, dir=parent)
        self._lock: int | None = os.open(self.name, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def cleanup(self) -> None:
        """Remove the folder; may be called twice."""
        super().cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_stale(prefix: str, parent: Path) -> None:
    """Remove this user's scratch folders that nobody holds any more."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            old = time.time() - status.st_mtime > _YOUNG_S
            if not (old and status.st_uid == os.getuid() and folder.is_dir()):
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody holds it
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def sync_folder(folder: Path) -> None:
    """Let a folder and its files reach the disk: what follows may then rely on them."""
    for path in (*(file for file in folder.rglob("*")), folder, folder.parent):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
