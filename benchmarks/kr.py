"""Kill and Revive and its baselines at equal bytes: accuracy against traffic on
SmolLM2-135M-Instruct.

    python benchmarks/kr.py run --data FOLDER --minutes 60  # for about this long; again to continue
    python benchmarks/kr.py table                            # what there is so far
    python benchmarks/kr.py figure                           # docs/images/kr-*.png
    python benchmarks/kr.py sites --data FOLDER             # gradients by site: results/sites.json

FOLDER holds banking77/{train,eval}.jsonl with `prompt` and `completion`, and
commonsense/TASK/{train,eval}.jsonl with `instruction`, `choices` and `answer`. One JSON line a
finished run goes to benchmarks/results/kr.jsonl; runs that are there are not repeated. Several of
these commands may run at once, one for each core. Both halves run in one process, which changes no
byte that is counted; the base is bf16, or fp32 with `--dtype fp32`, where a processor is slow in
bf16 (each line says what it was); adapters and loss are fp32, the wire fp16. Stages: `tune` picks
each arm's learning rate and sweeps variants on rows held back from training; `final` runs the arms
that are compared, on the eval rows, with three seeds, at the learning rate that tuned best;
`length` trains for 150, 600 and 1,250 steps (two epochs); `task` looks for commonsense tasks on
which FT learns. Runs of `length` of one arm share a trunk: the learning rate is constant, until the
last fifth of a run takes it to zero, and a longer run goes on where that of a shorter one began to
fall. Those of seed 0 are evaluated every 125 steps. All keep their state then and where the rate
begins to fall, and once stopped go on from it. The margin of a PASS was fixed before any final run.
`table` and `figure` also show what `codecs.py` has run on Banking77, over coarser and hosted wires.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

HERE = Path(__file__).parent
RESULT = HERE / "results" / "kr.jsonl"
SITES = HERE / "results" / "sites.json"
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, TUNE_ROWS = 150, 16, 800
LENGTHS, CURVE_STEPS, CURVE_ROWS = (150, 600, 1250), 125, 300  # up to two epochs of Banking77
LENGTH_WARMUP = 30  # steps in which the learning rate grows, whatever the length
TASK_BATCH_SIZE, TASK_ROWS = 8, 400  # commonsense rows are longer

QKV = ["q_proj", "k_proj", "v_proj"]
MLP = ["gate_proj", "up_proj"]
# What a budget may cost in adapter FLOPs bounds the rank: the paper's claim is 18 % of FT's.
FEW = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
MANY = (1e-3, 2e-3, 4e-3, 8e-3)
FEW_MLP = (2e-3, 4e-3, 8e-3, 1.6e-2)
STAY = {"idle": "cloud", "revive": "none"}
KR = {**STAY, "warmup": 0.03}
START = {
    "idle": "cloud",
    "warmup": 0,
    "revive": "scored",
}  # from a spread set on; probes say what may come in
COVER = {**START, "cover": True}
# An eighth of FT's bytes on q, k, v, whatever the modules and the wire; or another share of them.
OURS = {"share_of_ft": 0.125}
V = ["v_proj"]
SPREAD = {"policy": "spread", "warmup": 0}


# name -> (target modules, rank, wire, Kill-and-Revive options or None for FT, learning rates)
ARMS: dict[str, tuple[list[str], int, str, dict[str, Any] | None, tuple[float, ...]]] = {
    "FT": (QKV, 8, "plain", None, MANY),
    "FT hosted": (QKV, 8, "hosted", None, MANY),
    "FT rank 1": (QKV, 1, "plain", None, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "FT gate,up hosted": (MLP, 8, "hosted", None, MANY),
    "FT gate,up hosted rank 4": (MLP, 4, "hosted", None, MANY),
    "FT gate,up hosted rank 2": (MLP, 2, "hosted", None, MANY),
    "FT gate,up hosted rank 1": (MLP, 1, "hosted", None, MANY),
    # an eighth of FT's bytes on q, k, v, plain wire
    "KR": (QKV, 12, "plain", KR, FEW),
    "KR paper": (QKV, 8, "plain", {"preset": "paper", "average": True}, FEW),
    "random": (QKV, 14, "plain", {"policy": "random", "warmup": 0}, FEW),
    "spread": (QKV, 14, "plain", SPREAD, FEW),
    "spread v": (V, 20, "plain", {**SPREAD, **OURS}, FEW),
    "KR v start": (V, 20, "plain", {**START, **OURS}, FEW),
    "KR v cover": (V, 20, "plain", {**COVER, **OURS}, FEW),
    # less than an eighth without a choice: all modules, coarser (SPLIT)
    "v int4, dx dropped": (V, 6, "plain", None, (8e-3,)),
    "gate,up hosted int4": (MLP, 4, "hosted", None, (4e-3,)),
    # ours: any modules, any exact wire, no more bytes than an eighth of FT on q, k, v
    "FT gate,up": (MLP, 8, "factored", None, MANY),
    "spread gate,up": (MLP, 8, "factored", {**SPREAD, **OURS}, FEW_MLP),
    "KR gate,up start": (MLP, 8, "factored", {**START, **OURS}, FEW_MLP),
    "KR gate,up cover": (MLP, 8, "factored", {**COVER, "share_of_ft": 0.123}, FEW_MLP),
    "KR gate,up": (MLP, 8, "factored", {**KR, **OURS}, FEW_MLP),
    # variants of KR, and more baselines
    "KR start": (QKV, 14, "plain", START, FEW),
    "KR modules start": (
        QKV,
        14,
        "plain",
        {**START, "unit": "module", "prefer": "score_per_cost"},
        FEW,
    ),
    "redraw": (QKV, 14, "plain", {"policy": "redraw", "warmup": 0, **STAY}, FEW),
    "last": (QKV, 14, "plain", {"policy": "last", "warmup": 0}, FEW),
    "KR v start random": (V, 20, "plain", {**START, **OURS, "revive": "random"}, FEW),
    "KR q,k,v,gate,up start": (QKV + MLP, 8, "factored", {**START, **OURS}, FEW_MLP),
    "KR v": (V, 20, "plain", {**KR, **OURS}, FEW),
    "rotate v, moments kept": (
        *(V, 20, "plain"),
        {"policy": "rotate", "warmup": 0, "moments": "keep", **STAY, **OURS},
        FEW,
    ),
    "KR v redraw": (V, 20, "plain", {"policy": "redraw", "warmup": 0, **STAY, **OURS}, FEW),
    "KR drop scored": (QKV, 12, "plain", {"warmup": 0.03, "revive": "scored"}, FEW),
    "KR gradient": (QKV, 12, "plain", {**KR, "signal": "gradient"}, FEW),
    "random gate,up": (MLP, 8, "factored", {"policy": "random", "warmup": 0, **OURS}, FEW_MLP),
    "sensitivity once": (QKV, 12, "plain", {**KR, "policy": "sensitivity"}, FEW),
    "KR gate,up cover random": (
        MLP,
        8,
        "factored",
        {**COVER, "share_of_ft": 0.123, "revive": "random"},
        FEW_MLP,
    ),
    "KR gate,up cover drop": (
        *(
            MLP,
            8,
            "factored",
            {**COVER, "share_of_ft": 0.123, "revive": "random", "idle": "drop"},
            FEW_MLP,
        ),
    ),
    "KR gate,up cover slow": (
        *(
            MLP,
            8,
            "factored",
            {**COVER, "share_of_ft": 0.123, "revive": "random", "interval": 40},
            FEW_MLP,
        ),
    ),
    "KR v cover random": (V, 20, "plain", {**COVER, **OURS, "revive": "random"}, FEW),
    "KR v cover drop": (V, 20, "plain", {**COVER, **OURS, "revive": "random", "idle": "drop"}, FEW),
    # more bytes: where does a static set reach FT?
    "spread v at 1/4": (V, 16, "plain", {**SPREAD, "share_of_ft": 0.25}, FEW),
    "FT v": (V, 16, "plain", None, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "spread gate,up at 1/5": (MLP, 8, "factored", {**SPREAD, "share_of_ft": 0.2}, FEW_MLP),
    "spread gate,up at 3/10": (MLP, 8, "factored", {**SPREAD, "share_of_ft": 0.3}, FEW_MLP),
}
# All modules of a group of sites: what `sites` finds is held against what training gives.
ARMS |= {
    "FT o": (["o_proj"], 8, "plain", None, MANY),
    "FT down": (["down_proj"], 8, "plain", None, MANY),
}
PROBED, PROBE_BATCHES = ("FT", "FT v", "FT o", "FT gate,up", "FT down"), 4
# What may make modules learn faster for next to no byte: LoRA+ (arXiv:2402.12354: a rate for B that
# is so many times A's), rsLoRA (arXiv:2312.03732: alpha / sqrt(r)), and a spectral start from the
# first batch (which costs that micro-batch once more).
HELPS: dict[str, dict[str, Any]] = {
    "LoRA+ 4": {"ratio": 4.0},
    "LoRA+ 16": {"ratio": 16.0},
    "rsLoRA": {"use_rslora": True},
    "spectral": {"spectral": True},
}
ARMS |= {f"spread v, {name}": ARMS["spread v"] for name in HELPS}
ARMS["FT, spectral"] = ARMS["FT"]
# What a split model of an arm takes beside its wire.
SPLIT: dict[str, dict[str, Any]] = {
    "v int4, dx dropped": {"wire_dtype": "int4", "input_grad": "drop"},
    "gate,up hosted int4": {"wire_dtype": "int4"},
}
FINAL = (
    *("FT", "FT gate,up", "KR", "KR paper", "random", "redraw", "last", "spread"),
    *("spread v", "KR gate,up", "spread gate,up", "KR gate,up cover", "FT rank 1"),
    *("spread gate,up at 1/5", "spread gate,up at 3/10"),
)
# The learning rates at which these are tried. They go on until the best is not the largest or the
# smallest, but for KR v cover, FT v and KR paper, whose best is the largest.
SWEPT = {
    **{arm: ARMS[arm][4] for arm in (*FINAL, "FT v")},
    **dict.fromkeys(("FT", "FT gate,up"), (*MANY, 1.6e-2)),
    "spread v": (*FEW, 4.8e-2),
    "KR gate,up": (*FEW_MLP, 3.2e-2),
    "FT rank 1": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "KR paper": FEW[:3],
    "last": FEW[:3],
    **dict.fromkeys(("KR v cover", "spread v at 1/4"), FEW[1:]),
    **dict.fromkeys(
        ("spread gate,up at 1/5", "spread gate,up at 3/10", "KR gate,up cover"), FEW_MLP[1:]
    ),
}
TRIED = (  # variants that got no sweep: (arm, learning rates)
    *(("KR gate,up cover", 8e-3), ("KR v cover", 1.2e-2), ("KR gate,up cover random", 8e-3)),
    *(("KR v cover random", 1.2e-2), ("KR gate,up cover drop", 8e-3), ("KR v cover drop", 1.2e-2)),
    *(("KR gate,up cover slow", 8e-3), ("KR gate,up start", 8e-3)),
    *(
        ("KR v start", 6e-3),
        ("KR start", 6e-3),
        ("KR modules start", 6e-3),
        ("KR v start random", 6e-3),
    ),
    *(
        ("KR q,k,v,gate,up start", 4e-3),
        ("KR gate,up start", 4e-3),
        ("KR v", 6e-3),
        ("KR v redraw", 6e-3),
    ),
    *(
        ("KR drop scored", 6e-3),
        ("KR gradient", 6e-3),
        ("random gate,up", 4e-3),
        ("sensitivity once", 6e-3),
    ),
    *(("spread v, LoRA+ 4", 6e-3), ("spread v, LoRA+ 4", 1.2e-2)),
    *(("spread v, LoRA+ 16", 3e-3), ("spread v, rsLoRA", 6e-3)),
    *(("FT, spectral", rate) for rate in (4e-3, 8e-3)),
    *(("spread v, spectral", rate) for rate in (1.2e-2, 2.4e-2, 6e-3)),
)
# Groups of the arms of stage `length`: with three seeds, with a spectral start, with all modules.
COMPARED, SPECTRAL = ("FT", "spread v", "KR v cover"), ("spread v, spectral", "FT, spectral")
BUYING, ROTATING = ("v int4, dx dropped", "gate,up hosted int4"), "rotate v, moments kept"
# Arms of stage `length`, and their rates: half of what tuned best at 150 steps of a rate that falls
# from its first step on, for the arm or the nearest that was tuned (FT v, FT gate,up, spread v).
RATES = {
    "FT": 4e-3,
    "FT, spectral": 4e-3,
    "spread v": 1.2e-2,
    "spread v, spectral": 1.2e-2,
    "KR v cover": 1.2e-2,
    "v int4, dx dropped": 8e-3,
    "gate,up hosted int4": 4e-3,
    ROTATING: 1.2e-2,
}
# Its runs in order: arm, rate, seed and steps. A shorter run of an arm goes before a longer one.
# At the full length lower rates are tried too, and three seeds of what answers the claims.
LONG_RUNS = (
    *((arm, RATES[arm], 0, steps) for steps in LENGTHS for arm in (*COMPARED, *BUYING)),
    *((arm, RATES[arm], 0, steps) for arm in SPECTRAL for steps in LENGTHS[:-1]),
    *((arm, RATES[arm] / 2, seed, LENGTHS[-1]) for seed in SEEDS for arm in COMPARED),
    *((arm, RATES[arm] / 4, 0, LENGTHS[-1]) for arm in COMPARED),
    *((arm, RATES[arm] / 2, 0, LENGTHS[-1]) for arm in (*SPECTRAL, *BUYING)),
    *((ROTATING, RATES[ROTATING], 0, steps) for steps in LENGTHS),
)
TASKS = ("arc_easy", "openbookqa", "social_iqa", "boolq")


def specs(done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Runs in order: variants, every swept arm at its learning rates, the final arms, all
    lengths, other tasks.
    """
    for arm, rate in TRIED:
        yield {"stage": "tune", "task": "banking77", "arm": arm, "learning_rate": rate, "seed": 0}
    for arm, rates in SWEPT.items():
        for rate in rates:
            yield {
                "stage": "tune",
                "task": "banking77",
                "arm": arm,
                "learning_rate": rate,
                "seed": 0,
            }
    for seed in SEEDS:
        for arm in FINAL:
            rate = best_rate(done, arm)
            yield {
                "stage": "final",
                "task": "banking77",
                "arm": arm,
                "learning_rate": rate,
                "seed": seed,
            }
    for arm, rate, seed, steps in LONG_RUNS:
        yield {
            "stage": "length",
            "task": "banking77",
            "arm": arm,
            "learning_rate": rate,
            "seed": seed,
            "steps": steps,
        }
    for task, rate in (*((task, MANY[0]) for task in TASKS), (TASKS[0], MANY[2])):
        yield {"stage": "task", "task": task, "arm": "FT", "learning_rate": rate, "seed": 0}
    for arm in ("FT o", "FT down"):
        yield {"stage": "tune", "task": "banking77", "arm": arm, "learning_rate": 8e-3, "seed": 0}


