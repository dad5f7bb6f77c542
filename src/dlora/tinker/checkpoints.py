"""What clients save: adapter folders under names, as tinker://RUN/KIND/NAME.

A folder is a standard adapter of peft. Beside it is `tinker.json`, with what the SDK wants to know
later, and for a state the optimizer's tensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlora.errors import UsageError
from dlora.files import sync_folder, write_json

__all__ = ["SAMPLER", "STATE", "Checkpoint", "Checkpoints", "Notes", "read_optimizer"]

STATE: Final = "weights"
SAMPLER: Final = "sampler_weights"
_KINDS: Final = {STATE: "training", SAMPLER: "sampler"}
_SCHEME: Final = "tinker://"
_RUN: Final = re.compile(r"[0-9a-zA-Z-]{1,64}:train:\d{1,9}")
_NAME: Final = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
_NOTES: Final = "tinker.json"
_OPTIMIZER: Final = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What is known of a saved adapter beside what peft writes."""

    base_model: str
    rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    run_metadata: dict[str, str] | None = None
    """What the client noted when it made the adapter."""
    user_metadata: dict[str, str] | None = None
    """What it noted when it saved."""
    time: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A saved adapter."""

    path: str
    run: str
    kind: str
    name: str
    folder: Path

    @property
    def checkpoint_id(self) -> str:
        """As the SDK has it."""
        return f"{self.kind}/{self.name}"

    @property
    def checkpoint_type(self) -> str:
        """The SDK's word for its kind."""
        return _KINDS[self.kind]

    def notes(self) -> Notes:
        """What was noted. Raises UsageError if that cannot be read."""
        try:
            return Notes(**json.loads((self.folder / _NOTES).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path}: {_NOTES} cannot be read: {error}") from error

    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())


class Checkpoints:
    """The folder that saved adapters are in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def at(self, path: str) -> Checkpoint:
        """What a tinker:// path names, there or not. Raises UsageError for what is no such path."""
        parts = path.removeprefix(_SCHEME).split("/")
        if not path.startswith(_SCHEME) or len(parts) != 3:
            raise UsageError(f"path: got {path!r}, want {_SCHEME}RUN/{STATE}/NAME")
        run, kind, name = parts
        if not _RUN.fullmatch(run) or kind not in _KINDS or not _NAME.fullmatch(name):
            raise UsageError(
                f"path: got {path!r}, want {_SCHEME}RUN/KIND/NAME with kind {' or '.join(_KINDS)}, "
                "and a name of letters, digits, dots, underscores and hyphens"
            )
        return Checkpoint(path, run, kind, name, self.root / run / kind / name)

    def found(self, path: str) -> Checkpoint:
        """The same; raises UsageError also if nothing was saved there."""
        checkpoint = self.at(path)
        if not checkpoint.folder.is_dir():
            raise UsageError(f"{path} was not saved here: {self.root} has no such folder")
        return checkpoint

    def of_run(self, run: str) -> list[Checkpoint]:
        """Everything that a run has saved, oldest first."""
        if not _RUN.fullmatch(run):
            return []
        folders = [one for kind in _KINDS for one in (self.root / run / kind).glob("*")]
        folders = [one for one in folders if _NAME.fullmatch(one.name)]
        folders.sort(key=lambda folder: folder.stat().st_mtime)
        return [self.at(f"{_SCHEME}{run}/{one.parent.name}/{one.name}") for one in folders]

    def save(
        self,
        path: str,
        write: Callable[[Path], None],
        notes: Notes,
        optimizer: Mapping[str, Tensor] | None,
        *,
        overwrite: bool,
    ) -> Checkpoint:
        """Save an adapter, all of it or nothing; `write` puts peft's files into a folder.

        Raises UsageError for a name that is taken, unless it may be overwritten.
        """
        checkpoint = self.at(path)
        target = checkpoint.folder
        if target.exists() and not overwrite:
            raise UsageError(f"{path} is there already: take another name")

        # Whole in a folder beside it, then renamed.
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
        try:
            write(scratch)
            if optimizer is not None:
                save_file(dict(optimizer), scratch / _OPTIMIZER)
            time = datetime.now(UTC).isoformat()
            write_json(scratch / _NOTES, asdict(notes) | {"time": time})
            sync_folder(scratch)

            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
                os.rename(target, old)
                shutil.rmtree(old, ignore_errors=True)
            os.rename(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return checkpoint

    def delete(self, path: str) -> None:
        """Remove a saved adapter. Raises UsageError if there is none."""
        shutil.rmtree(self.found(path).folder)


def read_optimizer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The optimizer's tensors of a state. Raises UsageError where there are none."""
    file = checkpoint.folder / _OPTIMIZER
    if not file.is_file():
        raise UsageError(f"{checkpoint.path} has no optimizer state: load it without")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{checkpoint.path}: {_OPTIMIZER} cannot be read: {error}") from error
