"""`dlora report`: one HTML page that needs nothing else, and a PNG for every figure of it.

Reads what `dlora train` leaves in the folders of finished or running runs: run.json, log.jsonl,
and kr.jsonl where there is one. The page is report.html beside this file, the figures are in
`dlora.training.figures`.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlora.extras import missing_extra
from dlora.kill_revive.config import OF_LORA
from dlora.runs import Run, load_run
from dlora.training.readable import counted, readable_time
from dlora.training.tasks import TITLES

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write output/report.html and a PNG for every figure; return the files written.

    Raises UsageError for folders without a run, and if matplotlib is not installed.
    """
    runs = [load_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [
            dataclasses.replace(run, name=str(folder))
            for run, folder in zip(runs, folders, strict=True)
        ]

    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("report", "`dlora report`") from error
    matplotlib.use("agg")
    from jinja2 import Environment
    from matplotlib import pyplot

    from dlora.training.figures import figures_of

    output.mkdir(parents=True, exist_ok=True)
    figures, written = [], []
    for figure in figures_of(runs):
        file = output / f"{figure.name}.png"
        figure.drawing.savefig(file, dpi=110, bbox_inches="tight")
        pyplot.close(figure.drawing)
        data = base64.b64encode(file.read_bytes()).decode()
        figures.append({"title": figure.title, "data": data, "caption": figure.caption})
        written.append(file)

    template = files("dlora.training").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    html = output / "report.html"
    html.write_text(page.render(runs=runs, rows=_rows(runs), figures=figures), encoding="utf-8")
    return [html, *written]


def _rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The table: (title, a value for each run)."""

    def each(value: Callable[[Run], Any]) -> list[str]:
        return [str(value(run)) for run in runs]

    def counted(amount: Callable[[Run], float], scale: float, unit: str) -> list[str]:
        """Amounts, those of further runs also as a share of the first run's."""
        first = amount(runs[0]) / scale
        amounts = [amount(run) / scale for run in runs]
        shares = [f" ({it / first:.1%})" if len(runs) > 1 and first else "" for it in amounts]
        return [f"{it:,.1f} {unit}{share}" for it, share in zip(amounts, shares, strict=True)]

    return [
        ("date", each(_date)),
        ("model", each(lambda run: run.values.get("model_id", ""))),
        ("data", each(lambda run: _rows_of(run, "data"))),
        ("evaluated on", each(lambda run: _rows_of(run, "eval_data"))),
        # How they were trained.
        ("trained", each(_trained)),
        ("adapter on", each(_adapter)),
        ("batch", each(_batch)),
        ("learning rate", each(_learning_rate)),
        ("wire", each(_wire)),
        ("steps", each(_steps)),
        ("training loss", each(lambda run: _loss(run, "train_loss"))),
        ("evaluation loss", each(lambda run: _loss(run, "eval_loss"))),
        *_figures(runs),
        # What the runs cost.
        ("traffic", counted(lambda run: run.traffic, 1e6, "MB")),
        ("round trips", each(lambda run: f"{run.cost.round_trips:,}")),
        ("edge, adapters", counted(lambda run: run.cost.adapter_flops, 1e9, "GFLOP")),
        ("edge, all", counted(lambda run: run.cost.edge_flops, 1e9, "GFLOP")),
        ("cloud", counted(lambda run: run.cost.cloud_flops, 1e9, "GFLOP")),
        ("time of the whole run", each(_time)),
    ]


def _figures(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """What tasks log beside the loss, where one of the runs has it."""
    for short, title in TITLES.items():
        for use, name in (("", short), ("held-out ", f"eval_{short}")):
            values = [run.figures.get(name) for run in runs]
            if any(value is not None for value in values):
                yield use + title, ["" if value is None else f"{value:.4f}" for value in values]


def _trained(run: Run) -> str:
    """The task, where it is another than answers, and all modules or few."""
    task = run.values.get("settings", {}).get("task", "sft")
    return run.kind if task == "sft" else f"{task}, {run.kind}"


def _date(run: Run) -> str:
    """When it began and ended, in UTC."""
    began, ended = (str(run.values.get(name, ""))[:16] for name in ("started", "ended"))
    if ended[:10] == began[:10]:
        ended = ended[11:]
    return f"{began} to {ended}".replace("T", " ") if ended else began.replace("T", " ")


def _rows_of(run: Run, use: str) -> str:
    """The files' names, without their folders, and how many rows were used."""
    source = run.values.get("settings", {}).get(use)
    count = run.values.get("rows", {}).get(use, {}).get("count")
    if source is None:
        return "" if count is None else f"held out: {counted(count, 'row')}"
    names = ", ".join(Path(part.strip()).name for part in str(source).split(","))
    return names if count is None else f"{names}: {counted(count, 'row')}"


def _batch(run: Run) -> str:
    settings = run.values.get("settings", {})
    size, several = settings.get("batch_size"), settings.get("gradient_accumulation_steps") or 1
    return "" if size is None else f"{size} rows" if several == 1 else f"{several} x {size} rows"


def _learning_rate(run: Run) -> str:
    settings = run.values.get("settings", {})
    rate = settings.get("learning_rate")
    return "" if rate is None else f"{rate:g}, {settings.get('lr_scheduler_type', '')}"


def _wire(run: Run) -> str:
    settings = run.values.get("settings", {})
    return " ".join(str(settings[name]) for name in ("wire", "wire_dtype") if name in settings)


def _time(run: Run) -> str:
    """All parts of a resumed run, evaluations included."""
    seconds = run.values.get("seconds", 0)
    plain = f"{seconds:,.0f} s"
    return plain if seconds < 60 else f"{readable_time(seconds)} ({plain})"


def _adapter(run: Run) -> str:
    settings = run.values.get("settings", {})
    targets = settings.get("target_modules")
    names = ["peft's default"] if targets is None else targets
    names = [names] if isinstance(names, str) else names
    names = ", ".join([*names, *(one for more in OF_LORA for one in settings.get(more) or ())])
    return f"{names}; rank {settings.get('r')}"


def _steps(run: Run) -> str:
    return f"{run.values.get('steps', 0)} ({run.values.get('status')})"


def _loss(run: Run, name: str) -> str:
    value = run.values.get(name)
    return "" if value is None else f"{value:.4f}"
