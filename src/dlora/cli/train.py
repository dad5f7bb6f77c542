"""`dlora train`, `plan`, `report` and `audit`, and what they print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dlora.edge.settings import AccessSettings
from dlora.privacy.settings import AuditSettings
from dlora.protocol.device import try_device
from dlora.training.data_settings import DataSettings
from dlora.training.settings import PlanSettings, ReportSettings, TrainSettings

__all__ = ["audit", "data", "plan", "print_result", "report", "train"]


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

    from dlora.training.run import train

    transformers_logging.set_verbosity_error()
    try_device(settings.device)
    with _connected(settings.server, settings) as link:
        run = train(settings, link)
    print_result(run, settings.output)
    return 0 if run["status"] == "finished" else 130


def print_result(run: dict[str, Any], output: Path) -> None:
    """Print what a person wants to know after a run; `run` is the content of run.json."""
    from dlora.edge.meter import Meter

    cost = Meter.from_saved(run["cost"])
    print(f"{run['status']} after {run['steps']} steps and {run['seconds']:.0f} s: {_losses(run)}")

    print(
        f"traffic    {cost.sent_bytes / 1e6:.1f} MB up, {cost.received_bytes / 1e6:.1f} MB down, "
        f"{cost.round_trips} round trips, {cost.retries} retries"
    )
    print(
        f"compute    edge {cost.edge_flops / 1e9:.1f} GFLOP "
        f"(adapters {cost.adapter_flops / 1e9:.1f}), cloud {cost.cloud_flops / 1e9:.1f} GFLOP"
    )

    print(f"adapter    {output}")
    if kr := run.get("kill_revive"):
        print(
            f"active     {len(kr['active'])} units at the end; on average {kr['cost_share']:.1%} "
            "of FT's cost"
        )
    if run["status"] == "interrupted":
        print("continue   the same command with --resume")


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


def _losses(run: dict[str, Any]) -> str:
    """The last losses of a run, as far as there are some."""
    losses = f"loss {run['train_loss']:.4f}" if run["train_loss"] is not None else "no loss yet"
    if run["eval_loss"] is not None:
        best = run["best_eval_loss"] or run["eval_loss"]
        losses += f", eval loss {run['eval_loss']:.4f} (best {best:.4f})"
    return losses


def plan(settings: PlanSettings) -> int:
    """Edge: bytes, round trips and seconds of a training step, before anything is run."""
    from dlora.training.planner import check, plan

    try_device(settings.device)
    if settings.link is not None:
        return _plan_link(settings, settings.link)
    with _connected(settings.server, settings) as link:
        model, planned = plan(settings, link)
        print(
            f"model        {link.description.model_id}, {planned.active_sites} active sites, "
            f"{settings.wire} wire, {planned.in_flight} in flight"
        )
        _print_plan(settings, planned)
        if settings.check:
            _print_check(settings, planned, *check(settings, model))
    return 0


def _plan_link(settings: PlanSettings, name: str) -> int:
    """The ways to train over a link, and commands of the fastest."""
    from dlora.training.advice import SEEN, advise, command, table
    from dlora.training.link_speed import link_speed

    with _connected(settings.server, settings) as link:
        rows, model_id = advise(settings, link), link.description.model_id
    print(f"{model_id} over {link_speed(name)}; {settings.batch_size} x {settings.length} tokens")
    print("a micro-batch. MB and seconds are of an optimizer step.\n")
    print("\n".join(table(rows)))

    print("\n*  the fastest that shows no more, trained as local tuning would")
    if any(row.mark == "+" for row in rows):
        print(
            "+  faster still, but another training: few modules at a time, or fewer, larger steps"
        )
    for row in rows:
        if row.mark:
            print(f"\n{row.mark}  the cloud sees {SEEN[row.choice.wire]}:\n   {command(row)}")
    return 0


def _print_plan(settings: PlanSettings, planned: Any) -> None:
    """One step, then the whole run."""
    several = settings.gradient_accumulation_steps
    times = f"{several} micro-batches of " if several > 1 else ""
    print(f"a step       {times}{settings.batch_size} x {settings.length} tokens")
    sent, received = planned.sent_bytes / 1e6, planned.received_bytes / 1e6
    print(f"bytes        {sent:.2f} MB up, {received:.2f} MB down")
    print(f"round trips  {planned.round_trips}")

    parts = f"cloud {planned.cloud_s:.2f}, edge {planned.edge_s:.2f}, "
    parts += f"messages {planned.wire_s:.2f}, link {planned.link_s:.2f}"
    print(f"seconds      {planned.seconds:.2f}: {parts}")

    gigabytes = settings.steps * (sent + received) / 1e3
    hours = settings.steps * planned.seconds / 3600
    print(f"{settings.steps} steps   {gigabytes:.2f} GB, {hours:.2f} h")


def _print_check(settings: PlanSettings, planned: Any, cost: Any, seconds: float) -> None:
    """How far the plan is from steps that were run."""
    traffic = planned.sent_bytes + planned.received_bytes
    off = traffic / (cost.sent_bytes + cost.received_bytes) - 1
    checked = f"checked      bytes off by {off:+.2%}, round trips {cost.round_trips}, "

    link = (settings.rtt_ms, settings.up_mbit, settings.down_mbit)
    if any(value is not None for value in link):
        print(f"{checked}seconds not compared: the link here is not the one that was given")
    else:
        print(f"{checked}seconds {seconds:.2f}, off by {planned.seconds / seconds - 1:+.0%}")


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

    for attack in results["attacks"]:
        print(f"{attack['where']:28} {attack['says']}")
    for file in write_audit(results, settings.output):
        print(file)
    return 0
