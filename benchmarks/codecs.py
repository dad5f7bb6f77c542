"""What coarse codecs cost: errors of a step's gradients, and accuracy of whole runs.

    python benchmarks/codecs.py run --data FOLDER                       # gradients of one batch
    python benchmarks/codecs.py run --data FOLDER --whole --minutes 60  # runs; again to continue
    python benchmarks/codecs.py table                                   # what there is so far

FOLDER is that of `kr.py`. Gradients: SmolLM2-135M-Instruct in fp32, one batch of 16 rows of
Banking77, LoRA of rank 8; an adapter as it begins, and one that was trained for 150 steps over the
fp16 wire. Each codec is tried alone, where the rest is fp32, and in the mixes that have a name. The
error is the norm of the difference to the gradients of the fp32 wire over theirs; the cosine is
that of the worst module, A and B together. Whole runs are those of `kr.py` (Banking77, 150 steps of
16 rows) and of `paper.py` (ARC-Easy in the form of text, 40 steps of 8 rows), with three seeds. One
JSON line each goes to benchmarks/results/codecs.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kr
import kr_report
from filelock import FileLock, Timeout

HERE = Path(__file__).parent
RESULT = HERE / "results" / "codecs.jsonl"
LOCKS = RESULT.parent / ".locks"
STEPS, BATCH_SIZE, SEEDS = 150, 16, (0, 1, 2)
RATE = 8e-3  # tuned best in kr.py for FT and FT gate,up; hosted arms and low ranks were not tuned

# ----------------------------------------------------------------- gradients

# name -> (target modules, wire)
WIRES: dict[str, tuple[list[str], str]] = {
    "gate,up factored": (kr.MLP, "factored"),
    "q,k,v hosted": (kr.QKV, "hosted"),
    "q,k,v plain": (kr.QKV, "plain"),
}


def choices(wire: str, state: str = "trained") -> dict[str, dict[str, Any]]:
    """Name -> options of a split model: one codec alone, and the mixes; the first is exact.

    Where B is still zero an adapter has no gradient of x.
    """
    from dlora.protocol.codecs import MIXES
    from dlora.protocol.wire import WIRE_DTYPES

    exact, fresh = MIXES["fp32"], state == "fresh"
    coarse: tuple[str, ...] = ("int8", "int4", "rotated_int4")
    kinds = {"plain": ["x", "dx", "deltas", "delta_grads", "ends"], "hosted": ["ends", "factors"]}
    found: dict[str, dict[str, Any]] = {"fp32": {"wire_dtype": exact}}
    for name in ("fp16", "int8", "int4"):
        found[name] = {"wire_dtype": name}
    for kind in kinds.get(wire, ["x", "dx", "ends", "factors"]):
        for codec in coarse if kind == "x" else coarse[::2]:
            if fresh and kind == "dx":
                continue
            changed: Any = {kind: WIRE_DTYPES[codec]}
            found[f"{kind} {codec}"] = {"wire_dtype": replace(exact, **changed)}
    for codec in coarse[:2]:  # as these names were before: everything alike
        everything: Any = dict.fromkeys(vars(exact), WIRE_DTYPES[codec])
        found[f"everything {codec}"] = {"wire_dtype": replace(exact, **everything)}
    if wire != "hosted" and not fresh:
        found["dx dropped"] = {"wire_dtype": exact, "input_grad": "drop"}
        for name in ("fp16", "int8", "int4"):
            found[f"{name}, dx dropped"] = {"wire_dtype": name, "input_grad": "drop"}
    return found


def gradients(data: Path, folder: Path) -> None:
    """Every choice on every wire, with a fresh and a trained adapter."""
    import torch
    from provenance import provenance

    import dlora
    from dlora.cloud.load import load_model

    torch.set_num_threads(1)
    loaded = load_model("smollm2", dtype="fp32")
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
    rows = kr.read(data, "banking77", "train")
    batch = kr.batches(rows, loaded.tokenizer, 1, BATCH_SIZE, 0)[0]

    for state in ("fresh", "trained"):
        for name, (targets, wire) in WIRES.items():
            done = {(run["wire"], run["state"], run["choice"]) for run in of_stage("gradients")}
            left = {
                choice: options
                for choice, options in choices(wire, state).items()
                if (name, state, choice) not in done
            }
            if not left:
                continue
            if state == "trained":
                train(folder, targets, rows, data)
            model = adapter(link, targets, wire, folder if state == "trained" else None)
            want, _ = step(model, batch, choices(wire)["fp32"])
            for choice, options in left.items():
                got, sizes = step(model, batch, options)
                line = {"stage": "gradients", "wire": name, "state": state, "choice": choice}
                write(line | errors(want, got) | sizes | provenance())


def adapter(link: Any, targets: list[str], wire: str, folder: Path | None) -> Any:
    """A split model with a fresh adapter, or with the one that `train` has left in a folder."""
    import torch
    from peft import LoraConfig

    import dlora

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    options: Any = {"wire": wire, "upload_consent": wire == "hosted"}
    if folder is None:
        model = dlora.get_peft_model(link, config, **options)
    else:
        model = dlora.load_adapter(link, folder / "-".join(targets), **options)
    model.set_options(head_positions="supervised")
    return model.train()


def train(folder: Path, targets: list[str], rows: list[dict[str, Any]], data: Path) -> None:
    """Train an adapter as `kr.py` does, over the fp16 wire, unless it is there already.

    Hosted, which gives the same gradients and is the fastest.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    import dlora
    from dlora.cloud.load import load_model

    place = folder / "-".join(targets)
    if (place / "adapter_config.json").is_file():
        return
    loaded = load_model("smollm2")  # fp32: not all processors are fast in bf16
    loaded.model.set_attn_implementation("eager")
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
    model = adapter(link, targets, "hosted", None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rate = get_linear_schedule_with_warmup(optimizer, round(0.05 * STEPS), STEPS)
    for number, batch in enumerate(kr.batches(rows, loaded.tokenizer, STEPS, BATCH_SIZE, 0)):
        loss = kr.take_step(model, batch, number, optimizer, rate, None)
        if number % 10 == 0:
            print(f"  step {number} of {STEPS}, loss {loss:.3f}", flush=True)
    model.save_pretrained(str(place))


def step(model: Any, batch: dict[str, Any], options: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """({module: gradients of A and B}, what it took) of a step without an update."""
    import torch

    model.set_options(**{"input_grad": "exact", **options})
    model.forget_kept()
    before = model.meter.copy()
    model(**{name: value for name, value in batch.items() if name != "rows"}).loss.backward()
    cost = model.meter - before
    grads: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grads.setdefault(name.split(".lora_")[0], []).append(parameter.grad.flatten().clone())
    model.zero_grad()
    sizes = {
        "sent_bytes": cost.sent_bytes,
        "received_bytes": cost.received_bytes,
        "round_trips": cost.round_trips,
        "tokens": cost.tokens,
    }
    return {name: torch.cat(parts) for name, parts in grads.items()}, sizes


def errors(want: dict[str, Any], got: dict[str, Any]) -> dict[str, float]:
    """Relative error of all gradients together, and the worst module's cosine."""
    import torch

    whole, off = (
        torch.cat([chosen(want[name], got[name]).flatten() for name in want]).norm().item()
        for chosen in (lambda a, b: a, lambda a, b: a - b)
    )
    cosines = [
        torch.nn.functional.cosine_similarity(want[name], got[name], dim=0).item() for name in want
    ]
    return {"relative_error": off / whole, "worst_cosine": min(cosines)}


# ----------------------------------------------------------------- whole runs

BOTH, ONE = ("banking77", "arc_easy"), ("banking77",)


def hosted_int4(arm: str, factors: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """An arm of kr.py with ends of four bits, and the adapter in a codec of its own."""
    return arm, {"wire_dtype": "int4", "factors": factors}, ONE


# name -> (arm of kr.py, options of the split model, tasks)
ARMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gate,up factored fp16": ("FT gate,up", {"wire_dtype": "fp16"}, BOTH),
    "gate,up factored int4, dx dropped": (
        "FT gate,up",
        {"wire_dtype": "int4", "input_grad": "drop"},
        BOTH,
    ),
    "q,k,v hosted fp16": ("FT hosted", {"wire_dtype": "fp16"}, ONE),
    "gate,up hosted fp16": ("FT gate,up hosted", {"wire_dtype": "fp16"}, ONE),
    "q,k,v plain fp16": ("FT", {"wire_dtype": "fp16"}, ONE),
    "gate,up hosted int4, adapter int4, rank 4": hosted_int4("FT gate,up hosted rank 4", "int4"),
    "gate,up hosted int4, adapter int8, rank 2": hosted_int4("FT gate,up hosted rank 2", "int8"),
    "gate,up hosted int4, adapter int8": hosted_int4("FT gate,up hosted", "int8"),
    "gate,up hosted int4, adapter int8, rank 4": hosted_int4("FT gate,up hosted rank 4", "int8"),
    "gate,up hosted int4, adapter int4": hosted_int4("FT gate,up hosted", "int4"),
    "gate,up hosted int4, adapter fp16, rank 1": hosted_int4("FT gate,up hosted rank 1", "fp16"),
    "q,k,v plain fp32": ("FT", {"wire_dtype": "fp32"}, ONE),
    "gate,up factored int8": ("FT gate,up", {"wire_dtype": "int8"}, ONE),
    "gate,up factored int4": ("FT gate,up", {"wire_dtype": "int4"}, ONE),
    "gate,up factored fp16, dx dropped": (
        "FT gate,up",
        {"wire_dtype": "fp16", "input_grad": "drop"},
        ONE,
    ),
}
BESIDE = (  # (arm, less which other)
    ("gate,up factored int4, dx dropped", "gate,up factored fp16"),
    ("gate,up hosted fp16", "gate,up factored fp16"),
    ("gate,up hosted int4, adapter int4", "gate,up factored fp16"),
    ("gate,up hosted int4, adapter int4, rank 4", "gate,up factored fp16"),
    ("gate,up hosted int4, adapter int4, rank 4", "q,k,v plain fp16"),
    ("q,k,v hosted fp16", "q,k,v plain fp16"),
    ("q,k,v plain fp32", "q,k,v plain fp16"),
)
SAVED = "gate,up factored fp16"  # what adapters that were saved are compared with, on any wire
TASKS = BOTH
FIRST = 5
"""Of the arms: those that have all of their runs before any other has one."""
ARC = {  # as in paper/smollm2-text.yaml, with more eval rows and a base in fp32
    "steps": 40,
    "epochs": None,
    "batch_size": 8,
    "eval_rows": 1000,
    "dtype": "fp32",
    "attention": "eager",
    "wire_dtype": "fp16",
    "form": "text",
    "quantize": "none",
    "model": {"id": "smollm2", "targets": kr.QKV},
}
ARC_RATE = 4e-3


def whole(data: Path, folder: Path, minutes: float, arm: str | None) -> None:
    """Go on with the whole runs, of one arm or all, until the time is up."""
    import torch

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    LOCKS.mkdir(parents=True, exist_ok=True)
    clouds: dict[str, Any] = {}
    while time.monotonic() < end:
        claimed = claim(arm)
        if claimed is None:
            print("nothing is left that can begin now")
            return
        (task, name, seed), lock = claimed
        print(task, name, seed, flush=True)
        run = banking if task == "banking77" else arc_easy
        found = run(name, seed, data, folder, clouds)
        write(found | {"stage": "whole", "task": task, "run": name})
        lock.release()
        print(f"  accuracy {found['accuracy']:.4f}, {found['seconds']:.0f} s", flush=True)


def claim(arm: str | None) -> tuple[tuple[str, str, int], FileLock] | None:
    """The next run, of this arm if there is one, that nobody has done or is at, and the lock that
    says so.
    """
    for wanted in order():
        if arm not in (None, wanted[1]):
            continue
        lock = FileLock(LOCKS / f"codecs-{'-'.join(map(str, wanted))}".replace(" ", "_"))
        if wanted in finished():
            continue
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if wanted not in finished():
            return wanted, lock
        lock.release()
    return None


def order() -> Iterator[tuple[str, str, int]]:
    """(task, arm, seed) of every run, in the order in which they are begun."""
    names = list(ARMS)
    for group in (names[:FIRST], names[FIRST:]):
        for task in TASKS:
            for seed in SEEDS:
                yield from ((task, name, seed) for name in group if task in ARMS[name][2])


def finished() -> set[tuple[str, str, int]]:
    """Whole runs that are there."""
    return {(run["task"], run["run"], run["seed"]) for run in of_stage("whole")}


def banking(
    name: str, seed: int, data: Path, folder: Path, clouds: dict[str, Any]
) -> dict[str, Any]:
    """One run on Banking77, by `kr.py`."""
    import dlora
    from dlora.cloud.load import load_model

    if "banking77" not in clouds:
        loaded = load_model("smollm2")  # fp32: not all processors are fast in bf16
        loaded.model.set_attn_implementation("eager")
        link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
        clouds["banking77"] = link, loaded.tokenizer
    link, tokenizer = clouds["banking77"]
    arm, options, _ = ARMS[name]
    spec = {"stage": "final", "task": "banking77", "arm": arm, "learning_rate": RATE, "seed": seed}
    split: dict[str, Any] = {"options": split_options(options)}
    if "factors" in options:  # what is saved is not rounded
        split["answers"] = "fp16"
    return kr.one(spec | split, link, tokenizer, data) | {"options": options}


def split_options(options: dict[str, Any]) -> dict[str, Any]:
    """What a split model takes: of an adapter that has a codec of its own the mix."""
    from dlora.protocol.codecs import mix
    from dlora.protocol.wire import WIRE_DTYPES

    if "factors" not in options:
        return options
    others = {name: value for name, value in options.items() if name != "factors"}
    codecs = mix(options["wire_dtype"], "hosted")
    names = {"int4": "rotated_int4"}
    factors: Any = WIRE_DTYPES[names.get(options["factors"], options["factors"])]
    return others | {"wire_dtype": replace(codecs, factors=factors)}


def arc_easy(
    name: str, seed: int, data: Path, folder: Path, clouds: dict[str, Any]
) -> dict[str, Any]:
    """One run on ARC-Easy, by `paper.py`, which leaves off and goes on at checkpoints."""
    import paper

    arm, options, _ = ARMS[name]
    targets, rank, wire, *_ = kr.ARMS[arm]
    split = {**options, "upload_consent": wire == "hosted"}
    chosen = {"kind": "lora", "r": rank, "learning_rate": ARC_RATE, "targets": targets}
    settings = ARC | {"arm": {**chosen, "wire": wire, "options": split}}
    spec = {"model": "smollm2", "task": "arc_easy", "arm": arm, "seed": seed, "settings": settings}
    config = paper.Config(
        models={}, tasks=["arc_easy"], arms={}, runs=[], steps=ARC["steps"], form="text"
    )
    folder.mkdir(parents=True, exist_ok=True)
    found = paper.one(spec, config, data, folder, lambda: False)
    if found is None:
        raise AssertionError("nobody stops this run")
    return found | {"options": options}


# ----------------------------------------------------------------- results


def load_results() -> list[dict[str, Any]]:
    """All lines."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


def of_stage(stage: str) -> Iterator[dict[str, Any]]:
    """The lines of one stage."""
    return (run for run in load_results() if run["stage"] == stage)


def write(line: dict[str, Any]) -> None:
    """Add a line to the results."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with FileLock(LOCKS / "codecs"), RESULT.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = ("wire", "state", "choice", "relative_error", "worst_cosine", "sent_bytes")
    print({name: line[name] for name in shown if name in line}, flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: gradients of one batch, then whole runs."""
    return "\n\n".join(
        make([run for run in results if run["stage"] == stage])
        for stage, make in (("gradients", gradients_table), ("whole", whole_table))
    )


def gradients_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: one table a wire, a row a choice; bytes beside those of fp32."""
    parts = []
    for wire in WIRES:
        mine = {(run["state"], run["choice"]): run for run in runs if run["wire"] == wire}
        names = dict.fromkeys(choice for _, choice in mine)
        full = mine.get(("fresh", "fp32"))
        if full is None:
            continue
        head = "error, fresh | worst cosine | error, trained | worst cosine"
        lines = [f"| {wire} | bytes, % of fp32 | {head} |", "|---|---|---|---|---|---|"]
        for choice in names:
            cells = [
                figure(mine.get((state, choice)), shown)
                for state in ("fresh", "trained")
                for shown in ("relative_error", "worst_cosine")
            ]
            some = mine.get(("fresh", choice)) or mine["trained", choice]
            share = 100 * traffic(some) / traffic(full)
            named = not choice.startswith(("x ", "dx ", "deltas", "delta_grads", "ends", "factors"))
            shown = f"**{choice}**" if named else choice
            lines.append(f"| {shown} | {share:.1f} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def figure(run: dict[str, Any] | None, name: str) -> str:
    """One cell."""
    if run is None:
        return ""
    return f"{run[name]:.4f}" if name == "relative_error" else f"{run[name]:.3f}"


def traffic(run: dict[str, Any]) -> int:
    """Bytes of both directions."""
    if "sent_bytes" in run:
        return int(run["sent_bytes"] + run["received_bytes"])
    both = run["bytes"]  # `kr.py` has one number, `paper.py` has two
    return int(sum(both.values()) if isinstance(both, dict) else both)


def whole_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: accuracy by seed, and bytes, on Banking77 beside those of FT on q, k, v, plain."""
    parts = []
    full = kr_report.by_arm(kr.load_results())["FT"]
    for task in TASKS:
        lines = [
            f"| {task} | accuracy (seeds) | eval loss | MB | of FT on q, k, v, plain, % |",
            "|---|---|---|---|---|",
        ]
        for name in ARMS:
            mine = {run["seed"]: run for run in runs if (run["task"], run["run"]) == (task, name)}
            if not mine:
                continue
            accuracy = statistics.fmean(run["accuracy"] for run in mine.values())
            losses = [run["eval_loss"] for run in mine.values() if run["eval_loss"] is not None]
            loss = f"{statistics.fmean(losses):.3f}" if losses else ""
            seeds = ", ".join(f"{mine[seed]['accuracy']:.3f}" for seed in sorted(mine))
            size = statistics.fmean(traffic(run) for run in mine.values()) / 1e6
            share = f"{kr_report.share(mine, full, 'bytes'):.2f}" if task == "banking77" else ""
            lines.append(
                f"| {name} | **{accuracy:.3f}** ({seeds}) | {loss} | {size:.1f} | {share} |"
            )
        if len(lines) > 2:
            parts.append("\n".join([*lines, *beside(runs, task)]))
    return "\n\n".join(parts)


def beside(runs: list[dict[str, Any]], task: str) -> Iterator[str]:
    """Differences in accuracy that the document speaks of, paired by seed."""
    yield ""
    for coarse, exact in BESIDE:
        mine, full = (
            {run["seed"]: run for run in runs if (run["task"], run["run"]) == (task, name)}
            for name in (coarse, exact)
        )
        if seeds := sorted(mine.keys() & full.keys()):
            difference = kr_report.interval(mine, full)
            yield f"- {coarse}, less {exact}: {difference} ({len(seeds)} seeds)"
    exact = {run["seed"]: run for run in runs if (run["task"], run["run"]) == (task, SAVED)}
    for name in ARMS:
        mine = [run for run in runs if (run["task"], run["run"]) == (task, name)]
        if asked := {run["seed"]: run["answers"] for run in mine if run.get("answers")}:
            dtype = next(iter(asked.values()))["wire_dtype"]
            shown = ", ".join(f"{asked[seed]['accuracy']:.3f}" for seed in sorted(asked))
            yield f"- {name}, answering over {dtype} ({shown}),"
            yield f"  less {SAVED}: {kr_report.interval(asked, exact)}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder of the task data")
    parser.add_argument("--whole", action="store_true", help="whole runs in place of gradients")
    parser.add_argument("--folder", type=Path, default=Path("runs/codecs"), help="trained adapters")
    parser.add_argument("--arm", choices=ARMS, metavar="NAME", help="of whole runs this alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    arguments = parser.parse_args()
    if arguments.what == "run" and arguments.data is None:
        parser.error("run wants --data FOLDER")
    if arguments.what == "table":
        print(table(load_results()))
    elif arguments.whole:
        whole(arguments.data, arguments.folder, arguments.minutes, arguments.arm)
    else:
        gradients(arguments.data, arguments.folder)
