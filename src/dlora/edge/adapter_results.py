"""What an adapter was measured to be: evaluation.json in its folder, and a section of its README.

    {"arc_easy": {"metrics": [{"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.01}],
                  "rows": 100, "of_rows": 2376, "num_fewshot": 0, "version": 1.0,
                  "of": the SHA-256 of the weights, "harness": "lm-eval 0.4.13", ...}}

A later evaluation of the same task takes the place of the earlier. An adapter that was trained
further is another one: what was measured before is in the file, and no longer in the README.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dlora.files import write_json

__all__ = ["RESULTS_FILE", "card_with_results", "note_results", "weights_hash"]

RESULTS_FILE: Final = "evaluation.json"
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_BEGIN: Final = "<!-- dlora eval: begin -->"
_END: Final = "<!-- dlora eval: end -->"


def weights_hash(folder: Path) -> str:
    """The SHA-256 of an adapter's weights; empty where there are none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def note_results(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep results by task, and show them in the folder's README, which is made if there is none.

    What else the README says stays.
    """
    known = _read(folder) | {
        name: {**values, "of": weights_hash(folder)} for name, values in results.items()
    }
    write_json(folder / RESULTS_FILE, known)
    readme = folder / "README.md"
    text = (
        readme.read_text(encoding="utf-8") if readme.is_file() else f"# {folder.resolve().name}\n"
    )
    readme.write_text(card_with_results(text, folder), encoding="utf-8")


def card_with_results(text: str, folder: Path) -> str:
    """A README with the section on results as they are now: replaced, added, or taken out."""
    before, begun, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begun else ""
    lines = list(_section(folder))
    if not lines:
        return (before.rstrip("\n") + "\n" + after.lstrip("\n")) if begun else text
    section = "\n".join([_BEGIN, *lines, _END])
    return "\n".join([before.rstrip("\n"), "", section, after.lstrip("\n")])


def _section(folder: Path) -> Iterator[str]:
    """Its lines; none where nothing was measured of the adapter as it is."""
    now = weights_hash(folder)
    current = {name: one for name, one in _read(folder).items() if one.get("of") == now}
    if not current:
        return
    harness = ", ".join(sorted({str(one.get("harness", "")) for one in current.values()}))
    yield f"## Evaluation\n\nWith {harness}, the base model in the cloud.\n"
    yield "| task | metric | value | standard error | examples | rows |"
    yield "|---|---|---|---|---|---|"
    for name, one in sorted(current.items()):
        rows = f"{one['rows']}"
        if one["of_rows"] not in (None, one["rows"]):
            rows += f" of {one['of_rows']}"
        for metric in one["metrics"]:
            title = metric["metric"]
            if metric["filter"] != "none":
                title += f" ({metric['filter']})"
            error = "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
            yield (
                f"| {name} | {title} | {metric['value']:.4f} | {error} | {one['num_fewshot']} | "
                f"{rows} |"
            )


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """What the file holds; nothing where it is not there, or is of something else."""
    try:
        values = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: one for name, one in values.items() if isinstance(one, dict) and "metrics" in one}
