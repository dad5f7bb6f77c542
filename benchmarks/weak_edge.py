"""A weak edge: one core and a cap on its memory, beside local peft on the same core, without and
with that cap.

    python benchmarks/weak_edge.py run      # some minutes
    python benchmarks/weak_edge.py table    # the table of docs/benchmarks.md

Model, data and training are those of local_vs_split.py, with the head on supervised positions. The
server has the machine's other cores. The cap is a control group's, in which the kernel kills what
needs more: needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import local_vs_split

RESULT = Path(__file__).parent / "results" / "weak_edge.json"
CAP_MIB = 1024
ARMS = (("split", CAP_MIB), ("local", None), ("local", CAP_MIB))
ROUNDS = 2


@contextmanager
def memory_group(cap_mib: int) -> Iterator[Path]:
    """A control group (version 1 or 2) with so much memory; removed at the end."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = (old if old.is_dir() else root) / f"dlora-weak-edge-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(
            f"cannot cap memory: {error}. This benchmark makes a control group, which needs root."
        ) from error
    try:
        limits = (
            {"memory.limit_in_bytes": cap_mib * 2**20}
            if old.is_dir()
            else {"memory.max": cap_mib * 2**20}
        )
        if not old.is_dir():
            limits["memory.swap.max"] = 0  # on version 1: as much swap as the machine has
        for name, value in limits.items():
            (group / name).write_text(str(value))
        yield group
    finally:
        group.rmdir()


def turn(kind: str, cap_mib: int | None, address: str) -> dict[str, Any]:
    """One turn in a process of its own on core 0: what local_vs_split.py's arm finds, or an
    error.
    """
    words = local_vs_split.command(kind, "supervised", address)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(cap_mib)) if cap_mib else None

        def begin() -> None:
            os.sched_setaffinity(0, {0})
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=begin
        )
    if done.returncode == -signal.SIGKILL:
        return {"error": "killed: out of memory"}
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run() -> None:
    """All turns, in turn; write the result file."""
    from provenance import provenance

    from dlora.cli.demo import serving

    if (os.cpu_count() or 1) < 2:
        raise SystemExit("want two cores: one for the edge, and one for its server")
    turns = []
    os.sched_setaffinity(
        0, set(range(1, os.cpu_count() or 1))
    )  # the server's, which is started from here
    with serving(str(local_vs_split.CONFIG["model"])) as address:
        for number in range(ROUNDS):
            for kind, cap in ARMS:
                found = turn(kind, cap, address)
                turns.append({"round": number, "kind": kind, "cap_mib": cap, **found})
                print(
                    number,
                    kind,
                    cap,
                    found.get("error") or [round(s, 2) for s in found["seconds"]],
                    flush=True,
                )
    result = {
        "command": "python benchmarks/weak_edge.py run",
        "config": local_vs_split.CONFIG | {"cap_mib": CAP_MIB, "rounds": ROUNDS},
        **provenance("grpcio"),
        "turns": turns,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """Markdown: seconds of a step and memory, arm by arm."""
    lines = [
        "| on one core | memory cap, MiB | seconds a step (each round) | of local peft's | peak "
        "MiB |",
        "|---|---|---|---|---|",
    ]

    turns = {
        arm: [turn for turn in record["turns"] if (turn["kind"], turn["cap_mib"]) == arm]
        for arm in ARMS
    }
    fine = {arm: [turn for turn in found if "error" not in turn] for arm, found in turns.items()}
    steps = {
        arm: [statistics.median(turn["seconds"][1:]) for turn in found]
        for arm, found in fine.items()
    }
    local = steps["local", None]
    for (kind, cap), mine in steps.items():
        errors = [turn["error"] for turn in turns[kind, cap] if "error" in turn]
        shown = ", ".join([f"{one:.1f}" for one in mine] + errors[:1])
        ratio = (
            f"{statistics.median(mine) / statistics.median(local):.2f}" if mine and local else ""
        )
        name = "edge, server on the other core" if kind == "split" else "local peft"
        peak = f"{max(turn['peak_mib'] for turn in fine[kind, cap]):.0f}" if mine else ""
        lines.append(f"| {name} | {cap or 'none'} | {shown} | {ratio} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    if parser.parse_args().what == "run":
        run()
    print(table(json.loads(RESULT.read_text())))
