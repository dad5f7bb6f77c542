"""Many edges on one server: throughput, fairness, equal results, memory; and a step through Ray
beside one without.

    python benchmarks/load.py run      # about a quarter of an hour on 2 cores
    python benchmarks/load.py waiting  # memory of streams that wait, some minutes
    python benchmarks/load.py table    # the tables of docs/benchmarks.md

Every edge trains its own adapter on its own random tokens, all on this machine beside the server,
each a process with one thread (32 edges of the tiny model: 8 threads in each of 4). After a first
step each waits for the others; then tokens are counted for a fixed time. An edge's adapter after
three steps is compared, bit for bit, with that of the same edge alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "load.json"
WAITING_RESULT = RESULT.with_name("load_waiting.json")
COMPARED_STEPS = 3
# model -> (rows, tokens a row, seconds, numbers of edges, threads of edges in a process)
LOADS: dict[str, tuple[int, int, float, tuple[int, ...], int]] = {
    "smollm2": (2, 32, 90.0, (1, 4, 8), 1),
    "tiny": (2, 32, 30.0, (1, 32), 8),
}


def edge(
    address: str, seed: int, rows: int, length: int, seconds: float, barrier: Any, found: list[Any]
) -> None:
    """One edge: train until the time is up; append what it did."""
    import torch
    from peft import LoraConfig

    import dlora

    link = dlora.connect(address, timeout_s=60)
    with _BUILDING:  # initial values come from the process's one generator
        torch.manual_seed(seed)
        config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
        model = dlora.get_peft_model(link, config)
    model.set_options(head_positions="supervised")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    vocab = model.get_input_embeddings().weight.shape[0]

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        ids = torch.randint(0, vocab, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, :-8] = -100
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    barrier.wait()
    done, digest, start = 1, "", time.monotonic()
    while time.monotonic() - start < seconds or done < COMPARED_STEPS:
        step(done)
        done += 1
        if done == COMPARED_STEPS:
            digest = hashlib.sha256(
                b"".join(p.detach().numpy().tobytes() for p in parameters)
            ).hexdigest()
    took = time.monotonic() - start
    rate = (done - 1) * rows * length / took
    found.append(
        {"seed": seed, "tokens_per_s": rate, "digest": digest, "retries": model.meter.retries}
    )
    link.close()


_BUILDING = threading.Lock()


def edges(address: str, seeds: list[int], rows: int, length: int, seconds: float) -> None:
    """Some edges as threads of this process; prints what they did. Begins when standard input says
    so.
    """
    import torch

    torch.set_num_threads(1)
    found: list[Any] = []

    def ready() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    barrier = threading.Barrier(len(seeds), action=ready)
    threads = [
        threading.Thread(target=edge, args=(address, seed, rows, length, seconds, barrier, found))
        for seed in seeds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found), flush=True)


@contextmanager
def serving(model: str, *flags: str) -> Iterator[tuple[str, int]]:
    """A `dlora serve` process: its address and pid."""
    command = [
        sys.executable,
        "-m",
        "dlora",
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--drain_s",
        "0",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith("ready"):
                    yield line.split()[1], process.pid
                    break
        finally:
            process.terminate()
            process.communicate(timeout=60)


def memory_mib(pid: int, what: str = "VmRSS") -> float:
    """Resident memory of a process, now or (VmHWM) at its highest."""
    text = Path(f"/proc/{pid}/status").read_text()
    return round(int(text.split(f"{what}:")[1].split()[0]) / 1024, 1)


def turn(
    address: str, pid: int, count: int, load: tuple[int, int, float, Any, int], seconds: float
) -> dict[str, Any]:
    """So many edges at once."""
    rows, length, _, _, threads = load
    groups = [list(range(i, min(i + threads, count))) for i in range(0, count, threads)]
    with ExitStack() as stack:
        processes = []
        for seeds in groups:
            words = ["edges", "--address", address, "--seeds", ",".join(map(str, seeds))]
            words += ["--rows", str(rows), "--length", str(length), "--seconds", str(seconds)]
            command = [sys.executable, __file__, *words]
            pipes: dict[str, Any] = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "text": True,
            }
            processes.append(stack.enter_context(subprocess.Popen(command, **pipes)))
        for process in processes:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("an edge did not start; its message stands above")
        idle = memory_mib(pid)  # every edge is connected and has trained, none has a stream
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        peak = 0.0
        while any(process.poll() is None for process in processes):
            peak = max(peak, memory_mib(pid))
            time.sleep(0.25)
        found = [one for process in processes for one in json.loads(process.stdout.read())]
    rates = [one["tokens_per_s"] for one in found]
    return {
        "edges": count,
        "tokens_per_s": sum(rates),
        "slowest_to_mean": min(rates) / statistics.fmean(rates),
        "retries": sum(one["retries"] for one in found),
        "digests": {one["seed"]: one["digest"] for one in found},
        "server_idle_mib": idle,
        "server_peak_mib": peak,
    }


def tiny_folder(folder: Path, positions: int = 2048) -> str:
    """A small random Llama on disk, for texts of so many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=positions,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def run() -> dict[str, Any]:
    """All loads, then Ray."""
    found: dict[str, Any] = {"loads": {}}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_folder(Path(scratch) / "tiny")
        for name, load in LOADS.items():
            turns, alone = [], {}
            with serving(name if name != "tiny" else tiny, "--threads", "1") as (address, pid):
                start_mib = memory_mib(pid)
                for count in load[3]:
                    turns.append(turn(address, pid, count, load, load[2]))
                    shown = {k: v for k, v in turns[-1].items() if k != "digests"}
                    print(name, shown, file=sys.stderr, flush=True)
                for seed in range(max(load[3])):  # each edge's own result, alone on the server
                    one = turn_alone(address, pid, seed, load)
                    alone[seed] = one
            for one in turns:
                one["equal"] = all(
                    digest == alone[int(seed)] for seed, digest in one.pop("digests").items()
                )
            found["loads"][name] = {"server_start_mib": start_mib, "turns": turns}
        found["ray"] = beside_ray(tiny)
    return found


