"""What a run folder holds: written by training, read by report, audit and describe. Plain values
only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dlora.errors import UsageError

__all__ = ["Run", "load_run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one folder holds."""

    name: str
    record: dict[str, Any]
    """run.json"""
    log: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    """Lines of kr.jsonl: one for every decision and unit."""

    @property
    def cost(self) -> dict[str, float]:
        """The meter; all zero while a run has just begun."""
        found: dict[str, float] = self.record.get("cost", {})
        return found

    @property
    def traffic(self) -> float:
        """Bytes in both directions."""
        return self.cost.get("sent_bytes", 0) + self.cost.get("received_bytes", 0)

    @property
    def kind(self) -> str:
        """FT, Kill and Revive, or the name of a baseline."""
        config = self.record.get("kill_revive", {}).get("config")
        if config is None or config["policy"] == "all":
            return "FT"
        return "Kill and Revive" if config["policy"] == "kr" else str(config["policy"])

    def axis(self, name: str) -> list[float]:
        """Of every line of the log: step, or what has been spent up to there (MB, seconds)."""
        if name == "step":
            return [entry["step"] for entry in self.log]
        keys = ("sent_mb", "received_mb") if name == "MB" else ("seconds",)
        return list(accumulate(sum(entry.get(key, 0.0) for key in keys) for entry in self.log))


def load_run(folder: Path) -> Run:
    """Read a run's folder. Raises UsageError if it holds none, or one that cannot be read."""
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text())
        log, decisions = (_lines(folder / name) for name in ("log.jsonl", "kr.jsonl"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no run of `dlora train`: there is no run.json") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} cannot be read: {error}") from error
    if not isinstance(record, dict) or not all(isinstance(line, dict) for line in log + decisions):
        raise UsageError(f"{folder} cannot be read: its files are not those of `dlora train`")
    return Run(
        name=folder.resolve().name,
        record=record,
        log=[e for e in log if "step" in e],
        decisions=decisions,
    )


def _lines(file: Path) -> list[Any]:
    """JSON lines; none if there is no file. The last one may be half-written: the run may still go
    on.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return found
