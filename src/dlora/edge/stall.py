"""A download that is cut where it stalls: waiting is bounded by progress, not by size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final

from dlora.errors import PeerLost
from dlora.proto import dlora_pb2 as pb

__all__ = ["without_stalls"]

_WINDOW_S: Final = 60.0
_LEAST_BYTES: Final = 256 * 2**10
"""In one window: a line of 4 kB/s manages that."""


def without_stalls(
    call: Any, address: str, window_s: float = _WINDOW_S, least_bytes: int = _LEAST_BYTES
) -> Iterator[pb.FileChunk]:
    """The chunks of a `FetchEdgeFiles` call. Raises PeerLost where too few come in a window."""
    num_bytes, over, stalled = 0, threading.Event(), False

    def watch() -> None:
        nonlocal stalled
        before = 0
        while not over.wait(window_s):
            if num_bytes - before < least_bytes:
                stalled = True
                call.cancel()
                return
            before = num_bytes

    threading.Thread(target=watch, name="dlora-download", daemon=True).start()
    try:
        for chunk in call:
            num_bytes += len(chunk.data)
            yield chunk
    except Exception as error:
        if stalled:
            raise PeerLost(
                f"{address} sent less than {least_bytes >> 10} KiB of its files in {window_s:.0f} s"
            ) from error
        raise
    finally:
        over.set()
        call.cancel()
