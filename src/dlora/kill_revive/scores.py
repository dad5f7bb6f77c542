"""Kill and Revive: how much a unit changed. Pure functions over numbers and tensors, no model.

A unit's score is what its policy measures, or the `signal` of `KillReviveConfig`: all over the
interval since the last decision. Of each module two factors are compared, then and now.

Shapes: I inputs and O outputs of the module's linear, R rank (of all active adapters together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "Factors",
    "Measured",
    "change_norm",
    "gradient_size",
    "probe_score",
    "product_norm",
    "score",
]

Factors = tuple[Tensor, Tensor]
"""A [R, I] and scaled B [O, R] of one module, float32; what the module adds is x A^T B^T."""

_LEAST_NORM: Final = 1e-12  # of a frozen weight: a division by zero would hide every other score


@dataclass(frozen=True)
class Measured:
    """What was measured of one unit over an interval; sequences have an entry for each module."""

    gradients: float
    """Sum of `gradient_size` over parameters and optimizer steps."""
    outputs: float
    """Sum of the squares of all deltas."""
    old: Sequence[Factors]
    new: Sequence[Factors]
    weight_norms: Sequence[float]
    """Frobenius norms of the frozen weights."""


def score(kind: str, unit: Measured) -> float:
    """The unit's score by a signal or by a policy's measure; 0 or more.

    Raises ValueError for a kind that is none.
    """
    match kind:
        case "sensitivity":
            return unit.gradients
        case "gradient":
            return unit.gradients**0.5
        case "output":
            return unit.outputs
        case "magnitude":
            return _root_of_squares([product_norm(*factors) for factors in unit.new])
        case "relative":
            return _root_of_squares(
                [
                    change_norm(old, new) / max(norm, _LEAST_NORM)
                    for old, new, norm in zip(unit.old, unit.new, unit.weight_norms, strict=True)
                ]
            )
        case "norm_delta":
            return _norm([b - a for a, b in zip(_flat(unit.old), _flat(unit.new), strict=True)])
        # Policies that choose without a score have this one in their log.
        case "delta_norm" | "random" | "redraw" | "rotate" | "last" | "spread":
            return abs(_norm(_flat(unit.new)) - _norm(_flat(unit.old)))
    raise ValueError(f"score: got kind {kind!r}, want a signal or a policy")


def gradient_size(parameter: Tensor, grad: Tensor, *, sensitivity: bool) -> float:
    """Sum of squared gradients, or of |weight x gradient| (AdaLoRA's sensitivity)."""
    size = (grad * parameter).abs().sum() if sensitivity else grad.square().sum()
    return float(size)


def probe_score(norms: Sequence[float]) -> float:
    """Norm of an idle unit's gradient, from those of its modules in each micro-batch of a step."""
    return _root_of_squares(norms)


def product_norm(a_RI: Tensor, b_OR: Tensor) -> float:
    """Frobenius norm of B A, from Gram matrices [R, R]: the product [O, I] is never made."""
    return max(0.0, float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())) ** 0.5


def change_norm(old: Factors, new: Factors) -> float:
    """Frobenius norm of B A - B' A', in float64: the difference of two nearly equal products."""
    (old_a_RI, old_b_OR), (a_RI, b_OR) = old, new
    return product_norm(
        torch.cat([a_RI, old_a_RI]).double(), torch.cat([b_OR, -old_b_OR], dim=1).double()
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    """l2 norm of all elements together."""
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def _root_of_squares(values: Sequence[float]) -> float:
    return sum(value**2 for value in values) ** 0.5


def _flat(modules: Sequence[Factors]) -> list[Tensor]:
    return [factor for factors in modules for factor in factors]
