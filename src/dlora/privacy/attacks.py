"""What an honest-but-curious cloud can compute from the wire: pure functions on tensors.

The cloud knows its model, so embedding table and head are public. What it is after is on the edge:
tokens, labels, the adapter. `audit.py` runs these functions on a recording and counts how much they
get right.

Shapes: N rows (tokens), K kept rows, D width of a row, E width of an embedding, V vocabulary,
O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "Inverter",
    "LinearMap",
    "Solution",
    "before_norm",
    "fit_inverter",
    "fit_ridge",
    "label_map",
    "labels_from_exit",
    "nearest_rows",
    "nearest_tokens",
    "relative_error",
    "solve_adapters",
    "unit_rows",
]

_CHUNK: Final = 512  # rows that are compared with a whole vocabulary at a time
_STRENGTHS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_MOST_TYPES: Final = 4096  # of a classifier: it needs a number for each row and type
_NORM_ERROR: Final = 0.05  # relative error up to which a function counts as a norm
_BLIND: Final = 1e-3  # share of a norm's largest scale below which the wire's rounding rules


# ----------------------------------------------------------------- tokens


def nearest_rows(rows_ND: Tensor, table_VD: Tensor) -> Tensor:
    """Index of the table row at the least Euclidean distance of each row, [N]."""
    squares_V = table_VD.square().sum(1)
    return torch.cat(
        [
            torch.addmm(squares_V, part, table_VD.T, alpha=-2).argmin(1)
            for part in rows_ND.split(_CHUNK)
        ]
        or [torch.zeros(0, dtype=torch.int64)]
    )


def nearest_tokens(entry_NE: Tensor, table_VE: Tensor) -> Tensor:
    """Look up every row that enters in the public embedding table: token ids [N].

    Exact where raw embeddings travel: rounding is far smaller than the distance between two tokens.
    """
    return nearest_rows(entry_NE, table_VE)


@dataclass(frozen=True)
class LinearMap:
    """y = (x - mean) / scale W + bias, made by ridge regression."""

    mean_D: Tensor
    scale_D: Tensor
    weight_DE: Tensor
    bias_E: Tensor
    strength: float
    """Ridge term as a share of the mean squared standardised feature."""
    validation_score: float
    """Score on the validation rows, by which the strength was chosen."""

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Rows [N, E]."""
        return torch.addmm(self.bias_E, (x_ND - self.mean_D) / self.scale_D, self.weight_DE)


def fit_ridge(
    x_ND: Tensor, y_NE: Tensor, validation_N: Tensor, score: Callable[[Tensor], float]
) -> LinearMap:
    """Closed-form ridge regression on standardised features.

    Each strength is fitted without the rows of the mask `validation_N`, and predicts those. The
    strength with the highest `score` of the predictions is chosen. The map is then fitted on all
    rows.
    """
    mean_D = x_ND.mean(0)
    # A feature that hardly varies would blow up where it does.
    scale_D = x_ND.std(0).clamp_min(1e-6 * float(x_ND.std()) + 1e-30)
    xs_ND = (x_ND - mean_D) / scale_D

    best, best_score = _STRENGTHS[-1], -1.0
    if validation_N.any() and not validation_N.all():
        maps = _ridge(xs_ND[~validation_N], y_NE[~validation_N], _STRENGTHS)
        for strength, (weight_DE, bias_E) in zip(_STRENGTHS, maps, strict=True):
            made_NE = torch.addmm(bias_E, xs_ND[validation_N], weight_DE)
            if (made_score := score(made_NE)) >= best_score:
                best, best_score = strength, made_score

    [(weight_DE, bias_E)] = _ridge(xs_ND, y_NE, [best])
    return LinearMap(mean_D, scale_D, weight_DE, bias_E, best, best_score)