def best_rate(done: list[dict[str, Any]], arm: str) -> float | None:
    """The learning rate that tuned best; None while a run of it is missing."""
    runs = [run for run in done if run["stage"] == "tune" and run["arm"] == arm]
    if not set(SWEPT[arm]) <= {run["learning_rate"] for run in runs}:
        return None
    best: float = max(runs, key=lambda run: run["accuracy"])["learning_rate"]
    return best


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    names = ("stage", "task", "arm", "learning_rate", "seed", "steps")
    return tuple(run[name] for name in names if name in run)


def load_results() -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def read(data: Path, task: str, part: str) -> list[dict[str, Any]]:
    """Rows with prompt and completion; those of a choice task keep `choices` and `answer`."""
    folder = data / (task if task == "banking77" else f"commonsense/{task}")
    rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
    if task != "banking77":
        for row in rows:
            row["prompt"] = row["instruction"] + "\n\nthe correct answer is"
            row["completion"] = " " + row["answer"]
    return rows


def batches(
    rows: list[dict[str, Any]], tokenizer: Any, steps: int, size: int, seed: int | None
) -> list[dict[str, Any]]:
    """Right-padded batches of rows of about equal length, in random order; without a seed all rows
    once.
    """
    import torch

    generator = random.Random(seed or 0)  # all rows once: in one order, so that runs pair by row
    chosen = list(rows) if seed is None else []
    while seed is not None and len(chosen) < steps * size:
        chosen += generator.sample(rows, min(len(rows), steps * size - len(chosen)))
    encoded = []
    for row in chosen:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((whole, len(prompt), row))
    made = []
    for start in range(0, len(encoded), 10 * size):
        chunk = sorted(encoded[start : start + 10 * size], key=lambda pair: len(pair[0]))
        groups = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        generator.shuffle(groups)
        made += groups
    found = []
    for group in made:
        length = max(len(ids) for ids, *_ in group)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, *_ in group])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, *_ in group])
        labels = ids.masked_fill(mask == 0, -100)
        for row, (_, prompt, _) in enumerate(group):
            labels[row, :prompt] = -100
        found.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": labels,
                "rows": [row for *_, row in group],
            }
        )
    return found


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Of a batch what a model takes."""
    return {name: value for name, value in batch.items() if name != "rows"}


def measure(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss on the completions, and the share of rows that are right.

    Exact match: each token of the completion and the end is the likeliest behind those before it,
    which is the same as that greedy decoding writes it. Choices: the right one has the highest
    log-likelihood; they differ in one token, so that one position's logits tell.
    """
    import torch

    model.eval()
    total, count = 0.0, 0
    right: list[bool] = []
    with torch.no_grad():
        for batch in batches(rows, tokenizer, math.ceil(len(rows) / 20), 20, None):
            wanted = batch["labels"][:, 1:]
            owners, positions = (wanted != -100).nonzero(as_tuple=True)
            output = model(
                **{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            )
            kept = torch.arange(output.logits.shape[1]) < (wanted != -100).sum(1, keepdim=True)
            logits = output.logits[kept.to(output.logits.device)]
            total += output.loss.item() * len(owners)
            count += len(owners)
            for number, row in enumerate(batch["rows"]):
                mine, target = logits[owners == number], wanted[number, positions[owners == number]]
                if "choices" in row:
                    right.append(best_choice(mine, row, tokenizer) == row["answer"])
                else:
                    right.append(bool((mine.argmax(-1) == target).all()))
    found = {
        "accuracy": sum(right) / len(rows),
        "rows": len(rows),
        "right": marks(right),
        "eval_loss": total / count,
    }
    if "choices" in rows[0]:
        answers = [row["answer"] for row in rows]
        found["majority"] = max(answers.count(answer) for answer in set(answers)) / len(rows)
    return found


def marks(right: Sequence[bool]) -> str:
    """A digit for each row, in an order that is the same for every arm: runs can be paired by
    row.
    """
    return "".join("01"[one] for one in right)


def best_choice(logits: Any, row: dict[str, Any], tokenizer: Any) -> str:
    """The choice of the highest log-likelihood, from the logits [C, V] along the right one."""
    start = len(tokenizer(row["prompt"])["input_ids"])
    tails = [
        tokenizer(row["prompt"] + " " + choice)["input_ids"][start:] for choice in row["choices"]
    ]
    places = [i for i, tokens in enumerate(zip(*tails, strict=True)) if len(set(tokens)) > 1]
    if len(places) != 1:
        raise ValueError(f"the choices {row['choices']} differ in more than one token")
    scores = [logits[places[0], tail[places[0]]].item() for tail in tails]
    choice: str = row["choices"][scores.index(max(scores))]
    return choice


def one(
    spec: dict[str, Any], link: Any, tokenizer: Any, data: Path, until: float = math.inf
) -> dict[str, Any] | None:
    """Train and measure one arm; None if a run of `length` was left at a checkpoint, as it is at
    the first that it makes after `until` (of `time.monotonic`). `spec["answers"]` is a wire
    dtype over which the adapter is measured as well.
    """
    import torch
    from peft import LoraConfig
    from provenance import provenance
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_linear_schedule_with_warmup

    import dlora
    from dlora.kill_revive.apply import KillAndRevive
    from dlora.kill_revive.config import from_options

    made_by = provenance()  # of the code that runs: later the checkout may be another
    targets, rank, wire, options, _ = ARMS[spec["arm"]]
    rows = read(data, spec["task"], "train")
    if spec["stage"] == "tune":
        held, rows = rows[:TUNE_ROWS], rows[TUNE_ROWS:]
    else:
        held = read(data, spec["task"], "eval")
        if spec["task"] != "banking77":
            held = held[:TASK_ROWS]
    is_long = spec["stage"] == "length"
    steps, planned = (spec["steps"], LENGTHS[-1]) if is_long else (STEPS, STEPS)
    size = BATCH_SIZE if spec["task"] == "banking77" else TASK_BATCH_SIZE
    torch.manual_seed(spec["seed"])
    helps = HELPS.get(spec["arm"].partition(", ")[2], {})
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_rslora="use_rslora" in helps,
    )
    coarser = SPLIT.get(spec["arm"], {}) | spec.get("options", {})
    split = {"upload_consent": wire == "hosted", **coarser}
    model = dlora.get_peft_model(link, config, wire=wire, **split)
    model.set_options(head_positions="supervised")
    base = (
        measure(model, tokenizer, held) if spec["stage"] == "task" and spec["arm"] == "FT" else {}
    )
    model.train()
    reviver, made = None, batches(rows, tokenizer, planned, size, spec["seed"])
    if options is not None:
        options, average = dict(options), average_of(made)
        preset = options.pop("preset", "on")
        if share := options.pop("share_of_ft", None):
            options["budget"] = budget(model, share, average)
        chosen = from_options(preset, options | {"seed": spec["seed"]})
        reviver = KillAndRevive(model, chosen, planned, average)
    optimizer = optimizer_of(model, spec["learning_rate"], helps.get("ratio"))
    fork = fork_of(steps)
    rate = (
        LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
        if is_long
        else get_linear_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    )
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    before, start = model.meter.copy(), time.monotonic()
    checkpoint = Checkpoint(spec, model, optimizer, rate, reviver)
    if is_long and (kept := checkpoint.load(planned if steps == planned else fork)):
        losses, curve = kept["losses"], kept["curve"]
        before, start = type(model.meter)(), start - kept["seconds"]
    for step in range(len(losses), steps):
        if is_long and step == fork and reviver:
            reviver.total_steps = steps  # it decides no more, but spends what it has left
        turned = "spectral" in helps and step == 0
        losses.append(take_step(model, made[step], step, optimizer, rate, reviver, turned=turned))
        done = step + 1
        if is_long and done % CURVE_STEPS == 0 and spec["seed"] == SEEDS[0]:
            curve.append(point(model, tokenizer, held[:CURVE_ROWS], done, before))
            print(f"  {curve[-1]}", flush=True)
        is_kept = is_long and (done == fork or done % CURVE_STEPS == 0)
        if is_kept and done < steps and (done <= fork or steps == planned):
            checkpoint.save(losses, curve, before, time.monotonic() - start)
            if time.monotonic() > until:
                return None
    seconds, cost = time.monotonic() - start, model.meter - before
    found = measure(model, tokenizer, held)
    if dtype := spec.get("answers"):
        model.set_options(wire_dtype=dtype)
        found["answers"] = {"wire_dtype": dtype, **measure(model, tokenizer, held)}
    return (
        spec
        | ({"options": coarser} if coarser else {})
        | found
        | {f"base_{name}": base[name] for name in ("accuracy", "eval_loss") if base}
        | {
            "train_loss": statistics.fmean(losses[-10:]),
            "losses": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, steps, 10)],
            "bytes": cost.sent_bytes + cost.received_bytes,
            "adapter_flops": cost.adapter_flops,
            "edge_flops": cost.edge_flops,
            "cloud_flops": cost.cloud_forward_flops + cost.cloud_backward_flops,
            "round_trips": cost.round_trips,
            "sets": sets(reviver) if reviver else None,
            "seconds": round(seconds, 1),
            "configuration": {"targets": targets, "r": rank, "wire": wire, "options": options}
            | helps
            | {
                "steps": steps,
                "batch_size": size,
                "base_dtype": str(link.cloud.model.dtype).removeprefix("torch."),
                "attention": link.cloud.model.config._attn_implementation,
            },
            **made_by,
        }
        | ({"curve": curve} if curve else {})
    )


