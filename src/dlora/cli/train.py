"""`dlora train`, `plan`, `report` and `audit`, and what they print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

from dlora.cli.lines import show, wrapped
from dlora.edge.settings import AccessSettings
from dlora.privacy.settings import AuditSettings
from dlora.protocol.device import try_device
from dlora.training.data_settings import DataSettings
from dlora.training.plan_settings import PlanSettings
from dlora.training.settings import ReportSettings, TrainSettings

__all__ = ["audit", "data", "plan", "report", "train"]


@contextmanager
def _connected(server: str, settings: AccessSettings) -> Iterator[Any]:
    """A connection to the server, ended afterwards."""
    from dlora.edge.grpc_link import Access, connect

    link = connect(server, access=Access(**settings.access))
    try:
        yield link
    finally:
        link.close()


def train(settings: TrainSettings) -> int:
    """Edge: train an adapter with private data against a server.

    The code is 130 if the run was interrupted.
    """
    from transformers.utils import logging as transformers_logging

    from dlora.cli.train_screen import ending, shown
    from dlora.training.run import train

    transformers_logging.set_verbosity_error()
    try_device(settings.device)
    with _connected(settings.server, settings) as link, shown(settings) as screen:
        run = train(settings, link, screen)
    show(ending(run, settings))
    return 0 if run["status"] == "finished" else 130


def data(settings: DataSettings) -> int:
    """Edge: what training would learn from data: rows as tokens, lengths, what an epoch costs."""
    from transformers.utils import logging as transformers_logging

    from dlora.training.data_report import describe

    transformers_logging.set_verbosity_error()
    connection = nullcontext() if settings.server is None else _connected(settings.server, settings)
    with connection as link:
        for line in describe(settings, link):
            print(line, flush=True)
    return 0


def plan(settings: PlanSettings) -> int:
    """Edge: bytes, round trips and seconds of a training run, before anything is trained."""
    from transformers.utils import logging as transformers_logging

    from dlora.cli.plan_screen import plan_lines

    transformers_logging.set_verbosity_error()
    try_device(settings.device)
    with _connected(settings.server, settings) as link:
        for line in plan_lines(settings, link):
            if isinstance(line, str):
                print(line, flush=True)
            else:
                show([line])
    return 0


def report(settings: ReportSettings) -> int:
    """Figures of one or several runs: one HTML file, and PNGs."""
    from dlora.training.report import write_report

    for file in write_report(settings.runs, settings.output):
        print(file)
    return 0


def audit(settings: AuditSettings) -> int:
    """Edge: how much a curious cloud could recover from a recorded run."""
    from transformers.utils import logging as transformers_logging

    from dlora.privacy.audit import audit
    from dlora.privacy.page import check_drawing, write_audit

    transformers_logging.set_verbosity_error()
    check_drawing()
    with _connected(settings.server, settings) as link:
        results = audit(settings, link)

    files = write_audit(results, settings.output)
    show([("verdict", results["verdict"]["says"])])
    if ways := results["verdict"]["ways"]:
        print("\nWhat changes it (flags of dlora train; docs/privacy.md has what they cost):")
    for way in ways:
        print(f"  {way['flags']}\n{wrapped(way['says'], '      ')}")

    # Every attack, under the place where it was made.
    for where, attacks in groupby(results["attacks"], key=lambda attack: attack["where"]):
        print(f"\n{where}")
        for attack in attacks:
            print(wrapped(attack["says"], "  "))
    print()
    for file in files:
        print(file)
    return 0
