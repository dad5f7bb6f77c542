"""Tables and figures of paper.py's result lines, and what the accounting says of 7 billion
weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import intervals

Run = dict[str, Any]
QKV = ["q_proj", "k_proj", "v_proj"]
# A step of the projection: micro-batch, tokens of a row, supervised tokens of a row, LoRA rank
STEP = {"batch": 16, "length": 96, "supervised": 3, "r": 8}
_WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
# Public numbers of the three models: transformers' configuration class, its values, target modules
PROJECTED: dict[str, tuple[str, dict[str, int], list[str]]] = {
    "LLaMA-7B": ("LlamaConfig", _WIDE | {"intermediate_size": 11008, "vocab_size": 32000}, QKV),
    "OPT-6.7B": (
        "OPTConfig",
        _WIDE | {"ffn_dim": 16384, "word_embed_proj_dim": 4096, "vocab_size": 50272},
        QKV,
    ),
    "BLOOM-7B1": (
        "BloomConfig",
        _WIDE | {"num_hidden_layers": 30, "vocab_size": 250880},
        ["query_key_value"],
    ),
}


# ----------------------------------------------------------------- accuracy


def select(runs: list[Run], **wanted: Any) -> list[Run]:
    """Runs with these values."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def half_width(runs: list[Run]) -> float:
    """Of the 95 % interval of the mean accuracy: t over seeds, or binomial for a single one."""
    shares = [run["accuracy"] for run in runs]
    if len(shares) > 1:
        return intervals.over_seeds(shares)
    return intervals.of_share(shares[0], runs[0]["rows"])


def gap_half_width(mine: list[Run], theirs: list[Run]) -> float:
    """Of the 95 % interval of a difference of accuracy between two arms on one task.

    Paired by row where all runs kept which rows were right; else by seed where both arms have the
    same several (t); else as if errors were independent.
    """
    rows = [[run.get("right", "") for run in side] for side in (mine, theirs)]
    if all(all(side) for side in rows):
        return intervals.by_row(*rows)[1]
    gaps = [a["accuracy"] - b["accuracy"] for a in mine for b in theirs if a["seed"] == b["seed"]]
    if len(gaps) == len(mine) == len(theirs) > 1:
        return intervals.over_seeds(gaps)
    return math.hypot(half_width(mine), half_width(theirs))


def mean(runs: list[Run]) -> float:
    """Accuracy over seeds."""
    return statistics.fmean(run["accuracy"] for run in runs)


def reference(config: Any, arm: str) -> str:
    """The arm that another is compared with: all modules of the same kind."""
    return str(config.arms[arm].get("beside", "FT"))


def single(runs: list[Run]) -> list[Run]:
    """Runs on one task, not for one user or several."""
    return [run for run in runs if run["task"].isidentifier()]


def accuracy_table(config: Any, runs: list[Run], model: str) -> str:
    """Percent right, task by task."""
    mine = select(single(runs), model=model)
    tasks = [task for task in config.tasks if select(mine, task=task)]
    lines = [
        f"| {model} | {' | '.join(tasks)} | tasks with base | gain over base | beside | difference "
        "|",
        "|---" * (len(tasks) + 5) + "|",
    ]
    cells = [f"{100 * select(mine, task=task)[0]['majority']:.1f}" for task in tasks]
    lines.append(f"| always the commonest answer | {' | '.join(cells)} | | | | |")
    for arm in config.arms:
        if not (
            by_task := {
                task: found for task in tasks if (found := select(mine, task=task, arm=arm))
            }
        ):
            continue
        cells = [
            f"{100 * mean(by_task[task]):.1f} ± {100 * half_width(by_task[task]):.1f}"
            if task in by_task
            else ""
            for task in tasks
        ]
        trained = config.arms[arm].get("kind") != "none"
        columns = []
        for other in ("base", reference(config, arm)):
            full = {
                task: found for task in by_task if (found := select(mine, task=task, arm=other))
            }
            if not (trained and full and other != arm):
                columns += ["", ""]
                continue
            gap = statistics.fmean(mean(by_task[task]) - mean(full[task]) for task in full)
            wide = [gap_half_width(by_task[task], full[task]) for task in full]
            beside = (
                f"{other}, {len(full)} task{'s' * (len(full) > 1)}"
                if other != "base"
                else str(len(full))
            )
            columns += [beside, f"{100 * gap:+.1f} ± {100 * math.hypot(*wide) / len(full):.1f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} | {' | '.join(columns)} |")
    places: dict[str, list[str]] = {"above": [], "at": [], "below": []}
    for task in tasks:
        for arm in config.arms:
            if found := select(mine, task=task, arm=arm):
                gap, wide = mean(found) - found[0]["majority"], half_width(found)
                place = "above" if gap > wide else "below" if gap < -wide else "at"
                places[place].append(f"{arm} on {task}")
    lines += ["", "Beside the commonest answer, with the interval:"]
    lines += [f"- {place} it: {', '.join(pairs) or 'none'}" for place, pairs in places.items()]
    return "\n".join(lines)


