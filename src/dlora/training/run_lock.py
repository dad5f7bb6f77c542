"""One process trains in a folder: two would rotate each other's checkpoints."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from dlora.errors import UsageError
from dlora.runs import RunFolder

__all__ = ["alone_in_output", "run_lock"]

log = logging.getLogger(__name__)

More = ParamSpec("More")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, and make it if need be; what was made and is empty goes afterwards.

    The trainer makes the folder for checkpoints, before all is checked.

    The system gives the lock back whatever ends the process. Raises UsageError if another process
    holds it.
    """
    inside_out = (RunFolder(folder).checkpoints, folder, *folder.parents)
    missing = [path for path in inside_out if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _take(handle, folder)
        yield
    finally:
        os.close(handle)
        for path in missing:
            with suppress(OSError):  # it was never made, or it holds something by now
                path.rmdir()


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another process trains in {folder}: wait for it, or use another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): let one process alone use it", folder, error)


def alone_in_output(train: Callable[More, dict[str, Any]]) -> Callable[More, dict[str, Any]]:
    """A function that trains, with its settings first, while it alone holds the output folder."""

    @wraps(train)
    def locked(*arguments: More.args, **named: More.kwargs) -> dict[str, Any]:
        settings: Any = arguments[0]
        with run_lock(settings.output):
            return train(*arguments, **named)

    return locked
