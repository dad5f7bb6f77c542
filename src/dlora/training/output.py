"""What a run may do to its output folder, and how its run.json begins.

A run is never overwritten, only resumed: with the same settings, against the same model. A run
that is refused leaves nothing behind, so that the corrected command can take the same folder.
"""

from __future__ import annotations

import json
import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from dlora.edge.link import Link
from dlora.errors import UsageError
from dlora.runs import KEPT_FILE, RunFolder, read_kept
from dlora.training.settings import TrainSettings

__all__ = ["began", "check_folder", "check_output", "first_values"]

log = logging.getLogger(__name__)

_PACKAGES: Final = ("dlora", "torch", "transformers", "peft", "trl", "grpcio")


def check_output(settings: TrainSettings, link: Link) -> None:
    """Raises UsageError for an output folder that this run may not use. Writes nothing."""
    earlier = _earlier(settings)
    served, fingerprint = link.description, earlier.get("fingerprint")
    if earlier and fingerprint != served.fingerprint:
        raise UsageError(
            f"--resume: the run was made with {earlier.get('model_id')} "
            f"({str(fingerprint)[:12]}), {link.address} now serves {served.model_id} "
            f"({served.fingerprint[:12]})"
        )
    _check_unfinished(earlier, settings)


def check_folder(settings: TrainSettings) -> None:
    """The same, as far as it needs no server."""
    _check_unfinished(_earlier(settings), settings)


def _earlier(settings: TrainSettings) -> dict[str, Any]:
    """The run that goes on, as far as anything tells of it; nothing for a new one.

    Raises UsageError unless it is this one's very beginning.
    """
    folder = RunFolder(settings.output)
    if not settings.resume:
        folder.check_new()
        return {}
    if folder.run_file.is_file():
        return _check_same_run(_read(folder.run_file), folder.run_file, settings)

    # run.json is gone; every checkpoint keeps one.
    checkpoint = folder.newest_complete()
    if checkpoint is None:
        raise UsageError(f"--resume: {folder.path} holds no run")
    if (checkpoint / KEPT_FILE).is_file():
        return _check_same_run(read_kept(checkpoint), checkpoint / KEPT_FILE, settings)
    log.warning("run.json is gone: nobody can tell whether the settings are the same")
    return {}


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{file} cannot be read: {error}. Remove it: checkpoints keep another"
        ) from error
    return values


def _check_same_run(earlier: dict[str, Any], file: Path, settings: TrainSettings) -> dict[str, Any]:
    """The run in the folder. Raises UsageError for other settings."""
    if changed := settings.differences(earlier.get("settings", {})):
        raise UsageError(
            "--resume continues the same run, but these settings differ from "
            f"{file}: {', '.join(changed)}"
        )
    return earlier


def _check_unfinished(earlier: dict[str, Any], settings: TrainSettings) -> None:
    if earlier.get("status") == "finished":
        raise UsageError(f"the run in {settings.output} is finished: there is nothing to resume")


def began(folder: RunFolder, checkpoint: Path | None) -> dict[str, str]:
    """When a run that goes on from a checkpoint began, as far as anybody knows."""
    kept = read_kept(checkpoint)
    if not kept and checkpoint is not None and folder.run_file.is_file():
        kept = _read(folder.run_file)
    return {"started": kept["started"]} if "started" in kept else {}


def first_values(settings: TrainSettings, link: Link) -> dict[str, Any]:
    """run.json as it is when a run begins."""
    from torch import get_num_threads as num_threads  # not where folders are only looked at

    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": link.description.model_id,
        "fingerprint": link.description.fingerprint,
        "settings": settings.as_dict(),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "threads": num_threads(),
    }