def optimizer_of(model: Any, learning_rate: float, ratio: float | None) -> Any:
    """AdamW on all that is trained; with a ratio LoRA+, B at so many times A's learning rate."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    if ratio is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=ratio, weight_decay=0.0
    )


def weight_gradients(base: Any, batch: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Of every module of these kinds, by its path: g^T x [out, in], in float32. An edge has the
    same numbers after one exchange, as it holds x and g of every site.
    """
    import torch

    weights = {
        path: module.weight
        for path, module in base.named_modules()
        if path.rpartition(".")[2] in kinds
    }
    for weight in weights.values():
        weight.requires_grad_()
    try:
        loss = base(**inputs_of(batch)).loss
        found = torch.autograd.grad(loss, list(weights.values()))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {path: value.float() for path, value in zip(weights, found, strict=True)}


def sites(link: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """What a probing pass over a few batches says of the groups of modules that an arm trains all
    of: the norm of g^T x, summed over the modules, and the bytes of a step on each wire.
    """
    import torch
    from peft import LoraConfig
    from provenance import provenance

    import dlora
    from dlora.kill_revive.units import costs_of

    rows = read(data, "banking77", "train")[TUNE_ROWS:]
    made = batches(rows, tokenizer, PROBE_BATCHES, BATCH_SIZE, 0)
    kinds = sorted({kind for arm in PROBED for kind in ARMS[arm][0]})
    norms = dict.fromkeys(kinds, 0.0)
    for batch in tqdm(made, desc="probe", disable=None):
        for path, value in weight_gradients(link.cloud.model, batch, kinds).items():
            norms[path.rpartition(".")[2]] += float(torch.linalg.norm(value)) / len(made)
    average, found = average_of(made), {}
    for arm in PROBED:
        targets, rank, *_ = ARMS[arm]
        config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
        found[arm] = {
            "norm": sum(norms[kind] for kind in targets),
            "bytes": {
                wire: average.tokens
                * costs_of(
                    dlora.get_peft_model(link, config, wire=wire, upload_consent=True), rows=average
                ).everything
                for wire in ("plain", "factored", "hosted")
            },
        }
    return {
        "norms": norms,
        "arms": found,
        "batches": PROBE_BATCHES,
        "batch_size": BATCH_SIZE,
        "base_dtype": str(link.cloud.model.dtype).removeprefix("torch."),
        **provenance(),
    }


def fork_of(steps: int) -> int:
    """The step from which on the learning rate of a run of stage `length` falls."""
    return steps - round(steps / 5)


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate of such a run, before a step."""
    falling = (steps - step) / (steps - fork_of(steps))
    return min((step + 1) / LENGTH_WARMUP, 1.0, falling)


class Checkpoint:
    """States of the long runs of an arm, in files that git does not see.

    A run that goes on sends modules that the cloud held idle once more.
    """

    def __init__(
        self, spec: dict[str, Any], model: Any, optimizer: Any, rate: Any, reviver: Any
    ) -> None:
        self.folder = RESULT.parent / ".checkpoints" / trunk_of(spec)
        self.model, self.optimizer, self.rate, self.reviver = model, optimizer, rate, reviver
        self.base = str(model.link.cloud.model.dtype)

    def save(self, losses: list[float], curve: list[Any], before: Any, seconds: float) -> None:
        """Keep everything that the next step depends on."""
        import torch

        reviver = self.reviver and (self.reviver.state_dict(), dict(self.reviver.snapshot))
        self.folder.mkdir(parents=True, exist_ok=True)
        half, file = self.folder / "half", self.folder / f"{len(losses)}.pt"
        torch.save(
            {
                "base": self.base,
                "parameters": self.parameters(),
                "optimizer": self.optimizer.state_dict(),
                "rate": self.rate.state_dict(),
                "reviver": reviver,
                "meter": asdict(self.model.meter - before),
                "losses": losses,
                "curve": curve,
                "seconds": seconds,
            },
            half,
        )
        half.replace(file)

    def load(self, most: int) -> dict[str, Any] | None:
        """Go on where `save` was called last, but for states of more steps than `most`; losses,
        curve and seconds until then, or None.
        """
        import torch

        there = [int(file.stem) for file in self.folder.glob("*.pt") if int(file.stem) <= most]
        if not there:
            return None
        file = self.folder / f"{max(there)}.pt"
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        if kept["base"] != self.base:
            raise SystemExit(f"{file} is of a base in {kept['base']}: use that, or delete it")
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(kept["parameters"][name])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.rate.load_state_dict(kept["rate"])
        if self.reviver:
            self.reviver.load_state_dict(*kept["reviver"])
        self.model.meter = type(self.model.meter)(**kept["meter"])
        return kept

    def parameters(self) -> dict[str, Any]:
        """The whole adapter, by name."""
        return {
            name: parameter for name, parameter in self.model.named_parameters() if "lora_" in name
        }


def trunk_of(spec: dict[str, Any]) -> str:
    """A run's name as one of a file; runs that share a trunk have the same."""
    return "-".join(map(str, key(spec)[:5])).replace(" ", "_")


def point(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], step: int, before: Any
) -> dict[str, Any]:
    """One point of a run's curve; what its evaluation costs is not the run's."""
    cost, meter = model.meter - before, model.meter
    model.meter = type(meter)()
    scores = measure(model, tokenizer, rows)
    model.meter = meter
    model.train()
    return {
        "step": step,
        "bytes": cost.sent_bytes + cost.received_bytes,
        "accuracy": round(scores["accuracy"], 4),
        "eval_loss": round(scores["eval_loss"], 4),
    }


