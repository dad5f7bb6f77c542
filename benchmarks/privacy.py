"""How much a curious cloud recovers from a recorded run, in each setting: `dlora train --record`,
then `dlora audit`.

    python benchmarks/privacy.py run --data FOLDER  # minutes a setting; of TASK/{train,eval}.jsonl
    python benchmarks/privacy.py accuracy --data FOLDER   # what noise and codecs cost
    python benchmarks/privacy.py table                    # the tables of docs/privacy.md

SmolLM2-135M-Instruct behind a server process on this machine; for accuracies both halves in one
process, the base in bf16. The result holds figures alone, no text. What is there already is run
again only if it is named: --settings plain. Layers on the edge, and padding, give the plain
setting's gradients (tests hold them to that), so that they have its accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RESULT = Path(__file__).parent / "results" / "privacy.json"
CONFIG = {
    "model": "smollm2",
    "batch_size": 16,
    "micro_batches": 24,
    "eval_rows": 128,
    "r": 8,
    "target_modules": "q_proj,k_proj,v_proj",
    "wire_dtype": "fp16",
    "matched_rows": 8,
    "seed": 0,
}
# Name of a setting: more flags of `dlora train`.
SETTINGS: dict[str, list[str]] = {
    "plain": [],
    **{f"first {k}": ["--edge_first", str(k)] for k in (1, 2, 4, 8)},
    **{f"last {m}": ["--edge_last", str(m)] for m in (1, 2)},
    **{
        f"first {k}, last {m}": ["--edge_first", str(k), "--edge_last", str(m)]
        for k in (1, 2, 4, 8)
        for m in (1, 2)
    },
    "int8": ["--wire_dtype", "int8"],
    "int4": ["--wire_dtype", "int4"],
    **{f"entry noise {n}": ["--noise_entry", str(n)] for n in (1, 4)},
    "tail noise 1": ["--noise_tail", "1"],
    "pad to 64": ["--pad_to", "64"],
    "first 8, last 2, noise 1, pad": [
        *(
            "--edge_first",
            "8",
            "--edge_last",
            "2",
            "--noise_entry",
            "1",
            "--noise_tail",
            "1",
            "--pad_to",
            "64",
        ),
    ],
}
# The second task gets fewer: its rows are longer.
SECOND = ("plain", "first 8, last 2", "entry noise 4", "first 8, last 2, noise 1, pad")
# What changes the gradients: (noise on the entry, on the tail, wire dtype) of settings that do.
CHANGED = {
    "int8": (0.0, 0.0, "int8"),
    "int4": (0.0, 0.0, "int4"),
    "entry noise 1": (1.0, 0.0, "fp16"),
    "entry noise 4": (4.0, 0.0, "fp16"),
    "tail noise 1": (0.0, 1.0, "fp16"),
    "first 8, last 2, noise 1, pad": (1.0, 1.0, "fp16"),
}
STEPS, LEARNING_RATE, ACCURACY_ROWS = 150, 4e-3, 800


def measure(flags: list[str], data: Path, task: str, address: str) -> dict[str, Any]:
    """Train on the first rows of a task, recorded, and audit the recording."""
    import kr

    from dlora.cli.main import main
    from dlora.runs import load_run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, count in (
            ("train", CONFIG["batch_size"] * CONFIG["micro_batches"]),
            ("eval", CONFIG["eval_rows"]),
        ):
            rows = [
                {key: row[key] for key in ("prompt", "completion")}
                for row in kr.read(data, task, part)[:count]
            ]
            (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        steps = str(CONFIG["micro_batches"])
        train = ["train", "--server", address, "--output", str(folder / "run"), "--report_to", "[]"]
        train += ["--data", str(folder / "train.jsonl"), "--max_steps", steps, "--record", steps]
        train += [
            "--give_up_after_s",
            "36000",
        ]  # where this process is stopped for a while, so is its server
        train += [
            "--eval_data",
            str(folder / "eval.jsonl"),
            "--eval_steps",
            steps,
            "--keep_best",
            "false",
        ]
        for key in ("batch_size", "r", "target_modules", "wire_dtype", "seed"):
            train += [f"--{key}", str(CONFIG[key])]
        audit = [
            "audit",
            str(folder / "run"),
            "--server",
            address,
            "--output",
            str(folder / "audit"),
        ]
        audit += ["--seed", str(CONFIG["seed"]), "--give_up_after_s", "36000"]
        # In full once; else at the entry, and at the lowest, middle and highest site.
        audit += ["--sites", "3"] if flags else ["--match", str(CONFIG["matched_rows"])]
        for command in ([*train, *flags], audit):
            if main(command):
                raise SystemExit(f"dlora {command[0]} failed")
        run = load_run(folder / "run")
        costs = {"edge_flops": run.cost.edge_flops, "bytes": run.traffic}
        return {"flags": flags, "cost": costs} | json.loads(
            (folder / "audit/audit.json").read_text()
        )


def accuracy(setting: str, data: Path) -> dict[str, Any]:
    """Exact match on held-out rows after a longer run with what this setting changes."""
    import kr
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.cloud.load import load_model
    from dlora.edge.noise import Noise

    entry, tail, wire_dtype = CHANGED.get(setting, (0.0, 0.0, "fp16"))
    torch.set_num_threads(1)
    loaded = load_model(str(CONFIG["model"]), dtype="bf16")
    loaded.model.set_attn_implementation("eager")
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=loaded.model_id)
    torch.manual_seed(CONFIG["seed"])
    targets = str(CONFIG["target_modules"]).split(",")
    config = LoraConfig(r=CONFIG["r"], lora_alpha=2 * CONFIG["r"], target_modules=targets)
    model = dlora.get_peft_model(link, config, wire_dtype=wire_dtype).train()
    model.set_options(head_positions="supervised", noise=Noise(entry=entry, tail=tail))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    rows = kr.read(data, "banking77", "train")
    for step, batch in enumerate(
        kr.batches(rows, loaded.tokenizer, STEPS, CONFIG["batch_size"], CONFIG["seed"])
    ):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 8) * (1 - step / STEPS)
        batch.pop("rows")
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held = kr.read(data, "banking77", "eval")[:ACCURACY_ROWS]
    found: dict[str, Any] = kr.measure(model, loaded.tokenizer, held)
    link.close()
    return found | {
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "base_dtype": "bf16",
        "wire_dtype": wire_dtype,
    }


def run(data: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """Measure settings on both tasks; those that the result holds already and that were not named
    stay.
    """
    from dlora.cli.demo import serving

    most = ["--edge_first", "8", "--edge_last", "2"]
    with serving(str(CONFIG["model"]), *most) as address:
        for task, wanted in (("banking77", SETTINGS), ("arc_easy", SECOND)):
            for name in wanted:
                settings = load_result().get("settings", {}).get(task, {})
                if name in names if names else name not in settings:
                    found = measure(SETTINGS[name], data, task, address)
                    yield {"settings": {task: settings | {name: found}}}


def save_result(found: dict[str, Any]) -> None:
    """Add to the result file."""
    result = load_result()
    for part, values in found.items():
        for key, value in values.items():
            result.setdefault(part, {})[key] = value
    from provenance import provenance

    result |= {
        "config": CONFIG,
        **provenance("trl"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def load_result() -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return found


def _best(found: dict[str, Any], key: str, **wanted: Any) -> float:
    """The most that any attack gets, of those with these values; chance attacks aside."""
    return max(
        one[key]
        for one in found["attacks"]
        if one.get(key) is not None
        and one["attack"] != "guess"
        and all(one[k] == v for k, v in wanted.items())
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: every setting in a line, then tokens, labels and adapters by place for the plain
    one.
    """
    return (
        "\n\n".join(
            f"On {task}:\n\n"
            + _settings(settings, result.get("accuracy", {}) if task == "banking77" else {})
            for task, settings in result["settings"].items()
        )
        + "\n\nThe plain setting on banking77, by place:\n\n"
        + "\n".join(_by_place(result["settings"]["banking77"]["plain"]))
    )


