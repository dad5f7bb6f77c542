"""All commands of `dlora`, in the order of the help."""

from __future__ import annotations

from typing import Final

from dlora.cli import checks, serve, tinker, train, use
from dlora.cli.flags import Command
from dlora.cli.settings import DemoSettings, EnvSettings, MergeSettings
from dlora.inference.settings import GenerationTexts
from dlora.kill_revive.config import KillReviveConfig
from dlora.training.settings import TrainSettings
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


_MODEL: Final = "with the model (the cloud)"
_DATA: Final = "with the data (the edge): training"
_ADAPTER: Final = "with an adapter (the edge): using it"
_MORE: Final = "more"

COMMANDS: Final = {
    "serve": Command(serve.serve, _MODEL, check=serve.check_serve),
    "keys": Command(serve.keys, _MODEL, word="action", check=serve.check_keys),
    "status": Command(serve.status, _MODEL, check=serve.check_status),
    "data": Command(train.data, _DATA, word="data", check=checks.check_data),
    "plan": Command(
        train.plan,
        _DATA,
        inner={"kr_options": KillReviveConfig},
        beside=TrainSettings,
        check=checks.check_plan,
    ),
    "train": Command(
        train.train,
        _DATA,
        inner={"kr_options": KillReviveConfig, "trainer": TrainerTexts},
        check=checks.check_train,
    ),
    "report": Command(train.report, _DATA, word="runs", check=checks.check_report),
    "audit": Command(train.audit, _DATA, word="run", check=checks.check_audit),
    "generate": Command(
        use.generate, _ADAPTER, inner={"generation": GenerationTexts}, check=checks.check_generate
    ),
    "chat": Command(
        use.chat, _ADAPTER, inner={"generation": GenerationTexts}, check=checks.check_talk
    ),
    "eval": Command(use.evaluate, _ADAPTER, check=checks.check_eval),
    "api": Command(use.api, _ADAPTER, check=checks.check_api),
    "tinker": Command(tinker.tinker, _ADAPTER, check=checks.check_tinker),
    "merge": Command(_merge, _ADAPTER, check=checks.check_merge),
    "info": Command(use.info, _MORE, check=checks.check_info),
    "demo": Command(_demo, _MORE, check=checks.check_demo),
    "env": Command(_env, _MORE),
}
"""Name -> command, in the order of the help."""
