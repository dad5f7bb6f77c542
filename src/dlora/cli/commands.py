"""All commands of `dlora`: what each reads, what it does, and its line in the help."""

from __future__ import annotations

from typing import Final

from dlora.cli import serve, train, use
from dlora.cli.flags import Command
from dlora.cli.settings import DemoSettings, MergeSettings
from dlora.edge.settings import InfoSettings
from dlora.inference.settings import ApiSettings, ChatSettings, EvalSettings, GenerateSettings
from dlora.kill_revive.config import KillReviveConfig
from dlora.privacy.settings import AuditSettings
from dlora.server.settings import KeysSettings, ServeSettings, StatusSettings
from dlora.training.settings import PlanSettings, ReportSettings, TrainSettings

__all__ = ["COMMANDS"]


def _merge(settings: MergeSettings) -> int:
    from dlora.cli.merge import run_merge

    return run_merge(settings)


def _demo(settings: DemoSettings) -> int:
    from dlora.cli.demo import run_demo

    return run_demo(settings)


_ALL: Final = (
    Command(
        name="serve",
        settings=ServeSettings,
        run=serve.serve,
        text="Cloud: load a model, freeze it, and serve edges until Ctrl-C.",
    ),
    Command(
        name="keys",
        settings=KeysSettings,
        run=serve.keys,
        text="Cloud: certificates, tenants and tokens for a server of one's own.",
        word="action",
    ),
    Command(
        name="status",
        settings=StatusSettings,
        run=serve.status,
        text="Cloud: who uses a server on this machine, and how much.",
    ),
    Command(
        name="train",
        settings=TrainSettings,
        run=train.train,
        text="Edge: train an adapter with private data against a server.",
        inner={"kr_options": KillReviveConfig},
    ),
    Command(
        name="generate",
        settings=GenerateSettings,
        run=use.generate,
        text="Edge: answer a prompt, standard input, or a file of prompts.",
    ),
    Command(
        name="chat",
        settings=ChatSettings,
        run=use.chat,
        text="Edge: talk with the model and a private adapter.",
    ),
    Command(
        name="eval",
        settings=EvalSettings,
        run=use.evaluate,
        text="Edge: loss and perplexity, exact match, or choice accuracy on a data file.",
    ),
    Command(
        name="api",
        settings=ApiSettings,
        run=use.api,
        text="Edge: an OpenAI-compatible server on loopback, over a private adapter.",
    ),
    Command(
        name="info",
        settings=InfoSettings,
        run=use.info,
        text="What a server serves, and what an adapter folder holds.",
    ),
    Command(
        name="plan",
        settings=PlanSettings,
        run=train.plan,
        text="Edge: bytes, round trips and seconds of a training step, before anything is run.",
    ),
    Command(
        name="report",
        settings=ReportSettings,
        run=train.report,
        text="Figures of one or several runs: one HTML file, and PNGs.",
        word="runs",
    ),
    Command(
        name="audit",
        settings=AuditSettings,
        run=train.audit,
        text="Edge: how much a curious cloud could recover from a recorded run.",
        word="run",
    ),
    Command(
        name="merge",
        settings=MergeSettings,
        run=_merge,
        text="Write base model plus adapter as one full model, where the base is at hand.",
    ),
    Command(
        name="demo",
        settings=DemoSettings,
        run=_demo,
        text="Server and edge in two processes on this machine: train, compare before and after.",
    ),
)

COMMANDS: Final = {command.name: command for command in _ALL}
"""Name -> command, in the order of the help."""