def _ridge(x_ND: Tensor, y_NE: Tensor, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias for each strength; the bias is not shrunk."""
    bias_E, offset_D = y_NE.mean(0), x_ND.mean(0)
    x_ND = (x_ND - offset_D).double()
    gram_DD, cross_DE = x_ND.T @ x_ND, x_ND.T @ (y_NE - bias_E).double()

    maps = []
    for strength in strengths:
        regularised_DD = gram_DD.clone()
        regularised_DD.diagonal().add_(strength * len(x_ND))
        weight_DE = torch.cholesky_solve(cross_DE, torch.linalg.cholesky(regularised_DD)).float()
        maps.append((weight_DE, bias_E - offset_D @ weight_DE))
    return maps


@dataclass(frozen=True)
class Inverter:
    """From rows at any place of the wire to token ids: a linear map, then the nearest target.

    The nearest by cosine.
    """

    map: LinearMap
    targets_VE: Tensor
    """Unit rows: the embedding table, or one row for each type of the attacker's text."""
    ids_V: Tensor
    """Token id of each target."""

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Token ids [N]."""
        return self.ids_V[_most_similar(self.map(x_ND), self.targets_VE)]

    def candidates(self, x_ND: Tensor, count: int) -> Tensor:
        """The likeliest token ids, [N, count]."""
        count = min(count, len(self.ids_V))
        parts = [
            (part @ self.targets_VE.T).topk(count).indices for part in self.map(x_ND).split(_CHUNK)
        ]
        return self.ids_V[torch.cat(parts)]


def fit_inverter(x_ND: Tensor, ids_N: Tensor, table_VE: Tensor, validation_N: Tensor) -> Inverter:
    """Learn to invert x from text that the attacker knows.

    Ridge regression to a target, then the nearest target. There are two kinds of targets. The
    token's embedding also recovers tokens that the attacker's text lacks. The token's type, one-hot
    (a ridge classifier), knows those types alone. The kind that does better on the validation rows
    is taken. Source: linear inversion as in Song & Raghunathan 2020, arXiv:2004.00053, section 4.
    """
    types, numbers_N = ids_N.unique(return_inverse=True)
    table_VE = unit_rows(table_VE - table_VE.mean(0))
    validation_numbers = numbers_N[validation_N]

    def accuracy(targets: Tensor) -> Callable[[Tensor], float]:
        return lambda made: float(
            (_most_similar(made, targets) == validation_numbers).float().mean()
        )

    own = table_VE[types]
    embedding = fit_ridge(x_ND, own[numbers_N], validation_N, accuracy(own))
    if len(types) <= _MOST_TYPES:
        one_hot = torch.eye(len(types))
        classifier = fit_ridge(x_ND, one_hot[numbers_N], validation_N, accuracy(one_hot))
        if classifier.validation_score > embedding.validation_score:
            return Inverter(classifier, one_hot, types)
    return Inverter(embedding, table_VE, torch.arange(len(table_VE)))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _most_similar(rows_NE: Tensor, unit_VE: Tensor) -> Tensor:
    # The rows' own length changes no order.
    return torch.cat(
        [(part @ unit_VE.T).argmax(1) for part in rows_NE.split(_CHUNK)]
        or [torch.zeros(0, dtype=torch.int64)]
    )


# ----------------------------------------------------------------- labels


def labels_from_exit(
    hidden_KD: Tensor,
    grad_KD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None = None,
    blind_KRD: Tensor | None = None,
) -> Tensor:
    """Labels [K] from last hidden states and the gradient of a cross-entropy with respect to them.

    The gradient is s (p^T W - W[y]). p is the softmax of W h, which the cloud can compute. s > 0 is
    unknown, and the same for all rows (1 / K for a mean). So the right y is the one whose
    p^T W - W[y] is nearest to g / s. s comes from the rows with the largest gradients: their y is
    the row of W that makes both most parallel. `blind_KRD`: orthonormal directions, or zeros, of
    which the gradient reveals nothing; see `before_norm`. Where logits are capped (Gemma 2) this is
    an approximation. Source: after Zhao et al. 2020 (iDLG), arXiv:2001.02610, here for each
    position and with p known.
    """
    if not len(hidden_KD):
        return torch.zeros(0, dtype=torch.int64)

    means_KD = torch.cat(  # p^T W
        [
            torch.softmax(_logits(part, head_VD, bias_V), 1) @ head_VD
            for part in hidden_KD.split(_CHUNK)
        ]
    )
    squares_V = head_VD.square().sum(1)

    def compare(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of d = p^T W - W[y], for some rows and all y: d g, and |d|^2 but for blind directions."""
        mean, grad = means_KD[rows], grad_KD[rows]
        along = (grad * mean).sum(1, keepdim=True) - grad @ head_VD.T
        length = mean.square().sum(1, keepdim=True) - 2 * mean @ head_VD.T + squares_V
        for blind in () if blind_KRD is None else blind_KRD[rows].unbind(1):
            length = length - ((blind * mean).sum(1, keepdim=True) - blind @ head_VD.T).square()
        return along, length.clamp_min(1e-12)

    # The scale s, as the median over the strongest rows.
    strongest = grad_KD.norm(dim=1).argsort(descending=True)[: max(1, min(64, len(grad_KD) // 4))]
    along, length = compare(strongest)
    guess = (along / length.sqrt()).argmax(1, keepdim=True)
    scales = grad_KD[strongest].norm(dim=1) / length.gather(1, guess)[:, 0].sqrt()
    s = scales.median().clamp_min(1e-30)

    # |d - g / s|^2 is |d|^2 - 2 d g / s and what is the same for all y.
    labels = []
    for rows in torch.arange(len(grad_KD)).split(_CHUNK // 4):
        along, length = compare(rows)
        labels.append((length - 2 * along / s).argmin(1))
    return torch.cat(labels)


def before_norm(
    norm: Callable[[Tensor], Tensor], x_KD: Tensor, grad_KD: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Go from the input of the last norm to its output: (hidden states, their gradient, blind).

    The Jacobian of an RMSNorm or LayerNorm at x is diag(d) P. P takes away what lies along x, and
    in a LayerNorm what lies along the vector of ones; leaving that out always costs one direction
    of D. So g = P (d * u) gives u = g / d, but for 1 / d times these two directions. They are the
    third result, orthonormal [K, 2, D]: of them the gradient reveals nothing. d comes from two
    products with the Jacobian. `norm` works on each row alone. None where it is something else than
    a norm, as with a projection behind it.
    """
    if not len(x_KD):
        return None
    signs_KD = torch.randn(x_KD.shape, generator=torch.Generator().manual_seed(0)).sign()
    with torch.enable_grad():
        x = x_KD.detach().float().requires_grad_()
        made = norm(x)
        if made.shape != x.shape:
            return None
        plain_KD, signed_KD = (
            torch.autograd.grad(made, x, u, retain_graph=True)[0]
            for u in (signs_KD.square(), signs_KD)
        )

    # J^T u = d * u but for the two lost directions, for u of ones and u of signs: d in two ways,
    # with two unknown numbers each, that have to agree.
    lost_KD2 = torch.linalg.qr(torch.stack([torch.ones_like(x), x], 2).detach())[0]
    both_KD4 = torch.cat([lost_KD2, -signs_KD[:, :, None] * lost_KD2], 2)
    gap_KD = signs_KD * signed_KD - plain_KD
    factors_K41 = torch.linalg.lstsq(both_KD4, gap_KD[:, :, None]).solution
    explained_KD = (both_KD4 @ factors_K41)[:, :, 0] + plain_KD
    if relative_error(explained_KD, signs_KD * signed_KD) > _NORM_ERROR:
        return None

    hidden_KD, d_KD = made.detach(), plain_KD + (lost_KD2 @ factors_K41[:, :2])[:, :, 0]
    floor_K1 = _BLIND * d_KD.abs().amax(1, keepdim=True)
    d_KD = torch.where(d_KD.abs() < floor_K1, floor_K1, d_KD)

    # Back through diag(d), without the directions that are lost there.
    blind_KD2 = torch.linalg.qr(lost_KD2 / d_KD[:, :, None])[0]
    u_KD = grad_KD / d_KD
    u_KD = u_KD - (blind_KD2 @ (blind_KD2.transpose(1, 2) @ u_KD[:, :, None]))[:, :, 0]
    return hidden_KD, u_KD, blind_KD2.transpose(1, 2)


def _logits(hidden_KD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return hidden_KD @ head_VD.T if bias_V is None else torch.addmm(bias_V, hidden_KD, head_VD.T)


def label_map(
    grads_KD: Tensor, labels_K: Tensor, head_VE: Tensor, validation_K: Tensor
) -> Inverter:
    """Learn to read labels from gradient rows at any place, from micro-batches with known labels.

    The same inverter as for tokens, for `unit_rows` of gradients: a row's size reveals how sure the
    model was, its direction the label.
    """
    return fit_inverter(unit_rows(grads_KD), labels_K, head_VE, validation_K)


# ----------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Solution:
    """A module's product, as the cloud solved for it."""

    product_OD: Tensor
    """Scaled B A."""
    residual: float
    """How badly it explains what the cloud saw, relative.

    Large where the adapter is not a plain product (dropout).
    """
    determined: bool
    """There were rows enough for one solution only; else it is right for inputs like those seen."""
    rank: int


def solve_adapters(
    x_ND: Tensor,
    deltas: Sequence[Tensor],
    *,
    factors: Sequence[Tensor] = (),
    delta_grads: Sequence[Tensor] = (),
    input_grad_ND: Tensor | None = None,
) -> list[Solution]:
    """Solve for B A of all modules of one site, from batches with one and the same adapter.

    delta = x A^T B^T has the column space of B, of low rank. Its top right singular vectors C
    [O, R] also leave most of the wire's rounding behind. With z = delta C [N, R] what is left is
    A' [R, D], with B A = C A'. It follows from two sides:
    forward, z = x A'^T: exact if x has D independent rows;
    backward, dx = sum over modules of (grad C) A': exact if there are as many independent rows as
    all ranks together.
    Of the sides with rows enough, the one that explains both sides better is taken. On the factored
    wire C is B, and z is what travels. `input_grad_ND` is missing at the lowest site.
    """
    if factors:
        bases, zs, z_grads = list(factors), list(deltas), list(delta_grads)
    else:
        bases = [_column_space(unit_rows(delta)) for delta in deltas]
        zs = [delta @ base for delta, base in zip(deltas, bases, strict=True)]
        z_grads = [grad @ base for grad, base in zip(delta_grads, bases, strict=True)]
    ranks = [base.shape[1] for base in bases]

    # The modules of the site side by side, as one system of equations.
    x, z = _equal_weights(x_ND.double(), torch.cat(zs, 1).double())
    transposed, determined = _least_squares(x, z)
    candidates = [(transposed.T, determined)]
    backward: tuple[Tensor, Tensor] | None = None
    if input_grad_ND is not None and z_grads:
        dx, gz = _equal_weights(input_grad_ND.double(), torch.cat(z_grads, 1).double())
        backward = gz, dx
        candidates.append(_least_squares(gz, dx))

    # Too few rows count worse than any residual.
    penalties = [0.0 if determined else 1e3 for _, determined in candidates]
    residuals = [_residuals(a, x, z, backward, ranks) for a, _ in candidates]
    scores = torch.stack([r + penalty for r, penalty in zip(residuals, penalties, strict=True)])
    solutions = []
    for i, base in enumerate(bases):
        best = int(scores[:, i].argmin())
        a, determined = candidates[best]
        product = (base.double() @ a.split(ranks)[i]).float()
        residual = float(scores[best, i]) - penalties[best]
        solutions.append(Solution(product, residual, determined, ranks[i]))
    return solutions


def _equal_weights(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Both, divided by the length of each row of `outputs`.

    Rounding is relative to values: large rows must not drown the others.
    """
    weight = 1 / outputs.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return inputs * weight, outputs * weight


def _residuals(
    a_RD: Tensor,
    x: Tensor,
    z: Tensor,
    backward: tuple[Tensor, Tensor] | None,
    ranks: list[int],
) -> Tensor:
    """Relative error of each module: the worse of both sides, as far as the cloud has them."""
    pairs = zip((x @ a_RD.T - z).split(ranks, 1), z.split(ranks, 1), strict=True)
    forward = torch.stack([off.norm() / whole.norm().clamp_min(1e-300) for off, whole in pairs])
    if backward is None:
        return forward
    gz, dx = backward
    return torch.maximum(forward, (gz @ a_RD - dx).norm() / dx.norm().clamp_min(1e-300))


def _column_space(delta_NO: Tensor) -> Tensor:
    """Right singular vectors [O, R] of a matrix of low rank plus rounding.

    Only those that stand out of the rounding.
    """
    _, values, vectors = torch.linalg.svd(delta_NO.double(), full_matrices=False)
    # Half of the singular values are rounding alone, as R is far under N and O; random ones spread
    # by a factor of 2.
    floor = 6 * values[len(values) // 2] if len(values) > 1 else values.new_zeros(())
    rank = max(1, int((values > floor).sum()))
    return vectors[:rank].T.to(delta_NO.dtype)


def _least_squares(a: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """The shortest X of least |a X - b|, and whether there is no other.

    There is none if `a` has as many independent rows as columns.
    """
    u, values, v = torch.linalg.svd(a, full_matrices=False)
    independent = values > 1e-6 * values[:1]  # below that float32's own noise
    x = v[independent].T @ ((u[:, independent].T @ b) / values[independent, None])
    return x, int(independent.sum()) == a.shape[1]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what was wanted."""
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
