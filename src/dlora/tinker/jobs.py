"""Requests that take a while: done one after another on one thread, their results kept.

The SDK submits a request, gets its id, and asks for the result until it is there. One thread does
all of the work, in the order in which it came: so the steps of an adapter stay in order, and
nothing of torch is shared between threads.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

__all__ = ["Jobs"]

log = logging.getLogger(__name__)

_MOST_KEPT: Final = 4096
"""Results that are kept, fetched or not: a client whose connection broke asks again."""


class Jobs:
    """Work in the order in which it came."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]
        self._waiting = queue.SimpleQueue()
        threading.Thread(target=self._work, name="dlora-tinker-jobs", daemon=True).start()

    def submit(self, request_id: str, work: Callable[[], Any]) -> None:
        """Do this in its turn. A request that is sent twice, as after a lost answer, is one."""
        with self._lock:
            if request_id in self._kept:
                return
            future: Future[Any] = Future()
            self._kept[request_id] = future
            done = [name for name, one in self._kept.items() if one.done()]
            for name in done[: max(0, len(self._kept) - _MOST_KEPT)]:
                del self._kept[name]
        self._waiting.put((future, work))

    def knows(self, request_id: str) -> bool:
        """Whether such a request came, and its result is still kept."""
        with self._lock:
            return request_id in self._kept

    async def result(self, request_id: str, wait_s: float) -> Any:
        """What the work gave, or raised. Raises KeyError for an unknown id, or TimeoutError."""
        with self._lock:
            future = self._kept[request_id]
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), wait_s)

    def _work(self) -> None:
        while True:
            future, work = self._waiting.get()
            try:
                future.set_result(work())
            except Exception as error:  # whatever it is: who waits has to hear of it
                log.debug("a request failed", exc_info=error)
                future.set_exception(error)
