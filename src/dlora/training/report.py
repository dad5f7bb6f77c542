"""Figures of finished or running training runs: one HTML file that needs nothing else, and a PNG a
figure.

Reads what `dlora train` leaves in a run's folder: run.json, log.jsonl, and kr.jsonl where there is
one.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dlora.errors import UsageError
from dlora.runs import Run, load_run

__all__ = ["write_report"]

_COLOURS: Final = {"edge": "#d95f02", "link": "#c8c8c8", "cloud": "#1f78b4"}

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DLoRA report</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
figure { margin: 2rem 0 } figcaption { color: #555 } .wide { overflow-x: auto }
</style></head><body>
<h1>DLoRA report</h1>
<p>The model's layers ran frozen in a cloud; text, labels, adapter, loss and optimizer stayed on an edge. A
<em>unit</em> is what Kill and Revive trains or leaves out as a whole: all adapter modules that read the same tensor (a
site), or one module. FT trains all units all the time. Costs are exact counts of the runs' own messages and
matrix products.</p>
<div class="wide"><table><tr><th>run</th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for title, values in rows %}<tr><td>{{ title }}</td>{% for v in values %}<td>{{ v }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if runs|length > 1 %}<p>Percentages are of the first run, {{ runs[0].name }}.</p>{% endif %}
{% for figure in figures %}<figure><h2>{{ figure.title }}</h2>
<img src="data:image/png;base64,{{ figure.data }}" alt="{{ figure.title }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}</body></html>
"""


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write output/report.html and a PNG for every figure; return the files written.

    Raises UsageError for folders without a run, and if matplotlib is not installed.
    """
    runs = [load_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [
            Run(**(vars(run) | {"name": str(folder)}))
            for run, folder in zip(runs, folders, strict=True)
        ]
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            '`dlora report` draws with matplotlib: pip install "dlora[report]"'
        ) from error
    matplotlib.use("agg")
    from jinja2 import Environment
    from matplotlib import pyplot

    output.mkdir(parents=True, exist_ok=True)
    figures, files = [], []
    drawn = [
        ("learning", "Loss and accuracy", _learning(runs), _LEARNING),
        *(
            (f"units-{i}", f"Change of every unit: {run.name}", _units(run), _UNITS)
            for i, run in enumerate(runs, 1)
        ),
        *(
            (f"step-{i}", f"Time line of one step: {run.name}", _step(run), _STEP)
            for i, run in enumerate(runs, 1)
        ),
        ("costs", "Compute and traffic", _costs(runs), _COSTS),
    ]
    for name, title, figure, caption in drawn:
        if figure is None:  # the run has nothing to show there
            continue
        file = output / f"{name}.png"
        figure.savefig(file, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        data = base64.b64encode(file.read_bytes()).decode()
        figures.append({"title": title, "data": data, "caption": caption})
        files.append(file)
    page = Environment(autoescape=True).from_string(_PAGE)
    html = output / "report.html"
    html.write_text(page.render(runs=runs, rows=_rows(runs), figures=figures))
    return [html, *files]


def _rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The table: (title, a value for each run)."""
    first = runs[0]

    def counted(value: float, reference: float, unit: str) -> str:
        share = f" ({value / reference:.1%})" if len(runs) > 1 and reference else ""
        return f"{value:,.1f} {unit}{share}"

    def flops(run: Run, *names: str) -> float:
        return sum(run.cost.get(name, 0) for name in names) / 1e9

    def loss(run: Run, name: str) -> str:
        value = run.record.get(name)
        return "" if value is None else f"{value:.4f}"

    def adapter(run: Run) -> str:
        settings = run.record.get("settings", {})
        targets = settings.get("target_modules") or "peft's default"
        return f"{targets if isinstance(targets, str) else ', '.join(targets)}; rank {settings.get('r')}"

    edge = ("adapter_flops", "head_flops", "embedding_flops", "edge_layer_flops")
    cloud = ("cloud_forward_flops", "cloud_backward_flops")
    return [
        ("model", [str(run.record.get("model_id", "")) for run in runs]),
        ("trained", [run.kind for run in runs]),
        ("adapter on", [adapter(run) for run in runs]),
        ("wire", [str(run.record.get("settings", {}).get("wire", "")) for run in runs]),
        ("steps", [f"{run.record.get('steps', 0)} ({run.record.get('status')})" for run in runs]),
        ("training loss", [loss(run, "train_loss") for run in runs]),
        ("evaluation loss", [loss(run, "eval_loss") for run in runs]),
        ("traffic", [counted(run.traffic / 1e6, first.traffic / 1e6, "MB") for run in runs]),
        ("round trips", [f"{run.cost.get('round_trips', 0):,}" for run in runs]),
        (
            "edge, adapters",
            [counted(flops(run, edge[0]), flops(first, edge[0]), "GFLOP") for run in runs],
        ),
        ("edge, all", [counted(flops(run, *edge), flops(first, *edge), "GFLOP") for run in runs]),
        ("cloud", [counted(flops(run, *cloud), flops(first, *cloud), "GFLOP") for run in runs]),
        ("time", [f"{run.record.get('seconds', 0):,.0f} s" for run in runs]),
    ]


