"""All commands of `dlora`, in the order of the help."""

from __future__ import annotations

from typing import Final

from dlora.cli import serve, train, use
from dlora.cli.flags import Command
from dlora.cli.settings import DemoSettings, MergeSettings
from dlora.inference.settings import GenerationTexts
from dlora.kill_revive.config import KillReviveConfig
from dlora.training.trainer_settings import TrainerTexts

__all__ = ["COMMANDS"]


def _merge(settings: MergeSettings) -> int:
    """Write base model plus adapter as one full model, where the base is at hand."""
    from dlora.cli.merge import run_merge

    return run_merge(settings)


def _demo(settings: DemoSettings) -> int:
    """Server and edge in two processes on this machine: train, compare before and after."""
    from dlora.cli.demo import run_demo

    return run_demo(settings)


COMMANDS: Final = {
    "serve": Command(serve.serve),
    "keys": Command(serve.keys, word="action"),
    "status": Command(serve.status),
    "train": Command(train.train, inner={"kr_options": KillReviveConfig, "trainer": TrainerTexts}),
    "generate": Command(use.generate, inner={"generation": GenerationTexts}),
    "chat": Command(use.chat, inner={"generation": GenerationTexts}),
    "eval": Command(use.evaluate),
    "api": Command(use.api),
    "info": Command(use.info),
    "plan": Command(train.plan),
    "report": Command(train.report, word="runs"),
    "audit": Command(train.audit, word="run"),
    "merge": Command(_merge),
    "demo": Command(_demo),
}
"""Name -> command."""
