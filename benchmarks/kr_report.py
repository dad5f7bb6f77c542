"""What `kr.py` has found, as tables and figures: first the claims at every length, then the runs of
150 steps with a falling rate.

`python benchmarks/kr.py table` and `python benchmarks/kr.py figure` call it. Rows of whole runs of
`codecs.py` are shown beside them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import intervals
import kr
from kr import load_results

__all__ = ["appendix", "load_results", "show", "table"]

CODECS = kr.HERE / "results" / "codecs.jsonl"
IMAGES = kr.HERE.parent / "docs" / "images"
MARGIN = 0.02  # points of accuracy that an arm may lose against FT and still PASS
BYTES, ADAPTER_FLOPS = 12.5, 18.0  # percent of FT on q, k, v: what a claim allows
SLACK = 1.02  # a budget is kept to 2 % of it
TOLD = (  # ten of 150 steps of a falling rate, two of them by codecs.py
    *("FT", "FT gate,up", "gate,up factored int4, dx dropped"),
    "gate,up hosted int4, adapter int4, rank 4",
    *("spread gate,up", "KR gate,up cover", "spread v", "spread", "random", "KR"),
)
# codecs.py's runs of an arm of FINAL with the base in fp32: what its other runs are compared with.
TWINS = {"FT": "q,k,v plain fp16", "FT gate,up": "gate,up factored fp16"}


def show(what: str, runs: list[dict[str, Any]]) -> None:
    """Print all tables, or draw the figures."""
    if what == "figure":
        length_figure(runs, IMAGES / "kr-length.png")
        figure(runs, IMAGES / "kr-front.png")
    else:
        print("\n\n".join([table(runs), *appendix(runs)]))


# ----------------------------------------------------------------- at every length

Seeds = dict[int, dict[str, Any]]


def tried(runs: list[dict[str, Any]], arm: str, steps: int) -> dict[float, Seeds]:
    """Learning rate and seed to a run of stage `length`."""
    wanted = {"stage": "length", "arm": arm, "steps": steps}
    found: dict[float, Seeds] = {}
    for run in runs:
        if run.items() >= wanted.items():
            found.setdefault(run["learning_rate"], {})[run["seed"]] = run
    return found


def by_length(runs: list[dict[str, Any]]) -> dict[str, dict[int, Seeds]]:
    """Arm, steps and seed to a run of stage `length`, at the rate that came out best there."""
    found = {
        arm: {steps: at_best(some) for steps in kr.LENGTHS if (some := tried(runs, arm, steps))}
        for arm in kr.RATES
    }
    return {arm: mine for arm, mine in found.items() if mine}


def at_best(some: dict[float, Seeds]) -> Seeds:
    """The runs of the rate that is best over the seeds that all rates have."""
    seeds = set.intersection(*(set(mine) for mine in some.values()))
    return max(some.values(), key=lambda mine: mean({seed: mine[seed] for seed in seeds} or mine))


def mean(mine: Seeds) -> float:
    """Accuracy over seeds."""
    return statistics.fmean(run["accuracy"] for run in mine.values())


def rates(runs: list[dict[str, Any]]) -> str:
    """Markdown of the arms that were run at more than one learning rate at a length, beside FT at
    its best.
    """
    lines = ["| arm | steps | learning rate | accuracy |", "|---|---|---|---|"]
    full = by_length(runs).get("FT", {})
    for arm in kr.RATES:
        for steps in kr.LENGTHS:
            some = tried(runs, arm, steps)
            for rate, mine in sorted(some.items()) if len(some) > 1 else ():
                cell = accuracy(mine, {} if arm == "FT" else full.get(steps, {}))
                lines.append(f"| {arm} | {steps:,} | {rate:g} | {cell} |")
    return "\n".join(lines) if len(lines) > 2 else "No arm was run at more than one rate."


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the claims, and the arms, at every length."""
    arms = by_length(runs)
    full = arms.get("FT", {})
    head = "|".join(f" {steps:,} steps " for steps in kr.LENGTHS)
    claims = [
        f"| at an eighth of FT's bytes or less |{head}|",
        "|---" * (len(kr.LENGTHS) + 1) + "|",
    ]
    for name, choose in CLAIMS.items():
        cells = [best(arms, steps, choose) for steps in kr.LENGTHS]
        claims.append(f"| {name} | {' | '.join(cells)} |")
    cells = [
        judge(*(arms.get(arm, {}).get(steps, {}) for arm in kr.SPECTRAL)) for steps in kr.LENGTHS
    ]
    claims.append(f"| `{kr.SPECTRAL[0]}` beside `{kr.SPECTRAL[1]}` | {' | '.join(cells)} |")
    cells = [moved_or_not(arms, steps) for steps in kr.LENGTHS]
    claims.append(f"| sets that change, beside the set that never changes | {' | '.join(cells)} |")
    lines = [
        "| arm | on | wire | learning rate | bytes, % | adapter FLOPs, % | all edge FLOPs, % |"
        f"{head}|",
        "|---" * (len(kr.LENGTHS) + 7) + "|",
    ]
    for arm, mine in arms.items():
        targets, rank, wire, *_ = kr.ARMS[arm]
        last = max(mine.keys() & full.keys(), default=None)
        costs = ("bytes", "adapter_flops", "edge_flops")
        at = [next(iter(seeds.values()))["learning_rate"] for seeds in mine.values()]
        cells = [
            modules_of(targets, rank),
            wire,
            ", ".join(f"{one:g}" for one in (at if len(set(at)) > 1 else at[:1])),
            *(
                share(mine[last], full[last], name)
                if last and all(name in run for run in [*mine[last].values(), *full[last].values()])
                else ""
                for name in costs
            ),
            *(
                accuracy(mine[steps], {} if arm == "FT" else full.get(steps, {}))
                if steps in mine
                else ""
                for steps in kr.LENGTHS
            ),
        ]
        cells = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(claims) + "\n\n" + "\n".join(lines)


