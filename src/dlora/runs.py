"""What a run's folder holds: written by training, read by report, audit and describe.

output/adapter_config.json, adapter_model.safetensors   the adapter, as peft writes it
output/README.md                      the same run for people, with how to load the adapter
output/run.json                       the run: settings, versions, costs, how it ended
output/log.jsonl                      one line for every log entry of the trainer, loss and costs
output/recording/                     with --record: frames and truth, see privacy/recording.py
output/kr.jsonl                       with Kill and Revive: why each unit is active or not
output/checkpoints/checkpoint-N/      what --resume continues from, with dlora_run.json, the run
                                      as it was then

Plain values only: no settings, no model.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from dlora.edge.meter import Meter
from dlora.errors import UsageError
from dlora.files import write_json

__all__ = [
    "KEPT_FILE",
    "Run",
    "RunFolder",
    "checkpoint_of",
    "damage",
    "load_run",
    "read_kept",
    "step_of",
]

log = logging.getLogger(__name__)

# What the trainer saves in a checkpoint. The second set is there as a whole or not at all.
_ALWAYS: Final = frozenset(("trainer_state.json", "adapter_model.safetensors"))
_OF_RESUME: Final = frozenset(("optimizer.pt", "scheduler.pt", "rng_state.pth"))
_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")
KEPT_FILE: Final = "dlora_run.json"
"""In a checkpoint: the run as run.json has it, and the seconds until then."""


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

    def check_new(self) -> None:
        """Raises UsageError unless a new run may begin here."""
        if self.run_file.is_file():
            raise UsageError(
                f"{self.path} already holds a run: continue it with --resume, or use another folder"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty: use a new folder")

    def read(self) -> dict[str, Any]:
        """The run as run.json has it or, where that is gone, the newest checkpoint; else empty."""
        if self.run_file.is_file():
            run: dict[str, Any] = json.loads(self.run_file.read_text(encoding="utf-8"))
            return run
        return read_kept(self.newest_complete())

    def write(self, run: dict[str, Any]) -> None:
        """Write run.json, at once or not at all."""
        write_json(self.run_file, run)

    def write_ending(self, run: dict[str, Any], results: dict[str, Any]) -> None:
        """Write how the run ended. On a full disk without results, over the old file.

        Never raises: the run's own error is what counts.
        """
        try:
            self.write(run | results)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.run_file, error)
            with suppress(OSError):
                short = json.dumps(run)  # without line breaks, so no longer than what is there
                with self.run_file.open("r+", encoding="utf-8") as file:
                    file.write(short)
                    file.truncate()

    def all_checkpoints(self) -> list[Path]:
        """The folders that have a checkpoint's name, the oldest first; others are let alone."""
        folders = (path for path in self.checkpoints.glob("checkpoint-*") if path.is_dir())
        return sorted((path for path in folders if _CHECKPOINT.fullmatch(path.name)), key=step_of)

    def newest_complete(self) -> Path | None:
        """The newest checkpoint whose files can all be read; None if there is none."""
        newest_first = reversed(self.all_checkpoints())
        return next((folder for folder in newest_first if damage(folder) is None), None)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; newer ones that are half-written are deleted.

        A full disk or a power cut leaves those. None if there is no complete one.
        """
        for folder in reversed(self.all_checkpoints()):
            reason = damage(folder)
            if reason is None:
                return folder
            log.warning("%s is not complete (%s): looking for an older one", folder, reason)
            shutil.rmtree(folder, ignore_errors=True)
        return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if all can be read to their end."""
    names = {file.name for file in checkpoint.glob("*")}
    if missing := sorted(_ALWAYS - names):
        return f"{missing[0]} is missing"
    if names & _OF_RESUME and (missing := sorted(_OF_RESUME - names)):
        return f"{missing[0]} is missing"

    for file in sorted(checkpoint.rglob("*")):
        try:
            _read_through(file)
        except (OSError, ValueError, SafetensorError, BadZipFile) as error:
            return f"{file.name}: {error}"
    return None


def _read_through(file: Path) -> None:
    """Raises what the file's kind raises for one that was cut off or changed."""
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="numpy"):  # wants the header to fit the size
            pass
    elif file.suffix in (".pt", ".pth"):
        with ZipFile(file) as parts:
            if (bad := parts.testzip()) is not None:
                raise ValueError(f"{bad} in it is not as it was written")


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return checkpoints / f"checkpoint-{step}"


def read_kept(checkpoint: Path | None) -> dict[str, Any]:
    """The run as a checkpoint keeps it; nothing if there is none, or it is of an older version."""
    file = None if checkpoint is None else checkpoint / KEPT_FILE
    if file is None or not file.is_file():
        return {}
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return kept


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
    def figures(self) -> dict[str, float]:
        """What the task logs beside the loss, at the end."""
        figures = self.values.get("figures")
        return figures if isinstance(figures, dict) else {}

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
        values = json.loads(folder.run_file.read_text(encoding="utf-8"))
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
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return values
