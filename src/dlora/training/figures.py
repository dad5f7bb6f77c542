"""The figures of a report, drawn with matplotlib from what runs left in their folders.

learning    loss and accuracy of all runs, against steps, traffic and time
units       with Kill and Revive: how much every unit changed, and when it was active
step        who computed when in one micro-batch
costs       traffic and compute of all runs, side by side

Units are after Figure 3, a step after Figure 4, costs after Figure 5 of arXiv:2404.05182.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import LogNorm

from dlora.runs import Run
from dlora.training.tasks import TITLES

__all__ = ["Figure", "figures_of"]


@dataclass(frozen=True)
class Figure:
    """A drawing, with what the page says of it."""

    name: str
    """Of its file."""
    title: str
    caption: str
    drawing: Any
    """matplotlib's Figure."""


def figures_of(runs: Sequence[Run]) -> Iterator[Figure]:
    """All figures that these runs have something to show in, in the page's order."""
    if learning := _learning(runs):
        yield Figure("learning", "Loss and accuracy", _LEARNING, learning)

    for number, run in enumerate(runs, 1):
        if units := _units(run):
            yield Figure(f"units-{number}", f"Change of every unit: {run.name}", _UNITS, units)
    for number, run in enumerate(runs, 1):
        if step := _step(run):
            yield Figure(f"step-{number}", f"Time line of one step: {run.name}", _STEP, step)

    yield Figure("costs", "Compute and traffic", _COSTS, _costs(runs))


# ----------------------------------------------------------------- learning

_LEARNING: Final = (
    "Loss in nats a supervised token, and the share of supervised tokens that were the likeliest; "
    "of preferences and rewards the task's own loss, and what it logs beside it. "
    "Thin lines: training; points: evaluation. The same curves against steps, megabytes that "
    "crossed the network, and seconds."
)


