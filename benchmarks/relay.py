"""A relay of TCP bytes that delays, throttles, cuts, swallows or corrupts them as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading


class Relay:
    """Passes TCP bytes on between edges and a server, and does to them what it is told."""

    def __init__(
        self,
        target: tuple[str, int],
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float = 0.0,
    ) -> None:
        self.target, self.delay_s, self.jitter_s, self.bytes_per_s = (
            target,
            delay_s,
            jitter_s,
            bytes_per_s,
        )
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
        swallowing = False
        while data := await reader.read(1 << 14):
            self.passed_bytes += len(data)
            if self._armed is not None and self._armed[2] == direction:
                what, left, _ = self._armed
                self._armed = (what, left - len(data), direction)
                if left <= len(data):
                    self._armed, self.injected = None, self.injected + 1
                    if what == "cut":
                        writer.write(data[:left])
                        return
                    if what == "corrupt":
                        data = bytearray(data)
                        data[min(left, len(data) - 1)] ^= 0x10
                    swallowing = what == "swallow"
            if swallowing:
                continue
            if self.delay_s or self.jitter_s:
                await asyncio.sleep(self.delay_s + self.lots.random() * self.jitter_s)
            if self.bytes_per_s:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            writer.write(data)
            await writer.drain()
