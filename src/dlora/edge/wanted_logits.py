"""Logits at some positions of some rows: what scoring needs, so that no other hidden state returns.

Shapes: B rows, T tokens of the longest and one more, N tokens of a row, M wanted positions of it,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlora.edge.labels import IGNORE
from dlora.edge.prompt import virtual_tokens

__all__ = ["wanted_logits"]


def wanted_logits(
    model: Any, ids: Sequence[Tensor], places: Sequence[Tensor], following: Sequence[Tensor]
) -> list[Tensor]:
    """Logits at those places of each row, float32 [M, V].

    `ids` are the rows' tokens [N], `places` bool masks of them, `following` the token behind each
    place, [M]. The model's option `head_positions` has to be "supervised". The label of a position
    is what follows it. So there is a column more than tokens, without a token: it does not travel,
    and the last position can have a label.
    """
    longest = max(len(row_N) for row_N in ids)
    ids_BT = torch.zeros(len(ids), longest + 1, dtype=torch.int64)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORE)
    for index, (row_N, asked_N, labels_M) in enumerate(zip(ids, places, following, strict=True)):
        length = len(row_N)
        ids_BT[index, :length], mask_BT[index, :length] = row_N, 1
        labels_BT[index, 1 : length + 1][asked_N] = labels_M

    device = model.device
    logits = model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        labels=labels_BT.to(device),
    ).logits.float()

    # What comes back are the rows' wanted positions, one after another, or all of their positions,
    # those of virtual tokens first.
    if model.link.description.full_head:
        ahead = virtual_tokens(model)
        return [
            one[ahead : ahead + len(asked_N)][asked_N.to(device)]
            for one, asked_N in zip(logits, places, strict=True)
        ]
    return [one[: int(asked_N.sum())] for one, asked_N in zip(logits, places, strict=True)]