def _learning(runs: Sequence[Run]) -> Any:
    """A row for each measure that was logged, a column for each axis."""
    keys = {key for run in runs for entry in run.log for key in entry}
    measures = [("loss", "loss"), ("mean_token_accuracy", "token accuracy"), *TITLES.items()]
    measures = [(key, title) for key, title in measures if key in keys]
    if not measures:
        return None

    figure, panels = pyplot.subplots(
        len(measures),
        3,
        figsize=(13, 3.4 * len(measures)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (key, title) in zip(panels, measures, strict=True):
        for panel, axis in zip(row, ("step", "MB", "seconds"), strict=True):
            for number, run in enumerate(runs):
                _curves(panel, run, axis, key, colour=f"C{number}")
            panel.set_xlabel(axis)
            panel.grid(alpha=0.3)

        row[0].set_ylabel(title)
        # A loss of rewards may be negative.
        if key == "loss" and all(entry.get(key, 1.0) > 0 for run in runs for entry in run.log):
            row[0].set_yscale("log")
    panels[0][0].legend(frameon=False)
    return figure


def _curves(panel: Any, run: Run, axis: str, key: str, *, colour: str) -> None:
    """One measure of one run: training as a thin line, evaluation as points."""
    training, evaluation = {"alpha": 0.8, "lw": 1.1}, {"marker": "o", "ms": 5}
    places = run.axis(axis)
    for name, label, style in ((key, run.name, training), (f"eval_{key}", None, evaluation)):
        points = [
            (place, entry[name])
            for place, entry in zip(places, run.log, strict=True)
            if name in entry
        ]
        if points:
            panel.plot(*zip(*points, strict=True), color=colour, label=label, **style)


# ----------------------------------------------------------------- units

_UNITS: Final = (
    "A row is a unit, the lowest layer at the bottom; a column is a decision. Colour: how much the "
    "unit changed since the decision before (by the run's signal); light grey: idle, nothing was "
    "exchanged. Red crosses: killed at this decision; blue triangles: revived; grey points: "
    "trained from the first step on."
)


def _units(run: Run) -> Any:
    """Heat map of scores, unit by decision, with a mark where a unit was killed or revived."""
    if not run.decisions:
        return None
    steps = sorted({line["step"] for line in run.decisions})
    units = list(dict.fromkeys(line["unit"] for line in run.decisions))
    scores, active = _grid(run, units, steps)

    height = max(3.0, 0.16 * len(units))
    figure, panel = pyplot.subplots(
        figsize=(max(6.0, 0.45 * len(steps) + 3), height), layout="constrained"
    )
    panel.set_facecolor("#ececec")

    # Scores span orders of magnitude: colours are logarithmic, over three of them at most.
    if np.isfinite(scores).any():
        top = np.nanmax(scores)
        image = panel.pcolormesh(
            np.ma.masked_invalid(scores),
            norm=LogNorm(max(np.nanmin(scores), top / 1e3), top),
            cmap="viridis",
        )
        signal = run.values.get("kill_revive", {}).get("config", {}).get("signal", "score")
        figure.colorbar(image, label=f"{signal} over the interval", shrink=0.8)
    _mark_changes(panel, active, from_start=run.decisions[0]["step"] == 0)

    # No more labels than can be read.
    every = max(1, len(steps) // 14)
    panel.set_xticks(np.arange(len(steps))[::every] + 0.5, [str(step) for step in steps[::every]])
    every = max(1, len(units) // 40)
    labels = [_short(unit) for unit in units[::every]]
    panel.set_yticks(np.arange(len(units))[::every] + 0.5, labels, fontsize=7)
    panel.set_xlabel("decision before step")
    return figure


def _grid(run: Run, units: list[str], steps: list[int]) -> tuple[Any, Any]:
    """(scores [units, steps], NaN where idle; whether active [units, 1 + steps]).

    The first column of `active` is what held before the first decision.
    """
    scores = np.full((len(units), len(steps)), np.nan)
    active = np.zeros((len(units), len(steps) + 1), dtype=bool)
    active[:, 0] = run.decisions[0]["step"] > 0  # a warm-up trains everything
    for line in run.decisions:
        row, column = units.index(line["unit"]), steps.index(line["step"])
        active[row, column + 1] = line["active"]
        if active[row, column] and line["score"] is not None and line["score"] > 0:
            scores[row, column] = line["score"]
    return scores, active


def _mark_changes(panel: Any, active: Any, *, from_start: bool) -> None:
    """Mark killed and revived units; `from_start`: the first decision began the training."""
    before, now = active[:, :-1], active[:, 1:]
    rows, columns = np.nonzero(before & ~now)
    if columns.size:
        panel.scatter(columns + 0.5, rows + 0.5, marker="x", color="#e41a1c", s=22, lw=1.4)

    rows, columns = np.nonzero(~before & now)
    if columns.size and not from_start:
        panel.scatter(columns + 0.5, rows + 0.5, marker="^", color="#377eb8", s=22, lw=1.4)
    elif columns.size:
        late = columns > 0
        panel.scatter(columns[late] + 0.5, rows[late] + 0.5, marker="^", color="#377eb8", s=22)
        panel.scatter(columns[~late] + 0.5, rows[~late] + 0.5, marker="o", color="#555555", s=10)


def _short(unit: str) -> str:
    """ "site 3: model.layers.3.self_attn.q_proj, ..." as "3: q_proj, ..."."""
    names = unit.partition(": ")[2].split(", ") if ": " in unit else [unit]
    layer = next((part for part in names[0].split(".") if part.isdigit()), None)
    kinds = ", ".join(name.rpartition(".")[2] for name in names)
    return kinds if layer is None else f"{layer}: {kinds}"


# ----------------------------------------------------------------- one step

_STEP: Final = (
    "The newest training micro-batch of the run: who computed when. The halves take turns; grey is "
    "the network, and waiting for a place in the cloud's queue. With parts of a micro-batch in "
    "flight: the first of them, while others were under way."
)
_COLOURS: Final = {"cloud": "#1f78b4", "link": "#c8c8c8", "edge": "#d95f02"}


def _step(run: Run) -> Any:
    """Who worked when in one micro-batch."""
    parts = run.values.get("micro_batch")
    if not parts:
        return None

    figure, panel = pyplot.subplots(figsize=(12, 2.1), layout="constrained")
    labels = []
    for place, (name, colour) in enumerate(_COLOURS.items()):
        spans = [(start, end - start) for who, start, end in parts if who == name]
        panel.broken_barh(spans, (place - 0.4, 0.8), color=colour)
        labels.append(f"{name}, {sum(length for _, length in spans):.2f} s")
    panel.set_yticks(range(len(labels)), labels)
    panel.set_xlabel("seconds")
    panel.set_xlim(0, parts[-1][2])
    return figure


# ----------------------------------------------------------------- costs

_COSTS: Final = (
    "What the whole runs cost, warm-up, probes and evaluations included: traffic in both "
    "directions, and matrix products on the edge and in the cloud."
)

Part = tuple[str, str, str]
"""Of a bar: a counter of `Meter`, its label, its colour."""

_TRAFFIC: Final[list[Part]] = [
    ("sent_bytes", "up", "#d95f02"),
    ("received_bytes", "down", "#1f78b4"),
]
_EDGE: Final[list[Part]] = [
    ("adapter_flops", "adapters", "#1b9e77"),
    ("head_flops", "head and loss", "#b2df8a"),
]
_EDGE_LAYERS: Final[Part] = ("edge_layer_flops", "layers on the edge", "#66a61e")
_CLOUD: Final[list[Part]] = [
    ("cloud_forward_flops", "forward", "#6a3d9a"),
    ("cloud_backward_flops", "backward", "#cab2d6"),
]


def _costs(runs: Sequence[Run]) -> Any:
    """Bars of traffic and compute, run beside run."""
    figure, panels = pyplot.subplots(
        1, 3, figsize=(13, 1.2 + 0.45 * len(runs)), sharey=True, layout="constrained"
    )
    with_layers = any(run.cost.edge_layer_flops for run in runs)
    _bars(panels[0], runs, "traffic, MB", 1e6, _TRAFFIC)
    _bars(panels[1], runs, "edge, GFLOP", 1e9, [*_EDGE, _EDGE_LAYERS] if with_layers else _EDGE)
    _bars(panels[2], runs, "cloud, GFLOP", 1e9, _CLOUD)
    panels[0].invert_yaxis()
    return figure


def _bars(panel: Any, runs: Sequence[Run], title: str, scale: float, parts: list[Part]) -> None:
    """A bar for each run, its parts one behind the other; shares are of the first run's."""
    names, totals = [run.name for run in runs], [0.0] * len(runs)
    for counter, label, colour in parts:
        sizes = [getattr(run.cost, counter) / scale for run in runs]
        panel.barh(names, sizes, left=totals, label=label, color=colour)
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]

    for place, total in enumerate(totals):
        share = f" ({total / totals[0]:.0%})" if place and totals[0] else ""
        panel.text(total, place, f" {total:,.0f}{share}", va="center", fontsize=8)
    panel.set_xlim(0, max(totals) * 1.3 or 1)
    panel.set_title(title, fontsize=10)
    panel.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2
    )