def _settings(settings: dict[str, Any], accuracies: dict[str, Any]) -> str:
    lines = [
        "| setting | tokens, public text only | tokens, attacker knows such text | whole rows | "
        "lengths | labels | "
        "modules with B A known | evaluation loss | accuracy | edge compute | traffic |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = settings.get("plain")
    for name in SETTINGS:
        if (found := settings.get(name)) is None:
            continue
        modules = [
            error
            for one in found["attacks"]
            if one["attack"] == "adapter"
            for error in one["errors"]
        ]
        known = sum(error <= 1e-3 for error in modules)
        trained = accuracies.get(name if name in CHANGED else "plain")
        lengths = max(one["lengths"] for one in found["attacks"] if "lengths" in one)
        lines.append(
            f"| {name} | {max(_best(found, 'tokens', attacker=who) for who in _blind(found)):.1%} "
            "| "
            f"{_best(found, 'tokens'):.1%} | {_best(found, 'rows_exact'):.1%} | {lengths:.0%} | "
            f"{_best(found, 'labels'):.1%} | {known} of {len(modules)} | "
            f"{found['loss']['eval']:.3f} | "
            f"{'' if trained is None else format(trained['accuracy'], '.3f')} | "
            f"{_times(found, base, 'edge_flops')} | {_times(found, base, 'bytes')} |"
        )
    return "\n".join(lines)


def _times(found: dict[str, Any], base: dict[str, Any] | None, key: str) -> str:
    return "" if base is None else f"{found['cost'][key] / base['cost'][key]:.2f}"


def _blind(found: dict[str, Any]) -> set[str | None]:
    """Attackers that know nothing of the run's own text."""
    return {one["attacker"] for one in found["attacks"] if "tokens" in one} - {"in-domain"}


def _by_place(found: dict[str, Any]) -> list[str]:
    def share(one: dict[str, Any] | None, key: str) -> str:
        return "" if one is None or one.get(key) is None else f"{one[key]:.1%}"

    lines = [
        "| place | tokens, in-domain | of types never seen | whole rows | tokens, public text | of "
        "types never seen | "
        "tokens, public text, by matching | relative error of B A |",
        "|---|---|---|---|---|---|---|---|",
    ]
    places = {one["place"]: one["where"] for one in found["attacks"] if one["attack"] == "inverter"}
    for place, where in places.items():
        at = {
            (one["attack"], one["attacker"]): one
            for one in found["attacks"]
            if one["place"] == place
        }
        own, public = at.get(("inverter", "in-domain")), at.get(("inverter", "out-of-domain"))
        adapter = at.get(("adapter", None))
        lines.append(
            f"| {where.partition(':')[0]} | {share(own, 'tokens')} | {share(own, 'unseen')} | "
            f"{share(own, 'rows_exact')} | {share(public, 'tokens')} | {share(public, 'unseen')} | "
            f"{share(at.get(('matching', 'out-of-domain')), 'tokens')} | "
            + (f"{adapter['error']:.1e}" if adapter else "")
            + " |"
        )
    lines += ["", "| labels from | recovered |", "|---|---|"]
    titles = {
        "guess": "no gradient: the model's own guess",
        "labels": "the gradient at the exit, in closed form",
        "label map": "gradients at {where}, linear map, {attacker}",
    }
    labels = [one for one in found["attacks"] if "labels" in one]
    lines += [f"| always the most frequent label | {share(one, 'chance')} |" for one in labels[:1]]
    for one in labels:
        where = {"exit": "the exit"}.get(one["where"], one["where"].partition(":")[0])
        title = titles[one["attack"]].format(where=where, attacker=one["attacker"])
        lines.append(f"| {title} | {share(one, 'labels')} |")
    return lines


if __name__ == "__main__":
    from dlora.cli.demo import SHARED_CORES

    if "OMP_PROC_BIND" not in os.environ:  # read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SHARED_CORES)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("run", "accuracy"):
        runs = commands.add_parser(what)
        runs.add_argument("--data", type=Path, required=True)
        runs.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=[])
    commands.add_parser("table")
    chosen = parser.parse_args()
    if chosen.what == "run":
        for one in run(chosen.data, chosen.settings):
            save_result(one)
    elif chosen.what == "accuracy":
        for name in chosen.settings or [
            n for n in ("plain", *CHANGED) if n not in load_result().get("accuracy", {})
        ]:
            found = accuracy(name, chosen.data)
            print(name, found["accuracy"], file=sys.stderr, flush=True)
            save_result({"accuracy": load_result().get("accuracy", {}) | {name: found}})
    print(table(load_result()))
