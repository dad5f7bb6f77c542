"""Matching: the cloud has the model, so it can try tokens and see which give the recorded rows.

With public text alone, at the middle site, on some rows: it is slow.

Shapes: N tokens of all rows, D width of the site, C candidates of all rows at one position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dlora.edge.link import Link
from dlora.edge.model import SplitModel
from dlora.privacy.attacks import Inverter, fit_inverter
from dlora.privacy.cloud_view import CloudView
from dlora.privacy.findings import Finding, finding
from dlora.privacy.recording import RecordingLink
from dlora.privacy.samples import Samples, validation_rows
from dlora.privacy.scores import token_scores

__all__ = ["attack_by_matching", "match_rows"]

_CANDIDATES: Final = 8  # of the inverter, and as many of the model's own


def attack_by_matching(
    link: Link,
    model: SplitModel,
    attacked: Samples,
    public: Samples,
    table_VE: Tensor,
    places: dict[int, str],
    *,
    most: int,
    seed: int,
) -> Iterator[Finding]:
    """At most `most` rows by `match_rows`; nothing where that is 0, or where there is no site."""
    if not most or not places:
        return
    site = list(places)[len(places) // 2]
    part = attacked.of_rows(attacked.row_N.unique()[:most])

    validation_N = validation_rows(public.row_N, seed)
    inverter = fit_inverter(public.sites[site], public.ids_N, table_VE, validation_N)
    guess_N = match_rows(link, model, inverter, site, part.sites[site], part.row_N)
    scores = token_scores(guess_N, part.ids_N, part.row_N, public.ids_N.unique())

    says = (
        f"{scores['tokens']:.1%} of the tokens, "
        f"{scores['rows_exact']:.0%} of the rows word for word, of {part.num_rows} rows that were "
        "spelled out by trying tokens in the model itself, with public text alone"
    )
    yield finding(
        "matching",
        f"site {site}",
        places[site],
        says,
        "out-of-domain",
        **scores,
        rows=part.num_rows,
    )


def match_rows(
    link: Link, model: SplitModel, inverter: Inverter, site: int, x_ND: Tensor, row_N: Tensor
) -> Tensor:
    """Spell rows out from left to right by what comes to a site: token ids [N].

    Candidates of a position are the inverter's, and those that the model expects after the tokens
    chosen before. Each runs through the model, with the attacker's adapter; the token whose x comes
    closest is chosen.
    """
    rows = [(row_N == row).nonzero()[:, 0] for row in row_N.unique()]
    inverted_NC = inverter.candidates(x_ND, _CANDIDATES)
    seen: list[CloudView] = []
    model.set_active([name for at in model.sites if at.index == site for name in at.names])
    model.link = RecordingLink(
        link, lambda edge, cloud: seen.append(CloudView(edge, cloud)), training=False
    )
    model.eval()

    chosen_N = torch.zeros_like(row_N)
    expected: dict[int, Tensor] = {}  # by row: what the model expects next
    for t in tqdm(range(max(map(len, rows))), desc="matching", unit="token"):
        # Every candidate behind what its row has until now: as one batch, [C, t + 1].
        longer = [number for number, row in enumerate(rows) if len(row) > t]
        candidates = [
            torch.cat([inverted_NC[rows[n][t]], expected.get(n, inverted_NC[0, :0])]).unique()
            for n in longer
        ]
        ids_CT = torch.cat(
            [
                torch.cat([chosen_N[rows[n][:t]].expand(len(new), t), new[:, None]], 1)
                for n, new in zip(longer, candidates, strict=True)
            ]
        )

        with torch.no_grad():
            mask_CT = torch.ones_like(ids_CT)
            output = model(input_ids=ids_CT, attention_mask=mask_CT, logits_to_keep=1)
        logits_CV = output.logits[:, -1]
        x_CD = seen.pop().sites[site].x.view(*ids_CT.shape, -1)[:, -1]

        # Each row takes the nearest of its own candidates.
        start = 0
        for n, new in zip(longer, candidates, strict=True):
            end = start + len(new)
            best = start + int((x_CD[start:end] - x_ND[rows[n][t]]).norm(dim=1).argmin())
            chosen_N[rows[n][t]] = ids_CT[best, -1]
            expected[n] = logits_CV[best].topk(_CANDIDATES).indices
            start = end
    return chosen_N
