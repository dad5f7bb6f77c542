"""Noise on what leaves the edge, so that less can be read from it. Loads no torch.

Embeddings (or hidden states, where layers run here) and the gradient of the last hidden states are
all that the edge says about its text and labels. Everything else that travels follows from these
and the adapter.

Shapes: K kept rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlora.errors import UsageError

if TYPE_CHECKING:  # settings check noise too, and load no torch
    from torch import Tensor

__all__ = ["Noise"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Clipped Gaussian noise on rows that leave the edge.

    A row longer than `clip` times the median length of its micro-batch is shortened to that. Then
    normal noise is added. The noise follows the data's own scale and composes over steps: this is
    no differential privacy, and what it hides has to be measured.
    """

    entry: float = 0.0
    """On what goes into the cloud's first layer: expected length as a share of the row's own."""
    tail: float = 0.0
    """On the gradient of what comes out of its last: expected length as a share of the median, so
    that rows without a label look like others.
    """
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
        return rows + _normal(rows) * lengths * (self.entry / rows.shape[-1] ** 0.5)

    def on_tail(self, grad_KD: Tensor) -> Tensor:
        """Noisy gradient [K, D] of the kept hidden states."""
        if not self.tail or not grad_KD.numel():
            return grad_KD
        grad_KD = self._clipped(grad_KD)
        length = _median_length(grad_KD)
        return grad_KD + _normal(grad_KD) * length * (self.tail / grad_KD.shape[-1] ** 0.5)

    def _clipped(self, rows: Tensor) -> Tensor:
        lengths = rows.detach().norm(dim=-1, keepdim=True)
        return rows * (self.clip * _median_length(rows) / lengths.clamp(min=1e-30)).clamp(max=1.0)


def _normal(like: Tensor) -> Tensor:
    """Standard normal values in the shape of another tensor."""
    return like.detach().clone().normal_()


def _median_length(rows: Tensor) -> Tensor:
    """The median length of the rows that are not zero; 0 where all are."""
    lengths = rows.detach().norm(dim=-1).flatten()
    lengths = lengths[lengths > 0]
    return lengths.median() if len(lengths) else lengths.new_zeros(())
