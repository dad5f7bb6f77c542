"""What can be changed in what leaves the edge, so that less can be read from it.

Embeddings (or hidden states, where the edge holds layers) and the gradient of the last hidden
states are all that the edge says about its text and labels: everything else that travels follows
from these and the adapter.

Shapes: B batch, T tokens, N rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.errors import UsageError

__all__ = ["Noise", "fill_padding", "is_right_padded"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Clipped Gaussian noise on rows that leave the edge.

    A row longer than `clip` times the median length of its micro-batch is shortened to that. Then
    normal noise is added, whose expected length is `entry` times the row's own length (what goes
    into the cloud's first layer), or `tail` times the median length (the gradient of what comes out
    of its last, so that rows without label look like others). The noise follows the data's own
    scale and composes over steps: this is no differential privacy, and what it hides has to be
    measured.
    """

    entry: float = 0.0
    tail: float = 0.0
    clip: float = 3.0

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("entry", "tail"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"noise {name}: got {getattr(self, name)}, want 0 or more")
        if not self.clip >= 1:
            raise UsageError(f"noise clip: got {self.clip}, want 1 or more")

    def on_entry(self, rows: Tensor) -> Tensor:
        """Noisy [..., D]; gradients pass as if the noise were a constant."""
        if not self.entry:
            return rows
        rows = self._clipped(rows)
        lengths = rows.detach().norm(dim=-1, keepdim=True)
        return rows + torch.randn_like(rows) * lengths * (self.entry / rows.shape[-1] ** 0.5)

    def on_tail(self, grad_KD: Tensor) -> Tensor:
        """Noisy gradient [K, D] of the kept hidden states."""
        if not self.tail or not grad_KD.numel():
            return grad_KD
        grad_KD = self._clipped(grad_KD)
        return grad_KD + torch.randn_like(grad_KD) * _median_length(grad_KD) * (
            self.tail / grad_KD.shape[-1] ** 0.5
        )

    def _clipped(self, rows: Tensor) -> Tensor:
        lengths = rows.detach().norm(dim=-1, keepdim=True)
        return rows * (self.clip * _median_length(rows) / lengths.clamp(min=1e-30)).clamp(max=1.0)


def _median_length(rows: Tensor) -> Tensor:
    """Of the rows that are not zero; 0 where there is none."""
    lengths = rows.detach().norm(dim=-1).flatten()
    lengths = lengths[lengths > 0]
    return lengths.median() if len(lengths) else lengths.new_zeros(())


def is_right_padded(mask_BT: Tensor) -> bool:
    """Whether no attended token follows a padded one."""
    return not bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any())


def fill_padding(embeddings_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Put random attended tokens of the batch in place of the padding: on the right no real token
    looks at them.
    """
    attended_BT = mask_BT.bool().to(embeddings_BTD.device)
    real_ND = embeddings_BTD[attended_BT]
    filled = embeddings_BTD.clone()
    count = int((~attended_BT).sum())
    filled[~attended_BT] = real_ND[torch.randint(len(real_ND), (count,)).to(real_ND.device)]
    return filled
