"""A soak: edges that come and go for long, a server that is restarted, and what grows meanwhile.

    python benchmarks/soak.py run --minutes 60
    python benchmarks/soak.py table

Three edges at a time, threads of this process, beside a `dlora serve` process with a tiny Llama.
Each connects, trains some steps or answers a prompt, and leaves; then, after a pause, the next
comes. After a third
of the time the server is told to stop, and another is started on its port. Every edge with the same
seed has to end with the same bits. Memory, threads and descriptors of both processes are read all
the time. Growth is that of their median from the second quarter of a process's time to its last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from load import tiny_folder
from peft import LoraConfig

import dlora
from dlora.edge.link import RetryPolicy

RESULT = Path(__file__).parent / "results" / "soak.json"
EDGES, SEEDS, STEPS = 3, 4, 5
POSITIONS = 128
PAUSE_S = 3.0  # at most, before the next edge comes
SAMPLE_S = 2.0
COUNTED = ("adapters", "answers", "failed", "retries")
MEASURES = ("memory_mib", "threads", "descriptors")


def serve(folder: Path, port: int) -> subprocess.Popen[str]:
    """A server process that is ready."""
    command = [sys.executable, "-m", "dlora", "serve", "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said = []
    for line in process.stdout or ():
        said.append(line)
        if line.startswith("ready"):
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
            return process
    raise RuntimeError(f"the server did not start: {''.join(said)}")


class Edges:
    """Edges one after the other, several at a time, until they are told to end."""

    def __init__(self, address: str, cache: Path) -> None:
        self.address, self.cache = address, cache
        self.ending = threading.Event()
        self.counts: Counter[str] = Counter()
        self.digests: dict[str, set[str]] = {}
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._slot, args=(number,)) for number in range(EDGES)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let the edges at work finish."""
        self.ending.set()
        for thread in self._threads:
            thread.join()

    def _slot(self, number: int) -> None:
        lots = random.Random(number)
        while not self.ending.is_set():
            self.ending.wait(lots.uniform(0, PAUSE_S))
            answers, seed = lots.random() < 0.25, lots.randrange(SEEDS)
            try:
                digest, retries = self._edge(seed, answers)
            except Exception as error:  # all are counted, none is wanted
                with self._lock:
                    self.errors.append(f"{type(error).__name__}: {error}"[:300])
                    self.counts["failed"] += 1
                continue
            with self._lock:
                kind = "answers" if answers else "adapters"
                self.counts[kind] += 1
                self.counts["retries"] += retries
                self.digests.setdefault(f"{kind} {seed}", set()).add(digest)

    def _edge(self, seed: int, answers: bool) -> tuple[str, int]:
        """One edge: a digest of what it made, and how often it tried again."""
        link = dlora.connect(self.address, timeout_s=120, cache=self.cache)
        try:
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            retry = RetryPolicy(give_up_after_s=300.0, first_delay_s=0.05)
            with self._lock:  # what builds a model without memory is not safe among threads
                model = dlora.get_peft_model(link, config, retry=retry)
            # All threads share the process's one generator; these values depend on the seed alone.
            own = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.05, generator=own)
            if answers:
                ids = torch.arange(3 + seed, 12 + seed)[None]
                found = [model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)]
            else:
                found = _trained(model, seed)
            raw = b"".join(tensor.detach().numpy().tobytes() for tensor in found)
            return hashlib.sha256(raw).hexdigest(), model.meter.retries
        finally:
            link.close()


def _trained(model: Any, seed: int) -> list[torch.Tensor]:
    """The adapter after some steps of AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * seed + step)
        ids = torch.randint(0, 300, (4, 24), generator=generator)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def sample(pid: int) -> dict[str, float]:
    """What a process holds now."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return {
        "memory_mib": pages * resource.getpagesize() / 2**20,
        "threads": len(list((proc / "task").iterdir())),
        "descriptors": len(list((proc / "fd").iterdir())),
    }


def growth(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each measure the median in the second quarter and in the last, and the growth in %."""
    quarter = max(1, len(samples) // 4)
    found = {}
    for name in MEASURES:
        before, after = (
            statistics.median(one[name] for one in part)
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        percent = 100 * (after / before - 1)
        found[name] = {
            "before": round(before, 1),
            "after": round(after, 1),
            "percent": round(percent, 2),
        }
    return found


def run(minutes: float) -> dict[str, Any]:
    """The whole soak."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        tiny_folder(Path(scratch) / "model", POSITIONS)
        server = serve(Path(scratch) / "model", port)
        started = time.monotonic()
        edges = Edges(f"127.0.0.1:{port}", Path(scratch) / "cache")
        samples: dict[str, list[dict[str, float]]] = {
            "first server": [],
            "second server": [],
            "edges": [],
        }
        try:
            life = "first server"
            while (passed := time.monotonic() - started) < 60 * minutes:
                if life == "first server" and passed > 20 * minutes:
                    server.send_signal(signal.SIGTERM)
                    server.wait()
                    server, life = serve(Path(scratch) / "model", port), "second server"
                samples[life].append(sample(server.pid))
                samples["edges"].append(sample(os.getpid()))
                time.sleep(SAMPLE_S)
        finally:
            edges.end()
            server.kill()
            server.wait()
        seconds = time.monotonic() - started
    return {
        "minutes": round(seconds / 60, 2),
        "edges": dict(edges.counts),
        "errors": edges.errors[:20],
        "different": sorted(name for name, found in edges.digests.items() if len(found) > 1),
        "growth": {name: growth(found) for name, found in samples.items() if len(found) > 4},
        "samples": {name: len(found) for name, found in samples.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    counts = result["edges"]
    cells = [result["minutes"], *(counts.get(name, 0) for name in COUNTED)]
    lines = [
        "| minutes | edges trained | edges answered | failed | attempts again | other results than "
        "of the same seed |",
        "|---|---|---|---|---|---|",
        f"| {' | '.join(map(str, cells))} | {len(result['different'])} |",
        "",
        "| process | memory, MiB | threads | descriptors |",
        "|---|---|---|---|",
    ]
    for name, measures in result["growth"].items():
        cells = [
            f"{one['before']:.0f}, then {one['after']:.0f} ({one['percent']:+.1f} %)"
            for one in (measures[measure] for measure in MEASURES)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.what == "run":
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)  # every lost stream is one
        from provenance import provenance

        found = {**run(arguments.minutes), **provenance("grpcio")}
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(table(json.loads(RESULT.read_text())))
