"""The attack on the adapter: B A of every module of the attacked sites, by least squares.

Several micro-batches give more rows, as long as they are of one optimizer step: the adapter is the
same in all of them. Those at the end of the recording are taken, where B is no longer zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dlora.privacy.attacks import Solution, relative_error, solve_adapters
from dlora.privacy.cloud_view import CloudView, SiteView
from dlora.privacy.findings import Finding, finding
from dlora.privacy.recording import Module, Recording

__all__ = ["attack_adapters", "sent_adapter"]

_EXACT: Final = 1e-3  # relative error up to which a module counts as known


def attack_adapters(recording: Recording, places: dict[int, str]) -> Iterator[Finding]:
    """Solve for every attacked site, and compare with the truth; nothing for bottlenecks."""
    views, modules = _views_of_one_adapter(recording)
    if not modules:  # what a bottleneck adds is no product that could be solved for
        return
    num_rows = sum(len(view.positions) for view in views)

    for site, where in tqdm(places.items(), desc="adapters", unit="site"):
        seen = [view.sites[site] for view in views]
        want = {one.module: one.B @ one.A for one in modules if one.site == site}
        solutions = _solve(seen)
        # A product that is still zero has no relative error.
        errors = [
            relative_error(solution.product_OD, want[module])
            for module, solution in zip(seen[0].modules, solutions, strict=True)
            if want[module].any()
        ]
        if not errors:
            continue

        worst = max(errors)
        determined = all(solution.determined for solution in solutions)
        yield finding(
            "adapter",
            f"site {site}",
            where,
            _in_words(worst, num_rows, determined),
            error=worst,
            errors=errors,
            rows=num_rows,
            in_features=seen[0].x.shape[1],
            ranks=[solution.rank for solution in solutions],
            determined=determined,
            known=sum(error <= _EXACT for error in errors) / len(errors),
        )


def sent_adapter(recording: Recording) -> Iterator[Finding]:
    """What the hosted wire sends needs no attack."""
    begin = recording.read(len(recording) - 1)[0].begin
    yield finding(
        "adapter",
        "begin",
        "begin",
        "the adapter itself, sent by --wire hosted",
        modules=len(begin.modules),
        known=1.0,
    )


def _views_of_one_adapter(recording: Recording) -> tuple[list[CloudView], list[Module]]:
    """The last micro-batches with one and the same adapter, and its modules.

    Only as many micro-batches as give rows enough.
    """
    last, truth, _ = recording.read(len(recording) - 1)
    views, modules = [last], truth.modules
    enough = 2 * max((one.A.shape[1] for one in modules), default=0)

    for number in range(len(recording) - 2, -1, -1):
        if sum(len(view.positions) for view in views) >= enough:
            break
        view, truth, _ = recording.read(number)
        pairs = zip(truth.modules, modules, strict=False)
        if not all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in pairs):
            break
        views.append(view)
    return views, modules


def _solve(seen: list[SiteView]) -> list[Solution]:
    """Solutions of one site from all its micro-batches, one below the other."""

    def stacked(parts: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(of_module) for of_module in zip(*parts, strict=True)]

    grads = [one.input_grad for one in seen]
    whole = [grad for grad in grads if grad is not None]
    return solve_adapters(
        torch.cat([one.x for one in seen]),
        stacked([one.deltas for one in seen]),
        factors=seen[0].factors,
        delta_grads=stacked([one.delta_grads for one in seen]),
        input_grad_ND=torch.cat(whole) if len(whole) == len(grads) else None,
    )


def _in_words(worst: float, num_rows: int, determined: bool) -> str:
    says = (
        f"the adapter's product B A to a relative error of {worst:.1e} or better, "
        f"from {num_rows} rows"
    )
    if not determined:
        says += (
            " (too few different ones for all of it: "
            "what it does to inputs like those seen is known exactly)"
        )
    return says
