"""Kill and Revive and its baselines at equal bytes: accuracy against traffic on SmolLM2-135M-Instruct.

    python benchmarks/kr.py run --data FOLDER --minutes 60   # go on for about so long; run again to continue
    python benchmarks/kr.py table                            # what there is so far

FOLDER holds banking77/{train,eval}.jsonl with `prompt` and `completion`. One JSON line a finished run goes to
benchmarks/results/kr.jsonl; runs that are there are not repeated. Both halves run in one process,
which changes no byte that is counted. Stages, in order: `tune` picks each arm's learning rate and sweeps
variants on rows held back from training; `final` runs the arms that are compared, on the eval rows, with
three seeds, at the learning rate that tuned best. The margin of a PASS was fixed before any final run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "kr.jsonl"
MARGIN = 0.02  # points of exact match that an arm may lose against FT and still PASS
SEEDS = (0, 1, 2)
TASK = {"steps": 150, "batch_size": 16, "tune_rows": 300, "eval_rows": 500, "max_new_tokens": 12}

QKV = ["q_proj", "k_proj", "v_proj"]
MLP = ["gate_proj", "up_proj"]
CLOUD = {"idle": "cloud", "revive": "none"}
# name -> (target modules, rank, wire, Kill-and-Revive options or None for FT, learning rates)
ARMS: dict[str, tuple[list[str], int, str, dict[str, Any] | None, tuple[float, ...]]] = {
    "FT": (QKV, 8, "plain", None, (1e-3, 2e-3, 4e-3)),
    "spread": (QKV, 8, "plain", {"policy": "spread", "warmup": 0}, (3e-3, 6e-3, 1.2e-2)),
    "KR cloud relative": (QKV, 8, "plain", {**CLOUD, "warmup": 0.03}, (3e-3, 6e-3, 1.2e-2)),
    "KR paper": (QKV, 8, "plain", {"preset": "paper", "average": True}, (3e-3, 6e-3, 1.2e-2)),
    "random": (QKV, 8, "plain", {"policy": "random", "warmup": 0}, (3e-3, 6e-3, 1.2e-2)),
    "redraw": (QKV, 8, "plain", {"policy": "redraw", "warmup": 0, **CLOUD}, (3e-3, 6e-3, 1.2e-2)),
    "last": (QKV, 8, "plain", {"policy": "last", "warmup": 0}, (3e-3, 6e-3, 1.2e-2)),
    "FT rank 1": (QKV, 1, "plain", None, (2e-3, 4e-3, 8e-3)),
    # variants of KR, for the sweep
    "KR drop scored": (QKV, 8, "plain", {"warmup": 0.03}, (6e-3,)),
    "KR cloud gradient": (QKV, 8, "plain", {**CLOUD, "warmup": 0.03, "signal": "gradient"}, (6e-3,)),
    "KR cloud scored": (QKV, 8, "plain", {"idle": "cloud", "warmup": 0.03}, (6e-3,)),
    "KR cloud rank 12": (QKV, 12, "plain", {**CLOUD, "warmup": 0.03}, (6e-3,)),
    "KR cloud cubic": (QKV, 8, "plain", {**CLOUD, "warmup": 0.01, "schedule": "cubic", "settle": 0.2}, (6e-3,)),
    "gradient once": (QKV, 8, "plain", {"policy": "gradient", "warmup": 0.03, "idle": "cloud"}, (6e-3,)),
    # ours: any modules, any exact wire, no more bytes than an eighth of FT on q, k, v
    "spread gate,up factored": (
        MLP,
        16,
        "factored",
        {"policy": "spread", "warmup": 0, "bytes_of": "FT"},
        (1.5e-3, 3e-3, 6e-3),
    ),
    "FT gate,up": (MLP, 16, "plain", None, (1e-3, 2e-3, 4e-3)),
}
FINAL = ("FT", "KR cloud relative", "KR paper", "random", "redraw", "last", "spread", "FT rank 1")
TUNE = (
    ("FT", 1),
    ("spread", 1),
    ("KR cloud relative", 1),
    ("spread gate,up factored", 1),
    ("KR paper", 1),
    ("KR cloud gradient", 0),
    ("KR cloud scored", 0),
    ("KR drop scored", 0),
    ("random", 1),
    ("last", 1),
    ("redraw", 1),
    ("KR cloud rank 12", 0),
    ("KR cloud cubic", 0),
    ("gradient once", 0),
    ("FT rank 1", 1),
    ("FT gate,up", 1),
)


def specs(done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Runs in order: every arm at its middle learning rate, then the others, then the final arms."""
    for arm, middle in TUNE:
        yield {"stage": "tune", "arm": arm, "learning_rate": ARMS[arm][4][middle], "seed": 0}
    for arm, _ in TUNE:
        for rate in ARMS[arm][4]:
            yield {"stage": "tune", "arm": arm, "learning_rate": rate, "seed": 0}
    for seed in SEEDS:
        for arm in FINAL:
            rates = [run for run in done if run["stage"] == "tune" and run["arm"] == arm]
            best = max(rates, key=lambda run: run["exact_match"])["learning_rate"]
            yield {"stage": "final", "arm": arm, "learning_rate": best, "seed": seed}


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return run["stage"], run["arm"], run["learning_rate"], run["seed"]