def modules_of(targets: Sequence[str], rank: int) -> str:
    """A cell: what an arm trains."""
    return f"{', '.join(name.removesuffix('_proj') for name in targets)} r={rank}"


def accuracy(mine: Seeds, full: Seeds) -> str:
    """The mean, and the difference to FT, each with how many seeds it has."""
    shown = f"**{mean(mine):.3f}**" + ("" if len(mine) == 1 else f" ({len(mine)} seeds)")
    if seeds := mine.keys() & full.keys():
        gap, half = gap_by_row(mine, full)
        shown += f" {gap:+.3f} ± {half:.3f}" + (f" ({number(seeds)})" if len(mine) > 1 else "")
    return shown


def number(seeds: Collection[int]) -> str:
    """In words."""
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def gap_by_row(mine: Seeds, full: Seeds) -> tuple[float, float]:
    """Mean difference and half of its interval, over the rows of the seeds that both have."""
    seeds = mine.keys() & full.keys()
    return intervals.by_row(*([side[seed]["right"] for seed in seeds] for side in (mine, full)))


def is_of_the_paper(arm: str, cost: dict[str, float]) -> bool:
    """Modules among q, k, v over the plain wire, within both of the paper's costs."""
    targets, _, wire, *_ = kr.ARMS[arm]
    return (
        set(targets) <= set(kr.QKV)
        and wire == "plain"
        and cost["bytes"] <= BYTES * SLACK
        and cost["adapter_flops"] <= ADAPTER_FLOPS * SLACK
    )


def is_choice(arm: str, cost: dict[str, float]) -> bool:
    """The same, and not all modules are trained."""
    return is_of_the_paper(arm, cost) and kr.ARMS[arm][3] is not None


def is_cheap(arm: str, cost: dict[str, float]) -> bool:
    """Other modules or another wire, within the bytes."""
    targets, _, wire, *_ = kr.ARMS[arm]
    others = wire != "plain" or not set(targets) <= set(kr.QKV)
    return others and cost["bytes"] <= BYTES * SLACK


STILL, MOVING = "spread v", ("KR v cover", kr.ROTATING)
CLAIMS = {
    "(a) the paper's claim: modules among q, k, v, plain wire, at 18 % of the adapters' FLOPs or "
    "less; beside FT": is_of_the_paper,
    "the same, and not all modules are trained": is_choice,
    "(b) other modules, or another wire; beside FT": is_cheap,
}