def turn_alone(address: str, pid: int, seed: int, load: tuple[int, int, float, Any, int]) -> str:
    """The adapter of one edge with the server for itself."""
    rows, length, *_ = load
    words = ["edges", "--address", address, "--seeds", str(seed)]
    words += ["--rows", str(rows), "--length", str(length), "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, __file__, *words], input="go\n", stdout=subprocess.PIPE, text=True
    )
    digest: str = json.loads(done.stdout.splitlines()[-1])[0]["digest"]
    return digest


def beside_ray(model: str) -> dict[str, Any]:
    """SmolLM2 behind a plain server and behind one replica of Ray, in turns; a step of each."""
    load = LOADS["smollm2"]
    rates: dict[str, list[float]] = {"plain": [], "ray": []}
    with (
        serving("smollm2", "--threads", "1") as plain,
        serving("smollm2", "--threads", "1", "--replicas", "1") as replica,
    ):
        for _ in range(3):
            for name, (address, pid) in (("plain", plain), ("ray", replica)):
                rates[name].append(turn(address, pid, 1, load, 20.0)["tokens_per_s"])
    ratios = [one / other for one, other in zip(rates["plain"], rates["ray"], strict=True)]
    return {"tokens_per_s": rates, "step_time_ratio": statistics.median(ratios), "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| model | edges | tokens/s in all | of that with one edge | slowest edge, of the mean | "
        "micro-batches run again | results equal those alone | server, MiB: idle, at its highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, load in result["loads"].items():
        first = load["turns"][0]["tokens_per_s"]
        for one in load["turns"]:
            lines.append(
                f"| {name} | {one['edges']} | {one['tokens_per_s']:.0f} | "
                f"{one['tokens_per_s'] / first:.2f} | "
                f"{one['slowest_to_mean']:.2f} | {one['retries']} | "
                f"{'yes' if one['equal'] else 'NO'} | "
                f"{one['server_idle_mib']:.0f}, {one['server_peak_mib']:.0f} |"
            )
    lines.append("")
    for name, load in result["loads"].items():
        most = load["turns"][-1]
        count = most["edges"]
        idle = (most["server_idle_mib"] - load["server_start_mib"]) / count
        active = (most["server_peak_mib"] - most["server_idle_mib"]) / count
        lines.append(
            f"Memory of the server for each of {count} edges of {name}: {idle:.1f} MiB connected "
            "and idle, up to "
            f"{active:.1f} MiB more with a micro-batch of {LOADS[name][0]} x {LOADS[name][1]} "
            "tokens in flight.  "
        )
    ray = result["ray"]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ray["ratios"])
    lines += [
        "",
        f"A step through one replica of Ray takes {ray['step_time_ratio']:.2f} of one without "
        f"({shown}).",
    ]
    if "waiting" in result:
        lines += ["", "### Edges that wait", "", waiting_table(result["waiting"])]
    return "\n".join(lines)


# ----------------------------------------------------------------- edges that wait


WAITING = (16, 48)  # rows and tokens a row of a micro-batch of SmolLM2
TIMED = (8, 48)  # the same where seconds are measured
WIRES = ("plain", "factored", "hosted")
MEMORY_MIB = 8192
ROUND_TRIPS_S = (60.0, 300.0)  # what an edge's line and its own work add to a micro-batch


def waiting() -> dict[str, Any]:
    """What a stream of SmolLM2 that waits for its edge takes, without and with --recompute."""
    found: dict[str, Any] = {"wires": {}}
    flags = {"without": ["--threads", "1"], "recompute": ["--threads", "1", "--recompute"]}
    for wire in WIRES:
        found["wires"][wire] = {}
        for name, words in flags.items():  # a fresh server each: none has memory to use again
            port = free_port()
            with serving("smollm2", *words, "--metrics_port", str(port)) as (address, pid):
                found["wires"][wire][name] = held(address, pid, port, wire)
        print(wire, found["wires"][wire], file=sys.stderr, flush=True)
    with (
        serving("smollm2", *flags["without"]) as without,
        serving("smollm2", *flags["recompute"]) as again,
    ):
        found["steps"] = seconds(without, again)
    return found


