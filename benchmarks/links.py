"""Training over links: each way to train beside its own speed on loopback, and beside local peft.

    python benchmarks/links.py run           # what is not there yet; under an hour in all
    python benchmarks/links.py run home hosted   # links and arms whose names have all of this
    python benchmarks/links.py table         # the tables of docs/benchmarks.md
    python benchmarks/links.py plot FOLDER   # the figure

SmolLM2-135M behind a server process on this machine; `relay.py` is the link, and is measured first.
The server has one core and one thread, the edge another, as two machines would; local peft has what
the edge has. Every arm takes an optimizer step on loopback and then one over the link, all arms in
turns, after a short one that is not counted. Other work on a machine adds time and never takes
any: so seconds are the fastest of all turns, and a ratio is of two such. Predicted seconds are
those of `dlora plan` for this link. It calibrates on loopback before the turns, between them and
after them, since the machine's speed drifts; the fastest calibration counts, as for steps. The
planner's pick is of the first: the fastest that trains as local tuning does. Where another arm
trains the same way, its steps are the pick's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relay import link_to

RESULT = Path(__file__).parent / "results" / "links.jsonl"
ROUNDS, LONG_S = 2, 30.0
"""Steps of each arm; one alone where a step takes that long."""
SHAPE, WAITING_SHAPE, WARM_UP = (8, 64, 8), (16, 48, 8), (4, 8, 4)
"""Rows, tokens a row, labels a row: of named links, of those that only wait, before all steps."""
# name -> (round trip time in ms, Mbit/s up, Mbit/s down; 0: no limit)
LINKS: dict[str, tuple[float, float, float]] = {
    "home": (40, 20, 100),
    "mobile": (80, 5, 20),
    "40 ms": (40, 0, 0),
    "80 ms": (80, 0, 0),
    "fibre": (10, 100, 100),
    "LAN": (1, 1000, 1000),
}
QKV = ["q_proj", "k_proj", "v_proj"]


@dataclass(frozen=True)
class Arm:
    """One way to train q, k, v of SmolLM2 with rank 8."""

    wire: str
    in_flight: int | str = 1
    sites: int | None = None
    """Active sites, evenly spread; None: all."""
    micro_batches: int = 1
    """Of an optimizer step."""
    options: dict[str, Any] = field(default_factory=dict)


PICK = "the planner's pick"

ARMS: dict[str, Arm] = {
    PICK: Arm("hosted"),  # in its place: what the planner says for the link
    "FT hosted": Arm("hosted"),
    "FT hosted, 4 micro-batches": Arm("hosted", micro_batches=4),
    "FT hosted int8": Arm("hosted", options={"wire_dtype": "int8"}),
    "FT hosted int4": Arm("hosted", options={"wire_dtype": "int4"}),
    "Kill and Revive's eighth": Arm("plain", sites=4),
    "Kill and Revive's eighth, 2 in flight": Arm("plain", in_flight=2, sites=4),
    "FT factored, 4 in flight": Arm("factored", in_flight=4),
    "FT factored int4-dx, 4 in flight": Arm(
        "factored", in_flight=4, options={"wire_dtype": "int4", "input_grad": "drop"}
    ),
    "FT plain": Arm("plain"),
    "FT plain, 4 in flight": Arm("plain", in_flight=4),
}


class Trained:
    """An arm on a connection: takes optimizer steps, and knows what the last one cost."""

    def __init__(self, arm: Arm, address: str) -> None:
        import torch
        from peft import LoraConfig

        import dlora

        self.arm, self.link = arm, dlora.connect(address)
        torch.manual_seed(0)
        self.model = dlora.get_peft_model(
            self.link,
            LoraConfig(r=8, target_modules=QKV),
            wire=arm.wire,
            upload_consent=arm.wire == "hosted",
            head_positions="supervised",
            in_flight=arm.in_flight,
            **arm.options,
        )
        if arm.sites is not None:
            sites = self.model.sites
            chosen = [sites[int((i + 0.5) * len(sites) / arm.sites)] for i in range(arm.sites)]
            self.model.set_active([name for site in chosen for name in site.names])
        self.cost = self.model.meter.copy()
        self.optimizer = _optimizer(self.model)

    def step(self, shape: tuple[int, int, int]) -> float:
        """Seconds of an optimizer step."""
        before = self.model.meter.copy()
        seconds = _step(self.model, self.optimizer, shape, self.arm.micro_batches)
        self.cost = self.model.meter - before
        return seconds

    def close(self) -> None:
        """End the connection."""
        self.link.close()


def _optimizer(model: Any) -> Any:
    import torch

    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _step(model: Any, optimizer: Any, shape: tuple[int, int, int], micro_batches: int) -> float:
    import torch

    rows, length, labelled = shape
    ids = torch.randint(100, 40_000, (rows, length))
    labels = ids.clone()
    labels[:, :-labelled] = -100
    start = time.perf_counter()
    for _ in range(micro_batches):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def _local() -> tuple[Any, Any]:
    """The same adapter on the whole model in this process."""
    from peft import LoraConfig, get_peft_model

    from dlora.cloud.load import load_model

    config = LoraConfig(r=8, target_modules=QKV, task_type="CAUSAL_LM")
    model = get_peft_model(load_model("smollm2").model, config).train()
    return model, _optimizer(model)


# ----------------------------------------------------------------- the link itself


def measured_link(numbers: tuple[float, float, float], size: int = 1_000_000) -> dict[str, float]:
    """Round trip time and bandwidths of the relay with these settings, by sending bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo, args=(server, size), daemon=True).start()
        with link_to(f"127.0.0.1:{server.getsockname()[1]}", *numbers) as address:
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port))) as line:
                trips_s = [_exchange(line, b"p")[1] for _ in range(10)]
                first_s, whole_s = _exchange(line, b"x" * size)
    mbit = 8 * size / 1e6
    return {
        "rtt_ms": 1000 * min(trips_s),
        "up_mbit": mbit / (first_s - min(trips_s)),
        "down_mbit": mbit / (whole_s - first_s),
    }