def best(arms: dict[str, dict[int, Seeds]], steps: int, choose: Any) -> str:
    """A cell of the claims: the verdict of the most accurate arm of those that it may be."""
    full = arms.get("FT", {}).get(steps, {})
    mine = {
        arm: seeds[steps]
        for arm, seeds in arms.items()
        if arm != "FT" and seeds.get(steps, {}).keys() & full.keys()
    }
    costs = {
        arm: {name: share(runs, full, name) for name in ("bytes", "adapter_flops")}
        for arm, runs in mine.items()
    }
    found = [(gap_by_row(mine[arm], full), arm) for arm, cost in costs.items() if choose(arm, cost)]
    if not found:
        return "no run keeps to it yet" if mine else "not run yet"
    _, arm = max(found)
    return judge(mine[arm], full, f"`{arm}`, ")


def judge(mine: Seeds, full: Seeds, of: str = "") -> str:
    """A cell: PASS or MISS beside all modules, and whether the interval settles it."""
    if not mine.keys() & full.keys():
        return "not run yet"
    gap, half = gap_by_row(mine, full)
    word = "PASS" if is_within(gap) else "MISS"
    settled = "" if is_within(gap - half) == is_within(gap + half) else ", not settled"
    return f"**{word}**: {gap:+.3f} ± {half:.3f} ({of}{number(mine.keys() & full.keys())}{settled})"


def moved_or_not(arms: dict[str, dict[int, Seeds]], steps: int) -> str:
    """A cell of the claims: each arm whose set changes, less the one whose does not."""
    still = arms.get(STILL, {}).get(steps, {})
    found = []
    for arm in MOVING:
        mine = arms.get(arm, {}).get(steps, {})
        if seeds := mine.keys() & still.keys():
            gap, half = gap_by_row(mine, still)
            word = "no difference" if abs(gap) <= half else ("better" if gap > 0 else "worse")
            found.append(f"`{arm}` {gap:+.3f} ± {half:.3f} ({number(seeds)}: {word})")
    return "; ".join(found) or "not run yet"


# Arms that the text compares, beside FT: what is bought or helped, and what is chosen.
PAIRS = (
    *((kr.SPECTRAL[0], STILL), (kr.BUYING[0], STILL), (kr.SPECTRAL[0], kr.BUYING[0])),
    *((arm, STILL) for arm in MOVING),
)