def take_step(
    model: Any,
    batch: dict[str, Any],
    step: int,
    optimizer: Any,
    rate: Any,
    reviver: Any,
    *,
    turned: bool = False,
) -> float:
    """One optimizer step on a batch of `batches`, around it Kill and Revive if there is one; its
    loss. `turned`: with a spectral start before it, which is a micro-batch more.
    """
    import torch

    import dlora

    inputs = inputs_of(batch)
    if reviver:
        reviver.before_step(step)
    if turned:
        dlora.initialize_spectral(model, inputs)
    loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    if reviver:
        reviver.before_update(optimizer)
    optimizer.step()
    if reviver:
        reviver.after_update()
    rate.step()
    optimizer.zero_grad()
    return float(loss.item())


def sets(reviver: Any) -> list[list[Any]]:
    """The active units after each decision, by their number: [step, [unit, ...]]."""
    numbers = {unit.name: number for number, unit in enumerate(reviver.units)}
    found: dict[int, list[int]] = {}
    for line in reviver.decision_log:
        if line.active:
            found.setdefault(line.step, []).append(numbers[line.unit])
    return [[step, sorted(set(units))] for step, units in sorted(found.items())]


def average_of(made: list[dict[str, Any]]) -> Any:
    """What the average of these micro-batches holds, for Kill and Revive's budget."""
    from dlora.kill_revive.costs import Rows

    tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in made)
    return Rows(tokens / len(made), labels / tokens)


