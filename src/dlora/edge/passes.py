"""What goes into the cloud in one pass: the new tokens' hidden states, and where they stand.

Shapes: B batch, T new tokens, N rows that travel, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import encode, pack_mask

__all__ = ["PassInput", "fill_padding", "is_right_padded", "joined"]


@dataclass(frozen=True, eq=False)
class PassInput:
    """The new tokens of one pass, B x T of them, of which N rows travel.

    They are token embeddings or, where the first layers run on the edge, hidden states.
    """

    entry_BTD: Tensor
    mask_BT: Tensor | None
    """Which are tokens and which are padding; None: all are tokens."""
    position_ids_BT: Tensor | None
    keep_BT: Tensor
    """Bool mask of the positions whose last hidden states come back."""
    all_rows: bool = False
    """Padding travels too: in a part of something that is dense."""

    @property
    def batch(self) -> int:
        """B."""
        return self.keep_BT.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.keep_BT.shape[1]

    @cached_property
    def attended_BT(self) -> Tensor:
        """True for tokens, false for padding."""
        return torch.ones_like(self.keep_BT) if self.mask_BT is None else self.mask_BT.bool()

    @cached_property
    def dense(self) -> bool:
        """Whether all rows travel: a kept position that is padding needs the model's view of it."""
        return self.all_rows or bool((self.keep_BT & ~self.attended_BT).any())

    @cached_property
    def entry_ND(self) -> Tensor:
        """The rows that travel. Made on first use: what is only kept needs none."""
        rows_BT = torch.ones_like(self.attended_BT) if self.dense else self.attended_BT
        return self.entry_BTD[rows_BT.to(self.entry_BTD.device)]

    def fields(self, dtype: pb.DType | None) -> dict[str, Any]:
        """The fields that `Begin` and `Extend` share; without a dtype no embeddings."""
        positions = self.position_ids_BT
        embeddings = {} if dtype is None else {"embeddings": encode(self.entry_ND, dtype)}
        return {
            "length": self.length,
            "attention_mask": pack_mask(self.mask_BT),
            "position_ids": [] if positions is None else positions.reshape(-1).tolist(),
            "dense": self.dense,
            "keep": self.keep_BT.reshape(-1).nonzero()[:, 0].tolist(),
            **embeddings,
        }

    def columns(self, columns: slice) -> PassInput:
        """Some tokens of every row."""
        return self._cut(slice(None), columns)

    def rows(self, rows: Tensor) -> PassInput:
        """The rows with these numbers, in this order."""
        return self._cut(rows, slice(None))

    def _cut(self, rows: Any, columns: slice) -> PassInput:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows][:, columns]

        return PassInput(
            cut(self.entry_BTD),
            None if self.mask_BT is None else cut(self.mask_BT),
            None if self.position_ids_BT is None else cut(self.position_ids_BT),
            cut(self.keep_BT),
            self.all_rows,
        )

    def sent(self) -> PassInput:
        """The same as it is kept to be sent again: nothing of it has to come back."""
        return PassInput(
            self.entry_BTD.detach(),
            self.mask_BT,
            self.position_ids_BT,
            torch.zeros_like(self.keep_BT),
            self.all_rows,
        )


def joined(passes: Sequence[PassInput]) -> PassInput:
    """Passes that followed each other, as one."""
    masked = any(part.mask_BT is not None for part in passes)
    positions = [part.position_ids_BT for part in passes if part.position_ids_BT is not None]
    return PassInput(
        torch.cat([part.entry_BTD for part in passes], dim=1),
        torch.cat([part.attended_BT for part in passes], dim=1) if masked else None,
        torch.cat(positions, dim=1) if len(positions) == len(passes) else None,
        torch.cat([part.keep_BT for part in passes], dim=1),
        any(part.all_rows for part in passes),
    )


def is_right_padded(mask_BT: Tensor) -> bool:
    """Whether no attended token follows a padded one."""
    return not bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any())


def fill_padding(embeddings_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Put random attended tokens of the batch in place of padding, [B, T, D].

    On the right no real token looks at them, so nothing else changes.
    """
    attended_BT = mask_BT.bool().to(embeddings_BTD.device)
    real_ND = embeddings_BTD[attended_BT]
    filled_BTD = embeddings_BTD.clone()
    count = int((~attended_BT).sum())
    filled_BTD[~attended_BT] = real_ND[torch.randint(len(real_ND), (count,)).to(real_ND.device)]
    return filled_BTD
