"""The first words with the command line: what cannot work is said before anything is loaded."""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import dlora
from dlora.cli.commands import COMMANDS
from dlora.cli.main import main
from dlora.cli.parser import Request, parse
from dlora.extras import install_command, missing_extra
from dlora.protocol.device import check_device_name, try_device

ROOT = Path(dlora.__file__).parents[2]
SERVED = ["--server", "127.0.0.1:1"]
TRAIN = ["train", *SERVED, "--data", "d.jsonl", "--output", "new"]
AUDIT = ["audit", "run", "--server", "127.0.0.1:1"]
MERGE = ["merge", "--model", "base", "--adapter", "adapter", "--output", "new"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in: data, an adapter, a run, keys, and wrong ones of each."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "base", "adapter", "bottle", "run", "full/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "bottle/bottleneck_config.json").write_text("{}")
    (tmp_path / "run/run.json").write_text('{"status": "finished"}')
    for name, mode in (("open.token", 0o644), ("secret.token", 0o600)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    return tmp_path


CHECKED: list[tuple[list[str], str]] = [
    # servers, and who asks
    (["train", "--server", "localhost", *TRAIN[3:]], "train: --server: got 'localhost', want host"),
    (["chat", "--server", "http://a:1"], "chat: --server: got 'http://a:1', want host:port"),
    (["chat", "--server", "a:1,b"], "chat: --server: got 'b', want host:port"),
    (["plan", "--server", "a:99999"], "plan: --server: got 'a:99999', want host:port"),
    (["info", "--server", "a"], "info: --server: got 'a', want host:port"),
    (["data", "d.jsonl", "--server", "a"], "data: --server: got 'a', want host:port"),
    ([*AUDIT[:3], "a"], "audit: --server: got 'a', want host:port"),
    ([*TRAIN, "--tls_ca", "no.pem"], "train: --tls_ca: no.pem: No such file"),
    ([*TRAIN, "--tls-cert", "no.pem"], "train: --tls-cert: no.pem: No such file"),
    ([*TRAIN, "--token_file", "no"], "train: --token_file: no: No such file"),
    ([*TRAIN, "--token_file", "open.token"], "train: open.token holds secrets and is open to"),
    # devices
    ([*TRAIN, "--device", "gpu"], "train: --device: got 'gpu', want cpu, cuda, cuda:1 or mps"),
    (
        [*TRAIN, "--device", "cudda"],
        "train: --device: got 'cudda', want cpu, cuda, cuda:1 or mps; ",
    ),
    ([*TRAIN, "--device", "cuda:x"], "train: --device: got 'cuda:x', want"),
    (["serve", "--model", "base", "--device", "CUDA"], "serve: --device: got 'CUDA', want"),
    (["serve", "--model", "base", "--device", "auto"], "serve: --device: got 'auto', want one dev"),
    # data: a path that is not there is no data set of the hub
    (
        ["train", *SERVED, "--output", "new", "--data", "no.jsonl"],
        "train: --data: no.jsonl: no such",
    ),
    (
        ["train", *SERVED, "--output", "new", "--data", "no.TSV"],
        "train: --data: no.TSV: no such file",
    ),
    (["train", *SERVED, "--output", "new", "--data", "./no"], "train: --data: ./no: no such file"),
    (
        ["train", *SERVED, "--output", "new", "--data", "a/b/c"],
        "train: --data: a/b/c: no such file",
    ),
    (["train", *SERVED, "--output", "new", "--data", "/no"], "train: --data: /no: no such file"),
    (["train", *SERVED, "--output", "new", "--data", "empty"], "train: --data: empty: no data in"),
    (
        ["train", *SERVED, "--output", "new", "--data", "d.jsonl,no.csv"],
        "train: --data: no.csv: no such file",
    ),
    (
        ["train", *SERVED, "--output", "new", "--data", "d.jsonl,org/name"],
        "train: --data: org/name: no such file",
    ),
    ([*TRAIN, "--eval_data", "no.csv"], "train: --eval_data: no.csv: no such file"),
    (["eval", *SERVED, "--data", "no.jsonl"], "eval: --data: no.jsonl: no such file"),
    (["data", "no.jsonl"], "data: DATA: no.jsonl: no such file"),
    ([*AUDIT, "--public", "no.txt"], "audit: --public: no.txt: no such file"),
    ([*TRAIN, "--columns", "question"], "train: --columns: got 'question', want names and values"),
    ([*TRAIN, "--columns", "promt=q"], "train: --columns: got 'promt' in front of =, want prompt,"),
    ([*TRAIN, "--val_size", "2.5"], "train: --val_size: got 2.5, want a share under 1 or a whole"),
    ([*TRAIN, "--val_size", "-1"], "train: --val_size: got -1, want a share under 1 or a whole"),
    (
        [*TRAIN, "--val_size", "0.1", "--eval_data", "d.jsonl"],
        "train: --val_size: rows are held out in place of eval_data",
    ),
    # adapters
    ([*TRAIN, "--adapter", "no"], "train: --adapter: no such folder: no"),
    ([*TRAIN, "--adapter", "empty"], "train: --adapter: empty holds no adapter: adapter_config"),
    (["generate", *SERVED, "--adapter", "no"], "generate: --adapter: no such folder: no"),
    (["chat", *SERVED, "--adapter", "empty"], "chat: --adapter: empty holds no adapter"),
    (["eval", *SERVED, "--data", "d.jsonl", "--adapter", "no"], "eval: --adapter: no such folder"),
    (["info", "--adapter", "no"], "info: --adapter: no such folder: no"),
    (["api", *SERVED, "--adapter", "no"], "api: --adapter: no such folder: no"),
    (["api", *SERVED, "--adapters", "a=adapter,b=no"], "api: --adapters: no such folder: no"),
    (["api", *SERVED, "--adapters", "adapter"], "api: --adapters: got 'adapter', want names and"),
    (
        ["api", *SERVED, "--adapters", "a=adapter", "--adapter", "adapter"],
        "api: --adapters: they have names; leave adapter and name out",
    ),
    # patterns
    ([*TRAIN, "--target_modules", "(q"], "train: --target_modules: '(q' is no regular expression"),
    (["plan", *SERVED, "--target_modules", "(q"], "plan: --target_modules: '(q' is no regular"),
    ([*TRAIN, "--rank_pattern", "(q=4"], "train: --rank_pattern: '(q' is no regular expression"),
    ([*TRAIN, "--alpha_pattern.[", "4"], "train: --alpha_pattern.[: '[' is no regular expression"),
    (["serve", "--model", "base", "--allow_modules", "["], "serve: --allow_modules: '[' is no reg"),
    # loggers
    ([*TRAIN, "--report_to", "wanb"], "train: --report_to: got 'wanb', want wandb, "),
    # files and folders to write
    (["train", *SERVED, "--data", "d.jsonl", "--output", "run"], "train: run already holds a run"),
    (["train", *SERVED, "--data", "d.jsonl", "--output", "full"], "train: full is not empty: use"),
    (["train", *SERVED, "--data", "d.jsonl", "--output", "d.jsonl"], "train: --output: d.jsonl is"),
    (["generate", *SERVED, "--prompts", "no.txt"], "generate: --prompts: no.txt: no such file"),
    (
        ["generate", *SERVED, "--prompts", "d.jsonl", "--output", "empty"],
        "generate: --output: empty is a folder, want a file",
    ),
    (
        ["eval", *SERVED, "--data", "d.jsonl", "--output", "empty"],
        "eval: --output: empty is a folder, want a file",
    ),
    (
        ["report", "run", "--output", "d.jsonl"],
        "report: --output: d.jsonl is a file, want a folder",
    ),
    ([*AUDIT, "--output", "d.jsonl/x"], "audit: --output: d.jsonl is a file, want a folder"),
    (["demo", "--output", "run"], "demo: --output: run already holds a finished run"),
    (["demo", "--output", "d.jsonl"], "demo: --output: d.jsonl is a file, want a folder"),
    # runs
    (["report", "no"], "report: RUNS: no such folder: no"),
    (["report", "run", "empty"], "report: RUNS: empty holds no run of `dlora train`"),
    (["audit", "no", *AUDIT[2:]], "audit: RUN: no such folder: no"),
    (["audit", "empty", *AUDIT[2:]], "audit: RUN: empty holds no run of `dlora train`"),
    (AUDIT, "audit: RUN: run holds no recording: make one with `dlora train --record 24"),
    ([*TRAIN, "--resume"], "train: --resume: new holds no run"),
    ([*TRAIN[:-1], "run", "--resume"], "train: --resume continues the same run, but these"),
    (["plan", *SERVED, "--data", "no.csv"], "plan: --data: no.csv: no such file"),
    (["plan", *SERVED, "--data", "d.jsonl", "--length", "9"], "plan: --length: the rows of data"),
    (
        ["eval", *SERVED, "--data", "d.jsonl", "--predictions", "empty"],
        "eval: --predictions: empty is a folder, want a file",
    ),
    # models
    ([*MERGE[:2], "./no", *MERGE[3:]], "merge: --model: no such folder: ./no"),
    ([*MERGE[:2], "no.gguf", *MERGE[3:]], "merge: --model: no such file: no.gguf"),
    ([*MERGE[:4], "empty", *MERGE[5:]], "merge: --adapter: empty holds no adapter"),
    ([*MERGE[:4], "bottle", *MERGE[5:]], "merge: --adapter: bottle is a bottleneck: it is not"),
    ([*MERGE[:6], "full"], "merge: --output: full is not empty: use a new folder"),
    ([*MERGE[:6], "d.jsonl"], "merge: --output: d.jsonl is a file, want a folder"),
    # how much is said
    ([*TRAIN, "--quiet", "--verbose"], "train: give --quiet or --verbose, not both"),
    ([*TRAIN, "--quiet", "--log_level", "error"], "train: give --quiet or --log_level, not both"),
    ([*TRAIN, "--log_level", "loud"], "train: --log_level: got 'loud', want debug, info, warning"),
    ([*TRAIN, "--loglevel", "info"], "train: unknown flag --loglevel; did you mean --log_level?"),
    (["env", "--all"], "env: unknown flag --all; see dlora env --help"),
]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("argv", "message"), CHECKED, ids=[" ".join(argv) for argv, _ in CHECKED])
def test_what_cannot_work_here_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that names what is not there ends with code 2 and one line with the flag as it was
    typed, before a server is asked."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dlora: {message}"), captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")


