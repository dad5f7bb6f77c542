"""What a hostile or merely greedy peer costs others: attacks on a real server on this machine.

    python benchmarks/attacks.py run             # rows that are not there yet, each under a minute
    python benchmarks/attacks.py run 4 1,024     # of these, those whose names have all these words
    python benchmarks/attacks.py table           # the table of docs/security.md

Every row has a fresh `dlora serve` with TLS and tokens, a tiny random Llama, and an honest tenant
that trains on 2 x 16 tokens: for some seconds alone, then beside the attack. Memory, threads and
descriptors of the server are noted before, at their highest during, and after. Server, honest
tenant and attacker share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import serving
from provenance import provenance

RESULT = Path(__file__).parent / "results" / "attacks.json"
SECONDS, SETTLE_S = 8.0, 1.0
HONEST = (2, 16)
LIMITS = ("--max_tokens", "4096", "--max_length", "1024", "--threads", "1", "--max_inflight_mib")


@dataclass(frozen=True)
class Scene:
    """A server and its tenants, as an attack finds them."""

    address: str
    keys: Path
    token: str
    """The attacker's, a tenant like others."""


@dataclass(frozen=True)
class Attack:
    """One row. `start` begins it, and returns when it is under way; its exit ends it."""

    name: str
    weights: tuple[int, int]
    """Of the honest tenant and of the attacker."""
    start: Callable[[Scene], Any]


# ------------------------------------------------------------------------------ tenants


def tenant(address: str, keys: Path, token: str, rows: int, length: int) -> None:
    """Train without end on random tokens; answer each line of standard input with the tokens so
    far.
    """
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.edge.grpc_link import Access

    torch.set_num_threads(1)
    access = Access(ca=keys / "ca.pem", token=token)
    model = dlora.get_peft_model(
        dlora.connect(address, access=access, timeout_s=30),
        LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]),
    )
    model.set_options(head_positions="supervised")
    done = 0

    def train() -> None:
        nonlocal done
        ids = torch.randint(5, 300, (rows, length))
        labels = ids.clone()
        labels[:, :-4] = -100
        while True:
            model(input_ids=ids, labels=labels).loss.backward()
            done += ids.numel()
            started.set()

    # A long micro-batch is under way once it is sent; the honest tenant has to have finished one.
    started = threading.Event()
    threading.Thread(target=train, daemon=True).start()
    started.wait(5.0)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([done, time.monotonic()]), flush=True)


@contextmanager
def training(scene: Scene, token: str, rows: int, length: int) -> Iterator[Callable[[], Any]]:
    """A tenant in a process of its own; yields what asks it for (tokens, when)."""
    command = [sys.executable, __file__, "tenant", scene.address, str(scene.keys), token]
    command += [str(rows), str(length)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask() -> Any:
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a tenant did not start; its message stands above")
            yield ask
        finally:
            process.kill()


def greedy(rows: int, length: int) -> Callable[[Scene], Any]:
    """One stream after another of an ordinary tenant."""
    return lambda scene: training(scene, scene.token, rows, length)


ATTACKS = [
    Attack(f"another tenant's {rows} x {length:,} tokens", weights, greedy(rows, length))
    for weights in ((1, 1), (100, 1))
    for rows, length in ((1, 128), (1, 512), (2, 1024), (4, 1024))
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


def rate(ask: Callable[[], Any], pid: int) -> tuple[float, dict[str, float]]:
    """The honest tenant's tokens per second for a while, and the server's highest figures."""
    (before, start), most = ask(), figures(pid)
    while time.monotonic() - start < SECONDS:
        time.sleep(0.2)
        most = {key: max(value, most[key]) for key, value in figures(pid).items()}
    after, end = ask()
    return (after - before) / (end - start), most


def row(attack: Attack, model: str) -> dict[str, Any]:
    """The honest tenant alone, then beside the attack; the server before, during, after."""
    from dlora.server import keys

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys"
        keys.make_authority(folder, ["127.0.0.1", "localhost"], 1)
        for name, weight in zip(("honest", "other"), attack.weights, strict=True):
            keys.set_tenant(folder, name, {"weight": weight})
        honest, other = (keys.add_token(folder, name, 1)[1] for name in ("honest", "other"))

        flags = ("--keys", str(folder), *LIMITS, "4096")
        address, pid = stack.enter_context(serving(model, *flags))
        scene = Scene(address, folder, other)
        ask = stack.enter_context(training(scene, honest, *HONEST))
        alone, before = rate(ask, pid)
        with attack.start(scene):
            beside, during = rate(ask, pid)
        time.sleep(SETTLE_S)
        return {
            "weights": attack.weights,
            "tokens_per_s": {"alone": alone, "beside": beside},
            "server": {"before": before, "during": during, "after": figures(pid)},
        }


def tiny_folder(folder: Path) -> str:
    """A small random Llama on disk, with room for long prompts."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def run(words: list[str]) -> None:
    """Every row with these words that the result does not have; written after each."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_folder(Path(scratch) / "tiny")
        for attack in ATTACKS:
            key = f"{attack.name}, weights {attack.weights[0]}:{attack.weights[1]}"
            if key in found["rows"] or not set(words) <= set(attack.name.split()):
                continue
            found["rows"][key] = row(attack, model) | {"provenance": provenance("grpcio")}
            print(key, found["rows"][key]["tokens_per_s"], file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| attack | honest tenant, tokens/s: alone, beside | kept | server MiB: before, during, "
        "after | threads | descriptors |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found["rows"].items():
        alone, beside = one["tokens_per_s"]["alone"], one["tokens_per_s"]["beside"]
        moments = [one["server"][moment] for moment in ("before", "during", "after")]
        cells = [
            ", ".join(f"{moment[key]:.0f}" for moment in moments)
            for key in ("mib", "threads", "descriptors")
        ]
        lines.append(
            f"| {name} | {alone:.0f}, {beside:.0f} | {beside / alone:.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "tenant"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "tenant":
        address, folder, token, rows, length = arguments.rest
        tenant(address, Path(folder), token, int(rows), int(length))
        sys.exit()
    if arguments.what == "run":
        run(arguments.rest)
    print(table(json.loads(RESULT.read_text())))
