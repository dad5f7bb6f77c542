"""The tables and figures of arXiv:2404.05182, at the scale that a machine allows:
docs/reproduction.md.

    python benchmarks/paper.py run --config FILE.yaml --data FOLDER [--minutes M]
    python benchmarks/paper.py table --config ...      # what there is so far, as Markdown
    python benchmarks/paper.py figures --config ...    # docs/images/paper-*.png
    python benchmarks/paper.py fetch --config ... --data FOLDER    # the tasks, from the hub

FOLDER holds commonsense/TASK/{train,eval}.jsonl with `instruction`, `choices` and `answer`. A
finished run is one JSON line in benchmarks/results/paper-CONFIG.jsonl and is not repeated; a run
that was stopped goes on at its last checkpoint, bit for bit. Several of these commands may work on
the same config at once. Both halves run in one process, which changes no byte that is counted; the
edge is on the CPU, the cloud on the config's device.

A task is a name, a user's share of one (`boolq[0/4]`), or several users joined by `+`: one adapter
for all of them, trained for as many steps as theirs together, beside one adapter each.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import inspect
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import kr
import paper_tables
import yaml
from filelock import FileLock, Timeout
from paper_data import as_text
from provenance import provenance
from tqdm import tqdm

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a YAML file says. Runs are made in the order of `runs`, then those of `personal`."""

    models: dict[str, dict[str, Any]]
    """Name -> `id` (hub id, folder or smollm2) and `targets`: names, or names by kind, {lora:
    [...], series: [...]}
    """
    tasks: list[str]
    arms: dict[str, dict[str, Any]]
    """Name -> kind (none, lora, series, parallel), r, learning_rate, `kr`: options of Kill and
    Revive or its preset (`share_of_ft`: a budget in bytes of training all of q, k, v on the plain
    wire), `beside`: the arm to compare with, and where they are not the config's: targets, wire,
    quantize"""
    runs: list[dict[str, Any]]
    """Groups of arms, with tasks, models and seeds where not all are meant"""
    personal: list[dict[str, Any]] = field(default_factory=list)
    """Groups of users and arms: an adapter for each user, and one for all"""
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int | None = None
    """Optimizer steps of a run; or passes over the training rows:"""
    epochs: float | None = None
    batch_size: int = 8
    eval_rows: int | None = None
    dtype: str = "bf16"
    device: str = "cpu"
    attention: str = "eager"
    quantize: str = "none"
    """none, int8, int4, nf4: bits of the base's linear weights"""
    wire_dtype: str = "fp16"
    form: str = "label"
    """label: the model picks an option by its number, as in LLM-Adapters; text: by the option's own
    words
    """
    checkpoint_steps: int = 20
    hub: bool = False
    """Fetch tasks that FOLDER lacks from the hub first"""
    threads: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot work."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("config: want either `steps` or `epochs`")
        if self.form not in ("label", "text"):
            raise ValueError(f"config: form {self.form!r}, want label or text")
        for group in self.runs + self.personal:
            for kind, known in (("arms", self.arms), ("models", self.models)):
                if unknown := set(group.get(kind, ())) - set(known):
                    raise ValueError(
                        f"config: {kind} {sorted(unknown)} are not defined; there are: "
                        f"{', '.join(known)}"
                    )

    def result(self, file: Path) -> Path:
        """Where the runs of this config go, by default."""
        return HERE / "results" / f"paper-{file.stem}.jsonl"


def load_config(file: Path) -> Config:
    """Read YAML. Raises ValueError for keys that are not known."""
    values = yaml.safe_load(file.read_text())
    if unknown := set(values) - {one.name for one in fields(Config)}:
        raise ValueError(f"{file}: {', '.join(sorted(unknown))} not known")
    return Config(**values)


# ----------------------------------------------------------------- which runs