def load_results() -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def batches(rows: list[dict[str, str]], tokenizer: Any, steps: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Right-padded batches of rows of about equal length, in random order."""
    import torch

    generator = random.Random(seed)
    chosen = generator.sample(rows, steps * size)
    encoded = []
    for row in chosen:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((whole, len(prompt)))
    made = []
    for start in range(0, len(encoded), 10 * size):
        chunk = sorted(encoded[start : start + 10 * size], key=lambda pair: len(pair[0]))
        groups = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        generator.shuffle(groups)
        made += groups
    found = []
    for group in made:
        length = max(len(ids) for ids, _ in group)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in group])
        labels = ids.masked_fill(mask == 0, -100)
        for row, (_, prompt) in enumerate(group):
            labels[row, :prompt] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def one(spec: dict[str, Any], link: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Train and measure one arm."""
    import torch
    from peft import LoraConfig
    from transformers import get_linear_schedule_with_warmup

    import dlora
    from dlora.inference import complete
    from dlora.kill_revive import from_options
    from dlora.reviver import KillReviver, costs_of

    targets, rank, wire, options, _ = ARMS[spec["arm"]]
    rows = [json.loads(line) for line in (data / "banking77/train.jsonl").read_text().splitlines()]
    held, rows = rows[: TASK["tune_rows"]], rows[TASK["tune_rows"] :]
    if spec["stage"] == "final":
        held = [json.loads(line) for line in (data / "banking77/eval.jsonl").read_text().splitlines()]
        held = random.Random(0).sample(held, TASK["eval_rows"])
    torch.manual_seed(spec["seed"])
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = dlora.get_peft_model(link, config, wire=wire)
    model.head_positions = "supervised"
    model.train()
    reviver = None
    if options is not None:
        options = dict(options)
        preset = options.pop("preset", "on")
        if options.pop("bytes_of", None):  # an eighth of FT's bytes on q, k, v, as a share of this arm's own FT
            torch.manual_seed(0)
            qkv = LoraConfig(r=8, target_modules=QKV, task_type="CAUSAL_LM")
            budget = 0.125 * elements(costs_of(dlora.get_peft_model(link, qkv))) / elements(costs_of(model))
            options["budget"] = min(1.0, budget)
        reviver = KillReviver(model, from_options(preset, options), TASK["steps"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=spec["learning_rate"])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    rate = get_linear_schedule_with_warmup(optimizer, round(0.05 * TASK["steps"]), TASK["steps"])
    start, losses = time.monotonic(), []
    for step, batch in enumerate(batches(rows, tokenizer, TASK["steps"], TASK["batch_size"], spec["seed"])):
        if reviver:
            reviver.before_step(step)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        if reviver:
            reviver.before_update(optimizer)
        optimizer.step()
        if reviver:
            reviver.after_update()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds, cost = time.monotonic() - start, model.meter.copy()
    model.eval()
    total = count = right = 0
    for batch in batches(held, tokenizer, len(held) // 20, 20, 0):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * tokens
        count += tokens
    held.sort(key=lambda row: len(row["prompt"]))
    for i in range(0, len(held), 50):
        texts, _ = complete(
            model,
            tokenizer,
            [row["prompt"] for row in held[i : i + 50]],
            max_new_tokens=TASK["max_new_tokens"],
            do_sample=False,
        )
        right += sum(t.strip() == r["completion"].strip() for t, r in zip(texts, held[i : i + 50], strict=True))
    return spec | {
        "exact_match": right / len(held),
        "rows": len(held),
        "eval_loss": total / count,
        "train_loss": statistics.fmean(losses[-10:]),
        "bytes": cost.sent_bytes + cost.received_bytes,
        "adapter_flops": cost.adapter_flops,
        "cloud_flops": cost.cloud_forward_flops + cost.cloud_backward_flops,
        "round_trips": cost.round_trips,
        "active": sorted(reviver.active) if reviver else None,
        "seconds": round(seconds, 1),
        "configuration": {"targets": targets, "r": rank, "wire": wire, "options": options} | TASK,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--short", "../src"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def elements(costs: Any) -> int:
    """Elements a token of training everything."""
    return costs._elements({name for _, site in costs.sites for name in site})


def git(*words: str) -> str:
    """A word of git about this checkout."""
    done = subprocess.run(["git", "-C", str(HERE), *words], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def run(data: Path, minutes: float) -> None:
    """Go on with the list of runs until the time is up."""
    import dlora
    from dlora.load import load_model

    end = time.monotonic() + 60 * minutes
    loaded = load_model("smollm2")
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
    RESULT.parent.mkdir(exist_ok=True)
    while time.monotonic() < end:
        done = load_results()
        finished = {key(one) for one in done}
        spec = next((spec for spec in specs(done) if key(spec) not in finished), None)
        if spec is None:
            print("all runs are done")
            return
        print(spec, flush=True)
        found = one(spec, link, loaded.tokenizer, data)
        with RESULT.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"  exact match {found['exact_match']:.3f}, eval loss {found['eval_loss']:.3f}", flush=True)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown of all runs so far; bytes and FLOPs beside those of FT on q, k, v."""
    full = next((run for run in runs if run["arm"] == "FT"), None)
    lines = [
        "| stage | arm | learning rate | seed | exact match | ± | eval loss | bytes, % of FT | adapter FLOPs, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: (run["stage"] != "final", run["arm"], run["learning_rate"], run["seed"])):
        share = [100 * run[name] / full[name] if full else math.nan for name in ("bytes", "adapter_flops")]
        p = run["exact_match"]
        half = 1.96 * math.sqrt(p * (1 - p) / run["rows"])
        lines.append(
            f"| {run['stage']} | {run['arm']} | {run['learning_rate']:g} | {run['seed']} | {p:.3f} | {half:.3f} | "
            f"{run['eval_loss']:.3f} | {share[0]:.1f} | {share[1]:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder of the task data")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    arguments = parser.parse_args()
    if arguments.what == "run" and arguments.data is None:
        parser.error("run wants --data FOLDER")
    run(arguments.data, arguments.minutes) if arguments.what == "run" else print(table(load_results()))
