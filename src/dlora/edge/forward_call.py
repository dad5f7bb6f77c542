"""What one forward call of a split model knows about itself, from its hooks to its end.

Shapes: B batch, T tokens, K kept positions, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlora.edge.classifier import is_classifier, last_token, reads_last_token
from dlora.edge.labels import HeadRequest, head_request
from dlora.edge.passes import PassInput
from dlora.errors import UsageError
from dlora.protocol.layers import LayerRunner

__all__ = ["ForwardCall", "ForwardCalls", "Rows"]


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


class ForwardCalls:
    """Begins the forward calls of a split model, by hooks, and sees their outputs."""

    def __init__(self, model: Any) -> None:  # the `SplitModel`, whose module imports this one
        self.current = ForwardCall()
        self._model = model
        self._per_token: HeadRequest | None = None
        self._signature = inspect.signature(model.forward)
        base, width = model.get_base_model(), model.link.description.hidden_width
        self._classifies = is_classifier(base)
        self._reads_last = self._classifies and reads_last_token(base, width)

    def hook(self, *modules: nn.Module) -> None:
        """See the calls of these modules; of nested ones, which are one call, the outer counts."""
        for module in modules:  # bound methods follow a deep copy of the model, closures would not
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            module.register_forward_hook(self._end)

    def runner(self) -> LayerRunner:
        """What becomes of each decoder layer now."""
        return self.current.runner

    def _begin(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin a forward call: note where hidden states are wanted, gather the labels there."""
        labels: Tensor | None = kwargs.get("labels")
        if labels is not None and labels is self.current.request.labels:
            return args, kwargs  # the outer of the two hooks has been here
        self.current, self._per_token = ForwardCall(), None  # also where what follows raises

        if kwargs.get("fused_lm_head") and "forward" not in vars(self._model.get_base_model()):
            raise UsageError(
                "a split model cannot be a trainer's ref_model: leave it out, and the reference is "
                "the model itself with its adapter as it was, or switched off"
            )
        if self._classifies:
            self.current = ForwardCall(self._of_classifier(args, kwargs))
            return args, kwargs
        options, description = self._model.options, self._model.link.description
        request = head_request(
            args,
            kwargs,
            self._signature,
            positions="all" if description.full_head else options.head_positions,
            training=self._model.training,
        )
        self.current = ForwardCall(request)
        if request.labels is None:
            return args, kwargs
        self._per_token = request if request.per_token else None
        return args, {**kwargs, "labels": request.labels}

    def _of_classifier(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HeadRequest:
        """What a classifier's head reads; all, where nobody can say. Its labels are of rows."""
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if not self._reads_last or ids_BT is None:
            return HeadRequest()
        config = self._model.get_base_model().config.get_text_config()
        return last_token(ids_BT, config.pad_token_id)

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        """Put what the fused head says of each kept position where its token is."""
        request, self._per_token = self._per_token, None  # once, of two nested hooks
        if request is not None:
            request.put_back(output)
