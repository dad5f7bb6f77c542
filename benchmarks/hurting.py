"""A server process that is killed or stopped, and a link that does it at chosen frames."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MORTAL = Path(__file__).parents[1] / "tests" / "mortal_server.py"


class MortalServer:
    """A server process that comes back when it is killed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, str(MORTAL), str(folder), str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._returning: threading.Timer | None = None
        self.pid = self._next_life()

    def _next_life(self) -> int:
        if self.process.stdout is None:
            raise RuntimeError("the server has no standard output")
        return int(self.process.stdout.readline())

    def hurt(self, what: int, away_s: float) -> None:
        """Kill or stop it; it is back after so many seconds, in the background."""
        self.settle()
        pid = self.pid
        if what == signal.SIGKILL:
            os.kill(self.process.pid, signal.SIGSTOP)  # its parent, which would bring it back
        os.kill(pid, what)

        def bring_back() -> None:
            if what == signal.SIGKILL:
                os.kill(self.process.pid, signal.SIGCONT)
                self.pid = self._next_life()
            else:
                os.kill(pid, signal.SIGCONT)

        self._returning = threading.Timer(away_s, bring_back)
        self._returning.start()

    def settle(self) -> None:
        """Wait until it is back."""
        if self._returning is not None:
            self._returning.join()

    def end(self) -> None:
        """Kill it for good."""
        self.settle()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


class HurtingLink:
    """A link that calls `hurt` before chosen frames of its streams.

    Each of `places` is used once, by the first stream that comes so far: how many of its frames
    were sent and received before.
    """

    def __init__(self, link: Any, hurt: Callable[[], None]) -> None:
        self.link, self.hurt = link, hurt
        self.description, self.address = link.description, link.address
        self.put_adapter, self.edge_files = link.put_adapter, link.edge_files
        self.layer_files, self.ping, self.close = link.layer_files, link.ping, link.close
        self.places: list[int] = []
        self.injected = self.longest = 0

    def open(self) -> Any:
        return _HurtingStream(self, self.link.open())


class _HurtingStream:
    def __init__(self, owner: HurtingLink, stream: Any) -> None:
        self.owner, self.stream, self.count = owner, stream, 0

    def _step(self) -> None:
        if self.owner.places[:1] == [self.count]:
            self.owner.places.pop(0)
            self.owner.injected += 1
            self.owner.hurt()
        self.count += 1
        self.owner.longest = max(self.owner.longest, self.count)

    def send(self, frame: Any) -> None:
        self._step()
        self.stream.send(frame)

    def receive(self) -> Any:
        self._step()
        return self.stream.receive()

    def close(self) -> None:
        self.stream.close()
