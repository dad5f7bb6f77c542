"""How long tokenised rows are, and what of them a micro-batch holds on average."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from datasets import Dataset

from dlora.edge.labels import IGNORE
from dlora.training.readable import counted

__all__ = ["RowSizes"]


@dataclass(frozen=True)
class RowSizes:
    """Of each sequence of tokens, its length and how many of them are learned."""

    lengths: Sequence[int]
    learned: Sequence[int]
    sequences: int = 1
    """Of a row."""
    noun: str = "row"
    learned_is: str = ""
    """What is said before the learned tokens."""
    beside: int = 0
    """Tokens of the longest sequence that is in no row: a prompt with another row's completion."""

    @classmethod
    def of(cls, rows: Dataset) -> RowSizes:
        """Those of a trainer's rows. The first token of a row is predicted from nothing."""
        lengths = [len(ids) for ids in rows["input_ids"]]
        if "labels" not in rows.column_names:
            return cls(lengths, [length - 1 for length in lengths])
        learned = [sum(label != IGNORE for label in labels[1:]) for labels in rows["labels"]]
        return cls(lengths, learned)

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.lengths) // self.sequences

    def __str__(self) -> str:
        least, most = min(self.lengths), max(self.lengths)
        tokens = f"{least} to {most} tokens" if least < most else f"{most} tokens"
        middle, learned = median(self.lengths), sum(self.learned) / len(self.learned)
        return (
            f"{counted(self.count, self.noun)} of {tokens}, median {middle:.0f}, "
            f"{self.learned_is}{learned:.0f} learned"
        )

    def micro_batches(self, batch_size: int) -> int:
        """Of all rows once; the last may be smaller."""
        return math.ceil(self.count / batch_size)

    def padded(self, batch_size: int, pad_to: int = 0) -> int:
        """Tokens of a row with padding, on average over batches of shuffled rows."""
        multiple = pad_to or 1
        padded = [math.ceil(max(one) / multiple) * multiple for one in self._shuffled(batch_size)]
        return max(2, round(sum(padded) / len(padded)))

    def travelling(self, batch_size: int) -> tuple[float, float]:
        """Tokens of a micro-batch without padding, and those of them that are learned."""
        number = self.micro_batches(batch_size)
        return sum(self.lengths) / number, sum(self.learned) / number

    def _shuffled(self, batch_size: int) -> Iterator[Sequence[int]]:
        order, size = random.Random(0).sample(self.lengths, len(self.lengths)), self.sequences
        for start in range(0, len(order), size * batch_size):
            yield order[start : start + size * batch_size]
