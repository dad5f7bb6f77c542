"""What an honest-but-curious cloud can compute from what crosses the wire: pure functions on
tensors.

The cloud knows its model, so embedding table and head are public. What it is after is on the edge:
tokens, labels, the adapter. `audit.py` runs these on a recording and counts how much they get
right.

Shapes: N rows (tokens), K kept rows, D width of a row, E width of an embedding, V vocabulary, O
out, R rank.
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
    "rouge_l",
    "solve_adapters",
    "unit_rows",
]

_CHUNK: Final = 512  # rows that are compared with a whole vocabulary at a time
_MOST_TYPES: Final = 4096  # of a classifier: it needs a number for each row and type
_NORM_ERROR: Final = 0.05  # up to which a function counts as a norm
_BLIND: Final = 1e-3  # of the largest scale of a norm
_STRENGTHS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


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
    """Look every row that enters up in the public embedding table: token ids [N].

    Exact where raw embeddings travel, as rounding is far smaller than the distance between two
    tokens.
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
    """Ridge term as a share of the mean squared standardised feature; chosen on held-out rows."""
    held_out: float
    """Score on the held-out rows."""

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Rows [N, E]."""
        return torch.addmm(self.bias_E, (x_ND - self.mean_D) / self.scale_D, self.weight_DE)


def fit_ridge(
    x_ND: Tensor, y_NE: Tensor, held_N: Tensor, score: Callable[[Tensor], float]
) -> LinearMap:
    """Closed-form ridge regression on standardised features.

    The strength is the one whose predictions for the rows of the mask `held_N`, fitted on the
    others, get the highest `score`; the map is then fitted on all rows.
    """
    mean_D = x_ND.mean(0)
    # A feature that hardly varies would blow up where it does.
    scale_D = x_ND.std(0).clamp_min(1e-6 * float(x_ND.std()) + 1e-30)
    xs = (x_ND - mean_D) / scale_D

    def solve(x: Tensor, y: Tensor, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        bias = y.mean(0)
        offset = x.mean(0)
        x = (x - offset).double()
        gram, cross = x.T @ x, x.T @ (y - bias).double()
        found = []
        for strength in strengths:
            regularised = gram.clone()
            regularised.diagonal().add_(strength * len(x))
            weight = torch.cholesky_solve(cross, torch.linalg.cholesky(regularised)).float()
            found.append((weight, bias - offset @ weight))
        return found

    best, best_score = _STRENGTHS[-1], -1.0
    if held_N.any() and not held_N.all():
        tries = solve(xs[~held_N], y_NE[~held_N], _STRENGTHS)
        for strength, (weight, bias) in zip(_STRENGTHS, tries, strict=True):
            if (found := score(torch.addmm(bias, xs[held_N], weight))) >= best_score:
                best, best_score = strength, found
    [(weight_DE, bias_E)] = solve(xs, y_NE, [best])
    return LinearMap(mean_D, scale_D, weight_DE, bias_E, best, best_score)


@dataclass(frozen=True)
class Inverter:
    """From rows at any place of the wire to token ids: a linear map, then the nearest target by
    cosine.
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


