"""What a command refuses before it loads anything: files, folders, ports, patterns, packages.

Each check is of one command's settings and raises UsageError as "setting: reason", so that what is
said names the flag, or the key of a file, as it was typed. No torch here.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import socket
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Final

from dlora.cli.settings import DemoSettings, MergeSettings
from dlora.edge.data_files import data_files, read_file
from dlora.edge.data_forms import renamed
from dlora.edge.server_address import check_address
from dlora.edge.settings import AccessSettings, EdgeSettings, InfoSettings
from dlora.edge.task_forms import Task, task_form
from dlora.errors import DataError, UsageError
from dlora.extras import check_extra, is_installed
from dlora.inference.settings import ApiSettings, ChatSettings, EvalSettings, GenerateSettings
from dlora.privacy.settings import AuditSettings
from dlora.protocol.address import LOOPBACK_ADDRESS
from dlora.protocol.device import check_device_name
from dlora.runs import RunFolder
from dlora.tinker.settings import TinkerSettings
from dlora.training.data_settings import DataSettings
from dlora.training.output import check_folder
from dlora.training.plan_settings import PlanSettings
from dlora.training.rewards import check_rewards
from dlora.training.settings import ReportSettings, TrainSettings

__all__ = [
    "check_api",
    "check_audit",
    "check_data",
    "check_demo",
    "check_eval",
    "check_generate",
    "check_info",
    "check_merge",
    "check_mergeable",
    "check_model",
    "check_pattern",
    "check_plan",
    "check_port",
    "check_report",
    "check_talk",
    "check_tinker",
    "check_train",
]

_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BOTTLENECK: Final = "bottleneck_config.json"
_ADAPTER_FILES: Final = ("adapter_config.json", _BOTTLENECK)

# Where logs may go -> the module that it takes.
_LOGGERS: Final = {
    **{name: name for name in ("wandb", "mlflow", "comet_ml", "clearml", "neptune", "trackio")},
    **{name: name for name in ("codecarbon", "dagshub", "dvclive", "swanlab", "tensorboard")},
    **{"azure_ml": "azureml", "flyte": "flytekit", "kubeflow": "", "none": "", "all": ""},
}


# ----------------------------------------------------------------- one command each


def check_train(settings: TrainSettings) -> None:
    """Server, data, adapter, patterns, loggers, and the folder of the run."""
    _check_edge(settings)
    _check_source("data", settings.data)
    _check_source("eval_data", settings.eval_data)
    _check_adapter("adapter", settings.adapter)
    _check_targets(settings.target_modules)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, name):
            check_pattern(name, pattern)
    _check_loggers(settings.report_to)
    check_rewards(settings.reward)
    for source in filter(None, (settings.data, settings.eval_data)):
        _check_form(source, settings.columns, settings.task)
    check_folder(settings)


def check_plan(settings: PlanSettings) -> None:
    """Server, data, adapter and patterns."""
    _check_edge(settings)
    _check_source("data", settings.data)
    _check_source("eval_data", settings.eval_data)
    _check_adapter("adapter", settings.adapter)
    _check_targets(settings.target_modules)
    for pattern in settings.rank_pattern:
        check_pattern("rank_pattern", pattern)


def check_data(settings: DataSettings) -> None:
    """Server and data."""
    if settings.server is not None:
        _check_servers(settings.server)
    _check_access(settings)
    _check_source("data", settings.data)
    _check_targets(settings.target_modules)


def check_talk(settings: ChatSettings) -> None:
    """Server and adapter."""
    _check_edge(settings)
    _check_adapter("adapter", settings.adapter)


def check_generate(settings: GenerateSettings) -> None:
    """Server, adapter, and the files of prompts and answers."""
    _check_edge(settings)
    _check_adapter("adapter", settings.adapter)
    if settings.prompts is not None and not settings.prompts.is_file():
        raise UsageError(f"prompts: {settings.prompts}: no such file")
    _check_file_to_write("output", settings.output)


def check_eval(settings: EvalSettings) -> None:
    """Packages, server, adapter, data or tasks, and the file for the result."""
    if settings.tasks:
        check_extra("eval", "`dlora eval --tasks`")
    _check_edge(settings)
    _check_adapter("adapter", settings.adapter)
    _check_source("data", settings.data)
    if settings.tasks_path is not None and not settings.tasks_path.is_dir():
        raise UsageError(f"tasks_path: no such folder: {settings.tasks_path}")
    _check_file_to_write("output", settings.output)
    _check_file_to_write("predictions", settings.predictions)


def check_api(settings: ApiSettings) -> None:
    """Packages, server, adapters, and the port."""
    check_extra("api", "`dlora api`")
    _check_edge(settings)
    _check_adapter("adapter", settings.adapter)
    for folder in settings.adapters.values():
        _check_adapter("adapters", folder)
    check_port("port", settings.host, settings.port)


def check_tinker(settings: TinkerSettings) -> None:
    """Packages, server, the folder for what is saved, and the port."""
    check_extra("tinker", "`dlora tinker`")
    _check_edge(settings)
    _check_folder_to_write("output", settings.output)
    check_port("port", LOOPBACK_ADDRESS, settings.port)


def check_info(settings: InfoSettings) -> None:
    """Server and adapter."""
    if settings.server is not None:
        _check_servers(settings.server)
    _check_access(settings)
    _check_adapter("adapter", settings.adapter)


def check_report(settings: ReportSettings) -> None:
    """Packages, and the folders of runs."""
    check_extra("report", "`dlora report`")
    for run in settings.runs:
        _check_run("runs", run)
    _check_folder_to_write("output", settings.output)


def check_audit(settings: AuditSettings) -> None:
    """Packages, server, the run and its recording."""
    check_extra("report", "`dlora audit`")
    _check_servers(settings.server)
    _check_access(settings)
    _check_run("run", settings.run)
    _check_source("public", settings.public)
    _check_folder_to_write("output", settings.output)
    if not RunFolder(settings.run).recording.is_dir():
        raise UsageError(
            f"run: {settings.run} holds no recording: make one with `dlora train --record 24 ...`"
        )


def check_merge(settings: MergeSettings) -> None:
    """Model, adapter and the new folder."""
    check_model("model", settings.model)
    _check_adapter("adapter", settings.adapter)
    _check_folder_to_write("output", settings.output)
    if settings.output.exists() and any(settings.output.iterdir()):
        raise UsageError(f"output: {settings.output} is not empty: use a new folder")
    check_mergeable(settings.adapter)


def check_demo(settings: DemoSettings) -> None:
    """The folder of the run: its run may go on, unless it is finished."""
    _check_folder_to_write("output", settings.output)
    if RunFolder(settings.output).read().get("status") == "finished":
        raise UsageError(
            f"output: {settings.output} already holds a finished run: remove it, or give another"
        )


# ----------------------------------------------------------------- one thing each


def check_model(name: str, model: str) -> None:
    """A path has to be there; a hub id is for the hub to know."""
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # no such user
        path = path.expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"{name}: no such file: {model}")
    elif not path.is_dir() and (model.startswith((".", "~")) or not _HUB_ID.fullmatch(model)):
        raise UsageError(f"{name}: no such folder: {model}")


def check_mergeable(adapter: Path) -> None:
    """A bottleneck adapter cannot become a part of weights."""
    if (adapter / _BOTTLENECK).is_file():
        raise UsageError(
            f"adapter: {adapter} is a bottleneck: it is not linear and cannot become a part of the "
            "weights. dlora.apply_bottleneck(model, folder) puts it on a local model"
        )


def check_pattern(name: str, pattern: str) -> None:
    """A regular expression has to be one."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def check_port(name: str, host: str, port: int) -> None:
    """The port is free: it is taken for a moment, and given back."""
    if port == 0:
        return
    try:
        address = (host.strip("[]"), port)
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise UsageError(
            f"{name}: cannot listen on {host}:{port} ({error.strerror}): is it in use? Give "
            "another port, or 0 for any"
        ) from error