def budget(model: Any, share: float, rows: Any) -> float:
    """A share of the bytes of FT on q, k, v over the plain wire, as a share of those of all of this
    model's modules.
    """
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.kill_revive.units import costs_of

    torch.manual_seed(0)
    full = dlora.get_peft_model(
        model.link, LoraConfig(r=8, target_modules=QKV, task_type="CAUSAL_LM")
    )
    whole, mine = (costs_of(one, rows=rows).everything for one in (full, model))
    return min(1.0, share * whole / mine)


def claim() -> tuple[dict[str, Any], FileLock] | None:
    """The next run that nobody has done or is at, and the lock that says so; None if there is none
    now.
    """
    done = load_results()
    finished = {key(one) for one in done}
    for spec in specs(done):
        if key(spec) in finished or spec["learning_rate"] is None:
            continue
        lock = FileLock(RESULT.parent / ".locks" / trunk_of(spec))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if key(spec) not in {key(one) for one in load_results()}:
            return spec, lock
        lock.release()
    return None


def open_link(dtype: str) -> tuple[Any, Any]:
    """A link to the model, computed by one thread, and its tokenizer."""
    import torch

    import dlora
    from dlora.cloud.load import load_model

    torch.set_num_threads(1)
    loaded = load_model("smollm2", dtype=dtype)
    # On CPUs and short rows the fused backward in bf16 is slower.
    loaded.model.set_attn_implementation("eager")
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
    return link, loaded.tokenizer


