"""What attackers and victim have in common: rows at every place of the wire, beside the truth.

A place is the entry, the exit, or a site. An attacker learns a map from its own samples, where it
knows tokens and labels; it is tested on those of the victim, where it does not.

Shapes: B batch, T tokens, N attended tokens, K supervised positions, D width of a place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.privacy.cloud_view import CloudView
from dlora.privacy.recording import Truth

__all__ = ["Samples", "collect", "split_rows", "validation_rows"]

_BY_TOKEN: Final = ("ids_N", "row_N", "entry_ND")
_BY_LABEL: Final = ("labels_K", "row_K", "batch_K", "exit_KD", "exit_grad_KD", "top_grad_KD")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows at every place of the wire, beside what they came from."""

    ids_N: Tensor
    row_N: Tensor
    """Which row of data a token is of."""
    entry_ND: Tensor
    sites: dict[int, Tensor]
    """x [N, D] of each attacked site."""
    labels_K: Tensor
    row_K: Tensor
    """Which row of data a label is of."""
    batch_K: Tensor
    """Which micro-batch a label is of."""
    exit_KD: Tensor
    exit_grad_KD: Tensor
    top_grad_KD: Tensor
    """Gradients of the deltas of the highest attacked site, all modules side by side."""

    @property
    def num_rows(self) -> int:
        """Rows of data."""
        return len(self.row_N.unique())

    def of_rows(self, rows: Tensor) -> Samples:
        """The samples of some rows of data."""
        n, k = torch.isin(self.row_N, rows), torch.isin(self.row_K, rows)
        return Samples(
            sites={site: x_ND[n] for site, x_ND in self.sites.items()},
            **{name: getattr(self, name)[n] for name in _BY_TOKEN},
            **{name: getattr(self, name)[k] for name in _BY_LABEL},
        )


# ----------------------------------------------------------------- from the wire


def collect(seen: Iterable[tuple[CloudView, Truth]], sites: Sequence[int]) -> Samples:
    """Line up what the cloud sees with the truth, for all micro-batches.

    Of tokens those that are attended, of kept positions those that have a label.
    """
    parts: list[Samples] = []
    num_rows = 0
    for number, (view, truth) in enumerate(seen):
        parts.append(_line_up(view, truth, sites, number, num_rows))
        num_rows += view.begin.batch

    return Samples(
        sites={site: torch.cat([part.sites[site] for part in parts]) for site in sites},
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in (*_BY_TOKEN, *_BY_LABEL)
        },
    )


def _line_up(
    view: CloudView, truth: Truth, sites: Sequence[int], number: int, first_row: int
) -> Samples:
    """Samples of one micro-batch; its rows of data are numbered from `first_row`."""
    length = view.begin.length
    # Padding may travel as other tokens do: it is nobody's text.
    attended_N = truth.attention_mask.bool().reshape(-1)[view.positions]
    supervised_K = truth.supervised.reshape(-1)[view.keep]

    # Where the supervised positions are among the rows that travel.
    kept_rows_K = torch.searchsorted(view.positions, view.keep)[supervised_K]
    top_grads = view.sites[sites[-1]].delta_grads if sites else []
    nothing_K0 = view.exit.new_zeros(len(kept_rows_K), 0)

    return Samples(
        ids_N=truth.input_ids.reshape(-1)[view.positions][attended_N],
        row_N=(view.positions // length + first_row)[attended_N],
        entry_ND=view.entry[attended_N],
        sites={site: view.sites[site].x[attended_N] for site in sites},
        labels_K=truth.next_labels.reshape(-1)[view.keep][supervised_K],
        row_K=(view.keep // length + first_row)[supervised_K],
        batch_K=torch.full((len(kept_rows_K),), number),
        exit_KD=view.exit[supervised_K],
        exit_grad_KD=view.exit_grad[supervised_K],
        top_grad_KD=torch.cat([nothing_K0, *(grad[kept_rows_K] for grad in top_grads)], 1),
    )


# ----------------------------------------------------------------- who knows which rows


def split_rows(victim: Samples, most: int, seed: int) -> tuple[Samples, Samples]:
    """Rows that the in-domain attacker knows, and rows that are attacked; no text is in both.

    At most `most` different texts in each. Raises UsageError if there are too few to split.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row in victim.row_N.unique().tolist():
        rows_of.setdefault(tuple(victim.ids_N[victim.row_N == row].tolist()), []).append(row)
    texts = list(rows_of.values())
    if len(texts) < 4:
        raise UsageError(
            f"the recording has {len(texts)} different rows, too few to learn from some and "
            "attack others"
        )

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(texts) // 2
    # The attacker may know a text several times; an attacked text counts once.
    known = [row for i in order[:half][:most] for row in texts[i]]
    attacked = [texts[i][0] for i in order[half:][:most]]
    return victim.of_rows(torch.tensor(known)), victim.of_rows(torch.tensor(attacked))


def validation_rows(rows: Tensor, seed: int) -> Tensor:
    """Mask of about a fifth of an attacker's samples, whole rows of data: to choose settings by.

    `rows`: which row of data each sample is of, `row_N` or `row_K`.
    """
    names = rows.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return torch.isin(rows, names[order[: max(1, len(names) // 5)]])
