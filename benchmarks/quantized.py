"""Low-bit bases: memory, loss and speed of LoRA training on SmolLM2-135M-Instruct in bf16, int8,
int4 and nf4.

    python benchmarks/quantized.py run --data FOLDER   # 20 minutes; run again to continue
    python benchmarks/quantized.py table               # the table of docs/benchmarks.md

FOLDER holds banking77/{train,eval}.jsonl with `prompt` and `completion`. Runs that are in the
result file are not repeated. Both halves train in one process, as in kr.py; compute is bf16 in all
arms, adapters and loss are fp32, the wire fp16, one thread. Memory of the server is that of a
`dlora serve` process of its own. Seconds a step are CPU seconds, since wall time on a shared
machine says little, in one process where the arms take turns; the first turn of each is not
counted. `seconds` of a training run is wall time, with whatever else the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "quantized.jsonl"
ARMS = ("none", "int8", "int4", "nf4")
CONFIG = {
    "model": "smollm2",
    "compute_dtype": "bf16",
    "attention": "eager",
    "task": "banking77",
    "steps": 100,
    "batch_size": 16,
    "learning_rate": 8e-3,  # the best of kr.py's sweep for these modules in full precision
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "wire_dtype": "fp16",
    "rounds": 9,
    "seed": 0,
}


def load_results() -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def cloud(kind: str) -> tuple[Any, Any]:
    """An in-process link to a base of this kind, and its tokenizer."""
    import dlora
    from dlora.cloud.load import load_model

    loaded = load_model(CONFIG["model"], dtype=CONFIG["compute_dtype"], quantize=kind)
    loaded.model.set_attn_implementation(CONFIG["attention"])
    return dlora.in_process(
        loaded.model, loaded.tokenizer, model_id=loaded.model_id
    ), loaded.tokenizer


def learner(link: Any) -> tuple[Any, Any]:
    """A split model with a fresh adapter, and its optimizer."""
    import torch
    from peft import LoraConfig

    import dlora

    torch.manual_seed(CONFIG["seed"])
    config = LoraConfig(
        r=CONFIG["r"],
        lora_alpha=2 * CONFIG["r"],
        target_modules=CONFIG["target_modules"],
        task_type="CAUSAL_LM",
    )
    model = dlora.get_peft_model(link, config, wire_dtype=CONFIG["wire_dtype"])
    model.set_options(head_positions="supervised")
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=CONFIG["learning_rate"], weight_decay=0.0)


def update(model: Any, optimizer: Any, batch: dict[str, Any]) -> float:
    """One optimizer step; its loss."""
    import torch

    loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def train(kind: str, data: Path) -> dict[str, Any]:
    """Measure, train, and measure again."""
    from kr import batches, measure, read
    from transformers import get_linear_schedule_with_warmup

    from dlora.cloud.quantize import weight_bytes
    from dlora.cloud.trace import Linear

    link, tokenizer = cloud(kind)
    linears = [
        module for module in link.cloud.parts.decoder.modules() if isinstance(module, Linear)
    ]
    model, optimizer = learner(link)
    rows, held = read(data, CONFIG["task"], "train"), read(data, CONFIG["task"], "eval")
    before = measure(model, tokenizer, held)  # B is zero: the base
    rate = get_linear_schedule_with_warmup(
        optimizer, round(0.05 * CONFIG["steps"]), CONFIG["steps"]
    )
    model.train()
    losses, start = [], time.monotonic()
    for batch in batches(rows, tokenizer, CONFIG["steps"], CONFIG["batch_size"], CONFIG["seed"]):
        losses.append(update(model, optimizer, batch))
        rate.step()
    seconds = time.monotonic() - start
    after = measure(model, tokenizer, held)
    return {
        "weight_bytes": weight_bytes(link.cloud.model),
        "linear_bytes": sum(weight_bytes(module) for module in linears),
        "before": before,
        "after": after,
        "losses": [
            round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)
        ],
        "seconds": round(seconds, 1),
        "fingerprint": link.description.fingerprint,
    }


def server(kind: str) -> dict[str, Any]:
    """Resident memory of a `dlora serve` process that is ready, and the most that it needed to get
    there.
    """
    command = [sys.executable, "-m", "dlora", "serve", "--model", CONFIG["model"], "--port", "0"]
    command += ["--dtype", CONFIG["compute_dtype"], "--quantize", kind, "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("ready"):
                break
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
        process.communicate(timeout=60)
    found = {
        name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024
        for name in ("VmRSS", "VmHWM")
    }
    import dlora.cloud.load
    import dlora.server.server  # noqa: F401

    stack = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )  # of this process, which has loaded no model yet
    return {"rss_bytes": found["VmRSS"], "peak_rss_bytes": found["VmHWM"], "stack_bytes": stack}


def speed(data: Path) -> dict[str, Any]:
    """CPU seconds of the same training steps in every arm, in turns."""
    from kr import batches, read

    links = {kind: cloud(kind) for kind in ARMS}
    learners = {kind: learner(link) for kind, (link, _) in links.items()}
    tokenizer = links["none"][1]
    rows = read(data, CONFIG["task"], "train")
    seconds: dict[str, list[float]] = {kind: [] for kind in ARMS}
    for batch in batches(rows, tokenizer, CONFIG["rounds"], CONFIG["batch_size"], CONFIG["seed"]):
        for kind, (model, optimizer) in learners.items():
            start = time.process_time()
            update(model.train(), optimizer, batch)
            seconds[kind].append(round(time.process_time() - start, 3))
    return {"cpu_seconds_a_step": seconds}


def one(stage: str, kind: str, data: Path) -> dict[str, Any]:
    """One finished run: what was measured, and with what."""
    import torch
    from provenance import provenance

    torch.set_num_threads(1)
    found = {
        "server": lambda: server(kind),
        "train": lambda: train(kind, data),
        "speed": lambda: speed(data),
    }[stage]()
    return (
        {"stage": stage, "kind": kind}
        | found
        | {
            "configuration": CONFIG,
            **provenance("bitsandbytes"),
        }
    )


def run(data: Path) -> None:
    """Every run that is not in the result file, each in a fresh process."""
    for stage, kind in (
        *((stage, kind) for stage in ("server", "train") for kind in ARMS),
        ("speed", "all"),
    ):
        if any((run["stage"], run["kind"]) == (stage, kind) for run in load_results()):
            continue
        command = [
            sys.executable,
            __file__,
            "one",
            "--stage",
            stage,
            "--kind",
            kind,
            "--data",
            str(data),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        with RESULT.open("a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
        print(stage, kind, "done", flush=True)
    print(table(load_results()))


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: memory, quality before and after training, and the price in seconds; a cell is
    empty before its run.
    """
    found = {(run["stage"], run["kind"]): run for run in runs}
    steps = found.get(("speed", "all"), {}).get("cpu_seconds_a_step")
    lines = [
        "| weights | decoder's linears, MiB | all weights, MiB | server process, MiB | eval loss, "
        "base | trained | "
        "exact match, base | trained | CPU seconds a step, against bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in ARMS:
        cells = ["bf16" if kind == "none" else kind, *[""] * 8]
        if run := found.get(("train", kind)):
            before, after = run["before"], run["after"]
            cells[1:3] = (f"{run[name] / 2**20:.1f}" for name in ("linear_bytes", "weight_bytes"))
            cells[4:6] = (f"{one['eval_loss']:.3f}" for one in (before, after))
            cells[6:8] = (f"{one['accuracy']:.1%}" for one in (before, after))
        if run := found.get(("server", kind)):
            cells[3] = f"{run['rss_bytes'] / 2**20:.0f}"
        if steps:
            ratios = [
                mine / base for mine, base in zip(steps[kind][1:], steps["none"][1:], strict=True)
            ]
            cells[8] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "one"))
    parser.add_argument("--data", type=Path, help="folder of the task data")
    parser.add_argument("--stage", choices=("server", "train", "speed"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=(*ARMS, "all"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what != "table" and arguments.data is None:
        parser.error(f"{arguments.what} wants --data FOLDER")
    if arguments.what == "run":
        run(arguments.data)
    elif arguments.what == "one":
        print(json.dumps(one(arguments.stage, arguments.kind, arguments.data)))
    else:
        print(table(load_results()))