def gap_lines(config: Any, runs: list[Run], model: str) -> str:
    """Differences task by task, where both arms have several seeds."""
    mine = select(single(runs), model=model)
    found = []
    for arm in config.arms:
        for task in config.tasks:
            some, full = (select(mine, task=task, arm=one) for one in (arm, reference(config, arm)))
            if some != full and min(len(some), len(full)) > 1:
                gap, wide = mean(some) - mean(full), gap_half_width(some, full)
                found.append(f"{arm} on {task} {100 * gap:+.1f} ± {100 * wide:.1f}")
    told = "Differences on one task, where both arms have several seeds: "
    return told + ", ".join(found) + "." if found else ""


def personal_table(config: Any, runs: list[Run]) -> str:
    """An adapter for each user beside one for all, of the same steps in sum."""
    lines = ["| model, arm | user | adapter of its own | one for all |", "|---|---|---|---|"]
    for group in config.personal:
        for model in group.get("models", config.models):
            for arm in group["arms"]:
                shared = select(runs, model=model, arm=arm, task="+".join(group["users"]))
                own = {
                    user: select(runs, model=model, arm=arm, task=user) for user in group["users"]
                }
                if not shared or not all(own.values()):
                    continue
                pairs = []
                for user, found in own.items():
                    task = user.partition("[")[0]
                    theirs = [run.get("by_task", {task: run})[task] for run in shared]
                    pairs.append((mean(found), mean(theirs)))
                    wide = [100 * half_width(found), 100 * half_width(theirs)]
                    cells = [
                        f"{100 * value:.1f} ± {w:.1f}"
                        for value, w in zip(pairs[-1], wide, strict=True)
                    ]
                    lines.append(f"| {model}, {arm} | {user} | {' | '.join(cells)} |")
                sums = [f"{100 * statistics.fmean(side):.1f}" for side in zip(*pairs, strict=True)]
                lines.append(f"| {model}, {arm} | mean | {' | '.join(sums)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def missing(config: Any, wanted: list[Run], runs: list[Run]) -> str:
    """Which runs the config asks for that are not done."""
    done = {(run["model"], run["task"], run["arm"], run["seed"]) for run in runs}
    left: dict[tuple[str, str], dict[int, list[str]]] = {}
    for spec in wanted:
        if (spec["model"], spec["task"], spec["arm"], spec["seed"]) not in done:
            seeds = left.setdefault((spec["model"], spec["arm"]), {})
            seeds.setdefault(spec["seed"], []).append(spec["task"])
    lines = [f"{len(runs)} of {len(wanted)} runs of the config are done."]
    for (model, arm), seeds in left.items():
        shown = [
            f"seed {seed}: {'all tasks' if set(tasks) == set(config.tasks) else ', '.join(tasks)}"
            for seed, tasks in seeds.items()
        ]
        lines.append(f"- not run: {model}, {arm}, {'; '.join(shown)}")
    return "\n".join(lines)


# ----------------------------------------------------------------- costs, measured


def costs_of(run: Run) -> dict[str, float]:
    """A run's cost, a step."""
    flops = run["flops"]
    sums = {
        "bytes": run["bytes"]["sent"] + run["bytes"]["received"],
        "adapters": flops["adapter"],
        "edge": sum(flops[part] for part in ("adapter", "head", "embedding", "held")),
        "cloud": flops["cloud_forward"] + flops["cloud_backward"],
        "round trips": run["round_trips"],
    }
    return {name: value / run["steps"] for name, value in sums.items()}


def shares(
    config: Any, runs: list[Run], model: str, arm: str
) -> tuple[dict[str, float], dict[str, float]] | None:
    """(costs of a step, their shares of the reference's), over the runs that both have."""
    trained = [run for run in single(runs) if "flops" in run]
    mine = select(trained, model=model, arm=arm)
    full = {
        (run["task"], run["seed"]): run
        for run in select(trained, model=model, arm=reference(config, arm))
    }
    both = [
        (costs_of(run), costs_of(full[at]))
        for run in mine
        if (at := (run["task"], run["seed"])) in full
    ]
    if not both:
        return None
    sums = [
        {name: statistics.fmean(pair[side][name] for pair in both) for name in both[0][0]}
        for side in (0, 1)
    ]
    return sums[0], {name: sums[0][name] / sums[1][name] for name in sums[0]}


def costs_table(config: Any, runs: list[Run], model: str) -> str:
    """What a step costs, and its share of the reference."""
    lines = [
        "| arm | beside | MB a step | adapter GFLOP | all edge GFLOP | cloud GFLOP | round trips |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in config.arms:
        if not (found := shares(config, runs, model, arm)):
            continue
        per_step, share = found
        units = {"bytes": 1e6, "adapters": 1e9, "edge": 1e9, "cloud": 1e9, "round trips": 1}
        cells = [
            f"{per_step[name] / unit:.3g} ({100 * share[name]:.1f} %)"
            for name, unit in units.items()
        ]
        lines.append(f"| {arm} | {reference(config, arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variation_lines(config: Any, runs: list[Run], model: str) -> str:
    """Whether few units do most of the changing, as a choice of few by their variation supposes."""
    lines = []
    for run in select(single(runs), model=model, arm="FT"):
        if (log := run.get("variation") or {}).get("steps"):
            sums = sorted(
                (sum(filter(None, unit)) for unit in zip(*log["values"], strict=True)), reverse=True
            )
            count = max(1, round(len(sums) / 8))
            lines.append(f"{run['task']} {100 * sum(sums[:count]) / sum(sums):.1f} %")
    told = (
        f"Of all change of modules' norms in FT the {100 / 8} % of modules that change most make: "
    )
    return told + ", ".join(lines) + "." if lines else ""


# ----------------------------------------------------------------- costs, projected


@cache
def projected_sites(name: str) -> tuple[Any, tuple[Any, ...]]:
    """(configuration, sites) of one of the models, from shapes alone: no weight is made."""
    import torch
    import transformers

    from dlora.cloud.trace import TracedPass, trace

    kind, values, _ = PROJECTED[name]
    config = getattr(transformers, kind)(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        ).eval()
        decoder = model.get_decoder()
        # Llama would look for packed sequences in values that are not there; a ready mask keeps it
        # from that.
        mask = {"attention_mask": torch.zeros(1, 1, 4, 4)} if kind == "LlamaConfig" else {}
        x = torch.zeros(1, 4, config.hidden_size)

        def run() -> Any:
            return decoder(inputs_embeds=x, use_cache=False, **mask)

        found = trace(model, decoder, [TracedPass(run=run, batch=1, length=4)])
    return config, found.sites


def project(name: str, wire_dtype: str = "fp16", **step: int) -> dict[str, dict[str, float]]:
    """A training step of FT, and of an eighth of its sites, evenly spread: bytes, FLOPs by part,
    round trips.
    """
    from dlora.formulas import (
        adapter_flops,
        attention_flops,
        backward_flops,
        forward_flops,
        step_traffic,
    )

    step = STEP | step
    config, sites = projected_sites(name)
    rows, kept, r, d = (
        step["batch"] * step["length"],
        step["batch"] * step["supervised"],
        step["r"],
        config.hidden_size,
    )
    adapted = [
        (site, chosen)
        for site in sites
        if (chosen := [m for m in site.modules if m.name.rpartition(".")[2] in PROJECTED[name][2]])
    ]
    count = max(1, round(len(adapted) / 8))
    spread = [adapted[int((i + 0.5) * len(adapted) / count)] for i in range(count)]
    attention = attention_flops(config, step["batch"], step["length"])
    found = {}
    for arm, active in (("FT", adapted), ("an eighth of the sites", spread)):
        shapes = [
            (site.in_features, [(module.out_features, r) for module in chosen])
            for site, chosen in active
        ]
        sent, received = step_traffic(rows, kept, d, d, shapes, wire_dtype)
        adapters = sum(
            adapter_flops(rows, width, r, o, training=True, input_grad=number > 0)
            for number, (width, modules) in enumerate(shapes)
            for o, _ in modules
        )
        head = 2 * 2 * kept * config.vocab_size * d  # forward, and the gradient of its input
        cloud = forward_flops(sites, rows) + attention * config.num_hidden_layers
        cloud += backward_flops(sites, active[0][0].index, rows, attention)
        found[arm] = {
            "sent": sent,
            "received": received,
            "bytes": sent + received,
            "adapters": adapters,
        }
        found[arm] |= {"edge": adapters + head, "cloud": cloud, "round trips": 2 * len(active) + 1}
    return found


def projection_table() -> str:
    """Of the three models of the paper: from the accounting's formulas, nothing of it measured."""
    lines = [
        "| projected, not run | sites | MB a step | adapter GFLOP | all edge GFLOP | cloud TFLOP | "
        "round trips |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PROJECTED:
        full = project(name)["FT"]
        for arm, cost in project(name).items():
            units = {"bytes": 1e6, "adapters": 1e9, "edge": 1e9, "cloud": 1e12, "round trips": 1}
            cells = [
                f"{cost[key] / unit:,.4g} ({100 * cost[key] / full[key]:.1f} %)"
                for key, unit in units.items()
            ]
            lines.append(
                f"| {name}, {arm} | {(cost['round trips'] - 1) // 2:.0f} | {' | '.join(cells)} |"
            )
    size = f"{STEP['batch']} rows of {STEP['length']} tokens"
    step = f"{size}, {STEP['supervised']} of each supervised; rank {STEP['r']}"
    return "\n".join([*lines, "", f"A step has {step}."])


def tables(config: Any, wanted: list[Run], runs: list[Run]) -> str:
    """All tables, as they stand in docs/reproduction.md."""
    models = [model for model in config.models if select(single(runs), model=model)]
    parts = [
        part(config, runs, model)
        for model in models
        for part in (accuracy_table, gap_lines, costs_table, variation_lines)
    ]
    parts += [personal_table(config, runs), missing(config, wanted, runs)]
    return "\n\n".join(part for part in parts if part)


# ----------------------------------------------------------------- figures


def figures(config: Any, runs: list[Run], folder: Path, stem: str) -> Iterable[Path]:
    """Heat maps of how units vary, bars of cost, accuracy against bytes: a PNG each, for every
    model with runs.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for model in config.models:
        mine = select(single(runs), model=model)
        for name, draw in (("variation", _variation), ("costs", _costs), ("front", _front)):
            if (canvas := draw(config, mine, model, pyplot)) is not None:
                file = folder / "-".join(
                    ["paper", stem, *([model] if len(config.models) > 1 else []), f"{name}.png"]
                )
                canvas.savefig(file, dpi=90)
                pyplot.close(canvas)
                yield file


def _variation(config: Any, runs: list[Run], model: str, pyplot: Any) -> Any:
    """Unit by step: how much the l2 norm of each module changed in an interval of FT."""
    found = [
        run for run in runs if run["arm"] == "FT" and (run.get("variation") or {}).get("steps")
    ]
    chosen = [run for run in found if run["task"] in ("arc_challenge", "social_iqa")] or found[:2]
    if not chosen:
        return None
    canvas, panels = pyplot.subplots(
        1, len(chosen), figsize=(5 * len(chosen), 6), squeeze=False, layout="constrained"
    )
    for panel, run in zip(panels[0], chosen, strict=True):
        log = run["variation"]
        values = [
            [math.log10(max(value or 0.0, 1e-6)) for value in unit]
            for unit in zip(*log["values"], strict=True)
        ]
        first, last = log["steps"][0], log["steps"][-1]
        drawn = panel.imshow(
            values, aspect="auto", origin="lower", extent=(first, last, 0, len(values))
        )
        panel.set_title(f"{run['task']}, seed {run['seed']}")
        panel.set_xlabel("step")
        panel.set_ylabel(f"module, of {len(values)} in calling order")
        canvas.colorbar(drawn, ax=panel, label="log10 of the change of the l2 norm in an interval")
    return canvas


def _costs(config: Any, runs: list[Run], model: str, pyplot: Any) -> Any:
    """Shares of FT."""
    found = {
        arm: pair[1]
        for arm in config.arms
        if (pair := shares(config, runs, model, arm)) and arm != "FT"
    }
    if not found:
        return None
    names = {
        "bytes": "traffic",
        "adapters": "edge, adapters",
        "edge": "edge, all",
        "cloud": "cloud",
    }
    canvas, panel = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for place, (name, title) in enumerate(names.items()):
        at = [number + place * 0.2 for number in range(len(found))]
        drawn = panel.bar(at, [100 * share[name] for share in found.values()], 0.2, label=title)
        panel.bar_label(drawn, fmt="%.0f", fontsize=7)
    panel.axhline(12.5, color="#999999", ls="--", lw=1)
    panel.set_xticks([number + 0.3 for number in range(len(found))], list(found))
    panel.set_ylabel("% of all modules of the same kind")
    panel.legend(fontsize=8)
    return canvas


def _front(config: Any, runs: list[Run], model: str, pyplot: Any) -> Any:
    """Mean accuracy over the tasks that every arm drawn has, against bytes."""
    lora = [
        arm
        for arm, options in config.arms.items()
        if options.get("kind", "lora") == "lora" and "quantize" not in options
    ]
    tasks = {
        arm: {run["task"] for run in select(runs, arm=arm)}
        for arm in lora
        if shares(config, runs, model, arm)
    }
    if "FT" not in tasks or not (common := set.intersection(*tasks.values())):
        return None
    canvas, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, arm in enumerate(tasks):
        groups = [select(runs, arm=arm, task=task) for task in sorted(common)]
        wide = math.hypot(*(half_width(group) for group in groups)) / len(groups)
        x, y = (
            100 * shares(config, runs, model, arm)[1]["bytes"],
            statistics.fmean(map(mean, groups)),
        )
        panel.errorbar(x, 100 * y, 100 * wide, fmt="o", capsize=3)
        panel.annotate(
            arm,
            (x, 100 * y),
            xytext=(6, 4 - 10 * (number % 3)),
            textcoords="offset points",
            fontsize=8,
        )
    commonest = statistics.fmean(select(runs, task=task)[0]["majority"] for task in common)
    panel.axhline(
        100 * commonest, color="#999999", ls="--", lw=1, label="always the commonest answer"
    )
    if common <= {run["task"] for run in select(runs, arm="base")}:
        untrained = statistics.fmean(mean(select(runs, arm="base", task=task)) for task in common)
        panel.axhline(100 * untrained, color="#999999", ls=":", lw=1, label="base")
    panel.set_xscale("log")
    panel.set_xticks([10, 20, 50, 100], ["10", "20", "50", "100"])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("bytes, % of FT")
    named = ", ".join(sorted(common)) if len(common) < 4 else f"mean of {len(common)} tasks"
    panel.set_ylabel(f"accuracy, %: {named}")
    panel.legend(fontsize=8, loc="lower center")
    return canvas
