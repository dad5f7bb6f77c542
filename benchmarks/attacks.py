"""What a hostile or merely greedy peer costs others: attacks on a real server on this machine.

    python benchmarks/attacks.py run             # rows that are not there yet, each under a minute
    python benchmarks/attacks.py run unread      # of these, those whose names have all these words
    python benchmarks/attacks.py table           # the tables of docs/security.md

Every row has a fresh `dlora serve` with TLS and tokens, a tiny random Llama, and an honest tenant
that trains on 2 x 16 tokens: for some seconds alone, then beside the attack. Memory, threads and
descriptors of the server are noted before, at their highest during, and after. Server, honest
tenant and attacker share this machine's cores. A stranger's calls are counted on a second server
where nobody trains, with the seconds of CPU that each takes. What attackers do is in
`attackers.py`; what a hostile cloud does to an edge, and how that ends, in `hostile_clouds.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attackers import STRANGERS, TENANTS
from load import serving, tiny_folder
from provenance import provenance

RESULT = Path(__file__).parent / "results" / "attacks.json"
SECONDS, SETTLE_S = 8.0, 1.0
POSITIONS = 1024  # room for long prompts
HONEST = (1, 2, 16)
"""Streams at a time, rows, tokens a row."""
ALIKE = (3, 2, 64)
"""Of two tenants that both want all that they can get."""
LIMITS = (
    "--max_tokens 4096 --max_length 1024 --threads 1 --edge_timeout_s 6 --max_inflight_mib 4096"
)


@dataclass(frozen=True)
class Scene:
    """A server and its tenants, as an attack finds them."""

    address: str
    keys: Path
    token: str
    """The attacker's, a tenant like others; none for a stranger."""


@dataclass(frozen=True)
class Attack:
    """One row. `start` begins it and yields, when it is under way, what asks for its state; its
    exit ends it.
    """

    name: str
    weights: tuple[int, int]
    """Of the honest tenant and of the attacker."""
    start: Callable[[Scene], Any]
    load: tuple[int, int, int] = HONEST
    is_stranger: bool = False
    others: int = 1
    """Tenants that attack, each with the attacker's weight."""


# ------------------------------------------------------------------------------ tenants


def tenant(address: str, keys: Path, token: str, streams: int, rows: int, length: int) -> None:
    """Train without end on random tokens, so many streams at a time; answer each line of standard
    input with the tokens so far.
    """
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.edge.grpc_link import Access

    torch.set_num_threads(1)
    access = Access(ca=keys / "ca.pem", token=token)
    done, slowest_s = [0] * streams, [0.0]

    def split() -> Any:
        model = dlora.get_peft_model(
            dlora.connect(address, access=access, timeout_s=30),
            LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]),
        )
        model.set_options(head_positions="supervised")
        return model

    def train(model: Any, number: int) -> None:
        ids = torch.randint(5, 300, (rows, length))
        labels = ids.clone()
        labels[:, :-4] = -100
        while True:
            start = time.monotonic()
            model(input_ids=ids, labels=labels).loss.backward()
            done[number] += ids.numel()
            slowest_s[0] = max(slowest_s[0], time.monotonic() - start)
            started.set()

    # A long micro-batch is under way once it is sent; the honest tenant has to have finished one.
    started = threading.Event()
    for number, model in enumerate([split() for _ in range(streams)]):
        threading.Thread(target=train, args=(model, number), daemon=True).start()
    started.wait(5.0)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([sum(done), time.monotonic(), slowest_s[0]]), flush=True)
        slowest_s[0] = 0.0


@contextmanager
def asked(what: str, *command: str) -> Iterator[Callable[[], Any]]:
    """A process of this folder; yields, when it is ready, what asks it for its state."""
    words = [sys.executable, *command]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask() -> Any:
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{what} did not start; its message stands above")
            yield ask
        finally:
            process.kill()


def training(scene: Scene, token: str, load: tuple[int, int, int]) -> Any:
    """A tenant in a process of its own; what asks it for (tokens, when, slowest step)."""
    words = ("tenant", "--", scene.address, str(scene.keys), token, *map(str, load))
    return asked("a tenant", __file__, *words)


def greedy(load: tuple[int, int, int], scene: Scene) -> Any:
    """An ordinary tenant that wants much."""
    return training(scene, scene.token, load)


def hostile(kind: str, scene: Scene) -> Any:
    """A peer that means harm."""
    file = str(Path(__file__).with_name("attackers.py"))
    return asked("an attacker", file, kind, scene.address, str(scene.keys), scene.token)


ATTACKS = [
    *(
        Attack(
            f"another tenant's {rows} x {length:,} tokens",
            weights,
            partial(greedy, (1, rows, length)),
        )
        for weights in ((1, 1), (100, 1))
        for rows, length in ((1, 128), (1, 512), (2, 1024), (4, 1024))
    ),
    *(
        Attack("another tenant that wants the same", weights, partial(greedy, ALIKE), ALIKE)
        for weights in ((1, 1), (2, 1), (4, 1))
    ),
    *(
        Attack(kind, (1, 1), partial(hostile, kind), others=10 if kind.startswith("ten ") else 1)
        for kind in TENANTS
    ),
    *(Attack(kind, (1, 1), partial(hostile, kind), is_stranger=True) for kind in STRANGERS),
]


# ------------------------------------------------------------------------------ one row


