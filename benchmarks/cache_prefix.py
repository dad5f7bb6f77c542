"""What `cache_prefix` saves: a second epoch over the same rows against the first.

    python benchmarks/cache_prefix.py run      # some minutes on 2 slow cores
    python benchmarks/cache_prefix.py table    # its result as a table

SmolLM2-135M-Instruct, batches of 8 rows of 64 random tokens, forward and backward without an
optimizer step, so that the losses of both epochs have to be equal. Every round has rows of its own:
its first epoch sends them in full, its second by name. So epochs take turns, and a noisy machine
hits both; seconds are a ratio of neighbours, bytes are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cache_prefix.json"
CONFIG: dict[str, Any] = {
    "model": "smollm2",
    "batch_size": 8,
    "length": 64,
    "supervised_tokens_per_row": 16,
    "batches": 1,
    "rounds": 3,
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "wire_dtype": "fp16",
    "compute_dtype": "fp32",
    "arms": {
        "last 8 layers, hosted": {"wire": "hosted", "layers": list(range(22, 30))},
        # As many sites as Kill and Revive has active at 1/8 of the bytes, evenly spread.
        "an eighth of the sites, plain": {"wire": "plain", "layers": [3, 11, 18, 26]},
        "all 30 layers, hosted": {"wire": "hosted", "layers": list(range(30))},
    },
    "seed": 0,
}


def batches(seed: int) -> list[dict[str, Any]]:
    """The rows of one round."""
    import torch

    generator, shape = torch.Generator().manual_seed(seed), (CONFIG["batch_size"], CONFIG["length"])
    made = []
    for _ in range(CONFIG["batches"]):
        ids = torch.randint(100, 40_000, shape, generator=generator)
        labels = ids.clone()
        labels[:, : -CONFIG["supervised_tokens_per_row"]] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def epoch(model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What one pass over the rows costs."""
    before, losses, start = model.meter.copy(), [], time.perf_counter()
    for batch in rows:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    cost = model.meter - before
    model.zero_grad()
    return {
        "seconds": time.perf_counter() - start,
        "losses": losses,
        "sent_bytes": cost.sent_bytes,
        "received_bytes": cost.received_bytes,
        "cloud_flops": cost.cloud_flops,
        "cloud_seconds": cost.cloud_s,
        "round_trips": cost.round_trips,
    }


def arm(name: str, address: str) -> list[dict[str, Any]]:
    """All rounds of one arm in this process: both epochs of each."""
    import torch
    from peft import LoraConfig

    import dlora

    chosen = CONFIG["arms"][name]
    config = LoraConfig(
        r=CONFIG["r"],
        lora_alpha=16,
        target_modules=CONFIG["target_modules"],
        layers_to_transform=chosen["layers"],
    )
    torch.manual_seed(CONFIG["seed"])
    model = dlora.get_peft_model(
        dlora.connect(address),
        config,
        wire=chosen["wire"],
        wire_dtype=CONFIG["wire_dtype"],
        upload_consent=chosen["wire"] == "hosted",
        cache_prefix=True,
    )
    epoch(model, batches(10_000)[:1])  # not counted
    found = []
    for number in range(CONFIG["rounds"]):
        rows = batches(CONFIG["seed"] + number)
        found.append({"first": epoch(model, rows), "second": epoch(model, rows)})
        seconds = [f"{one['seconds']:.1f} s" for one in found[-1].values()]
        print(name, number, *seconds, file=sys.stderr, flush=True)
    return found


def run() -> None:
    """All arms; write the result file."""
    from provenance import provenance

    from dlora.cli.demo import SHARED_CORES, serving

    arms = {}
    with serving(CONFIG["model"]) as address:
        for name in CONFIG["arms"]:
            command = [sys.executable, __file__, "arm", "--name", name, "--address", address]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | SHARED_CORES,
            )
            arms[name] = json.loads(done.stdout.splitlines()[-1])
            record = {
                "command": "python benchmarks/cache_prefix.py run",
                "config": CONFIG,
                **provenance("grpcio"),
                "arms": arms,
            }
            # After each, as all of them take a while.
            RESULT.write_text(json.dumps(record, indent=1) + "\n")
            print(table(record))


def table(record: dict[str, Any]) -> str:
    """Markdown of the result: a row for each arm."""
    per = record["config"]["batches"]
    lines = [
        "| adapters on q, k, v | MB up a micro-batch: first epoch, second | MB down | "
        "cloud's FLOPs, second of first | seconds a micro-batch | second of first (each round) | "
        "largest difference of losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in record["arms"].items():

        def mean(field: str, scale: float, rounds: list[Any] = rounds) -> str:
            first, second = (
                statistics.median(one[which][field] for one in rounds) / per / scale
                for which in ("first", "second")
            )
            return f"{first:.2f}, {second:.2f}"

        ratios = [one["second"]["seconds"] / one["first"]["seconds"] for one in rounds]
        flops = rounds[0]["second"]["cloud_flops"] / rounds[0]["first"]["cloud_flops"]
        gap = max(
            abs(a - b)
            for one in rounds
            for a, b in zip(one["first"]["losses"], one["second"]["losses"], strict=True)
        )
        lines.append(
            f"| {name} | {mean('sent_bytes', 1e6)} | {mean('received_bytes', 1e6)} | {flops:.2f} | "
            f"{mean('seconds', 1)} | **{statistics.median(ratios):.2f}** "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {gap:.1g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "arm"))
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run()
    elif arguments.what == "table":
        print(table(json.loads(RESULT.read_text())))
    else:
        print(json.dumps(arm(arguments.name, arguments.address)))