def _echo(server: socket.socket, size: int) -> None:
    """One connection: a byte comes back at once, more when all of it has come."""
    line, _ = server.accept()
    while data := line.recv(1 << 16):
        if data != b"p":
            left = size - len(data)
            while left:
                left -= len(line.recv(1 << 16))
            data = b"x" * size
        line.sendall(data)


def _exchange(line: socket.socket, data: bytes) -> tuple[float, float]:
    """Seconds until the first bytes of the answer, and until its last."""
    start, first_s, left = time.perf_counter(), 0.0, len(data)
    line.sendall(data)
    while left:
        left -= len(line.recv(1 << 16))
        first_s = first_s or time.perf_counter() - start
    return first_s, time.perf_counter() - start


# ----------------------------------------------------------------- all of it


def load_results() -> list[dict[str, Any]]:
    """What was measured so far."""
    if not RESULT.is_file():
        return []
    return [json.loads(line) for line in RESULT.read_text().splitlines()]


def run(words: list[str]) -> None:
    """Every link and arm that is not there yet; a line of the result file for each."""
    from provenance import provenance

    from dlora.cli.demo import serving

    about = provenance("grpcio")
    done = {(one["link"], one["arm"]) for one in load_results()}
    with ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])  # the server's, which it keeps
        address = stack.enter_context(serving("smollm2"))
        os.sched_setaffinity(0, cores[1:2] or cores)
        for name, numbers in LINKS.items():
            arms = {
                arm: ARMS[arm]
                for arm in ARMS
                if (name, arm) not in done and all(word in f"{name}: {arm}" for word in words)
            }
            if not arms:
                continue
            for one in _measure(address, name, numbers, arms):
                with RESULT.open("a") as file:
                    file.write(json.dumps(one | about) + "\n")
                print(name, one["arm"], one["seconds"], file=sys.stderr, flush=True)


def _measure(
    address: str, name: str, numbers: tuple[float, float, float], arms: dict[str, Arm]
) -> list[dict[str, Any]]:
    """All arms of a link, in turns."""
    shape = SHAPE if numbers[1] else WAITING_SHAPE
    measured = measured_link(numbers) if numbers[1] else {}
    found = {
        arm: {
            "link": name,
            "arm": arm,
            "settings": numbers,
            "relay": measured,
            "shape": shape,
            "predicted_s": 0.0,
            "seconds": [],
            "loopback_seconds": [],
            "local_seconds": [],
        }
        for arm in arms
    }
    local, optimizer = _local()
    planner = Planner(address, numbers, shape)
    planner.calibrate()
    ways = dict(arms)
    if PICK in arms:
        arms[PICK] = ways[PICK] = planner.pick()
    pick = ways.get(PICK)
    same = next((arm for arm in arms if arm != PICK and arms[arm] == pick), None)
    if PICK in arms and same is not None:  # measured once
        del arms[PICK]
    with link_to(address, *numbers) as through:
        pairs = {arm: (Trained(one, address), Trained(one, through)) for arm, one in arms.items()}
        for _, (near, far) in pairs.items():
            near.step(WARM_UP)
            far.step(WARM_UP)
        for number in range(ROUNDS):
            local_step_s = _step(local, optimizer, shape, 1)
            for arm, (near, far) in pairs.items():
                record = found[arm]
                if number and record["seconds"][0] > LONG_S:
                    continue
                record["loopback_seconds"].append(near.step(shape))
                record["seconds"].append(far.step(shape))
                record["local_seconds"].append(local_step_s * arms[arm].micro_batches)
                record |= {
                    "sent_bytes": far.cost.sent_bytes,
                    "received_bytes": far.cost.received_bytes,
                    "in_flight": far.model.part_count.number,
                    "tokens": shape[0] * shape[1] * arms[arm].micro_batches,
                }
            planner.calibrate()
        for arm, pair in pairs.items():
            found[arm]["trains"] = str(arms[arm])
            for one in pair:
                one.close()
    if PICK in found and same is not None:
        found[PICK] |= {key: found[same][key] for key in found[same] if key != "arm"}
    planner.close()
    return [found[arm] | {"predicted_s": planner.seconds(ways[arm])} for arm in found]


