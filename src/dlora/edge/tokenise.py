"""Rows made tokens and labels as training makes them: by trl."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dlora.edge.model import SplitModel
from dlora.edge.templates import tokenising

__all__ = ["tokenising_trainer"]


def tokenising_trainer(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    origins: Sequence[str],
    batch_size: int,
) -> SFTTrainer:
    """A trainer whose `train_dataset` are the rows, tokenised, none too long. It trains nothing.

    Raises DataError for a row that the chat template refuses, and UsageError for others.
    """
    with tempfile.TemporaryDirectory(prefix="dlora-eval-") as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            per_device_eval_batch_size=batch_size,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        with tokenising(tokenizer, (rows, origins), refused="the data cannot be tokenised"):
            return SFTTrainer(
                model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
            )
