"""Kill and Revive: its state in a checkpoint, as JSON beside the tensors of its snapshot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from torch import Tensor

from dlora.errors import UsageError
from dlora.kill_revive.config import KillReviveConfig

__all__ = ["check_same", "read_state", "write_state"]

_STATE_FILE: Final = "dlora_kr.json"
_TENSOR_FILE: Final = "dlora_kr.safetensors"


def check_same(config: dict[str, Any], total_steps: int, state: dict[str, Any]) -> None:
    """Raises UsageError for a state of another configuration, or of a run of another length.

    Options that are newer than the state had their defaults.
    """
    was = asdict(KillReviveConfig()) | state["config"]
    changed = [name for name, value in config.items() if was[name] != value]
    if changed or state["total_steps"] != total_steps:
        raise UsageError(
            "Kill and Revive cannot go on with other settings: "
            f"{', '.join(changed) or 'total steps'}"
        )


def write_state(folder: Path, state: dict[str, Any], snapshot: dict[str, Tensor]) -> None:
    """Write both into a checkpoint."""
    save_file(snapshot, folder / _TENSOR_FILE)
    (folder / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read them from a checkpoint. Raises UsageError if they are not there."""
    try:
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        return state, load_file(folder / _TENSOR_FILE)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no state of Kill and Revive: {error}") from error