class Planner:
    """`dlora plan` for a link, calibrated on loopback as often as it is told to."""

    def __init__(
        self, address: str, numbers: tuple[float, float, float], shape: tuple[int, int, int]
    ) -> None:
        import dlora
        from dlora.training.plan_settings import PlanSettings
        from dlora.training.planner import planned_model

        rtt_ms, up_mbit, down_mbit = numbers
        self.base = PlanSettings(
            server=address,
            target_modules=QKV,
            batch_size=shape[0],
            length=shape[1],
            supervised=shape[2],
            rtt_ms=rtt_ms,
            up_mbit=up_mbit or None,
            down_mbit=down_mbit or None,
        )
        self.link = dlora.connect(address)
        self.model = planned_model(self.base, self.link)
        self.calibrations: list[Any] = []

    def calibrate(self) -> None:
        """Measure once more."""
        from dlora.training.advice import WIRE_DTYPES
        from dlora.training.planner import calibrated

        self.calibrations.append(calibrated(self.base, self.model, [*WIRE_DTYPES, "int8"]))

    def pick(self) -> Arm:
        """The fastest of what trains as local tuning does, whatever the cloud sees."""
        from dlora.training.advice import choose

        rows = choose(self.base, self.model, self.calibrations[0])
        best = max((row for row in rows if row.as_local), key=lambda row: row.tokens_per_s)
        return Arm(best.choice.wire, in_flight=best.prediction.in_flight)

    def seconds(self, arm: Arm) -> float:
        """Of a step, by the calibration with the fastest training step."""
        from dlora.training.planner import predict

        choice = replace(
            self.base,
            wire=arm.wire,
            upload_consent=arm.wire == "hosted",
            in_flight=arm.in_flight,
            sites=arm.sites,
            gradient_accumulation_steps=arm.micro_batches,
            wire_dtype=arm.options.get("wire_dtype", "fp16"),
            input_grad=arm.options.get("input_grad", "exact"),
        )
        measured = min(self.calibrations, key=lambda one: one.lowest_s)
        return predict(choice, self.model, measured).seconds

    def close(self) -> None:
        """End the connection."""
        self.link.close()


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: named links, then those that only wait, and how far predictions are off."""
    rows: list[str] = []
    for waits in (False, True):
        rows += [
            "| link | arm | in flight | MB up, down a step | tokens/s | of loopback | of local "
            "peft | seconds a step: predicted, run |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows += [_row(one) for one in found if (not one["settings"][1]) == waits]
        rows.append("")
    picks = [one for one in found if one["arm"] == PICK]
    hosted = [one for one in found if one["arm"].startswith("FT hosted")]
    others = [one for one in found if one not in hosted and one not in picks]
    names = ("the planner's picks", "all hosted arms", "the other arms")
    return "\n".join(
        [
            *rows,
            *(
                f"- Predicted seconds of {name}: {_off(group)}."
                for name, group in zip(names, (picks, hosted, others), strict=True)
            ),
        ]
    )


def _off(found: list[dict[str, Any]]) -> str:
    """How far predictions are from the fastest step."""
    shares = [one["predicted_s"] / min(one["seconds"]) - 1 for one in found]
    median = statistics.median(map(abs, shares))
    return f"off by {median:.0%} in the median, {min(shares):+.0%} to {max(shares):+.0%}"


def _row(one: dict[str, Any]) -> str:
    seconds = min(one["seconds"])
    loopback, local = (min(one[name]) / seconds for name in ("loopback_seconds", "local_seconds"))
    predicted = "" if one.get("predicted_s") is None else f"{one['predicted_s']:.1f}, "
    return (
        f"| {one['link']} | {one['arm']} | {one['in_flight']} | {one['sent_bytes'] / 1e6:.1f}, "
        f"{one['received_bytes'] / 1e6:.1f} | {one['tokens'] / seconds:.0f} | "
        f"{loopback:.2f} | {local:.2f} | "
        f"{predicted}{seconds:.1f} |"
    )


def plot(found: list[dict[str, Any]], folder: Path) -> None:
    """Tokens per second of every arm on every named link, the slowest first."""
    from matplotlib import pyplot

    names = sorted((name for name in LINKS if LINKS[name][1]), key=lambda name: LINKS[name][1])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for arm in (name for name in ARMS if name != PICK):  # it is one of the others
        by = {one["link"]: one for one in found if one["arm"] == arm}
        speeds = [
            by[name]["tokens"] / min(by[name]["seconds"]) if name in by else None for name in names
        ]
        axes.plot(names, speeds, marker="o", label=arm)
    axes.set(yscale="log", ylabel="tokens per second", title="SmolLM2-135M, q, k, v, 8 x 64 tokens")
    axes.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "links.png", dpi=150)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when torch is loaded
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"}
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "plot"))
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.words)
    if arguments.what == "plot":
        plot(load_results(), Path(arguments.words[0]))
    else:
        print(table(load_results()))
