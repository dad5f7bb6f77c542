"""Which last hidden states a forward call asks for, and the labels that go with them.

A loss needs hidden states only where a label asks for them. So labels are looked at before the
decoder runs: the positions that matter are noted, the labels there are gathered, and only the
hidden states there come back from the cloud.

The next-token losses of transformers and trl pair hidden state i with label i + 1. Kept rows with a
row of zeros behind them, and kept labels with an ignored one before them, keep that pairing in
every loss function.

Shapes: B batch, T tokens, K kept positions, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dlora.errors import UsageError

__all__ = ["IGNORE", "HeadRequest", "head_request", "spread", "with_zero_row"]

IGNORE: Final = -100  # the label of a position without supervision, as in PyTorch and transformers


@dataclass(frozen=True)
class HeadRequest:
    """The positions whose last hidden states a forward call wants."""

    keep_BT: Tensor | None = None
    """Bool mask of positions; None: all."""
    compact_labels: Tensor | None = None
    """Labels to match, [1, K + 1]; then the kept positions return alone, [1, K + 1, D]."""
    also_BT: Tensor | None = None
    """Where all are wanted: bool mask of positions that a loss looks at, padding or not."""

    def kept(self, attended_BT: Tensor) -> Tensor:
        """Bool mask of positions, on the CPU. Raises UsageError for labels of another shape."""
        named_BT = self.also_BT if self.keep_BT is None else self.keep_BT
        if named_BT is None:
            return attended_BT
        if named_BT.shape != attended_BT.shape:
            raise UsageError(
                f"labels have shape {list(named_BT.shape)}, input_ids {list(attended_BT.shape)}"
            )
        return attended_BT | named_BT.cpu() if self.keep_BT is None else named_BT.cpu()


def head_request(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: inspect.Signature,
    *,
    everywhere: bool,
) -> HeadRequest:
    """What a call of a model with these arguments wants.

    `everywhere`: logits at all positions, whatever the labels. Raises UsageError for labels that
    are not passed by name, as they could not be replaced.
    """
    labels_BT: Tensor | None = kwargs.get("labels")
    if labels_BT is None and len(args) > 3:
        labels_BT = signature.bind_partial(*args).arguments.get("labels")
        if labels_BT is not None:
            raise UsageError("pass labels by name: model(input_ids=..., labels=...)")

    if labels_BT is None:
        keep_last = kwargs.get("logits_to_keep", 0)
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(keep_last, int) and keep_last > 0 and ids_BT is not None:
            return _newest_positions(ids_BT, keep_last)
        return HeadRequest()
    if kwargs.get("shift_labels") is not None:
        return HeadRequest()
    if everywhere:
        # What the loss pairs with a label: the state at its position, or the one before.
        also_BT = labels_BT != IGNORE
        also_BT[:, :-1] |= labels_BT[:, 1:] != IGNORE
        return HeadRequest(also_BT=also_BT)
    return _gather_labels(labels_BT)


def _newest_positions(ids_BT: Tensor, count: int) -> HeadRequest:
    """The last `count` positions of every row: what generation reads."""
    keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    keep_BT[:, -count:] = True
    return HeadRequest(keep_BT)


def _gather_labels(labels_BT: Tensor) -> HeadRequest:
    """The positions before a label, and those labels behind an ignored one, [1, K + 1]."""
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORE
    kept_K = labels_BT[:, 1:][keep_BT[:, :-1]]
    compact = torch.cat([kept_K.new_full((1,), IGNORE), kept_K])[None]
    return HeadRequest(keep_BT, compact)


def with_zero_row(kept_KD: Tensor) -> Tensor:
    """Kept rows as the loss of gathered labels wants them: [K, D] -> [1, K + 1, D]."""
    return torch.cat([kept_KD, kept_KD.new_zeros(1, kept_KD.shape[1])])[None]


def spread(rows_KD: Tensor, keep_BT: Tensor) -> Tensor:
    """Put kept rows back in their places: [K, D] -> [B, T, D], zero where nothing was kept."""
    full = rows_KD.new_zeros(keep_BT.numel(), rows_KD.shape[1])
    keep = keep_BT.reshape(-1).nonzero()[:, 0].to(rows_KD.device)
    return full.index_put((keep,), rows_KD).view(*keep_BT.shape, -1)
