"""Kill and Revive in transformers' `Trainer` and trl's `SFTTrainer`: one callback."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.edge.labels import IGNORE
from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.kill_revive.apply import KillAndRevive, Noted
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import USUAL, Rows
from dlora.kill_revive.units import check_measurable

__all__ = ["KillReviveCallback"]

_LOOKED_AT: Final = 128
"""Rows by which the average is taken."""


class KillReviveCallback(TrainerCallback):
    """Kill and Revive in transformers' `Trainer` and trl's `SFTTrainer`: add it, and nothing else.

    State goes with the checkpoints. With `log` one JSON line for every decision and unit is
    appended there.
    """

    def __init__(self, config: KillReviveConfig, log: Path | None = None) -> None:
        self.config, self.log = config, log
        self.reviver: KillAndRevive | None = None
        self._written = 0
        self._noted: Noted | None = None
        self._saved: Noted | None = None
        self._saved_in: Path | None = None

    def note(self) -> None:
        """Note the state, which is that between two steps, for `go_back`."""
        self._noted, self._saved = None if self.reviver is None else self.reviver.state(), None

    def go_back(self) -> None:
        """Let checkpoints hold the state that was noted: the step since then is not finished."""
        self._saved = self._noted

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Bind to the model; take up the state of the checkpoint that the run continues from."""
        if not isinstance(model, SplitModel):
            raise UsageError(f"Kill and Revive wants a split model, got {type(model).__name__}")
        check_measurable(model)
        rows = _average(train_dataloader, args)
        self.reviver = KillAndRevive(model, self.config, state.max_steps, rows)
        if state.global_step:
            self.reviver.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._write(new=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Decide, if it is time."""
        if self.reviver is not None:
            self.reviver.before_step(state.global_step)
            self._write()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Note gradients."""
        if self.reviver is not None:
            self.reviver.before_update(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fade and warm."""
        if self.reviver is not None:
            self.reviver.after_update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Keep the state with the checkpoint, unless the trainer has done so."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder != self._saved_in:
            self.save(folder)
        self._saved_in = None

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint, before older ones go."""
        self._saved_in = folder
        if self.reviver is not None:
            self.reviver.save(folder, self._saved)

    def _write(self, *, new: bool = False) -> None:
        """Append the log's new lines; a `new` file gets all, those of a checkpoint included."""
        if self.log is None or self.reviver is None:
            return
        lines = self.reviver.decision_log if new else self.reviver.decision_log[self._written :]
        with self.log.open("w" if new else "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(asdict(line)) + "\n")
        self._written = len(self.reviver.decision_log)


def _average(dataloader: Any, args: TrainingArguments) -> Rows:
    """What a micro-batch of this data holds, by a few of evenly spread rows.

    The loader itself is not asked, which would move its random order on. Rows that come as a stream
    are not looked at.
    """
    data, accumulated = getattr(dataloader, "dataset", None), args.gradient_accumulation_steps
    if not (isinstance(data, Sized) and hasattr(data, "__getitem__") and len(data)):
        return replace(USUAL, accumulated=accumulated)

    count = min(len(data), _LOOKED_AT)
    numbers = [int((i + 0.5) * len(data) / count) for i in range(count)]
    batch = dataloader.collate_fn([data[number] for number in numbers])
    names = set(batch) if isinstance(batch, Mapping) else set()
    if "attention_mask" not in names or not {"labels", "completion_mask"} & names:
        return replace(USUAL, accumulated=accumulated)
    tokens = int(batch["attention_mask"].sum())
    learned_BT = batch["labels"] != IGNORE if "labels" in names else batch["completion_mask"] > 0
    supervised = int(learned_BT[:, 1:].sum())
    return Rows(
        max(1.0, args.train_batch_size * tokens / count), supervised / max(1, tokens), accumulated
    )
