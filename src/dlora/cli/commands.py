"""All commands of `dlora`, in the order of the help."""

from __future__ import annotations

from typing import Final

from dlora.cli import checks, serve, tinker, train, use
from dlora.cli.flags import Command
from dlora.cli.settings import DemoSettings, EnvSettings, MergeSettings
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


def _env(settings: EnvSettings) -> int:
    """What a bug report should say: versions, machine, devices, packages."""
    from dlora.cli.env import environment

    for name, value in environment():
        print(f"{name:22} {value}")
    return 0


COMMANDS: Final = {
    "serve": Command(serve.serve, check=serve.check_serve),
    "keys": Command(serve.keys, word="action", check=serve.check_keys),
    "status": Command(serve.status, check=serve.check_status),
    "data": Command(train.data, word="data", check=checks.check_data),
    "train": Command(
        train.train,
        inner={"kr_options": KillReviveConfig, "trainer": TrainerTexts},
        check=checks.check_train,
    ),
    "generate": Command(
        use.generate, inner={"generation": GenerationTexts}, check=checks.check_generate
    ),
    "chat": Command(use.chat, inner={"generation": GenerationTexts}, check=checks.check_talk),
    "eval": Command(use.evaluate, check=checks.check_eval),
    "api": Command(use.api, check=checks.check_api),
    "tinker": Command(tinker.tinker, check=checks.check_tinker),
    "info": Command(use.info, check=checks.check_info),
    "plan": Command(train.plan, check=checks.check_plan),
    "report": Command(train.report, word="runs", check=checks.check_report),
    "audit": Command(train.audit, word="run", check=checks.check_audit),
    "merge": Command(_merge, check=checks.check_merge),
    "demo": Command(_demo, check=checks.check_demo),
    "env": Command(_env),
}
"""Name -> command."""
