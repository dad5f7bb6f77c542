"""An edge whose adapters are all zero: for the checks and measurements at load.

With it a pass needs no stream and no peer. Its results have to be the model's own.

Shapes: B batch, T tokens, K kept rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dlora.cloud.parts import Parts
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.passes import Pass
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import MIXES
from dlora.protocol.sites import Site
from dlora.protocol.wire import decode, encode

__all__ = ["ZeroEdge", "probe_request", "run_with_zeros", "sample_ids"]


class ZeroEdge:
    """A `Pipe` to an edge whose adapters are all zero, for one pass."""

    def __init__(self, request: PassRequest) -> None:
        self.request = request
        self.active = {site.index: (site, modules) for site, modules in request.active}
        self.hidden = pb.Tensor()
        self._answers: list[pb.EdgeFrame] = []
        self._grad_widths: dict[int, int] = {}

    def decoded_hidden(self) -> Tensor:
        """The last hidden states that the cloud has sent, [K, D]."""
        return decode(self.hidden, list(self.hidden.shape), "hidden")

    def admit(self, cost_bytes: int) -> None:
        """Nobody else is there."""

    def breathe(self) -> float:
        """Nobody else is there."""
        return 0.0

    def expect(self, frames: int) -> None:
        """Nothing comes: its adapters are its own."""

    def send(self, frame: pb.CloudFrame) -> None:
        """Note what the cloud will want as an answer."""
        kind = frame.WhichOneof("kind")
        if kind == "input":
            site, modules = self.active[frame.input.site]
            deltas = [
                _zeros(self.request.num_rows, site.modules[module].out_features)
                for module in modules
            ]
            self._answers.append(pb.EdgeFrame(deltas=pb.SiteDeltas(site=site.index, deltas=deltas)))
            self._grad_widths[site.index] = (
                frame.input.x.shape[1] if frame.input.wants_input_grad else 0
            )

        elif kind == "hidden":
            self.hidden = frame.hidden.hidden
            grad = encode(self.hidden_grad(*self.hidden.shape), pb.FP32)
            self._answers.append(pb.EdgeFrame(hidden_grad=pb.HiddenGrad(grad=grad)))

        elif kind == "delta_grads" and (width := self._grad_widths[frame.delta_grads.site]):
            zeros = _zeros(self.request.num_rows, width)
            input_grad = pb.InputGrad(site=frame.delta_grads.site, grad=zeros)
            self._answers.append(pb.EdgeFrame(input_grad=input_grad))

    def hidden_grad(self, rows: int, width: int) -> Tensor:
        """The gradient of the last hidden states, [rows, width]."""
        return torch.zeros(rows, width)

    def receive(self) -> pb.EdgeFrame:
        """The next answer."""
        return self._answers.pop(0)


def probe_request(
    parts: Parts,
    sites: Sequence[Site],
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    training: bool,
    dtype: pb.DType = pb.FP32,
) -> PassRequest:
    """A request for a pass over these tokens with every module of `sites` active, in fp32.

    `dtype` is the codec of the embeddings.
    """
    tokens, everywhere_BT = ids_BT.numel(), torch.ones_like(ids_BT)
    rows = (everywhere_BT if mask_BT is None else mask_BT).reshape(-1).nonzero()[:, 0]
    return PassRequest(
        codecs=MIXES["fp32"],
        training=training,
        batch=ids_BT.shape[0],
        length=ids_BT.shape[1],
        mask_BT=mask_BT,
        position_ids_BT=None,
        rows_N=rows if len(rows) != tokens else None,
        keep_K=rows,
        active=tuple((site, tuple(range(len(site.modules)))) for site in sites),
        embeddings=encode(parts.lookups(ids_BT).reshape(tokens, -1)[rows], dtype),
    )


def sample_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same on every machine; low ids (specials) are left out."""
    weight = model.get_input_embeddings().weight
    vocab = weight.shape[0]
    ids = torch.arange(batch * length).view(batch, length) * 7919 % max(1, vocab - 8)
    return (ids + min(7, vocab - 1)).to(weight.device)


def run_with_zeros(parts: Parts, request: PassRequest, layer_width: int = 0) -> ZeroEdge:
    """Run a pass with zero adapters; return the edge, which has its hidden states."""
    edge = ZeroEdge(request)
    Pass(parts, request, edge, layer_width=layer_width).run()
    return edge


def _zeros(*shape: int) -> pb.Tensor:
    return encode(torch.zeros(*shape), pb.FP32)