def figures(pid: int) -> dict[str, float]:
    """Memory in MiB, threads and descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    number = {key: int(status.split(f"{key}:")[1].split()[0]) for key in ("VmRSS", "Threads")}
    return {
        "mib": round(number["VmRSS"] / 1024, 1),
        "threads": number["Threads"],
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watched(pid: int, seconds: float) -> dict[str, float]:
    """A process's highest figures within this time."""
    end, most = time.monotonic() + seconds, figures(pid)
    while time.monotonic() < end:
        time.sleep(0.2)
        most = {key: max(value, most[key]) for key, value in figures(pid).items()}
    return most


def rate(ask: Callable[[], Any], before: list[Any]) -> dict[str, float]:
    """A tenant's tokens per second since it was asked before, and its slowest step."""
    (tokens, start, _), (done, end, slowest_s) = before, ask()
    return {"tokens_per_s": (done - tokens) / (end - start), "slowest_step_s": slowest_s}


def row(attack: Attack, model: str) -> dict[str, Any]:
    """The honest tenant alone, then beside the attack; the server before, during, after."""
    with ExitStack() as stack:
        scene, pid, honest = scene_of(attack, model, stack)
        ask = stack.enter_context(training(scene, honest, attack.load))
        start = ask()
        before = watched(pid, SECONDS)
        alone, found = rate(ask, start), {}

        with attack.start(scene) as answers:
            start, other = ask(), answers()
            during = watched(pid, SECONDS)
            beside = rate(ask, start)
            if isinstance(other, list):
                found["other"] = rate(answers, other)
            else:
                found["answers"] = answers()
        time.sleep(SETTLE_S)
        found |= {"alone": alone, "beside": beside, "before": before, "during": during}
        return {"weights": attack.weights, **found, "after": figures(pid)}


def cost(attack: Attack, model: str) -> dict[str, float]:
    """What a stranger costs a server that does nothing else: CPU a call, and memory."""
    with ExitStack() as stack:
        scene, pid, _ = scene_of(attack, model, stack)
        time.sleep(SETTLE_S)
        before, start = figures(pid), cpu_s(pid)
        with attack.start(scene) as answers:
            most = watched(pid, SECONDS / 2)
            calls = sum(answers().values())
            spent_s = cpu_s(pid) - start
    return {
        "calls": calls,
        "cpu_ms_a_call": 1000 * spent_s / max(1, calls),
        "mib": round(most["mib"] - before["mib"], 1),
    }


def scene_of(attack: Attack, model: str, stack: ExitStack) -> tuple[Scene, int, str]:
    """A server that lasts as long as the stack, its pid, and the honest tenant's token."""
    from dlora.server import keys

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys"
    keys.make_authority(folder, ["127.0.0.1", "localhost"], 1)
    names = ["honest", *(f"other{number}" for number in range(attack.others))]
    for name in names:
        weight = attack.weights[name != "honest"]
        keys.set_tenant(folder, name, {"weight": weight})
    honest, *others = (keys.add_token(folder, name, 1)[1] for name in names)

    address, pid = stack.enter_context(serving(model, "--keys", str(folder), *LIMITS.split()))
    token = "no-token" if attack.is_stranger else ",".join(others)
    return Scene(address, folder, token), pid, honest


def run(words: list[str]) -> None:
    """Every row with these words that the result does not have; written after each."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_folder(Path(scratch) / "tiny", POSITIONS)
        for attack in ATTACKS:
            rows = found.setdefault("strangers" if attack.is_stranger else "tenants", {})
            key = attack.name
            if not attack.is_stranger:
                key = f"{key}, weights {attack.weights[0]}:{attack.weights[1]}"
            if key in rows or not set(words) <= set(attack.name.split()):
                continue
            rows[key] = row(attack, model) | {"provenance": provenance("grpcio")}
            if attack.is_stranger:
                rows[key]["cost"] = cost(attack, model)
            print(key, json.dumps(rows[key]), file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, Any]) -> str:
    """Markdown: tenants, then strangers."""
    kept = "honest tenant, tokens/s: alone, beside | kept | slowest step, s"
    server = "server MiB: before, during, after | threads | descriptors"
    lines = [
        f"| another tenant | {kept} | share of both | {server} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["tenants"].items():
        own, other = one["beside"]["tokens_per_s"], one.get("other")
        share = "" if other is None else f"{own / (own + other['tokens_per_s']):.0%}"
        lines.append(f"| {name} | {_kept(one)} | {share} | {_server(one)} |")
    lines += [
        "",
        f"| stranger | {kept} | CPU a call, ms | more memory without others, MiB | {server} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.get("strangers", {}).items():
        cells = f"{one['cost']['cpu_ms_a_call']:.2f} | {one['cost']['mib']:.0f}"
        lines.append(f"| {name} | {_kept(one)} | {cells} | {_server(one)} |")
    return "\n".join(lines)


def _kept(one: dict[str, Any]) -> str:
    alone, beside = one["alone"], one["beside"]
    share = beside["tokens_per_s"] / alone["tokens_per_s"]
    return (
        f"{alone['tokens_per_s']:.0f}, {beside['tokens_per_s']:.0f} | {share:.0%} | "
        f"{alone['slowest_step_s']:.2f}, {beside['slowest_step_s']:.2f}"
    )


def _server(one: dict[str, Any]) -> str:
    moments = [one[moment] for moment in ("before", "during", "after")]
    return " | ".join(
        ", ".join(f"{moment[key]:.0f}" for moment in moments)
        for key in ("mib", "threads", "descriptors")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "tenant"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "tenant":
        address, folder, token, *load = arguments.rest
        tenant(address, Path(folder), token, *map(int, load))
        sys.exit()
    if arguments.what == "run":
        run(arguments.rest)
    print(table(json.loads(RESULT.read_text())))
