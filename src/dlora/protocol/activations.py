"""Activations of bottleneck adapters, by name: what either half computes must be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from dlora.proto import dlora_pb2 as pb

__all__ = ["ACTIVATIONS", "activation_name", "activation_of"]

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


def activation_name(name: str | None) -> str:
    """How the wire calls an activation; None: there is none."""
    return pb.Activation.Name(pb.NO_ACTIVATION) if name is None else name.upper()


def activation_of(number: int) -> Callable[[Tensor], Tensor] | None:
    """The function of a number of the wire; None for none. Raises ValueError for an unknown one."""
    if number == pb.NO_ACTIVATION:
        return None
    return ACTIVATIONS[pb.Activation.Name(pb.Activation.ValueType(number)).lower()]