_LEARNING: Final = (
    "Loss in nats a supervised token, and the share of supervised tokens that were the likeliest. "
    "Thin lines: "
    "training; points: evaluation. The same curves against steps, megabytes that crossed the "
    "network, and seconds."
)


def _learning(runs: Sequence[Run]) -> Any:
    from matplotlib import pyplot

    measures = [("loss", "loss"), ("mean_token_accuracy", "token accuracy")]
    measures = [
        one for one in measures if any(one[0] in entry for run in runs for entry in run.log)
    ]
    if not measures:
        return None
    figure, axes = pyplot.subplots(
        len(measures),
        3,
        figsize=(13, 3.4 * len(measures)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (key, title) in zip(axes, measures, strict=True):
        for panel, name in zip(row, ("step", "MB", "seconds"), strict=True):
            for number, run in enumerate(runs):
                places = run.axis(name)
                for kind, style in (
                    (key, {"alpha": 0.8, "lw": 1.1}),
                    (f"eval_{key}", {"marker": "o", "ms": 5}),
                ):
                    points = [
                        (x, e[kind]) for x, e in zip(places, run.log, strict=True) if kind in e
                    ]
                    label = run.name if kind == key else None
                    panel.plot(
                        *zip(*points, strict=True), color=f"C{number}", label=label, **style
                    ) if points else None
            panel.set_xlabel(name)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(title)
        if key == "loss":
            row[0].set_yscale("log")
    axes[0][0].legend(frameon=False)
    return figure


_UNITS: Final = (
    "A row is a unit, the lowest layer at the bottom; a column is a decision. Colour: how much the "
    "unit changed since "
    "the decision before (by the run's signal); light grey: idle, nothing was exchanged. Red "
    "crosses: killed at this "
    "decision; blue triangles: revived; grey points: trained from the first step on."
)


def _units(run: Run) -> Any:
    """Heat map of scores, unit by decision. After Figure 3 of arXiv:2404.05182."""
    if not run.decisions:
        return None
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    steps = sorted({line["step"] for line in run.decisions})
    units = list(dict.fromkeys(line["unit"] for line in run.decisions))
    scores = np.full((len(units), len(steps)), np.nan)
    active = np.zeros((len(units), len(steps) + 1), dtype=bool)
    active[:, 0] = run.decisions[0]["step"] > 0  # a warm-up trains everything
    for line in run.decisions:
        row, column = units.index(line["unit"]), steps.index(line["step"])
        active[row, column + 1] = line["active"]
        if active[row, column] and line["score"] is not None and line["score"] > 0:
            scores[row, column] = line["score"]
    height = max(3.0, 0.16 * len(units))
    figure, panel = pyplot.subplots(
        figsize=(max(6.0, 0.45 * len(steps) + 3), height), layout="constrained"
    )
    panel.set_facecolor("#ececec")
    if np.isfinite(scores).any():
        top = np.nanmax(scores)
        image = panel.pcolormesh(
            np.ma.masked_invalid(scores),
            norm=LogNorm(max(np.nanmin(scores), top / 1e3), top),
            cmap="viridis",
        )
        signal = run.record.get("kill_revive", {}).get("config", {}).get("signal", "score")
        figure.colorbar(image, label=f"{signal} over the interval", shrink=0.8)
    for now, before, marker, colour in (
        (False, True, "x", "#e41a1c"),
        (True, False, "^", "#377eb8"),
    ):
        rows, columns = np.nonzero((active[:, 1:] == now) & (active[:, :-1] == before))
        if columns.size and not (run.decisions[0]["step"] == 0 and now):
            panel.scatter(columns + 0.5, rows + 0.5, marker=marker, color=colour, s=22, lw=1.4)
        elif columns.size:
            late = columns > 0
            panel.scatter(columns[late] + 0.5, rows[late] + 0.5, marker=marker, color=colour, s=22)
            panel.scatter(
                columns[~late] + 0.5, rows[~late] + 0.5, marker="o", color="#555555", s=10
            )
    every = max(1, len(steps) // 14)
    panel.set_xticks(np.arange(len(steps))[::every] + 0.5, [str(step) for step in steps[::every]])
    few = max(1, len(units) // 40)
    panel.set_yticks(
        np.arange(len(units))[::few] + 0.5, [_short(unit) for unit in units[::few]], fontsize=7
    )
    panel.set_xlabel("decision before step")
    return figure


def _short(unit: str) -> str:
    """ "site 3: model.layers.3.self_attn.q_proj, ..." as "layer 3: q_proj, ..."."""
    names = unit.partition(": ")[2].split(", ") if ": " in unit else [unit]
    layer = next((part for part in names[0].split(".") if part.isdigit()), None)
    kinds = ", ".join(name.rpartition(".")[2] for name in names)
    return kinds if layer is None else f"{layer}: {kinds}"


_STEP: Final = (
    "The newest training micro-batch of the run: who computed when. The halves take turns; grey is "
    "the network, and "
    "waiting for a place in the cloud's queue."
)


def _step(run: Run) -> Any:
    """Who worked when in one micro-batch. After Figure 4 of arXiv:2404.05182."""
    parts = run.record.get("micro_batch")
    if not parts:
        return None
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(12, 2.1), layout="constrained")
    names = ("cloud", "link", "edge")
    for place, name in enumerate(names):
        spans = [(start, end - start) for who, start, end in parts if who == name]
        panel.broken_barh(spans, (place - 0.4, 0.8), color=_COLOURS[name])
    totals = [sum(end - start for who, start, end in parts if who == name) for name in names]
    panel.set_yticks(
        range(3), [f"{name}, {total:.2f} s" for name, total in zip(names, totals, strict=True)]
    )
    panel.set_xlabel("seconds")
    panel.set_xlim(0, parts[-1][2])
    return figure


_COSTS: Final = (
    "What the whole runs cost, warm-up, probes and evaluations included: traffic in both "
    "directions, and matrix "
    "products on the edge and in the cloud."
)


def _costs(runs: Sequence[Run]) -> Any:
    """Bars of traffic and compute, run beside run. After Figure 5 of arXiv:2404.05182."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 3, figsize=(13, 1.2 + 0.45 * len(runs)), sharey=True, layout="constrained"
    )
    edge: tuple[tuple[str, str, str], ...]
    edge = (("adapter_flops", "adapters", "#1b9e77"), ("head_flops", "head and loss", "#b2df8a"))
    if any(run.cost.get("edge_layer_flops") for run in runs):
        edge += (("edge_layer_flops", "layers on the edge", "#66a61e"),)
    panels = (
        (
            "traffic, MB",
            1e6,
            (("sent_bytes", "up", "#d95f02"), ("received_bytes", "down", "#1f78b4")),
        ),
        ("edge, GFLOP", 1e9, edge),
        (
            *("cloud, GFLOP", 1e9),
            (
                ("cloud_forward_flops", "forward", "#6a3d9a"),
                ("cloud_backward_flops", "backward", "#cab2d6"),
            ),
        ),
    )
    names = [run.name for run in runs]
    for panel, (title, scale, parts) in zip(axes, panels, strict=True):
        left = [0.0] * len(runs)
        for key, label, colour in parts:
            sizes = [run.cost.get(key, 0) / scale for run in runs]
            panel.barh(names, sizes, left=left, label=label, color=colour)
            left = [one + other for one, other in zip(left, sizes, strict=True)]
        for place, total in enumerate(left):
            share = f" ({total / left[0]:.0%})" if place and left[0] else ""
            panel.text(total, place, f" {total:,.0f}{share}", va="center", fontsize=8)
        panel.set_xlim(0, max(left) * 1.3 or 1)
        panel.set_title(title, fontsize=10)
        panel.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2
        )
    axes[0].invert_yaxis()
    return figure
