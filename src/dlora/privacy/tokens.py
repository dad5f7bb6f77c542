"""Attacks on tokens that ask nobody: a look-up at the entry, linear inverters at every place.

Shapes: N rows (tokens), V vocabulary, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from dlora.privacy.attacks import fit_inverter, nearest_tokens
from dlora.privacy.findings import Attackers, Finding, finding, fitted, learned_from
from dlora.privacy.samples import Samples, validation_rows
from dlora.privacy.scores import token_scores

__all__ = ["attack_tokens"]


def attack_tokens(
    attacked: Samples, attackers: Attackers, table_VE: Tensor, places: dict[int, str], seed: int
) -> Iterator[Finding]:
    """Look-up at the entry; inverters of both attackers at the entry and every attacked site."""
    if attacked.entry_ND.shape[1] == table_VE.shape[1]:
        guess_N = nearest_tokens(attacked.entry_ND, table_VE)
        scores = token_scores(guess_N, attacked.ids_N, attacked.row_N)
        says = f"{_in_words(scores)}, by a look-up in the embedding table"
        yield finding("look-up", "entry", "entry", says, **scores)

    sites = [(f"site {site}", where, site) for site, where in places.items()]
    inputs = [("entry", "entry", None), *sites]
    for place, where, site in tqdm(inputs, desc="inverting", unit="place"):
        for name, own in attackers.items():
            inverter = fit_inverter(
                _rows_at(own, site), own.ids_N, table_VE, validation_rows(own.row_N, seed)
            )
            guess_N = inverter(_rows_at(attacked, site))
            scores = token_scores(guess_N, attacked.ids_N, attacked.row_N, own.ids_N.unique())

            says = f"{_in_words(scores)}, by a linear map learned from {learned_from(name)}"
            if scores["unseen"] is not None:
                says += f" ({scores['unseen']:.1%} of those it had never seen)"
            yield finding(
                "inverter", place, where, says, name, **scores, **fitted(inverter, table_VE)
            )


def _rows_at(samples: Samples, site: int | None) -> Tensor:
    return samples.entry_ND if site is None else samples.sites[site]


def _in_words(scores: dict[str, Any]) -> str:
    tokens, rows = scores["tokens"], scores["rows_exact"]
    return f"{tokens:.1%} of the tokens, {rows:.0%} of the rows word for word"
