"""Which last hidden states a forward call asks for, and the labels that go with them.

A loss needs hidden states only where a label asks for them. So labels are looked at before the
decoder runs: the positions that matter are noted, the labels there are gathered, and only the
hidden states there come back from the cloud.

The next-token losses of transformers and trl pair hidden state i with label i + 1. Kept hidden
states with zeros behind them, and kept labels with an ignored one before them, keep that pairing in
every loss function. Rows stay rows, so that a loss which sums, averages or compares by row is right
too. Only trl's fused head, which gives one value a token, reads all kept positions as one row: no
head is wasted on padding, and its values are put back to their tokens afterwards.

Shapes: B batch, T tokens, K kept positions, L the most of them in a row, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dlora.errors import UsageError

__all__ = ["IGNORE", "HeadRequest", "head_request", "spread"]

IGNORE: Final = -100  # the label of a position without supervision, as in PyTorch and transformers


@dataclass(frozen=True)
class HeadRequest:
    """The positions whose last hidden states a forward call wants."""

    keep_BT: Tensor | None = None
    """Bool mask of positions; None: all."""
    labels: Tensor | None = None
    """Labels to match, [B, L + 1], or [1, K + 1] where `per_token`; then the kept positions return
    alone, in as many places."""
    per_token: bool = False
    """Whether the head's output has one value a token, to be put back to where the token was."""
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

    def arrange(self, kept_KD: Tensor, keep_BT: Tensor) -> Tensor:
        """Kept hidden states as the head and the loss want them, zero in every other place.

        Returns [B, T, D], or the shape of `labels` and D.
        """
        if self.labels is None:
            return spread(kept_KD, keep_BT)
        places = torch.arange(self.labels.shape[1])
        return spread(kept_KD, places < _counts(keep_BT, self.per_token))

    def put_back(self, output: Any) -> None:
        """In the fused head's output, put values of kept positions, [1, K], where their tokens are.

        They are then [B, T - 1], as that head has it, and zero elsewhere.
        """
        if self.keep_BT is None or self.labels is None:
            raise AssertionError("values are put back where positions were kept")
        keep_BT, shape = self.keep_BT[:, :-1], (1, self.labels.shape[1] - 1)
        for name, values in output.items():
            if isinstance(values, Tensor) and values.shape == shape:
                zeros_BT = values.new_zeros(keep_BT.shape)
                output[name] = zeros_BT.masked_scatter(keep_BT.to(values.device), values)


def head_request(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: inspect.Signature,
    *,
    positions: str,
    training: bool,
) -> HeadRequest:
    """What a call of a model with these arguments wants.

    `positions`: the option `head_positions`. Raises UsageError for labels that are not passed by
    name, as they could not be replaced.
    """
    labels_BT: Tensor | None = kwargs.get("labels")
    if labels_BT is None and len(args) > 3:
        labels_BT = signature.bind_partial(*args).arguments.get("labels")
        if labels_BT is not None:
            raise UsageError("pass labels by name: model(input_ids=..., labels=...)")

    if labels_BT is None:
        keep_last = kwargs.get("logits_to_keep", 0)
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if isinstance(keep_last, int) and keep_last > 0 and given is not None:
            return _newest_positions(given, keep_last)
        return HeadRequest()
    if kwargs.get("shift_labels") is not None:
        return HeadRequest()

    # The fused head gives no logits, so that nobody could want those of other positions.
    per_token = bool(kwargs.get("fused_lm_head"))
    evaluates = positions == "auto" and not training and not per_token
    if positions == "all" or evaluates:
        # What the loss pairs with a label: the state at its position, or the one before.
        also_BT = labels_BT != IGNORE
        also_BT[:, :-1] |= labels_BT[:, 1:] != IGNORE
        return HeadRequest(also_BT=also_BT)
    return _gather_labels(labels_BT, per_token=per_token)


def _newest_positions(given: Tensor, count: int) -> HeadRequest:
    """The last `count` positions of every row, of ids or embeddings: what generation reads."""
    keep_BT = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    keep_BT[:, -count:] = True
    return HeadRequest(keep_BT)


def _gather_labels(labels_BT: Tensor, *, per_token: bool) -> HeadRequest:
    """The positions before a label, and those labels behind an ignored one."""
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORE
    kept_K = labels_BT[:, 1:][keep_BT[:, :-1]]

    counts = _counts(keep_BT, per_token)
    places = torch.arange(1 + int(counts.max()), device=labels_BT.device)
    filled = (places > 0) & (places <= counts)
    gathered = labels_BT.new_full(filled.shape, IGNORE).masked_scatter(filled, kept_K)
    return HeadRequest(keep_BT, gathered, per_token)


def _counts(keep_BT: Tensor, per_token: bool) -> Tensor:
    """How many positions are kept in each row that a loss sees, [B, 1]; [1, 1] if in one row."""
    return keep_BT.sum()[None, None] if per_token else keep_BT.sum(1, keepdim=True)


def spread(rows_KD: Tensor, keep_BT: Tensor) -> Tensor:
    """Put kept rows back in their places: [K, D] -> [B, T, D], zero where nothing was kept."""
    full = rows_KD.new_zeros(keep_BT.numel(), rows_KD.shape[1])
    keep = keep_BT.reshape(-1).nonzero()[:, 0].to(rows_KD.device)
    return full.index_put((keep,), rows_KD).view(*keep_BT.shape, -1)