def split_model(link: Any, wire: Any) -> Any:
    """An adapter of the paper's modules on SmolLM2."""
    import torch
    from peft import LoraConfig

    import dlora

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
    options = {"wire": wire, "wire_dtype": "fp32", "upload_consent": wire == "hosted"}
    model = dlora.get_peft_model(link, config, **options)
    model.set_options(head_positions="supervised")
    return model


def forward(model: Any, seed: int, shape: tuple[int, int] = WAITING) -> Any:
    """The loss of a micro-batch: its stream waits for backward."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocab, shape, generator=generator)
    labels = ids.clone()
    labels[:, :-8] = -100
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def charged_mib(port: int) -> float:
    """What all streams of a server are charged now, by its metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    found = re.findall(r"^dlora_inflight_bytes\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found)) / 2**20


def held(address: str, pid: int, port: int, wire: str) -> dict[str, float]:
    """MiB of one stream that waits for its loss, by the server's memory, and what it is charged."""
    import dlora

    link = dlora.connect(address, timeout_s=60)
    model = split_model(link, wire)
    forward(model, 0, TIMED).backward()  # what is made once is made
    sizes = [memory_mib(pid)]
    losses = []
    for seed in (1, 2):
        losses.append(forward(model, seed))
        sizes.append(memory_mib(pid))
    charged = charged_mib(port) / len(losses)
    losses.clear()  # and with them their streams
    link.close()
    return {
        "first_mib": sizes[1] - sizes[0],
        "next_mib": sizes[2] - sizes[1],
        "charged_mib": charged,
    }


def cpu_s(pid: int) -> float:
    """CPU seconds of a process until now."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def seconds(without: tuple[str, int], again: tuple[str, int]) -> dict[str, list[float]]:
    """CPU seconds of the server for a token on the plain wire, in turns."""
    import dlora

    servers = {"without": without, "recompute": again}
    links = {name: dlora.connect(address) for name, (address, _) in servers.items()}
    models = {name: split_model(link, "plain") for name, link in links.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(4):
        for name, model in models.items():
            before = cpu_s(servers[name][1])
            forward(model, seed, TIMED).backward()
            if seed:  # the first one warms up
                found[name].append((cpu_s(servers[name][1]) - before) / (TIMED[0] * TIMED[1]))
    for link in links.values():
        link.close()
    return found


def waiting_table(result: dict[str, Any]) -> str:
    """Markdown: memory of a stream that waits, and how many edges that makes."""
    tokens = WAITING[0] * WAITING[1]
    cloud_s = {name: tokens * statistics.median(one) for name, one in result["steps"].items()}
    ratios = [
        one / other
        for one, other in zip(result["steps"]["recompute"], result["steps"]["without"], strict=True)
    ]
    lines = [
        f"| wire | | MiB a waiting stream holds | charged | edges in {MEMORY_MIB // 1024} GiB | "
        + " | ".join(f"tokens/s in all, {wait:.0f} s elsewhere" for wait in ROUND_TRIPS_S)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(ROUND_TRIPS_S),
    ]
    for wire, both in result["wires"].items():
        for name, one in both.items():
            edges = int(MEMORY_MIB // one["charged_mib"])
            rates = [
                min(edges * tokens / (cloud_s[name] + wait), tokens / cloud_s[name])
                for wait in ROUND_TRIPS_S
            ]
            shown = " | ".join(f"{rate:.0f}" for rate in rates)
            kind = "`--recompute`" if name == "recompute" else "without"
            lines.append(
                f"| {wire} | {kind} | {one['next_mib']:.0f} | "
                f"{one['charged_mib']:.0f} | {edges} | {shown} |"
            )
    lines += [
        "",
        f"A micro-batch of {WAITING[0]} x {WAITING[1]} tokens takes the server "
        f"{cloud_s['without']:.1f} s of CPU without, and {cloud_s['recompute']:.1f} s with "
        f"`--recompute`: {statistics.median(ratios):.2f} times as much "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}).",
    ]
    return "\n".join(lines)


def load_results() -> dict[str, Any]:
    """Both files."""
    found: dict[str, Any] = json.loads(RESULT.read_text())
    if WAITING_RESULT.exists():
        found["waiting"] = json.loads(WAITING_RESULT.read_text())
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "waiting", "table", "edges"))
    for flag, kind in (
        ("--address", str),
        ("--seeds", str),
        ("--rows", int),
        ("--length", int),
        ("--seconds", float),
    ):
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "edges":
        numbers = [int(seed) for seed in arguments.seeds.split(",")]
        edges(arguments.address, numbers, arguments.rows, arguments.length, arguments.seconds)
        sys.exit()
    if arguments.what == "run":
        from provenance import provenance

        result = run() | {
            **provenance("grpcio", "ray"),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.what == "waiting":
        from provenance import provenance

        result = waiting() | provenance("grpcio")
        WAITING_RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(load_results()))
