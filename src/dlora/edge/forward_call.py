"""What one forward call of a split model knows about itself, from its hooks to its end.

Shapes: B batch, T tokens, K kept positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlora.edge.labels import HeadRequest
from dlora.edge.passes import PassInput
from dlora.protocol.layers import LayerRunner

__all__ = ["ForwardCall", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Which of a call's B x T tokens travel, and which come back. All on the CPU."""

    mask_BT: Tensor | None
    """Which are tokens and which are padding; None: all are tokens."""
    position_ids_BT: Tensor | None
    keep_BT: Tensor
    """Positions whose last hidden states were asked for."""
    wanted_BT: Tensor
    """Positions whose hidden states have to come back for that; all of `keep_BT` among them."""

    def pass_input(self, entry_BTD: Tensor, *, all_rows: bool = False) -> PassInput:
        """What goes into the cloud, given the tokens' hidden states; `all_rows`: padding, too."""
        return PassInput(entry_BTD, self.mask_BT, self.position_ids_BT, self.wanted_BT, all_rows)

    def only_kept(self, wanted_KD: Tensor) -> Tensor:
        """Of the rows that came back those that were asked for."""
        if self.wanted_BT is self.keep_BT:
            return wanted_KD
        return wanted_KD[self.keep_BT[self.wanted_BT].to(wanted_KD.device)]


@dataclass
class ForwardCall:
    """One forward call. The hooks make it, the decoder's forward uses it, and then it is over."""

    request: HeadRequest = field(default_factory=HeadRequest)
    """Which last hidden states are wanted: noted before the decoder is called."""
    layers: LayerRunner | None = None
    """What becomes of each decoder layer, while the decoder's own forward runs here."""

    @property
    def runner(self) -> LayerRunner:
        """What becomes of each decoder layer now."""
        if self.layers is None:
            raise AssertionError("layers run inside a forward of the decoder")
        return self.layers

    def rows(
        self,
        batch: int,
        length: int,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        *,
        everything: bool,
    ) -> Rows:
        """Settle which tokens travel and come back; `everything`: all attended ones come back.

        Raises UsageError for labels whose shape is not that of the tokens.
        """
        mask_BT = None if mask_BT is None else mask_BT.cpu()
        attended_BT = (
            torch.ones(batch, length, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        )
        keep_BT = self.request.kept(attended_BT)
        return Rows(
            mask_BT,
            None if position_ids is None else position_ids.expand(batch, length).cpu(),
            keep_BT,
            attended_BT | keep_BT if everything else keep_BT,
        )