def fit_inverter(x_ND: Tensor, ids_N: Tensor, table_VE: Tensor, held_N: Tensor) -> Inverter:
    """Learn to invert x from text that the attacker knows: ridge to the token's embedding, then
    nearest neighbour.

    Of two targets the one that does better on the held-out rows: the embedding, which also finds
    tokens that the attacker's text lacks, or the token's type (a ridge classifier over those
    types). Source: linear inversion as in Song & Raghunathan 2020, arXiv:2004.00053, section 4.
    """
    types, numbers_N = ids_N.unique(return_inverse=True)
    table_VE = unit_rows(table_VE - table_VE.mean(0))
    held_numbers = numbers_N[held_N]

    def accuracy(targets: Tensor) -> Callable[[Tensor], float]:
        return lambda made: float((_most_similar(made, targets) == held_numbers).float().mean())

    own = table_VE[types]
    embedding = fit_ridge(x_ND, own[numbers_N], held_N, accuracy(own))
    if len(types) <= _MOST_TYPES:
        one_hot = torch.eye(len(types))
        classifier = fit_ridge(x_ND, one_hot[numbers_N], held_N, accuracy(one_hot))
        if classifier.held_out > embedding.held_out:
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

    The gradient is s (p^T W - W[y]) with p the softmax of W h, which the cloud can compute, and one
    unknown s > 0 for all rows (1 / K for a mean). So the y is right whose p^T W - W[y] is nearest
    to g / s. s comes from the rows with the largest gradients, whose y is the row of W that makes
    both most parallel. `blind_KRD`: orthonormal directions, or zeros, of which the gradient tells
    nothing; see `before_norm`. Where logits are capped (Gemma 2) this is an approximation. Source:
    after Zhao et al. 2020 (iDLG), arXiv:2001.02610, here for each position and with p known.
    """
    if not len(hidden_KD):
        return torch.zeros(0, dtype=torch.int64)
    means = torch.cat(
        [
            torch.softmax(_logits(part, head_VD, bias_V), 1) @ head_VD
            for part in hidden_KD.split(_CHUNK)
        ]
    )
    squares_V = head_VD.square().sum(1)

    def compare(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of d = p^T W - W[y] for some rows and all y: d g, and the squared length of what g could
        tell of d.
        """
        mean, grad = means[rows], grad_KD[rows]
        along = (grad * mean).sum(1, keepdim=True) - grad @ head_VD.T
        length = mean.square().sum(1, keepdim=True) - 2 * mean @ head_VD.T + squares_V
        for blind in () if blind_KRD is None else blind_KRD[rows].unbind(1):
            length = length - ((blind * mean).sum(1, keepdim=True) - blind @ head_VD.T).square()
        return along, length.clamp_min(1e-12)

    strongest = grad_KD.norm(dim=1).argsort(descending=True)[: max(1, min(64, len(grad_KD) // 4))]
    along, length = compare(strongest)
    guess = (along / length.sqrt()).argmax(1, keepdim=True)
    s = (
        (grad_KD[strongest].norm(dim=1) / length.gather(1, guess)[:, 0].sqrt())
        .median()
        .clamp_min(1e-30)
    )
    found = []
    for rows in torch.arange(len(grad_KD)).split(_CHUNK // 4):
        along, length = compare(rows)
        found.append((length - 2 * along / s).argmin(1))
    return torch.cat(found)


def before_norm(
    norm: Callable[[Tensor], Tensor], x_KD: Tensor, grad_KD: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Go from the input of the last norm to its output: (hidden states, their gradient, what that
    does not tell).

    The Jacobian of an RMSNorm or LayerNorm at x is diag(d) P, where P takes away what lies along x,
    and in a LayerNorm along the vector of ones (leaving that out always costs one direction of D).
    So g = P (d * u) gives u = g / d, but for 1 / d times these two: the third result, orthonormal
    [K, 2, D]. d comes from two products with the Jacobian. None where `norm`, which works on each
    row alone, is something else, as with a projection behind it.
    """
    if not len(x_KD):
        return None
    signs_KD = torch.randn(x_KD.shape, generator=torch.Generator().manual_seed(0)).sign()
    with torch.enable_grad():
        x = x_KD.detach().float().requires_grad_()
        made = norm(x)
        if made.shape != x.shape:
            return None
        # J^T u = d * u but for the two lost directions, for u of ones and u of signs: d in two
        # ways, with two unknown numbers each, that have to agree.
        plain, signed = (
            torch.autograd.grad(made, x, u, retain_graph=True)[0]
            for u in (signs_KD.square(), signs_KD)
        )
    lost_KD2 = torch.linalg.qr(torch.stack([torch.ones_like(x), x], 2).detach())[0]
    both_KD4 = torch.cat([lost_KD2, -signs_KD[:, :, None] * lost_KD2], 2)
    gap_KD = signs_KD * signed - plain
    factors_K41 = torch.linalg.lstsq(both_KD4, gap_KD[:, :, None]).solution
    if relative_error((both_KD4 @ factors_K41)[:, :, 0] + plain, signs_KD * signed) > _NORM_ERROR:
        return None
    hidden_KD, d_KD = made.detach(), plain + (lost_KD2 @ factors_K41[:, :2])[:, :, 0]
    floor = _BLIND * d_KD.abs().amax(1, keepdim=True)  # below that the wire's rounding rules
    d_KD = torch.where(d_KD.abs() < floor, floor, d_KD)
    blind_KD2 = torch.linalg.qr(lost_KD2 / d_KD[:, :, None])[0]
    u_KD = grad_KD / d_KD
    u_KD = u_KD - (blind_KD2 @ (blind_KD2.transpose(1, 2) @ u_KD[:, :, None]))[:, :, 0]
    return hidden_KD, u_KD, blind_KD2.transpose(1, 2)


def _logits(hidden_KD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return hidden_KD @ head_VD.T if bias_V is None else torch.addmm(bias_V, hidden_KD, head_VD.T)


def label_map(grads_KD: Tensor, labels_K: Tensor, head_VE: Tensor, held_K: Tensor) -> Inverter:
    """Learn to read labels from gradient rows at any place: the attacker's own micro-batches,
    labels known.

    The same inverter as for tokens, for `unit_rows` of gradients, as a row's size tells how sure
    the model was and its direction tells the label.
    """
    return fit_inverter(unit_rows(grads_KD), labels_K, head_VE, held_K)


# ----------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Solution:
    """A module's product, as the cloud solved for it."""

    product_OD: Tensor
    """Scaled B A."""
    residual: float
    """How badly it explains what the cloud saw, relative: large where the adapter is not a plain
    product (dropout).
    """
    determined: bool
    """There were rows enough for one solution only; else it is right for inputs like those seen,
    and no others.
    """
    rank: int


def solve_adapters(
    x_ND: Tensor,
    deltas: Sequence[Tensor],
    *,
    factors: Sequence[Tensor] = (),
    delta_grads: Sequence[Tensor] = (),
    input_grad_ND: Tensor | None = None,
) -> list[Solution]:
    """Solve for B A of all modules of one site from the exchanges of batches with one and the same
    adapter.

    delta = x A^T B^T has the column space of B, of low rank: its top right singular vectors C [O,
    R] also leave most of the wire's rounding behind. With z = delta C [N, R] what is left to find
    is A' [R, D], with B A = C A', from two sides: z = x A'^T, exact if x has D independent rows;
    and dx = sum over modules of (grad C) A', exact if there are as many independent rows as all
    ranks together. The solution that explains both sides better is taken, of those with rows
    enough. On the factored wire C is B, and z is what travels. `input_grad_ND` is missing at the
    lowest site.
    """
    if factors:
        bases, zs, gzs = list(factors), list(deltas), list(delta_grads)
    else:
        bases = [_column_space(unit_rows(delta)) for delta in deltas]
        zs = [delta @ base for delta, base in zip(deltas, bases, strict=True)]
        gzs = [grad @ base for grad, base in zip(delta_grads, bases, strict=True)]
    ranks = [base.shape[1] for base in bases]
    z, gz = torch.cat(zs, 1).double(), torch.cat(gzs, 1).double() if gzs else None
    x = x_ND.double()
    weight = 1 / z.norm(dim=1, keepdim=True).clamp_min(1e-300)
    x, z = (
        x * weight,
        z * weight,
    )  # rounding is relative to values: large rows must not drown the others
    found, determined = _least_squares(x, z)
    candidates = [(found.T, determined)]
    dx: Tensor | None = None
    if input_grad_ND is not None and gz is not None:
        weight = 1 / gz.norm(dim=1, keepdim=True).clamp_min(1e-300)
        gz, dx = gz * weight, input_grad_ND.double() * weight
        candidates.append(_least_squares(gz, dx))

    def residuals(a: Tensor) -> Tensor:
        """Relative, of each module: both sides, as far as the cloud has them."""
        pairs = zip((x @ a.T - z).split(ranks, 1), z.split(ranks, 1), strict=True)
        found = torch.stack([off.norm() / whole.norm().clamp_min(1e-300) for off, whole in pairs])
        if dx is None or gz is None:
            return found
        return torch.maximum(found, (gz @ a - dx).norm() / dx.norm().clamp_min(1e-300))

    scores = torch.stack([residuals(a) + (0.0 if fine else 1e3) for a, fine in candidates])
    solutions = []
    for i, base in enumerate(bases):
        best = int(scores[:, i].argmin())
        a, fine = candidates[best]
        product = (base.double() @ a.split(ranks)[i]).float()
        solutions.append(
            Solution(product, float(scores[best, i]) - (0.0 if fine else 1e3), fine, ranks[i])
        )
    return solutions


def _column_space(delta_NO: Tensor) -> Tensor:
    """Right singular vectors [O, R] of a matrix of low rank plus rounding: those that stand out of
    the rounding.
    """
    _, values, vectors = torch.linalg.svd(delta_NO.double(), full_matrices=False)
    # Half of the singular values are rounding alone, as R is far under N and O; random ones spread
    # by a factor of 2.
    floor = 6 * values[len(values) // 2] if len(values) > 1 else values.new_zeros(())
    rank = max(1, int((values > floor).sum()))
    return vectors[:rank].T.to(delta_NO.dtype)


def _least_squares(a: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """The shortest X of least |a X - b|, and whether there is no other: `a` has as many independent
    rows as columns.
    """
    u, values, v = torch.linalg.svd(a, full_matrices=False)
    fine = values > 1e-6 * values[:1]  # below that float32's own noise
    found = v[fine].T @ ((u[:, fine].T @ b) / values[fine, None])
    return found, int(fine.sum()) == a.shape[1]


def relative_error(found: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what was wanted."""
    return float((found - want).norm() / want.norm().clamp_min(1e-30))


# ----------------------------------------------------------------- measures


def rouge_l(found: Sequence[int], want: Sequence[int]) -> float:
    """ROUGE-L as F1: the longest common subsequence over the mean length. Lin 2004, section 3.1.

    The length comes bit-parallel, all of one sequence at once: Hyyro 2004.
    """
    if not found or not want:
        return float(not found and not want)
    places: dict[int, int] = {}
    for i, token in enumerate(want):
        places[token] = places.get(token, 0) | 1 << i
    whole = state = (1 << len(want)) - 1
    for token in found:
        hits = state & places.get(token, 0)
        state = (state + hits | state - hits) & whole
    return 2 * (len(want) - state.bit_count()) / (len(found) + len(want))
