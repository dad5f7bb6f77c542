"""Which modules a plan is made with: all, so many sites, or what Kill and Revive would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Final

from dlora.edge.model import SplitModel
from dlora.edge.sites import ActiveSite
from dlora.kill_revive.config import from_options
from dlora.kill_revive.costs import Rows
from dlora.kill_revive.foresee import Foreseen, foresee
from dlora.kill_revive.units import costs_of, units_of
from dlora.training.calibrate import evenly_spread
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_traffic import Load

__all__ = ["STEPS", "foreseen", "planned_sites", "sites_with"]

STEPS: Final = 1000
"""Of a run whose length is not known."""


def foreseen(
    settings: PlanSettings, model: SplitModel, load: Load | None = None, steps: int = STEPS
) -> Foreseen | None:
    """What Kill and Revive will train and take in such a run; None where it is off.

    `load` is what travels of a micro-batch, where `length` has padding in it.
    """
    if settings.kr == "off":
        return None
    load = load or Load.of(settings)
    tokens = max(1.0, load.tokens)
    rows = Rows(tokens, load.supervised / tokens, settings.gradient_accumulation_steps)
    options = model.options.changed(
        wire=settings.wire,
        wire_dtype=settings.wire_dtype,
        input_grad=settings.input_grad,
        in_flight=1,
        upload_consent=settings.wire == "hosted" or model.options.upload_consent,
    )

    # A fresh adapter adds nothing yet: what is killed at its beginning does not fade.
    config = from_options(settings.kr, settings.kr_options)
    costs = costs_of(model, config.cost, rows, options)
    going = () if settings.adapter is None else model.adapted_modules
    return foresee(config, units_of(model, config.unit), costs, steps, going)


def planned_sites(
    settings: PlanSettings, model: SplitModel, load: Load | None = None
) -> list[ActiveSite]:
    """The sites that a plan is made with, each with its active modules alone."""
    if settings.sites is not None:
        return evenly_spread(model, min(settings.sites, len(model.sites)))
    steps = settings.max_steps if settings.max_steps > 0 else STEPS
    found = foreseen(settings, model, load, steps)
    return list(model.sites) if found is None else sites_with(model.sites, found.modules)


def sites_with(sites: Sequence[ActiveSite], modules: Collection[str]) -> list[ActiveSite]:
    """The sites with these modules alone, without those that have none of them."""
    found, wanted = [], set(modules)
    for site in sites:
        kept = [number for number, name in enumerate(site.names) if name in wanted]
        if kept:
            found.append(
                dataclasses.replace(
                    site,
                    modules=tuple(site.modules[number] for number in kept),
                    layers=tuple(site.layers[number] for number in kept),
                    names=tuple(site.names[number] for number in kept),
                )
            )
    return found
