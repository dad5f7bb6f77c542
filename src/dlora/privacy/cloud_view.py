"""What the cloud sees of one training micro-batch: the frames of both directions, by place.

    edge                                       cloud
    begin: entry ----------------------------> rows that enter its layers
           <---------------------------------- x of a site
    deltas ----------------------------------> added to the site's modules
           <---------------------------------- exit: rows that leave its layers
    exit_grad -------------------------------> where the cloud's backward pass begins
           <---------------------------------- delta_grads of a site
    input_grad ------------------------------> added to the gradient of x

Shapes: B batch, T tokens, N rows that travel, K kept rows, D width. The rows that travel are the
attended tokens; where padding is hidden, all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode, unpack_mask

__all__ = ["CloudView", "SiteView"]


class SiteView:
    """One site of one micro-batch; tensors are float32, decoded when they are asked for."""

    def __init__(self, modules: tuple[int, ...]) -> None:
        self.modules = modules
        """Index of each active module among the site's modules."""
        self._input = pb.SiteInput()
        self._deltas = pb.SiteDeltas()
        self._delta_grads = pb.DeltaGrads()
        self._input_grad: pb.InputGrad | None = None

    @property
    def x(self) -> Tensor:
        """Input of the site, [N, in]."""
        return _matrix(self._input.x)

    @property
    def deltas(self) -> list[Tensor]:
        """Of each active module [N, out]; factored: Z [N, r]."""
        return [_matrix(delta) for delta in self._deltas.deltas]

    @property
    def factors(self) -> list[Tensor]:
        """Factored: scaled B [out, r] of each active module."""
        return [_matrix(factor) for factor in self._deltas.factors]

    @property
    def delta_grads(self) -> list[Tensor]:
        """Gradients of `deltas`."""
        return [_matrix(grad) for grad in self._delta_grads.grads]

    @property
    def input_grad(self) -> Tensor | None:
        """dx [N, in] that the edge adds; None at the lowest site."""
        return None if self._input_grad is None else _matrix(self._input_grad.grad)


class CloudView:
    """What the cloud sees of one training micro-batch.

    entry: the rows of `Begin`. A site: `SiteView`. exit: the rows of `Hidden`, and their gradient.
    Raises WireError for frames that are not those of one whole micro-batch.
    """

    def __init__(self, edge: Sequence[pb.EdgeFrame], cloud: Sequence[pb.CloudFrame]) -> None:
        begun = bool(edge) and edge[0].WhichOneof("kind") == "begin"
        done = bool(cloud) and cloud[-1].WhichOneof("kind") == "done"
        if not begun or not done:
            raise WireError("the frames are not those of a whole micro-batch, from begin to done")

        self.begin = edge[0].begin
        # A hosted adapter is in `begin`, its gradients in `done`, and nothing is asked at sites.
        asked = [] if self.begin.hosted else self.begin.sites
        self.sites = {site.site: SiteView(tuple(site.modules)) for site in asked}
        self._hidden, self._hidden_grad = pb.Tensor(), pb.Tensor()
        self._sort_edge_frames(edge[1:])
        self._sort_cloud_frames(cloud)

        batch, length = self.begin.batch, self.begin.length
        mask_BT = unpack_mask(self.begin.attention_mask, batch, length)
        self.attended_BT = (
            torch.ones(batch, length, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        )
        """The attention mask that the cloud gets."""

        travels_BT = torch.ones_like(self.attended_BT) if self.begin.dense else self.attended_BT
        self.positions = travels_BT.reshape(-1).nonzero()[:, 0]
        """Flat position b * T + t of each row that travels, [N]."""
        self.keep = torch.tensor(list(self.begin.keep), dtype=torch.int64)
        """Flat position of each kept row, [K]."""

        if len(self.entry) != len(self.positions) or len(self.exit) != len(self.keep):
            raise WireError(
                f"{len(self.entry)} rows for {len(self.positions)} tokens, {len(self.exit)} kept"
            )

    def _sort_edge_frames(self, frames: Sequence[pb.EdgeFrame]) -> None:
        for frame in frames:
            if (kind := frame.WhichOneof("kind")) == "deltas":
                self._site(frame.deltas.site)._deltas = frame.deltas
            elif kind == "input_grad":
                self._site(frame.input_grad.site)._input_grad = frame.input_grad
            elif kind == "hidden_grad":
                self._hidden_grad = frame.hidden_grad.grad

    def _sort_cloud_frames(self, frames: Sequence[pb.CloudFrame]) -> None:
        for frame in frames:
            if (kind := frame.WhichOneof("kind")) == "input":
                self._site(frame.input.site)._input = frame.input
            elif kind == "delta_grads":
                self._site(frame.delta_grads.site)._delta_grads = frame.delta_grads
            elif kind == "hidden":
                self._hidden = frame.hidden.hidden

    def _site(self, index: int) -> SiteView:
        if index not in self.sites:
            raise WireError(f"a frame for site {index}, which is not active")
        return self.sites[index]

    @property
    def entry(self) -> Tensor:
        """What enters the cloud's layers, [N, D]."""
        return _matrix(self.begin.embeddings)

    @property
    def exit(self) -> Tensor:
        """What leaves the cloud's layers, [K, D]."""
        return _matrix(self._hidden)

    @property
    def exit_grad(self) -> Tensor:
        """Gradient of the exit, [K, D]."""
        return _matrix(self._hidden_grad)


def _matrix(message: pb.Tensor) -> Tensor:
    if len(message.shape) != 2:
        raise WireError(f"got shape {list(message.shape)[:8]}, want two dimensions")
    return decode(message, list(message.shape), "a recorded tensor")
