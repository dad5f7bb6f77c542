"""The README of a run's adapter, from run.json: base, data by name, settings, figures, costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dlora.edge.adapter_card import card_head, how_to_load
from dlora.edge.adapter_results import card_with_results
from dlora.edge.bottleneck import CONFIG_FILE
from dlora.edge.meter import Meter
from dlora.kill_revive.config import OF_LORA
from dlora.runs import RunFolder
from dlora.training.advice import SEEN
from dlora.training.tasks import TITLES

__all__ = ["run_card", "write_run_card"]

_SETTINGS: Final = (
    "task",
    *("kind", "r", "lora_alpha", "lora_dropout", "target_modules", *OF_LORA),
    *("learning_rate", "optim"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "epochs", "max_steps", "batch_size"),
    *("gradient_accumulation_steps", "max_length", "overlong", "seed", "kr", "input_grad"),
    "trainer",
)


def write_run_card(folder: RunFolder, run: dict[str, Any]) -> None:
    """Write README.md beside the adapter; `run` is what run.json holds."""
    bottleneck = (folder.path / CONFIG_FILE).is_file()
    text = "\n".join(run_card(folder.path.resolve().name, run, bottleneck=bottleneck))
    text = card_with_results(text, folder.path)
    (folder.path / "README.md").write_text(text, encoding="utf-8")


def run_card(name: str, run: dict[str, Any], *, bottleneck: bool = False) -> Iterator[str]:
    """Its lines. Data has a name and a size, and no content; no server and no path is named."""
    base, settings = run["model_id"], run["settings"]
    yield card_head(base)
    yield f"# {name}\n"
    yield (
        f"An adapter for `{base}`, trained with [DLoRA](https://arxiv.org/abs/2404.05182): the "
        "frozen model stayed in the cloud, text, labels, adapter and optimizer on the edge.\n"
    )
    yield how_to_load(base, name, bottleneck=bottleneck)
    yield "## Data\n"
    yield from _data(run)
    yield "\n## Training\n"
    yield from _table(_figures(run))
    yield ""
    yield from _table((key, _plain(settings[key])) for key in _SETTINGS if _is_said(settings, key))
    yield "\n## Cost\n"
    yield from _table(_cost(run))
    yield "\n## Privacy\n"
    yield from _privacy(settings)
    yield "\n## Versions\n"
    versions = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
    yield f"{versions}, Python {run['python']}. Base model fingerprint `{run['fingerprint']}`.\n"


def _data(run: dict[str, Any]) -> Iterator[str]:
    """The name of each source, without its folder, and its rows."""
    for use, title in (("data", "trained on"), ("eval_data", "evaluated on")):
        source = run["settings"].get(use)
        count = run.get("rows", {}).get(use, {}).get("count")
        if source is None and count is None:
            continue
        names = ", ".join(Path(part.strip()).name for part in str(source or "").split(","))
        shown = f"`{names}`" if source else "held out of the same data"
        yield f"- {title} {shown}" + (f", {count} rows" if count is not None else "")


def _figures(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "ended", f"{run['status']}, {run.get('steps', 0)} steps"
    yield "begun", run["started"]
    for key, title in (
        *(("train_loss", "last training loss"), ("eval_loss", "last eval loss")),
        *(("best_eval_loss", "best eval loss"), ("best_eval_reward", "best eval reward")),
    ):
        if run.get(key) is not None:
            yield title, f"{run[key]:.4f}"
    figures = run.get("figures", {})
    for name, title in TITLES.items():
        for use, key in (("", name), ("held-out ", f"eval_{name}")):
            if figures.get(key) is not None:
                yield f"{use}{title}", f"{figures[key]:.4f}"


def _cost(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cost = Meter.from_saved(run.get("cost", {}))
    yield "time", f"{run.get('seconds', 0):.0f} s"
    yield "sent, received", f"{cost.sent_bytes / 1e6:.1f} MB, {cost.received_bytes / 1e6:.1f} MB"
    yield "round trips", str(cost.round_trips)
    yield "edge", f"{cost.edge_flops / 1e9:.1f} GFLOP"
    yield "cloud", f"{cost.cloud_flops / 1e9:.1f} GFLOP"


def _privacy(settings: dict[str, Any]) -> Iterator[str]:
    """What the cloud could see, by the settings that decide it."""
    wire = settings.get("wire", "plain")
    kept = "rewards" if settings.get("task") == "grpo" else "labels"
    yield (
        f"Text and {kept} were not sent. The cloud saw {SEEN[wire]} (`--wire {wire}`, "
        f"`--wire_dtype {settings['wire_dtype']}`). That is not confidentiality against a cloud "
        "that records what it receives."
    )
    used = {
        "edge_first": "first layers on the edge",
        "edge_last": "last layers on the edge",
        "noise_entry": "noise on what goes in",
        "noise_tail": "noise on the gradient of the last hidden states",
        "pad_to": "rows padded to a multiple of",
    }
    for key, title in used.items():
        if settings.get(key):
            yield f"- {title}: {settings[key]:g}"


def _is_said(settings: dict[str, Any], key: str) -> bool:
    """Whether a setting had an effect."""
    value = settings.get(key)
    idle = {
        "task": "sft",
        "max_steps": -1,
        "kind": "lora",
        "kr": "off",
        "input_grad": "exact",
        "overlong": "error",
    }
    if key == "epochs" and settings.get("max_steps", -1) != -1:
        return False
    return value not in (None, {}, [], idle.get(key))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {one}" for name, one in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Iterator[tuple[str, str]] | Any) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"
