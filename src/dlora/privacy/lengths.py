"""Lengths and numbers of labels of rows: nothing has to be computed, shapes and zeros reveal them.

The attention mask and the kept positions stand in `Begin`. Where padding hides both, the gradient
at the exit still reveals them: it is zero wherever nothing is to be learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dlora.privacy.cloud_view import CloudView
from dlora.privacy.findings import Finding, finding
from dlora.privacy.recording import Truth

__all__ = ["LengthCounts", "attack_lengths", "count_lengths"]


@dataclass(frozen=True, kw_only=True)
class LengthCounts:
    """Of how many rows of a micro-batch the cloud knows (the length, the number of labels)."""

    rows: int
    masks: tuple[int, int]
    """From what `Begin` says."""
    zeros: tuple[int, int]
    """From where the gradient at the exit is zero."""


def count_lengths(view: CloudView, truth: Truth) -> LengthCounts:
    """Compare what shapes and zeros say with the truth, row for row."""
    batch, length = view.attended_BT.shape
    lengths_B, labels_B = truth.attention_mask.sum(1), truth.supervised.sum(1)
    kept_B = torch.bincount(view.keep // length, minlength=batch)

    graded = torch.zeros(batch * length, dtype=torch.bool)
    graded[view.keep] = view.exit_grad.any(1)
    graded_BT = graded.view(batch, length)
    # The last gradient of a row is where its last token is to be predicted.
    behind_last_B = length - graded_BT.flip(1).int().argmax(1) + 1
    ends_B = torch.where(graded_BT.any(1), behind_last_B, 0)

    return LengthCounts(
        rows=batch,
        masks=(
            int((view.attended_BT.sum(1) == lengths_B).sum()),
            int((kept_B == labels_B).sum()),
        ),
        zeros=(int((ends_B == lengths_B).sum()), int((graded_BT.sum(1) == labels_B).sum())),
    )


def attack_lengths(counts: list[LengthCounts]) -> Iterator[Finding]:
    """Shares of all rows, from what Begin says and from where gradients at the exit are zero."""
    rows = sum(count.rows for count in counts)
    by_zeros = "by where gradients end and which are zero"
    for attack, place, where, way in (
        ("masks", "begin", "masks", "read off"),
        ("zeros", "exit", "exit", by_zeros),
    ):
        known = zip(*(getattr(count, attack) for count in counts), strict=True)
        lengths, supervised = (sum(numbers) / rows for numbers in known)
        says = (
            f"the length of {lengths:.0%} of the rows, "
            f"and of {supervised:.0%} how many labels they have, {way}"
        )
        yield finding(attack, place, where, says, lengths=lengths, supervised=supervised)
