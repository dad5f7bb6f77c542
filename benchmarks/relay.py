"""A relay of TCP bytes: a link of some round trip time and bandwidth, which cuts, swallows or
corrupts bytes when it is told to.

    python benchmarks/relay.py ADDRESS RTT_MS UP_MBIT DOWN_MBIT    # 0: no limit; prints its address

What arrives is sent on a transmission time and half a round trip later, as on a line: many bytes
are under way at once, and all connections of a direction share its bandwidth.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

BUFFER_BYTES = 1 << 18
"""What a direction holds beside the bytes that are on the line."""
LINE_BYTES = 1 << 24
"""The most that is on a line without a limit."""


@contextlib.contextmanager
def link_to(
    address: str, rtt_ms: float, up_mbit: float = 0.0, down_mbit: float = 0.0
) -> Iterator[str]:
    """A relay in a process of its own; yields its address, which for no limit at all is the
    server's.
    """
    if not (rtt_ms or up_mbit or down_mbit):
        yield address
        return
    numbers = [str(number) for number in (rtt_ms, up_mbit, down_mbit)]
    command = [sys.executable, __file__, address, *numbers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Relay:
    """Passes TCP bytes on between edges and a server, and does to them what it is told."""

    def __init__(
        self,
        target: tuple[str, int],
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float = 0.0,
        *,
        up_bytes_per_s: float = 0.0,
        down_bytes_per_s: float = 0.0,
    ) -> None:
        """Every chunk comes `delay_s` later, and up to `jitter_s` more, in order. Bandwidths of 0
        have no limit; `bytes_per_s` is for both directions.
        """
        self.target, self.delay_s, self.jitter_s = target, delay_s, jitter_s
        self.rates = {
            "up": up_bytes_per_s or bytes_per_s,
            "down": down_bytes_per_s or bytes_per_s,
        }
        self._free_at = {"up": 0.0, "down": 0.0}  # when the line has sent what it was given
        self.lots = random.Random(0)
        self.injected = self.passed_bytes = 0
        self._armed: tuple[str, int, str] | None = (
            None  # what, after how many bytes, in which direction
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def arm(self, what: str, after_bytes: int, direction: str) -> None:
        """Do it once, after so many more bytes `up` or `down`; nothing if something is armed
        already.
        """
        if self._armed is None:
            self._armed = (what, after_bytes, direction)

    def close(self) -> None:
        """Drop everything."""

        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        ends = (writer, far_writer)
        tasks = [
            asyncio.create_task(self._pass(reader, far_writer, "up")),
            asyncio.create_task(self._pass(far_reader, writer, "down")),
        ]
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in ends:
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        """Until the end of one direction; then both are cut."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        room = asyncio.Semaphore(max(1, self._room_bytes(direction) >> 14))
        delivery = asyncio.create_task(self._deliver(under_way, room, writer))
        try:
            swallowing, due = False, 0.0
            while data := await reader.read(1 << 14):
                self.passed_bytes += len(data)
                data, is_cut, swallows = self._harm(data, direction)
                swallowing = swallowing or swallows
                if swallowing:
                    continue
                await room.acquire()
                due = max(due, self._due(len(data), direction))
                under_way.put_nowait((due, data))
                if is_cut:
                    break
            under_way.put_nowait((due, b""))
            await delivery
        finally:
            delivery.cancel()

    def _harm(self, data: bytes, direction: str) -> tuple[bytes, bool, bool]:
        """(what is left of these bytes, whether that is the end, whether the rest vanishes)."""
        if self._armed is None or self._armed[2] != direction:
            return data, False, False
        what, left, _ = self._armed
        if left > len(data):
            self._armed = (what, left - len(data), direction)
            return data, False, False
        self._armed, self.injected = None, self.injected + 1
        if what == "corrupt":
            harmed = bytearray(data)
            harmed[min(left, len(data) - 1)] ^= 0x10
            data = bytes(harmed)
        return (data[:left] if what == "cut" else data), what == "cut", what == "swallow"

    def _room_bytes(self, direction: str) -> int:
        """What may be under way before the sender has to wait."""
        rate = self.rates[direction]
        return BUFFER_BYTES + (int(rate * self.delay_s) if rate else LINE_BYTES)

    def _due(self, size: int, direction: str) -> float:
        """When so many bytes, given to the line now, are at its other end."""
        now, rate = time.monotonic(), self.rates[direction]
        sent = max(now, self._free_at[direction]) + (size / rate if rate else 0.0)
        self._free_at[direction] = sent
        return sent + self.delay_s + self.lots.random() * self.jitter_s

    async def _deliver(
        self,
        under_way: asyncio.Queue[tuple[float, bytes]],
        room: asyncio.Semaphore,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Write what has arrived, until there is no more."""
        while True:
            due, data = await under_way.get()
            if (left_s := due - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            if not data:
                return
            writer.write(data)
            await writer.drain()
            room.release()


if __name__ == "__main__":
    target, rtt_ms, *mbits = sys.argv[1:]
    host, _, port = target.rpartition(":")
    up, down = (float(mbit) * 1e6 / 8 for mbit in mbits)
    relay = Relay((host, int(port)), float(rtt_ms) / 2000, up_bytes_per_s=up, down_bytes_per_s=down)
    print(relay.address, flush=True)
    signal.pause()