def _check_edge(settings: EdgeSettings) -> None:
    _check_servers(settings.server)
    check_device_name(settings.device)
    _check_access(settings)


def _check_servers(servers: str) -> None:
    for server in servers.split(","):
        check_address(server.strip())


def _check_access(settings: AccessSettings) -> None:
    """Certificates and token are there and can be read."""
    for name in ("tls_ca", "tls_cert", "tls_key", "token_file"):
        file: Path | None = getattr(settings, name)
        try:
            if file is not None:
                file.open("rb").close()
        except OSError as error:
            raise UsageError(f"{name}: {file}: {error.strerror}") from error
    _ = settings.access  # looks at the token


def _check_source(name: str, source: str | None) -> None:
    try:
        if source is not None:
            data_files(source)
    except DataError as error:
        raise UsageError(f"{name}: {error}") from error


def _check_form(source: str, columns: Mapping[str, str], task: Task) -> None:
    """The first row of files has the columns of a task; a hub's rows are for the run to ask for."""
    files = None if task == "sft" else data_files(source)
    for name, number, row in islice(chain.from_iterable(map(read_file, files or ())), 1):
        where = f"{name}:{number}"
        task_form(where, renamed(where, row, columns), task)


def _check_adapter(name: str, folder: Path | None) -> None:
    if folder is None:
        return
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder: {folder}")
    if not any((folder / file).is_file() for file in _ADAPTER_FILES):
        raise UsageError(f"{name}: {folder} holds no adapter: adapter_config.json is missing")


def _check_targets(targets: list[str] | str | None) -> None:
    if isinstance(targets, str):
        check_pattern("target_modules", targets)


def _check_loggers(names: Iterable[str]) -> None:
    for name in names:
        if name not in _LOGGERS:
            near = difflib.get_close_matches(name, _LOGGERS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"report_to: got {name!r}, want {', '.join(_LOGGERS)}{hint}")
        if _LOGGERS[name] and not is_installed(_LOGGERS[name]):
            raise UsageError(
                f"report_to: {_LOGGERS[name]} is not installed: pip install {_LOGGERS[name]}, or "
                "give none"
            )


def _check_run(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder: {folder}")
    if not RunFolder(folder).run_file.is_file():
        raise UsageError(f"{name}: {folder} holds no run of `dlora train`: there is no run.json")


def _check_file_to_write(name: str, file: Path | None) -> None:
    if file is not None and file.is_dir():
        raise UsageError(f"{name}: {file} is a folder, want a file")


def _check_folder_to_write(name: str, folder: Path) -> None:
    """The folder, or the nearest one above it that is there, is one."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{name}: {there} is a file, want a folder")
