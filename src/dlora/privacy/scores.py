"""How much of a text was recovered: pure functions on token ids.

Shapes: N tokens, of several rows of data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["rouge_l", "token_scores"]


def token_scores(
    guess_N: Tensor, want_N: Tensor, row_N: Tensor, seen: Tensor | None = None
) -> dict[str, Any]:
    """Shares of tokens that were recovered, and how well whole rows were.

    `own`: tokens of types that are in less than half of the rows, so not of a prompt's template.
    `seen` and `unseen`: tokens whose type is, or is not, in the attacker's text; None where there
    are none. `chance`: what always guessing the most frequent token gets.
    """
    right_N = guess_N == want_N
    rows = [(guess_N[row_N == row], want_N[row_N == row]) for row in row_N.unique()]
    rows_with = Counter(token for _, want in rows for token in want.unique().tolist())
    common = torch.tensor(
        [token for token, count in rows_with.items() if 2 * count >= len(rows)], dtype=torch.int64
    )

    def share(mask_N: Tensor) -> float | None:
        return float(right_N[mask_N].float().mean()) if mask_N.any() else None

    known_N = torch.zeros_like(right_N) if seen is None else torch.isin(want_N, seen)
    return {
        "tokens": float(right_N.float().mean()),
        "own": share(~torch.isin(want_N, common)),
        # Of an attacker without text nothing is known or unknown.
        "seen": None if seen is None else share(known_N),
        "unseen": None if seen is None else share(~known_N),
        "num_unseen": None if seen is None else int((~known_N).sum()),
        # Whole rows, word for word and in order.
        "rows_exact": sum(torch.equal(guess, want) for guess, want in rows) / len(rows),
        "rouge_l": sum(rouge_l(guess.tolist(), want.tolist()) for guess, want in rows) / len(rows),
        "chance": float(want_N.bincount().max() / len(want_N)),
    }


def rouge_l(guess: Sequence[int], want: Sequence[int]) -> float:
    """ROUGE-L as F1: the longest common subsequence over the mean length.

    Source: Lin 2004, section 3.1. The length comes bit-parallel, all of one sequence at once:
    Hyyro 2004.
    """
    if not guess or not want:
        return float(not guess and not want)

    places: dict[int, int] = {}
    for i, token in enumerate(want):
        places[token] = places.get(token, 0) | 1 << i

    all_bits = state = (1 << len(want)) - 1
    for token in guess:
        hits = state & places.get(token, 0)
        state = (state + hits | state - hits) & all_bits
    return 2 * (len(want) - state.bit_count()) / (len(guess) + len(want))