@pytest.mark.usefixtures("place")
def test_such_commands_load_nothing() -> None:
    """All of them together load no torch and no transformers, in one process."""
    code = (
        "import sys\nfrom dlora.cli.main import main\n"
        f"for argv in {[argv for argv, _ in CHECKED]!r}:\n    assert main(argv) == 2, argv\n"
        "heavy = {'torch', 'transformers', 'grpc', 'datasets', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("\n") == len(CHECKED)


def test_a_key_of_a_file_is_named_by_its_place(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a settings file names and is not there has the file and the key in front."""
    (place / "run.yaml").write_text("server: a:1\ndata: no.csv\noutput: new\n")
    assert main(["train", "--config", "run.yaml"]) == 2
    assert capsys.readouterr().err == "dlora: train: run.yaml: data: no.csv: no such file\n"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("command", ["api", "serve"])
def test_a_taken_port_is_refused_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A port in use is named before anything is loaded or asked."""
    words = {"api": [*SERVED], "serve": ["--model", "base"]}[command]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([command, *words, "--port", port]) == 2
    said = f"dlora: {command}: --port: cannot listen on 127.0.0.1:{port} ("
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("argv", "modules"),
    [
        (["api", *SERVED], ("uvicorn",)),
        (["report", "run"], ("matplotlib",)),
        (AUDIT, ("jinja2",)),
        (["keys", "list"], ("cryptography",)),
        (["status"], ("prometheus_client",)),
        (["serve", "--model", "base", "--quantize", "nf4"], ("bitsandbytes",)),
        (["eval", *SERVED, "--tasks", "arc_easy"], ("lm_eval",)),
        (["serve", "--model", "base", "--replicas", "2"], ("ray",)),
    ],
)
def test_a_missing_extra_is_one_line_that_installs_it(
    argv: list[str],
    modules: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not installed is said before anything is loaded, with a command that names packages,
    and not this project, which is on no index."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "needs " in error and "install " in error
    assert 'install "dlora[' not in error and "install dlora" not in error
    assert modules[0].replace("_", "-") in error.rpartition("install ")[2]


def test_a_logger_that_is_not_installed_is_said_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--report_to wandb` without wandb ends before a server is asked; `none` needs nothing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*TRAIN, "--report_to", "wandb"]) == 2
    assert "--report_to: wandb is not installed: pip install wandb" in capsys.readouterr().err
    request = parse([*TRAIN, "--report_to", "none"], COMMANDS)
    assert isinstance(request, Request)
    request.check()


def test_every_extra_can_be_installed() -> None:
    """Each extra of pyproject.toml has a command that names all of its packages and no others, and
    is in the README; no document and no message installs the project by its name alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    del extras["dev"]
    readme = (ROOT / "README.md").read_text()
    assert f'".[{",".join(sorted(extras))}]"' in readme
    for extra, packages in extras.items():
        given = shlex.split(install_command(extra).partition(" install ")[2])
        assert sorted(one for one in given if ">=" in one) == sorted(packages)
        assert install_command(extra) in str(missing_extra(extra, "x")) and f"`{extra}`" in readme
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")):
        assert not re.search(r"pip install [\"']?dlora(\[\w|\b)(?!.*@)", file.read_text()), file


# ----------------------------------------------------------------- devices


def test_devices_are_tried_before_anything_is_loaded() -> None:
    """A device that this machine lacks is refused by name; the processor is always there."""
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        check_device_name(name)
    try_device("cpu")
    with pytest.raises(ValueError, match="device: 'hpu' cannot be used here: "):
        try_device("hpu")


# ----------------------------------------------------------------- how much is said


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ([], logging.INFO),
        (["--quiet"], logging.WARNING),
        (["--verbose"], logging.DEBUG),
        (["--log_level", "error"], logging.ERROR),
        (["--log-level=debug"], logging.DEBUG),
    ],
)
def test_how_much_is_said(
    flags: list[str], level: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The level that is asked for holds while the command runs, for DLoRA and for what it starts,
    and is as before afterwards."""
    seen: dict[str, Any] = {}

    def write_report(runs: list[Path], output: Path) -> list[Path]:
        seen["level"] = logging.getLogger("dlora.any").getEffectiveLevel()
        seen["bars"] = os.environ.get("TQDM_DISABLE")
        return []

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("dlora.training.report.write_report", write_report)
    (tmp_path / "run.json").write_text("{}")
    before = logging.getLogger().level, logging.getLogger("dlora").level
    assert main(["report", str(tmp_path), *flags]) == 0
    assert seen == {"level": level, "bars": "1" if level > logging.INFO else None}
    assert (logging.getLogger().level, logging.getLogger("dlora").level) == before
    assert "TQDM_DISABLE" not in os.environ


def test_the_level_may_stand_in_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`log_level` is a key as well; it is no setting, so that --print_config leaves it out."""
    (place / "run.yaml").write_text("log_level: warning\n")
    request = parse([*TRAIN, "--config", "run.yaml"], COMMANDS)
    assert isinstance(request, Request) and request.log_level == "warning"
    assert main([*TRAIN, "--quiet", "--print_config"]) == 0
    assert "quiet" not in capsys.readouterr().out


# ----------------------------------------------------------------- dlora env


def test_env_tells_versions_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dlora env` has what a bug report needs; a token in the environment is named, not shown."""
    monkeypatch.setenv("DLORA_TOKEN", "SECRET")
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    found = {line.split()[0]: line for line in out.splitlines()}
    assert {"dlora", "python", "system", "machine", "torch", "peft", "trl", "ray"} <= found.keys()
    assert "SECRET" not in out and found["DLORA_TOKEN"].endswith("is set")
    assert found["OMP_NUM_THREADS"].split()[1] == "1" and "pytest" not in found


# ----------------------------------------------------------------- real processes


def test_a_wrong_command_is_one_line_of_a_process(place: Path) -> None:
    """The entry point itself: nothing on standard output, one line, code 2."""
    for argv in (["trian"], ["train", "--lr_sched", "x"], [*TRAIN[:-4], "--output", "o"]):
        done = subprocess.run(
            [sys.executable, "-m", "dlora", *argv], capture_output=True, text=True, cwd=place
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_verbose_shows_where_an_error_was_raised(
    place: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --verbose the log has the error's traceback, beside the one line."""
    assert main(["eval", *SERVED, "--data", "no.csv", "--verbose"]) == 2
    assert "where it was raised" in caplog.text and "Traceback" in caplog.text
    caplog.clear()
    assert main(["eval", *SERVED, "--data", "no.csv"]) == 2
    assert "where it was raised" not in caplog.text
