"""What a run's folder holds: written by training, read by report, audit and describe.

output/adapter_config.json, adapter_model.safetensors   the adapter, as peft writes it
output/run.json                       the run: settings, versions, costs, how it ended
output/log.jsonl                      one line for every log entry of the trainer, loss and costs
output/recording/                     with --record: frames and truth, see privacy/recording.py
output/kr.jsonl                       with Kill and Revive: why each unit is active or not
output/checkpoints/checkpoint-N/      what --resume continues from

Plain values only: no settings, no model.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dlora.edge.meter import Meter
from dlora.errors import UsageError
from dlora.files import write_json

__all__ = ["Run", "RunFolder", "load_run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """The names in a run's folder."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The run: settings, versions, costs, how it ended."""
        return self.path / "run.json"

    @property
    def log_file(self) -> Path:
        """The trainer's log entries, one a line."""
        return self.path / "log.jsonl"

    @property
    def decisions_file(self) -> Path:
        """Decisions of Kill and Revive: a line for every decision and unit."""
        return self.path / "kr.jsonl"

    @property
    def recording(self) -> Path:
        """Folder of what --record writes."""
        return self.path / "recording"

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    def write(self, run: dict[str, Any]) -> None:
        """Write run.json, at once or not at all."""
        write_json(self.run_file, run)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; newer ones that are half-written are deleted.

        A full disk or a power cut leaves those. None if there is no complete one.
        """
        newest_first = sorted(self.checkpoints.glob("checkpoint-*"), key=step_of, reverse=True)
        for folder in newest_first:
            try:
                json.loads((folder / "trainer_state.json").read_text())  # written last
            except (OSError, json.JSONDecodeError):
                log.warning("%s is not complete: looking for an older one", folder)
                shutil.rmtree(folder, ignore_errors=True)
            else:
                return folder
        return None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one folder holds."""

    name: str
    values: dict[str, Any]
    """run.json"""
    cost: Meter
    """All zero while a run has just begun."""
    log: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    """Lines of kr.jsonl: one for every decision and unit."""

    @property
    def traffic(self) -> int:
        """Bytes in both directions."""
        return self.cost.sent_bytes + self.cost.received_bytes

    @property
    def kind(self) -> str:
        """FT, Kill and Revive, or the name of a baseline."""
        config = self.values.get("kill_revive", {}).get("config")
        if config is None or config["policy"] == "all":
            return "FT"
        return "Kill and Revive" if config["policy"] == "kr" else str(config["policy"])

    def axis(self, name: str) -> list[float]:
        """Of every line of the log: step, or what has been spent up to there (MB, seconds)."""
        if name == "step":
            return [entry["step"] for entry in self.log]
        keys = ("sent_mb", "received_mb") if name == "MB" else ("seconds",)
        return list(accumulate(sum(entry.get(key, 0.0) for key in keys) for entry in self.log))


def load_run(path: Path) -> Run:
    """Read a run's folder. Raises UsageError if it holds none, or one that cannot be read."""
    folder = RunFolder(path)
    try:
        values = json.loads(folder.run_file.read_text())
        entries, decisions = _lines(folder.log_file), _lines(folder.decisions_file)
    except FileNotFoundError as error:
        raise UsageError(f"{path} holds no run of `dlora train`: there is no run.json") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error

    foreign = UsageError(f"{path} cannot be read: its files are not those of `dlora train`")
    if not isinstance(values, dict) or not all(isinstance(e, dict) for e in entries + decisions):
        raise foreign
    try:
        cost = Meter.from_saved(values.get("cost", {}))
    except (AttributeError, TypeError):
        raise foreign from None

    return Run(
        name=path.resolve().name,
        values=values,
        cost=cost,
        log=[entry for entry in entries if "step" in entry],
        decisions=decisions,
    )


def _lines(file: Path) -> list[Any]:
    """The values of a file of JSON lines; none if there is no file.

    The last line may be half-written, as the run may still go on: it is left out.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return values