def specs(config: Config) -> list[dict[str, Any]]:
    """All runs in order, each once: everything that its result depends on."""
    groups = [(group, group.get("tasks", config.tasks)) for group in config.runs]
    groups += [(group, [*group["users"], "+".join(group["users"])]) for group in config.personal]
    common = ("steps", "epochs", "batch_size", "eval_rows", "dtype", "attention", "wire_dtype")
    found = {}
    for group, tasks in groups:
        for seed in group.get("seeds", config.seeds):
            for model in group.get("models", config.models):
                for task in tasks:
                    for arm in group["arms"]:
                        options = {"kind": "lora"} | config.arms[arm]
                        options.pop("beside", None)  # for tables alone
                        if options["kind"] == "none" and (
                            seed != config.seeds[0] or "+" in task or "[" in task
                        ):
                            continue  # nothing is drawn at random, and no user is told apart
                        spec = {"model": model, "task": task, "arm": arm, "seed": seed}
                        spec["settings"] = {name: getattr(config, name) for name in common}
                        quantize = options.pop("quantize", config.quantize)
                        spec["settings"] |= {
                            "model": config.models[model],
                            "arm": options,
                            "quantize": quantize,
                        }
                        if config.form != "label":
                            spec["settings"]["form"] = config.form
                        found.setdefault(key(spec), spec)
    return list(found.values())


