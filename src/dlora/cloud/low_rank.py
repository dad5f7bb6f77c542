"""A fused weight of experts with an adapter beside it: W + L R, of which the product is not made.

peft adds L R to W for each pass (`ParamWrapper`): a second tensor as large as the weights of all
experts, of which every stream that trains would keep one. Here a module's own forward finds a
`LowRank` in the place of its parameter. What it computes with a weight is done with W, and with L
and R beside it, and added: x (W + L R) = x W + (x L) R.

Shapes: E experts, M and N the last axes of the weight, R rank, S rows that experts read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from dlora.errors import ModelError

__all__ = ["Count", "LowRank", "with_weights"]

Count = Callable[[int, Tensor], None]
"""Called with the number of rows at each use, and what was read."""


class LowRank:
    """W [E, M, N] + L [E, M, R] R [E, R, N], or one expert's. Factors compute in float32.

    It answers what forwards of experts ask of a weight, and raises ModelError for all else.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, count: Count) -> None:
        self.weight, self.left, self.right, self.count = weight, left, right, count
        # Of all experts once: the gradient of one slice is as large as the whole.
        self._experts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    # ----------------------------------------------------------------- as a tensor has it

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """That of the weight."""
        return self.weight.device

    def data_ptr(self) -> int:
        """That of the weight: kernels ask how it is aligned."""
        return self.weight.data_ptr()

    def transpose(self, first: int, second: int) -> LowRank:
        """The last two axes, exchanged."""
        axes = {axis % self.weight.dim() for axis in (first, second)}
        if axes != {self.weight.dim() - 2, self.weight.dim() - 1}:
            raise ModelError(f"experts: a fused weight is transposed along {sorted(axes)}")
        return LowRank(self.weight.mT, self.right.mT, self.left.mT, self.count)

    def float(self) -> LowRank:
        """In float32."""
        return LowRank(self.weight.float(), self.left, self.right, self.count)

    def __getitem__(self, index: Any) -> LowRank:
        """One expert by its number, or one for each row, by numbers [S]."""
        weight = self.weight[index]
        if isinstance(index, int) or (isinstance(index, Tensor) and not index.dim()):
            lefts, rights = self._of_experts()
            return LowRank(weight, lefts[int(index)], rights[int(index)], self.count)
        if not isinstance(index, Tensor) or index.dim() != 1:
            raise ModelError(f"experts: a fused weight is indexed by {type(index).__name__}")
        return LowRank(weight, self.left[index], self.right[index], self.count)

    def _of_experts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both factors of every expert."""
        if self._experts is None:
            self._experts = self.left.unbind(0), self.right.unbind(0)
        return self._experts

    # ----------------------------------------------------------------- what is computed with it

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Tensor:
        name = getattr(func, "__name__", "")
        if (operation := _OPERATIONS.get(name)) is None:
            raise ModelError(f"experts: a fused weight is used by {name or func}")
        return operation(*args, **(kwargs or {}))

    def after(self, x: Tensor, base: Tensor) -> Tensor:
        """`base`, which is x W, with (x L) R; x is [.., S, M]."""
        self.count(x.numel() // x.shape[-1], x)
        return _plus(base, (x.float() @ self.left) @ self.right)

    def before(self, x: Tensor, base: Tensor) -> Tensor:
        """`base`, which is W x, with L (R x); x is [.., N, S]."""
        self.count(x.numel() // x.shape[-2], x)
        return _plus(base, self.left @ (self.right @ x.float()))

    def grouped(self, x: Tensor, base: Tensor, ends_E: Tensor) -> Tensor:
        """`base`, which is x W where each expert has its rows, with theirs of (x L) R.

        x is [S, M], and the rows of expert e end before `ends_E[e]`.
        """
        self.count(len(x), x)
        ends = ends_E.tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if len(x) != ends[-1]:
            raise ModelError(f"experts: {len(x)} rows, of which {ends[-1]} have an expert")
        lefts, rights = self._of_experts()
        parts = [
            (rows @ left) @ right
            for rows, left, right in zip(x.float().split(counts), lefts, rights, strict=True)
            if len(rows)
        ]
        return _plus(base, torch.cat(parts)) if parts else base


def _plus(base: Tensor, delta: Tensor) -> Tensor:
    return (base + delta).to(base.dtype)


# ----------------------------------------------------------------- operations, by torch's names


def _linear(x: Tensor, weight: LowRank, bias: Tensor | None = None) -> Tensor:
    turned = weight.transpose(-2, -1)
    return turned.after(x, nn.functional.linear(x, weight.weight, bias))


def _matmul(one: Any, other: Any) -> Tensor:
    if isinstance(other, LowRank):
        return other.after(one, one @ other.weight)
    found: Tensor = one.before(other, one.weight @ other)
    return found


def _grouped_mm(x: Tensor, weight: LowRank, offs: Tensor, **options: Any) -> Tensor:
    base = nn.functional.grouped_mm(x, weight.weight, offs=offs, **options)
    return weight.grouped(x, base, offs)


def _grouped_in_turn(x: Tensor, weight: LowRank, offs: Tensor) -> Tensor:
    base = torch.ops.transformers.grouped_mm_fallback(x, weight.weight, offs=offs)
    return weight.grouped(x, base, offs)


_OPERATIONS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_in_turn,
}


# ----------------------------------------------------------------- in a module


def with_weights(
    module: nn.Module, weights: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The module's own forward with others of its parameters, by name.

    The module itself stays as it is: passes of other threads are in it at the same time. What runs
    is a second object, which shares all but its parameters.
    """
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other._parameters = module._parameters | dict(weights)
    return type(module).forward(other, *args, **kwargs)