def pairs(runs: list[dict[str, Any]]) -> str:
    """Markdown: differences of arms at every length, over the rows of the seeds that both have, and
    where these are several by seed, with the t-interval over them.
    """
    arms = by_length(runs)
    head = "|".join(f" {steps:,} steps " for steps in kr.LENGTHS)
    lines = [f"| arm | less |{head}|", "|---" * (len(kr.LENGTHS) + 2) + "|"]
    for arm, other in PAIRS:
        cells = []
        for steps in kr.LENGTHS:
            mine, full = (arms.get(one, {}).get(steps, {}) for one in (arm, other))
            if not mine.keys() & full.keys():
                cells.append("")
                continue
            gap, half = gap_by_row(mine, full)
            cells.append(f"{gap:+.3f} ± {half:.3f}")
            if len(gaps := differences(mine, full)) > 1:
                each = ", ".join(f"{one:+.3f}" for one in gaps)
                cells[-1] += f" (by seed {each}: ± {intervals.over_seeds(gaps):.3f})"
        lines.append(f"| {arm} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(runs: list[dict[str, Any]]) -> str:
    """Markdown: when an arm's curve of seed 0 first has what FT has at the end of each length."""
    arms = by_length(runs)
    full = arms.get("FT", {})
    lengths = [steps for steps in kr.LENGTHS if 0 in full.get(steps, {})]
    head = "|".join(f" {steps:,} steps " for steps in lengths)
    lines = [
        f"| first reaches what FT has after |{head}|",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for arm, mine in arms.items():
        if arm == "FT" or not (points := curve_of(mine)):
            continue
        cells = []
        for steps in lengths:
            wanted = full[steps][0]["accuracy"]
            there = [done for done, value in points if value >= wanted]
            cells.append(f"{min(there):,}" if there else f"not in {max(points)[0]:,}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_of(mine: dict[int, Seeds]) -> list[tuple[int, float]]:
    """Steps and accuracy of seed 0: on the way, of 300 rows, and at the end of every length."""
    ends = {steps: seeds[0] for steps, seeds in mine.items() if 0 in seeds}
    if not ends:
        return []
    way = {point["step"]: point["accuracy"] for point in on_the_way(ends[max(ends)])}
    way |= {steps: run["accuracy"] for steps, run in ends.items()}
    return sorted(way.items())


def on_the_way(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of a run's curve before its learning rate began to fall; only seed 0 has one."""
    curve = run.get("curve", [])
    return [point for point in curve if point["step"] <= kr.fork_of(run["steps"])]


def length_figure(runs: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against bytes and against steps: a thin line on the way, dots with their intervals
    where a run ended.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    for place, (arm, mine) in enumerate(by_length(runs).items()):
        colour = f"C{place}"
        longest = mine[max(mine)]
        for run in longest.values():
            way = on_the_way(run)
            for panel, name in zip(panels, ("bytes", "step"), strict=True):
                scale = 1e9 if name == "bytes" else 1
                x = [point[name] / scale for point in way]
                style = {"color": colour, "lw": 0.8, "alpha": 0.5}
                panel.plot(x, [point["accuracy"] for point in way], **style)
        for panel, name in zip(panels, ("bytes", "steps"), strict=True):
            scale = 1e9 if name == "bytes" else 1
            x = [statistics.fmean(run[name] for run in mine[at].values()) / scale for at in mine]
            y = [mean(seeds) for seeds in mine.values()]
            bars = [intervals.of_share(p, rows_of(mine)) for p in y]
            panel.errorbar(x, y, bars, fmt="o", color=colour, capsize=3, label=arm)
    panels[0].set_xscale("log")
    panels[0].set_xlabel("GB of the run, both directions")
    panels[1].set_xlabel("steps of 16 rows")
    panels[0].set_ylabel("Banking77, exact match")
    panels[1].legend(fontsize=9, loc="lower right")
    for panel in panels:
        panel.grid(alpha=0.3)
    canvas.savefig(file, dpi=110)


def rows_of(mine: dict[int, Seeds]) -> int:
    """How many rows an accuracy is of."""
    rows: int = next(iter(next(iter(mine.values())).values()))["rows"]
    return rows


# ----------------------------------------------------------------- 150 steps of a falling rate


def short_table(runs: list[dict[str, Any]], arms: Sequence[str] = TOLD) -> str:
    """Markdown of final runs: accuracy with its interval, and what it cost beside FT on q, k, v."""
    finals = by_arm(runs) | bought()
    if "FT" not in finals:
        return "No final run of FT at its best learning rate yet."
    full = finals["FT"]
    lines = [
        "| arm | on | wire | learning rate | accuracy (seeds) | against FT | | against FT on the "
        "same modules | | "
        "bytes, % | adapter FLOPs, % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        if arm not in finals:
            continue
        mine = finals[arm]
        targets, rank, wire, *_ = kr.ARMS[mine[min(mine)]["arm"]]
        rate = f"{mine[min(mine)]['learning_rate']:g}"
        if arm in kr.ARMS:
            same = finals["FT gate,up"] if targets == kr.MLP and "FT gate,up" in finals else {}
            rate += at_the_edge(runs, arm)
        else:
            wire += "; base fp32"
            same = finals.get(TWINS["FT gate,up" if targets == kr.MLP else "FT"], {})
        shown = ", ".join(f"{mine[seed]['accuracy']:.3f}" for seed in sorted(mine))
        cells = [
            modules_of(targets, rank),
            *(
                wire,
                rate,
                f"**{mean(mine):.3f}** ({shown})",
                *judged(mine, full),
                *judged(mine, same),
            ),
            *(f"{share(mine, full, name):.1f}" for name in ("bytes", "adapter_flops")),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judged(mine: dict[int, Any], full: dict[int, Any]) -> list[str]:
    """Two cells: the difference, and the verdict where there is more than one seed to base it
    on.
    """
    seeds = mine.keys() & full.keys()
    if mine is full or not seeds:
        return ["", ""]
    return [interval(mine, full), verdict(mine, full) if len(seeds) > 1 else "one seed"]


def appendix(runs: list[dict[str, Any]]) -> list[str]:
    """The long lists: when FT is reached, other rates, differences, final arms of 150 steps, tasks,
    sites, every tuning run.
    """
    others = [arm for arm in (*kr.FINAL, *bought()) if arm not in TOLD]
    return [
        reached(runs),
        rates(runs),
        pairs(runs),
        short_table(runs),
        short_table(runs, others),
        tasks(runs),
        *([probed(runs, json.loads(kr.SITES.read_text()))] if kr.SITES.exists() else []),
        trials(runs),
    ]


def probed(runs: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """Markdown of `sites`: groups of modules by the norm of their gradient for each byte, beside
    what training all of a group came to.
    """
    wires = ("plain", "factored", "hosted")
    lines = [
        f"| arm | on | norm of g^T x | MB a step: {', '.join(wires)} | norm a MB: "
        f"{', '.join(wires)} | best tuning run |",
        "|---|---|---|---|---|---|",
    ]
    for arm, of in found["arms"].items():
        tuned = [run for run in runs if run["stage"] == "tune" and run["arm"] == arm]
        megabytes = [of["bytes"][wire] / 1e6 for wire in wires]
        cells = [
            ", ".join(name.removesuffix("_proj") for name in kr.ARMS[arm][0]),
            f"{of['norm']:.0f}",
            ", ".join(f"{value:.1f}" for value in megabytes),
            ", ".join(f"{of['norm'] / value:.1f}" for value in megabytes),
            f"{max(run['accuracy'] for run in tuned):.3f}" if tuned else "",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trials(runs: list[dict[str, Any]]) -> str:
    """Markdown of every tuning run, best first: the variants that failed are here too."""
    tuned = sorted(
        (run for run in runs if run["stage"] == "tune"), key=lambda run: -run["accuracy"]
    )
    full = next(run for run in tuned if run["arm"] == "FT")
    lines = [
        "| arm | learning rate | accuracy | eval loss | bytes, % of FT |",
        "|---|---|---|---|---|",
    ]
    for run in tuned:
        lines.append(
            f"| {run['arm']} | {run['learning_rate']:g} | {run['accuracy']:.3f} | "
            f"{run['eval_loss']:.3f} | "
            f"{100 * run['bytes'] / full['bytes']:.1f} |"
        )
    return "\n".join(lines)


def tasks(runs: list[dict[str, Any]]) -> str:
    """Markdown of the choice tasks on which FT was tried."""
    lines = [
        "| task | rows | majority | base | FT, learning rate 0.001 | 0.004 |",
        "|---|---|---|---|---|---|",
    ]
    for task in kr.TASKS:
        mine = {
            run["learning_rate"]: run
            for run in runs
            if run["stage"] == "task" and run["task"] == task
        }
        if mine:
            one = next(iter(mine.values()))
            cells = [
                f"{mine[rate]['accuracy']:.3f}" if rate in mine else ""
                for rate in (kr.MANY[0], kr.MANY[2])
            ]
            lines.append(
                f"| {task} | {one['rows']} | {one['majority']:.3f} | {one['base_accuracy']:.3f} | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join(lines)


def by_arm(runs: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm and seed to its final run at the learning rate that tuned best."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if (
            run["stage"] == "final"
            and run["arm"] in kr.FINAL
            and run["learning_rate"] == kr.best_rate(runs, run["arm"])
        ):
            found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def bought() -> dict[str, dict[int, dict[str, Any]]]:
    """Name and seed to each whole run of `codecs.py` on Banking77, in the order of the names."""
    lines = CODECS.read_text().splitlines() if CODECS.exists() else []
    runs = [run for run in map(json.loads, lines) if run.get("run") and run["task"] == "banking77"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["run"], run["seed"])):
        found.setdefault(run["run"], {})[run["seed"]] = run
    return found


def at_the_edge(runs: list[dict[str, Any]], arm: str) -> str:
    """A mark where the best learning rate is the largest or smallest that was tried: it may not be
    the best.
    """
    tried = {run["learning_rate"] for run in runs if run["stage"] == "tune" and run["arm"] == arm}
    return " (edge)" if kr.best_rate(runs, arm) in (min(tried), max(tried)) else ""


def share(mine: dict[int, Any], full: dict[int, Any], name: str) -> float:
    """Percent of FT, over the seeds that both have."""
    seeds = mine.keys() & full.keys()
    return 100 * sum(mine[seed][name] for seed in seeds) / sum(full[seed][name] for seed in seeds)


def differences(mine: dict[int, Any], full: dict[int, Any]) -> list[float]:
    """Accuracy less FT's, paired by seed."""
    return [
        mine[seed]["accuracy"] - full[seed]["accuracy"]
        for seed in sorted(mine.keys() & full.keys())
    ]


def interval(mine: dict[int, Any], full: dict[int, Any]) -> str:
    """Mean difference to FT with the 95 % t-interval over seeds, which pair the runs."""
    gaps = differences(mine, full)
    if mine is full:
        return ""
    half = f" ± {intervals.over_seeds(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.3f}{half}"


def verdict(mine: dict[int, Any], full: dict[int, Any]) -> str:
    """PASS: the mean over seeds is at most the margin below FT."""
    return "PASS" if is_within(statistics.fmean(differences(mine, full))) else "MISS"


def is_within(gap: float) -> bool:
    """At most the margin below, and no rounding of floats decides."""
    return round(gap, 9) >= -MARGIN


KINDS = {  # of arms in the figure, by how their names begin: colour, and words in the legend
    "FT": ("#333333", "all modules, 16 bits a number, adapters on the edge"),
    "codecs": ("#1b9e77", "gate,up or q,k,v over a coarser or hosted wire (base in fp32)"),
    "spread": ("#1f78b4", "evenly spread units that never change"),
    "KR": ("#d95f02", "Kill and Revive: units chosen by a score"),
    "other": ("#999999", "random or last units"),
}


def figure(runs: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against bytes, every arm on it; a bar goes from the worst seed to the best."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    finals = by_arm(runs)
    full = finals["FT"]
    cheaper = {name: mine for name, mine in bought().items() if name not in TWINS.values()}
    canvas, panel = pyplot.subplots(figsize=(11, 7), layout="constrained")
    points = []
    for arm, mine in (finals | cheaper).items():
        x, values = share(mine, full, "bytes"), [run["accuracy"] for run in mine.values()]
        colour, _ = KINDS.get("codecs" if arm in cheaper else arm.split()[0], KINDS["other"])
        panel.plot([x, x], [min(values), max(values)], color=colour, lw=2)
        panel.plot(x, statistics.fmean(values), "o", color=colour)
        points.append((x, statistics.fmean(values), arm))
    for colour, words in KINDS.values():
        panel.plot([], [], "o", color=colour, label=words)
    panel.axvline(12.5, color="#bbbbbb", ls="--", lw=1)
    panel.set_xscale("log")
    ticks = [x for x in (0.5, 1, 2, 5, 10, 12.5, 20, 30, 50, 100) if x > 0.8 * min(points)[0]]
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlim(0.8 * min(points)[0], 180)
    panel.set_ylim(-0.03, 0.85)
    panel.set_xlabel("bytes of the whole run, % of FT on q, k, v (plain wire)")
    panel.set_ylabel("Banking77, exact match on 1500 held-out rows")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower left")
    write_names(canvas, panel, points)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=110)


def write_names(canvas: Any, panel: Any, points: list[tuple[float, float, str]]) -> None:
    """A name at every point, where it covers no other name, no point and not the legend: beside
    it, or further off at the end of a line.
    """
    canvas.draw_without_rendering()
    unit = canvas.dpi / 72  # pixels of a point of type
    frame = panel.get_window_extent()
    taken = [panel.get_legend().get_window_extent()]
    marks = [line for line in panel.lines if len(line.get_xdata()) and line.get_ls() != "--"]
    taken += [line.get_window_extent().padded(2 * unit) for line in marks]
    places = [(7, -3, "left"), (-7, -3, "right")]
    places += [
        (x, y, side)
        for far in range(10, 200, 6)
        for x, side in ((12, "left"), (-12, "right"))
        for y in (far, -far)
    ]
    for x, y, name in sorted(points, key=lambda point: (-point[1], point[0])):
        at = panel.transData.transform((x, y))
        for right, up, side in places:
            text = panel.text(0, 0, name, fontsize=8, ha=side, transform=None)
            text.set_position((at[0] + right * unit, at[1] + up * unit))
            box = text.get_window_extent()
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            text.remove()
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkB": 3}
        panel.annotate(
            name,
            (x, y),
            xytext=(right, up),
            textcoords="offset points",
            fontsize=8,
            ha=side,
            arrowprops=line if abs(up) > 3 else None,
        )