def key(spec: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps(
        {name: spec[name] for name in ("model", "task", "arm", "seed", "settings")}, sort_keys=True
    )


def load_results(file: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finished(config: Config, file: Path) -> list[dict[str, Any]]:
    """Finished runs that the config still asks for."""
    wanted = {key(spec) for spec in specs(config)}
    return [run for run in load_results(file) if key(run) in wanted]


def claim(config: Config, result: Path, passed: set[str]) -> tuple[dict[str, Any], FileLock] | None:
    """The next run that nobody has done or is at, and the lock that says so; None if there is
    none.
    """
    for spec in specs(config):
        name = key(spec)
        if name in passed or name in {key(one) for one in load_results(result)}:
            continue
        lock = FileLock(scratch(result) / f"{digest(spec)}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        if name not in {key(one) for one in load_results(result)}:
            return spec, lock
        lock.release()
    return None


def digest(spec: dict[str, Any]) -> str:
    """A file name for a run."""
    return hashlib.sha256(key(spec).encode()).hexdigest()[:16]


def scratch(result: Path) -> Path:
    """The folder of locks and checkpoints; git ignores it."""
    folder = result.parent / ".locks" / result.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ----------------------------------------------------------------- data and models


def base_task(user: str) -> str:
    """The task of a user: boolq of boolq[0/4]."""
    return user.partition("[")[0]


def read(data: Path, task: str, part: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a task in the form that the config asks for."""
    rows = kr.read(data, task, part)
    return [as_text(row) for row in rows] if settings.get("form") == "text" else rows


def training_rows(data: Path, user: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a task, or of one user's share of them."""
    rows = read(data, base_task(user), "train", settings)
    share = re.fullmatch(r"\w+\[(\d+)/(\d+)\]", user)
    return rows[int(share[1]) :: int(share[2])] if share else rows


def training_batches(spec: dict[str, Any], data: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """All batches of a run: for several users the same number of rows of each."""
    settings, users = spec["settings"], spec["task"].split("+")
    shares = [training_rows(data, user, settings) for user in users]
    size = settings["batch_size"]
    if settings["steps"]:
        steps = settings["steps"] * len(users)
    else:
        steps = math.ceil(settings["epochs"] * sum(map(len, shares)) / size)
    if len(users) > 1:
        each = math.ceil(steps * size / len(users))
        lots = random.Random(spec["seed"])
        shares = [
            [row for _ in range(-(-each // len(s))) for row in lots.sample(s, len(s))][:each]
            for s in shares
        ]
    return kr.batches(
        [row for rows in shares for row in rows], tokenizer, steps, size, spec["seed"]
    )


_OPEN: dict[
    tuple[str, ...], tuple[Any, Any]
] = {}  # the model in use: a GPU may have no room for two


def open_cloud(
    model: str, dtype: str, device: str, attention: str, quantize: str
) -> tuple[Any, Any]:
    """A link to the loaded model, and its tokenizer. Raises ValueError where low-bit bases are not
    known.
    """
    import dlora
    from dlora.cloud.load import load_model

    name = (model, dtype, device, attention, quantize)
    if name not in _OPEN:
        close_cloud()
        options = {"quantize": quantize} if quantize != "none" else {}
        if options.keys() - inspect.signature(load_model).parameters.keys():
            raise ValueError(
                f"quantize: got {quantize!r}, and this version of dlora loads no low-bit base"
            )
        loaded = load_model(model, dtype=dtype, device=device, **options)
        loaded.model.set_attn_implementation(attention)
        _OPEN[name] = (
            dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id),
            loaded.tokenizer,
        )
    return _OPEN[name]


def close_cloud() -> None:
    """Let go of the model in use."""
    for link, _ in _OPEN.values():
        link.close()
    _OPEN.clear()
    gc.collect()


def measure(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of rows whose right choice has the highest log-likelihood; where one token tells,
    the loss as well.
    """
    from dlora.inference.evaluate import choice_scores

    if one_token_tells(tokenizer, rows):
        found: dict[str, Any] = kr.measure(model, tokenizer, rows)
        return found
    model.eval()
    order = sorted(rows, key=lambda row: len(row["prompt"]))
    right: list[bool] = []
    for start in range(0, len(rows), 8):
        chosen = order[start : start + 8]
        questions = [(row["prompt"], [" " + choice for choice in row["choices"]]) for row in chosen]
        for row, scores in zip(chosen, choice_scores(model, tokenizer, questions), strict=True):
            right.append(row["choices"][scores.index(max(scores))] == row["answer"])
    answers = [row["choices"].index(row["answer"]) for row in rows]
    majority = max(answers.count(answer) for answer in set(answers)) / len(rows)
    return {
        "accuracy": sum(right) / len(rows),
        "rows": len(rows),
        "right": kr.marks(right),
        "eval_loss": None,
        "majority": majority,
    }


def one_token_tells(tokenizer: Any, rows: list[dict[str, Any]]) -> bool:
    """Whether the choices of every row differ in one token: then one position's logits are
    enough.
    """
    for row in {tuple(row["choices"]): row for row in rows}.values():
        start = len(tokenizer(row["prompt"])["input_ids"])
        tails = [
            tokenizer(row["prompt"] + " " + choice)["input_ids"][start:]
            for choice in row["choices"]
        ]
        if (
            len({len(tail) for tail in tails}) > 1
            or sum(len(set(at)) > 1 for at in zip(*tails, strict=True)) != 1
        ):
            return False
    return True


# ----------------------------------------------------------------- one run


def one(
    spec: dict[str, Any], config: Config, data: Path, folder: Path, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Train and measure; None if it was stopped, with what there is in a checkpoint."""
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.kill_revive.apply import KillAndRevive
    from dlora.kill_revive.config import from_options

    settings, arm = spec["settings"], spec["settings"]["arm"]
    link, tokenizer = open_cloud(
        settings["model"]["id"],
        settings["dtype"],
        config.device,
        settings["attention"],
        settings["quantize"],
    )
    targets, kind = settings["model"]["targets"], arm["kind"]
    if isinstance(targets, dict):
        targets = targets.get(kind, targets["lora"])
    targets = arm.get("targets", targets)
    torch.manual_seed(spec["seed"])
    rank = arm.get("r", 8)
    if kind in ("series", "parallel"):
        adapter: Any = dlora.BottleneckConfig(
            r=rank, target_modules=targets, task_type="CAUSAL_LM", kind=kind
        )
    else:
        adapter = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"
        )
    split = {"wire_dtype": settings["wire_dtype"]} | arm.get("options", {})
    model = dlora.get_peft_model(link, adapter, wire=arm.get("wire", "plain"), **split)
    model.set_options(head_positions="supervised")
    held = {
        task: read(data, task, "eval", settings)[: settings["eval_rows"]]
        for task in dict.fromkeys(map(base_task, spec["task"].split("+")))
    }
    cost: dict[str, Any] = {}
    if kind == "none":
        with model.disable_adapter():
            measured = {task: measure(model, tokenizer, rows) for task, rows in held.items()}
    else:
        made = training_batches(spec, data, tokenizer)
        options, reviver = arm.get("kr"), None
        if options is not None:
            options, average = dict(options), kr.average_of(made)
            preset = options.pop("preset", "on")
            if share := options.pop("share_of_ft", None):
                options["budget"] = kr.budget(model, share, average)
            chosen = from_options(preset, {"seed": spec["seed"]} | options)
            reviver = KillAndRevive(model, chosen, len(made), average)
        steps = tqdm(total=len(made), desc=f"{spec['task']}, {spec['arm']}", disable=None)
        with steps:
            trained = train(
                *(model, made, reviver, arm["learning_rate"]),
                *(folder / f"{digest(spec)}.pt", config, stop, steps),
            )
        if trained is None:
            return None
        cost = trained
        measured = {task: measure(model, tokenizer, rows) for task, rows in held.items()}
    first = next(iter(measured.values()))
    together = {
        "accuracy": statistics.fmean(one["accuracy"] for one in measured.values()),
        "by_task": measured,
    }
    return (
        {name: spec[name] for name in ("model", "task", "arm", "seed")}
        | (first if len(measured) == 1 else together)
        | cost
        | {
            "settings": settings,
            **provenance(),
        }
    )


def train(
    model: Any,
    made: list[dict[str, Any]],
    reviver: Any,
    learning_rate: float,
    checkpoint: Path,
    config: Config,
    stop: Callable[[], bool],
    shown: tqdm,
) -> dict[str, Any] | None:
    """Train over all batches, from the checkpoint on if there is one: what it cost; None if it was
    stopped.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    from dlora.edge.meter import Meter

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    rate = get_linear_schedule_with_warmup(optimizer, round(0.05 * len(made)), len(made))
    spent, losses, seconds, start = Meter(), [], 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start, losses, seconds, spent = (
            state["step"],
            state["losses"],
            state["seconds"],
            Meter(**state["spent"]),
        )
        with torch.no_grad():
            for name, value in state["adapter"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        rate.load_state_dict(state["rate"])
        torch.set_rng_state(state["random"])
        if reviver:
            reviver.load_state_dict(*state["reviver"])
    model.train()
    before, began = model.meter.copy(), time.monotonic()
    shown.update(start)
    for step in range(start, len(made)):
        stopped = stop()
        if stopped or (step > start and step % config.checkpoint_steps == 0):
            state = {
                "step": step,
                "losses": losses,
                "seconds": seconds + time.monotonic() - began,
                "spent": asdict(spent + (model.meter - before)),
                "adapter": {name: p.detach() for name, p in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "rate": rate.state_dict(),
                "random": torch.get_rng_state(),
                "reviver": (reviver.state_dict(), reviver.snapshot) if reviver else None,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if stopped:
            return None
        losses.append(round(kr.take_step(model, made[step], step, optimizer, rate, reviver), 5))
        shown.update()
    spent = spent + (model.meter - before)
    checkpoint.unlink(missing_ok=True)
    parts = {
        part: f"{part}_flops"
        for part in ("adapter", "head", "embedding", "cloud_forward", "cloud_backward")
    } | {"held": "edge_layer_flops"}  # the key of the committed results
    return {
        "steps": len(made),
        "losses": losses,
        "train_loss": statistics.fmean(losses[-10:]),
        "bytes": {"sent": spent.sent_bytes, "received": spent.received_bytes},
        "flops": {part: getattr(spent, name) for part, name in parts.items()},
        "round_trips": spent.round_trips,
        "tokens": spent.tokens,
        "seconds": round(seconds + time.monotonic() - began, 1),
        "parameters": sum(p.numel() for p in parameters.values()),
        "sets": kr.sets(reviver) if reviver else None,
        "variation": variation(reviver) if reviver else None,
    }


def variation(reviver: Any) -> dict[str, Any]:
    """How much every unit changed in each interval, by the arm's signal; None where it was idle."""
    table: dict[int, dict[str, float | None]] = {}
    for line in reviver.decision_log:
        table.setdefault(line.step, {})[line.unit] = (
            None if line.score is None else float(f"{line.score:.4g}")
        )
    names = [unit.name for unit in reviver.units]
    steps = [step for step in table if step > 0]
    return {
        "signal": reviver.config.signal,
        "units": names,
        "steps": steps,
        "values": [[table[step].get(name) for name in names] for step in steps],
    }


def run(
    config: Config, data: Path, result: Path, stop: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Go on with the list of runs until told to stop; each result when it is there, written to the
    file.
    """
    passed: set[str] = set()
    while not stop() and (claimed := claim(config, result, passed)):
        spec, lock = claimed
        try:
            found = one(spec, config, data, scratch(result), stop)
            if found:
                with FileLock(scratch(result) / "results.lock"), result.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                yield found
        finally:
            passed.add(key(spec))
            lock.release()


def run_all(config: Config, data: Path, result: Path, minutes: float) -> None:
    """Runs until all are done, the time is up or Ctrl-C; a line for each, with what is left."""
    began, before, asked = time.monotonic(), len(finished(config, result)), threading.Event()

    def ask(*_: object) -> None:
        """Ctrl-C: the first ends after the step, with a checkpoint; the second at once."""
        asked.set()
        signal.signal(signal.SIGINT, ordinary)
        print("\nends after this step; Ctrl-C again: at once", file=sys.stderr, flush=True)

    def stop() -> bool:
        return asked.is_set() or time.monotonic() > began + 60 * minutes

    total, ordinary = len(specs(config)), signal.signal(signal.SIGINT, ask)
    try:
        print(f"{before} of {total} runs are done", flush=True)
        for found in run(config, data, result, stop):
            done = len(finished(config, result))
            left_s = (total - done) * (time.monotonic() - began) / max(1, done - before)
            print(
                {name: found[name] for name in ("model", "task", "arm", "seed")},
                f"accuracy {found['accuracy']:.3f}, {found.get('seconds', 0):.0f} s; {done} of "
                f"{total}, about {tqdm.format_interval(left_s)} left",
                flush=True,
            )
    finally:
        signal.signal(signal.SIGINT, ordinary)
    if stop():
        print("stopped; the same command goes on where it was")
    print(f"{len(finished(config, result))} of {total} runs are done")


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "figures", "fetch"))
    parser.add_argument("--config", type=Path, default=HERE / "paper/smollm2-text.yaml")
    parser.add_argument("--data", type=Path, help="folder of the task data")
    parser.add_argument(
        "--results",
        type=Path,
        help="file of finished runs; default: benchmarks/results/paper-CONFIG.jsonl",
    )
    parser.add_argument(
        "--images", type=Path, default=HERE.parent / "docs/images", help="folder for figures"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    given = parser.parse_args(words)
    config = load_config(given.config)
    result = given.results or config.result(given.config)
    if given.what in ("run", "fetch") and given.data is None:
        parser.error(f"{given.what} wants --data FOLDER")
    if given.what == "fetch" or (given.what == "run" and config.hub):
        import paper_data

        paper_data.fetch(given.data, config.tasks)
    if given.what == "run":
        import torch

        if config.threads:
            torch.set_num_threads(config.threads)
        run_all(config, given.data, result, given.minutes)
    elif given.what == "table":
        print(paper_tables.tables(config, specs(config), finished(config, result)))
    elif given.what == "figures":
        for file in paper_tables.figures(
            config, finished(config, result), given.images, given.config.stem
        ):
            print(file)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
