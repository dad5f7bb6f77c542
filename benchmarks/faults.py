"""Faults on the way and in the server: after each the run ends with exactly the adapter of a run
without faults.

    python benchmarks/faults.py run      # some minutes
    python benchmarks/faults.py table    # the table of docs/security.md

A tiny Llama is trained through a relay that delays, throttles, cuts, swallows or corrupts what
passes, in both directions and at random places of a step; the server is behind TLS where bytes are
corrupted. Every fault is injected several times in a run of AdamW steps with LoRA dropout, and the
adapters are compared bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

import dlora
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import Access
from dlora.edge.link import RetryPolicy
from dlora.server import keys
from dlora.server.server import Server, ServerOptions, TlsFiles

RESULT = Path(__file__).parent / "results" / "faults.json"
MORTAL = Path(__file__).parents[1] / "tests" / "mortal_server.py"
STEPS = 12
# name -> (what the relay does all the time, what it does once a step, TLS)
FAULTS: dict[str, tuple[dict[str, float], str | None, bool]] = {
    "delay of 20 ms each way": ({"delay_s": 0.02}, None, False),
    "delay of 10 ms with jitter up to 30 ms": ({"delay_s": 0.01, "jitter_s": 0.03}, None, False),
    "bandwidth of 1 MB/s": ({"bytes_per_s": 1e6}, None, False),
    "cut at a random byte": ({}, "cut", False),
    "cut at a random byte, under TLS": ({}, "cut", True),
    "half-open: bytes vanish, the connection stays": ({}, "swallow", False),
    "a corrupted byte, under TLS": ({}, "corrupt", True),
}


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


def tiny(seed: int = 0) -> Any:
    """A small random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config)


def train(link: Any, before_step: Callable[[int], None]) -> tuple[torch.Tensor, Any]:
    """Some steps of AdamW with LoRA dropout: the adapter, and what it cost."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )
    retry = RetryPolicy(give_up_after_s=120.0, first_delay_s=0.05)
    model = dlora.get_peft_model(link, config, retry=retry)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        before_step(step)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 300, (4, 24), generator=generator)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(
        [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    ), model.meter


def relayed(name: str, cloud: CloudModel, folder: Path, want: torch.Tensor) -> dict[str, Any]:
    """One run through the relay."""
    always, once, encrypted = FAULTS[name]
    tls = (
        TlsFiles(certificate=folder / "server.pem", key=folder / "server.key")
        if encrypted
        else None
    )
    with Server(cloud, tls=tls, options=ServerOptions(drain_s=0.0)) as server:
        relay = Relay(("127.0.0.1", server.port), **always)
        access = Access(ca=folder / "ca.pem") if encrypted else Access()
        # Half-open connections are noticed by keepalive after 30 s; here a frame may take 1.5 s.
        link = dlora.connect(
            relay.address, access=access, frame_timeout_s=1.5 if once == "swallow" else 60.0
        )
        link.edge_files()
        size, lots = 400_000, random.Random(name)  # bytes of about a step

        def arm(step: int) -> None:
            if once is not None:
                relay.arm(once, lots.randrange(1, size), lots.choice(("up", "down")))

        started = time.monotonic()
        got, meter = train(link, arm)
        link.close()
        injected = relay.injected if once else STEPS
        relay.close()
    return {
        "fault": name,
        "injected": injected,
        "retries": meter.retries,
        "steps_lost": 0 if torch.equal(got, want) else None,
        "equal": torch.equal(got, want),
        "seconds": round(time.monotonic() - started, 1),
    }


@contextlib.contextmanager
def mortal(folder: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """A server process that comes back when it is killed: its port, and how to kill it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(MORTAL), str(folder), str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        pid = int(process.stdout.readline())

        def kill() -> None:
            nonlocal pid
            os.kill(pid, signal.SIGKILL)
            pid = int(process.stdout.readline())

        try:
            yield port, kill
        finally:
            os.killpg(process.pid, signal.SIGKILL)


class KillingLink:
    """A link that kills the server at a given send or receive of the next stream."""

    def __init__(self, link: Any, kill: Callable[[], None]) -> None:
        self.link, self.kill, self.description = link, kill, link.description
        self.plan: tuple[str, int] | None = None
        self.injected = 0
        self.address = link.address

    def edge_files(self) -> Path:
        found: Path = self.link.edge_files()
        return found

    def open(self) -> Any:
        plan, self.plan = self.plan, None
        return _KillingStream(self, self.link.open(), plan)


class _KillingStream:
    def __init__(self, owner: KillingLink, stream: Any, plan: tuple[str, int] | None) -> None:
        self.owner, self.stream, self.plan = owner, stream, plan
        self.counts = {"send": 0, "receive": 0}

    def _step(self, kind: str) -> None:
        if self.plan == (kind, self.counts[kind]):
            self.owner.injected += 1
            self.owner.kill()
        self.counts[kind] += 1

    def send(self, frame: Any) -> None:
        self._step("send")
        self.stream.send(frame)

    def receive(self) -> Any:
        self._step("receive")
        return self.stream.receive()

    def close(self) -> None:
        self.stream.close()


def killed(folder: Path, want: torch.Tensor) -> dict[str, Any]:
    """SIGKILL of the server before every kind of frame, forward and backward."""
    with mortal(folder) as (port, kill):
        link = KillingLink(dlora.connect(f"127.0.0.1:{port}", timeout_s=60), kill)
        phases = [(kind, count) for count in (0, 1, 4, 7, 9, 12) for kind in ("send", "receive")]

        def plan(step: int) -> None:
            link.plan = phases[step]

        started = time.monotonic()
        got, meter = train(link, plan)
        link.link.close()
    return {
        "fault": "SIGKILL of the server, in twelve places of a step",
        "injected": link.injected,
        "retries": meter.retries,
        "steps_lost": 0 if torch.equal(got, want) else None,
        "equal": torch.equal(got, want),
        "seconds": round(time.monotonic() - started, 1),
    }


def run(names: list[str] | None = None) -> list[dict[str, Any]]:
    """All faults, or some."""
    model = tiny()
    cloud = CloudModel(model, model_id="tiny")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "keys"
        keys.make_authority(folder, ["127.0.0.1"], 1)
        with Server(cloud, options=ServerOptions(drain_s=0.0)) as server:
            link = dlora.connect(server.address)
            want, _ = train(link, lambda step: None)
            link.close()
        found = []
        for name in names or list(FAULTS):
            found.append(relayed(name, cloud, folder, want))
            print(found[-1], file=sys.stderr, flush=True)
        if names is None:
            model.save_pretrained(Path(scratch) / "model")
            found.append(killed(Path(scratch) / "model", want))
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| fault | injected | micro-batches run again | steps lost | result |",
        "|---|---|---|---|---|",
    ]
    for one in result["faults"]:
        same = "equal, bit for bit" if one["equal"] else "DIFFERS"
        lines.append(
            f"| {one['fault']} | {one['injected']} | {one['retries']} | {one['steps_lost']} | "
            f"{same} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    if parser.parse_args().what == "run":
        torch.set_num_threads(1)
        from provenance import provenance

        result = {
            "steps": STEPS,
            "faults": run(),
            **provenance("grpcio"),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(json.loads(RESULT.read_text())))
