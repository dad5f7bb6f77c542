"""How much a curious cloud recovers from a recorded run, in each setting: `dlora train --record`, then `dlora audit`.

    python benchmarks/privacy.py run --data FOLDER    # some minutes a setting; FOLDER holds train.jsonl and eval.jsonl
    python benchmarks/privacy.py table                # the tables of docs/privacy.md

SmolLM2-135M-Instruct behind a server process on this machine. The result holds figures alone, no text. Settings that
are there already are run again only if they are named: --settings plain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
SETTINGS: dict[str, list[str]] = {"plain": []}


def measure(flags: list[str], data: Path, address: str) -> dict[str, Any]:
    """Train on the first rows of a folder, recorded, and audit the recording."""
    from dlora.__main__ import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, count in (("train", CONFIG["batch_size"] * CONFIG["micro_batches"]), ("eval", CONFIG["eval_rows"])):
            lines = (data / f"{part}.jsonl").read_text().splitlines()[:count]
            (folder / f"{part}.jsonl").write_text("\n".join(lines))
        steps = str(CONFIG["micro_batches"])
        train = ["train", "--server", address, "--output", str(folder / "run"), "--report_to", "[]"]
        train += ["--data", str(folder / "train.jsonl"), "--max_steps", steps, "--record", steps]
        train += ["--give_up_after_s", "36000"]  # where this process is stopped for a while, so is its server
        train += ["--eval_data", str(folder / "eval.jsonl"), "--eval_steps", steps, "--keep_best", "false"]
        for key in ("batch_size", "r", "target_modules", "wire_dtype", "seed"):
            train += [f"--{key}", str(CONFIG[key])]
        audit = ["audit", str(folder / "run"), "--server", address, "--output", str(folder / "audit")]
        audit += ["--match", str(CONFIG["matched_rows"]), "--seed", str(CONFIG["seed"]), "--give_up_after_s", "36000"]
        for command in ([*train, *flags], audit):
            if main(command):
                raise SystemExit(f"dlora {command[0]} failed")
        return {"flags": flags} | json.loads((folder / "audit/audit.json").read_text())


def run(data: Path, names: list[str]) -> dict[str, Any]:
    """Measure settings; those that the result holds already and that were not named stay."""
    from dlora.demo import serving

    settings = json.loads(RESULT.read_text())["settings"] if RESULT.exists() else {}
    with serving(str(CONFIG["model"])) as address:
        for name in names or [name for name in SETTINGS if name not in settings]:
            settings[name] = measure(SETTINGS[name], data, address)
    git = ["git", "-C", str(RESULT.parent), "rev-parse", "HEAD"]
    return {
        "config": CONFIG,
        "data": data.resolve().name,
        "settings": settings,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("dlora", "torch", "transformers", "peft", "trl")},
        "commit": subprocess.run(git, stdout=subprocess.PIPE, text=True).stdout.strip(),
    }


def _best(found: dict[str, Any], key: str, **wanted: Any) -> float:
    """The most that any attack gets, of those with these values; chance attacks aside."""
    return max(
        one[key]
        for one in found["attacks"]
        if one.get(key) is not None and one["attack"] != "guess" and all(one[k] == v for k, v in wanted.items())
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: every setting in a line, then tokens, labels and adapters by place for each."""
    lines = [
        "| setting | evaluation loss | tokens, attacker knows such text | tokens, public text only | whole rows | "
        "labels | modules with B A known |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["settings"].items():
        modules = [error for one in found["attacks"] if one["attack"] == "adapter" for error in one["errors"]]
        known = sum(error <= 1e-3 for error in modules)
        lines.append(
            f"| {name} | {found['loss']['eval']:.3f} | {_best(found, 'tokens'):.1%} | "
            f"{max(_best(found, 'tokens', attacker=who) for who in _blind(found)):.1%} | "
            f"{_best(found, 'rows_exact'):.1%} | {_best(found, 'labels'):.1%} | {known} of {len(modules)} |"
        )
    for name, found in result["settings"].items():
        lines += ["", f"Setting `{name}`, by place:", "", *_by_place(found)]
    return "\n".join(lines)


def _blind(found: dict[str, Any]) -> set[str | None]:
    """Attackers that know nothing of the run's own text."""
    return {one["attacker"] for one in found["attacks"] if "tokens" in one} - {"in-domain"}


def _by_place(found: dict[str, Any]) -> list[str]:
    def share(one: dict[str, Any] | None, key: str) -> str:
        return "" if one is None or one.get(key) is None else f"{one[key]:.1%}"

    lines = [
        "| place | tokens, in-domain | of types never seen | whole rows | tokens, public text | of types never seen | "
        "tokens, public text, by matching | relative error of B A |",
        "|---|---|---|---|---|---|---|---|",
    ]
    places = {one["place"]: one["where"] for one in found["attacks"] if one["attack"] == "inverter"}
    for place, where in places.items():
        at = {(one["attack"], one["attacker"]): one for one in found["attacks"] if one["place"] == place}
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
    from dlora.demo import SHARED_CORES

    if "OMP_PROC_BIND" not in os.environ:  # read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SHARED_CORES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=[])
    commands.add_parser("table")
    chosen = parser.parse_args()
    if chosen.what == "run":
        RESULT.write_text(json.dumps(run(chosen.data, chosen.settings), indent=2) + "\n")
    print(table(json.loads(RESULT.read_text())))