def run(data: Path, minutes: float, dtype: str) -> None:
    """Go on with the list of runs until the time is up."""
    end = time.monotonic() + 60 * minutes
    link, tokenizer = open_link(dtype)
    (RESULT.parent / ".locks").mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end:
        claimed = claim()
        if claimed is None:
            print("nothing is left that can begin now")
            return
        spec, lock = claimed
        print(spec, flush=True)
        found = one(spec, link, tokenizer, data, until=end)
        if found is None:
            print("  left at a checkpoint")
            return
        with FileLock(RESULT.parent / ".locks" / "results"), RESULT.open("a") as file:
            file.write(json.dumps(found) + "\n")
        if spec.get("steps") == LENGTHS[-1]:
            shutil.rmtree(RESULT.parent / ".checkpoints" / trunk_of(spec))
        lock.release()
        print(
            f"  accuracy {found['accuracy']:.3f}, eval loss {found['eval_loss']:.3f}, "
            f"{found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "figure", "sites"))
    parser.add_argument("--data", type=Path, help="folder of the task data")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the base")
    arguments = parser.parse_args()
    if arguments.what in ("run", "sites") and arguments.data is None:
        parser.error(f"{arguments.what} wants --data FOLDER")
    if arguments.what == "run":
        run(arguments.data, arguments.minutes, arguments.dtype)
    elif arguments.what == "sites":
        SITES.write_text(json.dumps(sites(*open_link(arguments.dtype), arguments.data)) + "\n")
    else:
        import kr_report

        kr_report.show(arguments.what, load_results())
