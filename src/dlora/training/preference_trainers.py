"""trl's trainers of the tasks dpo, kto and grpo, as runs use them.

Their losses compare with a reference, for which trl copies the adapter. A new adapter adds nothing
yet: the model without any is the same reference, and costs one round trip in place of an exchange
at every site.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.trainer.utils import RepeatSampler

from dlora.training.split_trainer import SplitTrainer

__all__ = ["KINDS", "SplitDPOTrainer", "SplitGRPOTrainer", "SplitKTOTrainer"]

_ROLLOUTS_FILE: Final = "dlora_rollouts.safetensors"


class SplitDPOTrainer(SplitTrainer, DPOTrainer):
    """Of task dpo: a row is two sequences with one prompt."""

    task: ClassVar = "dpo"

    def __init__(self, *, is_new: bool, max_length: int, **arguments: Any) -> None:
        """`is_new`: the adapter adds nothing yet."""
        super().__init__(**arguments)
        self.begin_reference(is_new=is_new)


class SplitKTOTrainer(SplitTrainer, KTOTrainer):
    """Of task kto: a row is a sequence, and its prompt with another row's completion."""

    task: ClassVar = "kto"

    def __init__(self, *, is_new: bool, max_length: int, **arguments: Any) -> None:
        """The mismatched sequences, which no row has, are cut to `max_length` tokens."""
        super().__init__(**arguments)
        self.data_collator.max_length = max_length
        self.begin_reference(is_new=is_new)


class SplitGRPOTrainer(SplitTrainer, GRPOTrainer):
    """Of task grpo: answers are drawn, rated, and learned from in the steps that follow.

    Those steps, and the place in the data, are found again by a run that goes on.
    """

    task: ClassVar = "grpo"
    changed_in_steps: ClassVar = ("_step", "_buffered_inputs")

    def __init__(self, *, is_new: bool, max_length: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.begin_reference(is_new=is_new)

    @property
    def micro_batches(self) -> int:
        """Of an epoch: as many as have answers. Prompts that fill no whole draw are left out."""
        return len(self.get_train_dataloader())

    def save_more(self, folder: Path) -> None:
        """Answers that further steps learn from, and how many steps already have."""
        is_between = self._step % (self.args.steps_per_generation * self.num_iterations) > 0
        tensors = {
            f"{index}.{name}": value.clone()
            for index, batch in enumerate((self._buffered_inputs or []) if is_between else [])
            for name, value in batch.items()
            if value is not None
        }
        save_file(tensors, folder / _ROLLOUTS_FILE, metadata={"step": str(self._step)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        buffered: dict[int, dict[str, torch.Tensor]] = {}
        file_name, device = Path(resume_from_checkpoint) / _ROLLOUTS_FILE, self.accelerator.device
        with safe_open(file_name, framework="pt", device=str(device)) as file:
            self._step = int(file.metadata()["step"])
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                index, _, name = key.partition(".")
                buffered.setdefault(int(index), {})[name] = file.get_tensor(key)
        self._buffered_inputs = [buffered[index] for index in sorted(buffered)] or None

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """trl's, whose order in an epoch does not depend on those that this process has run."""
        return _EpochSampler(super()._get_train_sampler(dataset))


class _EpochSampler(Sampler[int]):
    """trl's sampler with an order for each epoch. The trainer calls `set_epoch` before it."""

    def __init__(self, repeated: RepeatSampler) -> None:
        self.repeated = repeated

    def __iter__(self) -> Iterator[int]:
        return iter(self.repeated)

    def __len__(self) -> int:
        return len(self.repeated)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order anew, from seed and epoch; that of the first epoch is trl's own."""
        if self.repeated.shuffle:
            self.repeated.generator.manual_seed(self.repeated.seed + epoch)


KINDS: Final = {"dpo": SplitDPOTrainer, "kto": SplitKTOTrainer, "grpo": SplitGRPOTrainer}
"""By task."""
