"""The command line: what is wrong is one line and code 2, and what is right arrives as given."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import logging
import socket
import subprocess
import sys
import threading
import types
import typing
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dlora.cli import flags
from dlora.cli.commands import COMMANDS
from dlora.cli.flags import OLD_NAMES, flags_of, groups_of
from dlora.cli.help import Note
from dlora.cli.main import main
from dlora.cli.parser import parse
from dlora.cli.serve import check_serve
from dlora.cli.values import convert
from dlora.errors import UsageError
from dlora.server.settings import ServeSettings
from dlora.version import __version__

TRAIN = ["train", "--server", "a:1", "--data", "d.jsonl", "--output", "o"]
HOSTED = ["--wire", "hosted", "--upload_consent", "true"]
GENERATE = ["generate", "--server", "a:1"]
SEE = "see dlora train --help"


def settings(*argv: str) -> Any:
    """The settings that a command line stands for; the command itself is not run."""
    request = parse(list(argv), COMMANDS)
    assert not isinstance(request, str)
    return request[1]


# ----------------------------------------------------------------- what is wrong


WRONG: list[tuple[list[str], str]] = [
    # commands
    (["frobnicate"], "unknown command frobnicate; see dlora --help"),
    (["trian"], "unknown command trian; did you mean train? See dlora --help"),
    (["--bogus"], "unknown flag --bogus; see dlora --help"),
    (["help", "trian"], "unknown command trian; did you mean train? See dlora --help"),
    (["-x"], "unknown flag -x; see dlora --help"),
    # unknown and misspelt flags, as they were typed
    (
        ["train", "--leraning_rate", "1"],
        "train: unknown flag --leraning_rate; did you mean --learning_rate? See dlora train --help",
    ),
    (
        ["train", "--leraning-rate=1"],
        "train: unknown flag --leraning-rate; did you mean --learning_rate? See dlora train --help",
    ),
    ([*TRAIN, "--no-such-flag", "1"], f"train: unknown flag --no-such-flag; {SEE}"),
    ([*TRAIN, "-q"], f"train: unknown flag -q; {SEE}"),
    (["train", "--a b"], f"train: unknown flag '--a b'; {SEE}"),
    (["serve", "--modle", "x"], "serve: unknown flag --modle; did you mean --model? See"),
    (["status", "--server", "a:1"], "status: unknown flag --server; see dlora status --help"),
    (["keys", "init", "--dyas", "3"], "keys: unknown flag --dyas; did you mean --days? See"),
    # abbreviations are no names
    ([*TRAIN, "--learn", "1"], "train: unknown flag --learn; "),
    ([*TRAIN, "--lr_sched", "linear"], "train: unknown flag --lr_sched; did you mean --lr_sched"),
    ([*TRAIN, "--adapt", "x"], "train: unknown flag --adapt; did you mean --adapter? See"),
    # missing settings
    (["train"], f"train: --server, --data and --output are missing; {SEE}"),
    (["train", "--server", "a:1", "--output", "o"], f"train: --data is missing; {SEE}"),
    (["serve"], "serve: --model is missing; see dlora serve --help"),
    (["eval", "--server", "a:1"], "eval: give data or tasks"),
    (["report"], "report: RUNS is missing; see dlora report --help"),
    (["audit", "--server", "a:1"], "audit: RUN is missing; see dlora audit --help"),
    (["keys"], "keys: ACTION is missing; see dlora keys --help"),
    (["merge", "--model", "m"], "merge: --adapter and --output are missing; see dlora merge"),
    # missing values
    ([*TRAIN, "--batch_size"], f"train: --batch_size: its value is missing; {SEE}"),
    (["train", "--data", "--output", "o"], f"train: --data: its value is missing; {SEE}"),
    (["train", "--config"], f"train: --config: its value is missing; {SEE}"),
    # bad values
    ([*TRAIN, "--batch_size", "eight"], "train: --batch_size: got 'eight', want a whole number"),
    ([*TRAIN, "--batch-size", "eight"], "train: --batch-size: got 'eight', want a whole number"),
    ([*TRAIN, "--batch_size", "2.5"], "train: --batch_size: got '2.5', want a whole number"),
    ([*TRAIN, "--lr", "fast"], "train: --lr: got 'fast', want a number"),
    ([*TRAIN, "--lr", "nan"], "train: --lr: got 'nan', want a number"),
    ([*TRAIN, "--kr", "maybe"], "train: --kr: got 'maybe', want off, on or paper"),
    ([*TRAIN, "--resume=maybe"], "train: --resume: got 'maybe', want true or false"),
    ([*TRAIN, "--output", ""], "train: --output: got '', want a path"),
    ([*TRAIN, "--eval_steps", "x"], "train: --eval_steps: got 'x', want a whole number"),
    ([*TRAIN, "--epochs", "a\nb"], "train: --epochs: got 'a\\nb', want a number"),
    ([*TRAIN, "--kr_options", "budget"], "train: --kr_options: got 'budget', want names and"),
    ([*TRAIN, "--kr_options", "{a: ["], "train: --kr_options: got '{a: [', want names and"),
    (
        [*TRAIN, "--kr", "on", "--kr_options", "{budget: much}"],
        "train: --kr_options: budget: got 'much', want a number",
    ),
    (
        [*TRAIN, "--kr", "on", "--kr_options.interval", "often"],
        "train: --kr_options.interval: interval: got 'often', want a whole number",
    ),
    (
        [*TRAIN, "--rank_pattern", "{q_proj: big}"],
        "train: --rank_pattern: q_proj: got 'big', want a whole number",
    ),
    ([*TRAIN, "--data.x", "1"], "train: unknown flag --data.x; "),
    (["keys", "frob"], "keys: ACTION: got 'frob', want init, server, tenant, token, certificate"),
    (["plan", "--server", "a:1", "--steps", "-"], "plan: --steps: got '-', want a whole number"),
    # words without a flag
    ([*TRAIN, "extra"], f"train: unexpected word 'extra'; {SEE}"),
    ([*TRAIN, "--resume", "yes"], f"train: unexpected word 'yes'; {SEE}"),
    (["keys", "init", "server"], "keys: unexpected word 'server'; see dlora keys --help"),
    # values that the settings themselves refuse
    ([*TRAIN, "--batch_size", "0"], "train: --batch_size: got 0, want at least 1"),
    ([*TRAIN, "--batch-size=0"], "train: --batch-size: got 0, want at least 1"),
    ([*TRAIN, "--alpha", "1", "--rank", "0"], "train: --rank: got 0, want at least 1"),
    (["serve", "--model", "m", "--port", "70000"], "serve: --port: got 70000, want 0 to 65535"),
    (["generate", "--server", "a:1", "--top-p", "2"], "generate: --top-p: got 2.0, want a value"),
    (["info"], "info: give --server, --adapter, or both"),
    (["keys", "token"], "keys token needs --tenant NAME"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_usage_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong command ends with code 2 and one line that names what was typed: no usage dump, no
    Python types, nothing on standard output."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dlora: {message}"), captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert "<class" not in captured.err and "usage:" not in captured.err


WRONG_FILES = [
    ("leraning_rate: 1", "unknown key leraning_rate; did you mean learning_rate? See dlora train"),
    ("nonsense: 1", "unknown key nonsense; see dlora train --help"),
    ("train:\n  r: 4", "unknown key train; "),
    ("batch_size: eight", "batch_size: got 'eight', want a whole number"),
    ("batch_size: 0", "batch_size: got 0, want at least 1"),
    ("batch-size: 2.5", "batch-size: got 2.5, want a whole number"),
    ("batch_size:", "batch_size: got nothing, want a whole number"),
    ("batch_size: true", "batch_size: got true, want a whole number"),
    ("kr: maybe", "kr: got 'maybe', want off, on or paper"),
    ("wire: on", "wire: got true, want plain, factored or hosted"),
    ("data: 5", "data: got 5, want text (put it in quotes)"),
    ("output: [a]", "output: got ['a'], want a path"),
    ("resume: 1", "resume: got 1, want true or false"),
    ("kr_options: 5", "kr_options: got 5, want names and values"),
    ("kr: on\nkr_options: {budget: much}", "kr_options: budget: got 'much', want a number"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[text for text, _ in WRONG_FILES])
def test_a_wrong_key_of_a_file_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong in a YAML file is one line that names the file and the key."""
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    argv = [word for word in TRAIN if word not in ("--data", "d.jsonl", "--output", "o")]
    known = [] if text.startswith(("data", "output")) else ["--data", "d", "--output", "o"]
    assert main([*argv, *known, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dlora: train: {file}: {message}"), error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("a: [1", "line 2: "), ("- a", "want lines"), ("", "want lines")],
)
def test_a_file_that_is_no_settings_file_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not there, or is no YAML with keys, is named with the reason."""
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text + "\n")
    assert main([*TRAIN, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dlora: train: --config: {file}: {message}"), error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["--token", "SECRET"], ["--token=SECRET"], ["--api-kee=SECRET"]])
def test_a_secret_behind_a_wrong_flag_is_not_shown(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped flag is named without its value, which may be a secret."""
    assert main(["api", "--server", "a:1", *words]) == 2
    captured = capsys.readouterr()
    assert "SECRET" not in captured.out + captured.err
    assert "did you mean --" in captured.err


def test_wrong_commands_load_no_torch() -> None:
    """Arguments and settings are checked before anything heavy is loaded, whatever is wrong."""
    wrong = [argv for argv, _ in WRONG]
    code = (
        "import sys\nfrom dlora.cli.main import main\n"
        f"for argv in {wrong!r}:\n    assert main(argv) == 2, argv\n"
        "heavy = {'torch', 'transformers', 'grpc'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ----------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    "text", ["null", "# x", "~", "[STOP]", "---", "--x", "-1", "", "1e3", "a: b"]
)
@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_text_arrives_as_given(text: str, flag: str) -> None:
    """A flag that takes text takes any text; none of it is read as YAML or as a flag."""
    name = flag.removeprefix("--")
    assert getattr(settings(*GENERATE, flag, text), name) == text
    assert getattr(settings(*GENERATE, f"{flag}={text}"), name) == text


def test_system_prompt_arrives_as_given() -> None:
    """`--system ~` is the system prompt ~, not none at all."""
    assert settings("chat", "--server", "a:1", "--system", "~").system == "~"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lr", "0.1"], "learning_rate", 0.1),
        (["--lr=1e-3"], "learning_rate", 1e-3),
        (["--rank", "4"], "r", 4),
        (["--alpha", "8"], "lora_alpha", 8.0),
        (["--batch-size", "2"], "batch_size", 2),
        (["--batch_size=2"], "batch_size", 2),
        (["--batch_size", "4", "--batch_size", "2"], "batch_size", 2),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--eval_steps", "null"], "eval_steps", None),
        (["--resume"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--resume=True"], "resume", True),
        (["--keep_best", "false"], "keep_best", False),
        (["--kr", "on"], "kr", "on"),
        (["--report_to", "none"], "report_to", ["none"]),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
        (["--report_to", "[tensorboard, wandb]"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "tensorboard,wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--target_modules", "q_proj,v_proj"], "targets", ["q_proj", "v_proj"]),
        (["--target_modules", "[q_proj, v_proj]"], "targets", ["q_proj", "v_proj"]),
        (["--target_modules", '["q_proj"]'], "targets", ["q_proj"]),
        (["--target_modules", "all-linear"], "targets", "all-linear"),
        (["--target_modules", r".*\.[qv]_proj"], "targets", r".*\.[qv]_proj"),
        (["--target_modules", "[]"], "targets", []),
        ([*HOSTED, "--target_parameters", "a.b,a.c"], "target_parameters", ["a.b", "a.c"]),
        (["--columns", "prompt=a b,completion=1"], "columns", {"prompt": "a b", "completion": "1"}),
        (["--columns", "{prompt: 'a, b'}"], "columns", {"prompt": "a, b"}),
        (["--rank_pattern", "q_proj=4,v=8"], "rank_pattern", {"q_proj": 4, "v": 8}),
        (["--trainer", "a=1e-3,b=yes,c=x=y"], "trainer", {"a": 1e-3, "b": True, "c": "x=y"}),
        (["--val_size", "0.1"], "val_size", 0.1),
        (["--trainer", '{"a": 1}'], "trainer", {"a": 1}),
        (["--trainer.a", "1e-3", "--trainer.b", "x"], "trainer", {"a": 1e-3, "b": "x"}),
        (["--rank_pattern", "{model.layers.0: 4}"], "rank_pattern", {"model.layers.0": 4}),
        (["--rank_pattern.model.layers.0", "4"], "rank_pattern", {"model.layers.0": 4}),
        (["--output", "runs/x"], "output", Path("runs/x")),
    ],
)
def test_a_flag_becomes_the_settings_type(words: list[str], name: str, value: Any) -> None:
    """Flags with - or _, with = or a space, aliases and switches give the value that is meant."""
    found = getattr(settings(*TRAIN, *words), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("kr: on", "kr", "on"),
        ("kr: true", "kr", "on"),
        ("kr: off", "kr", "off"),
        ("kr: false", "kr", "off"),
        ("kr: paper", "kr", "paper"),
        ("lr: 1e-3", "learning_rate", 1e-3),
        ("learning-rate: 1", "learning_rate", 1.0),
        ("eval_steps: null", "eval_steps", None),
        ("report_to: none", "report_to", ["none"]),
        ("report_to: [a, b]", "report_to", ["a", "b"]),
        ("target_modules: [q_proj, v_proj]", "targets", ["q_proj", "v_proj"]),
        ("target_modules: q_proj,v_proj", "targets", ["q_proj", "v_proj"]),
        (
            "wire: hosted\nupload_consent: true\ntarget_parameters: a.b,a.c",
            *("target_parameters", ["a.b", "a.c"]),
        ),
        ("trainer: {a: {b: 1}, c: 2024-01-01}", "trainer", {"a": {"b": 1}, "c": "2024-01-01"}),
        ("adapter: x", "adapter", Path("x")),
        ("resume: yes", "resume", True),
        ("output: null", "output", Path("o")),
    ],
)
def test_a_key_becomes_the_settings_type(text: str, name: str, value: Any, tmp_path: Path) -> None:
    """Keys of a YAML file give the value that is meant; `kr: on`, for YAML a boolean, as well."""
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    found = getattr(settings(*TRAIN, "--config", str(file)), name)
    assert found == value and type(found) is type(value)


def test_flags_override_files_wherever_they_stand(tmp_path: Path) -> None:
    """A later file overrides an earlier one, and a flag both, before and after them."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("server: a:1\ndata: d\noutput: o\nr: 1\nepochs: 1\nseed: 1\n")
    second.write_text("epochs: 2\nseed: 2\ntrainer: {a: 1}\n")
    found = settings(
        *("train", "--seed", "3", "--config", str(first), "--config", str(second)),
        *("--trainer.b", "2"),
    )
    assert (found.r, found.epochs, found.seed) == (1, 2.0, 3)
    assert found.trainer == {"a": 1, "b": 2}


def test_words_without_a_flag() -> None:
    """Folders of runs, the run of an audit and the action of keys need no flag, and stand
    anywhere."""
    assert settings("report", "a", "--output", "x", "b").runs == [Path("a"), Path("b")]
    assert settings("report", "--output", "x", "--", "-a").runs == [Path("-a")]
    assert settings("audit", "--server", "a:1", "a").run == Path("a")
    assert settings("keys", "--days", "3", "init").action == "init"


def test_printed_settings_are_a_file_that_gives_them_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--print_config` of any settings, read with --config, gives the same settings; what is
    missing may be added as a flag."""
    words = [*TRAIN, "--kr", "off", "--lr", "1e-5", "--trainer", "{a: yes}", "--rank", "4"]
    assert main([*words, "--print_config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert settings("train", "--config", str(file)) == settings(*words)
    assert main(["train", "--data", "d", "--output", "o", "--print_config"]) == 0
    file.write_text(capsys.readouterr().out)
    assert settings("train", "--config", str(file), "--server", "a:1").data == "d"


def test_printed_settings_may_hold_several_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """`--print_config` writes a list of folders as texts."""
    assert main(["report", "a", "b", "--print_config"]) == 0
    assert capsys.readouterr().out.startswith("runs:\n- a\n- b\n")


def test_two_dashes_are_a_text() -> None:
    """`--prompt --` is the prompt `--`, though argparse drops such a value."""
    assert settings(*GENERATE, "--prompt", "--").prompt == "--"
    assert settings(*GENERATE, "--prompt=--").prompt == "--"


# ----------------------------------------------------------------- help and names


def test_the_shell_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell asks, argcomplete gets a parser with all commands, flags and choices."""
    seen: list[Any] = []
    library = types.ModuleType("argcomplete")
    library.__spec__ = importlib.machinery.ModuleSpec("argcomplete", None)
    monkeypatch.setattr(library, "autocomplete", seen.append, raising=False)
    monkeypatch.setitem(sys.modules, "argcomplete", library)
    parse([], COMMANDS)
    assert not seen

    monkeypatch.setenv("_ARGCOMPLETE", "1")
    parse([], COMMANDS)
    ((flag, value, _),) = seen[0].parse_args(["train", "--kr=on"]).given
    assert (flag.name, value) == ("kr", "on")
    assert Note(option_strings=["--kr"], dest="kr", flag=flag).completer() == ("off", "on", "paper")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "usage: dlora COMMAND"),
        (["help"], "usage: dlora COMMAND"),
        (["-h"], "usage: dlora COMMAND"),
        (["--help"], "usage: dlora COMMAND"),
        (["-V"], f"dlora {__version__}\n"),
        (["--version"], f"dlora {__version__}\n"),
        (["help", "train"], "usage: dlora train --server TEXT --data TEXT --output PATH [flags]"),
        (["train", "-h"], "usage: dlora train --server TEXT"),
        (["train", "--batch_size", "2", "--help"], "usage: dlora train --server TEXT"),
    ],
)
def test_help_and_version(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help and version go to standard output and end with code 0, however they are asked for."""
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(text) and captured.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a command has every flag and its text, required ones first, in lines that fit; it
    has no Python types and no old names."""
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for flag in flags_of(COMMANDS[name]).values():
        assert flag.text, f"--{flag.name} has no help"
        assert len(flag.text) < 320, f"--{flag.name} has a long help"
        if flag.name != COMMANDS[name].word:
            starts = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
            assert starts.count(f"--{flag.name}") == 1
    assert max(map(len, lines)) <= 100
    headlines = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert len(headlines) == len(set(headlines))
    if "required:" in headlines:
        assert headlines[0] == "required:"
    assert "Literal" not in out and "null" not in out and "<" not in out
    for old, new in OLD_NAMES.get(name, {}).items():
        assert f"--{old}" not in out or new not in flags_of(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_groups_cover_every_setting_once(name: str) -> None:
    """Every setting stands under one headline of the help, and no headline names anything else (but
    both names of a setting that is being renamed)."""
    settings = COMMANDS[name].settings
    counts = Counter(name for names in groups_of(settings).values() for name in names)
    fields = {field.name for field in dataclasses.fields(settings)}
    old_or_new = {one for pair in OLD_NAMES.get(name, {}).items() for one in pair}
    assert set(counts.values()) <= {1}
    assert fields <= counts.keys() and counts.keys() - fields <= old_or_new


@pytest.mark.parametrize("name", COMMANDS)
def test_every_switch_stands_alone(name: str) -> None:
    """Every setting that is true or false may be given without a value, in every command."""
    command = COMMANDS[name]
    switches = [flag.name for flag in flags_of(command).values() if flag.is_switch]
    hints = typing.get_type_hints(command.settings)
    fields = [field.name for field in dataclasses.fields(command.settings)]
    assert sorted(switches) == sorted(field for field in fields if hints[field] is bool)
    for switch in switches:
        request = parse([name, f"--{switch}", "--print_config"], COMMANDS)
        assert f"{switch}: true\n" in f"{request}\n"


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of which `tempo` is an old name of `learning_rate`."""
    monkeypatch.setitem(flags.OLD_NAMES, "train", {"tempo": "learning_rate", "gone": "nothing"})


@pytest.mark.usefixtures("renamed")
def test_an_old_name_works_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An old name still sets its setting, as a flag and as a key, with one line that says the new
    one; no help shows it, and an entry without a setting does nothing."""
    assert settings(*TRAIN, "--tempo", "0.5").learning_rate == 0.5
    assert capsys.readouterr().err == (
        "dlora: train: --tempo is now --learning_rate; the old name works in this version\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text("tempo: 0.25\n")
    assert settings(*TRAIN, "--config", str(file)).learning_rate == 0.25
    assert f"train: {file}: tempo is now learning_rate;" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "tempo" not in capsys.readouterr().out
    assert main([*TRAIN, "--gone", "1"]) == 2
    assert "unknown flag --gone" in capsys.readouterr().err


def test_the_log_of_calls_has_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    """`--audit_log` works, whether it is the setting's name or its old one."""
    found = settings("serve", "--model", "m", "--audit_log", "calls.jsonl")
    name = "access_log" if hasattr(found, "access_log") else "audit_log"
    assert getattr(found, name) == Path("calls.jsonl")
    assert ("is now --access_log" in capsys.readouterr().err) == (name == "access_log")


# ----------------------------------------------------------------- before the model is loaded


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./nowhere"], "--model: no such folder: ./nowhere"),
        (["--model", "/nowhere"], "--model: no such folder: /nowhere"),
        (["--model", "~nobody/x"], "--model: no such folder: ~nobody/x"),
        (["--model", "a/b/c"], "--model: no such folder: a/b/c"),
        (["--model", "models/"], "--model: no such folder: models/"),
        (["--model", "nowhere.gguf"], "--model: no such file: nowhere.gguf"),
        (["--model", "m", "--allow_modules", "["], "--allow_modules: '[' is no regular expression"),
        (["--model", "m", "--host", "no.such.host.invalid", "--insecure"], "--port: cannot listen"),
        (["--model", "m", "--keys", "{tmp}/none"], "{tmp}/none/server.key: No such file"),
        (["--model", "m", "--tls_cert", "{tmp}/c", "--tls_key", "{tmp}/open"], "{tmp}/open holds"),
        (["--model", "m", "--tls_cert", "{tmp}/c", "--tls_key", "{tmp}/k"], "{tmp}/c: No such"),
        (["--model", "m", "--identities", "{tmp}/k"], "{tmp}/k is no identities file"),
    ],
)
def test_serve_refuses_before_it_loads(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot work is refused with one line before `loading` is said."""
    for name, mode in (("open", 0o644), ("k", 0o600)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    assert main(["serve", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dlora: serve: {message.format(tmp=tmp_path)}"), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("flag", ["--port", "--metrics_port"])
def test_serve_refuses_a_taken_port_before_it_loads(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port that is in use is refused before the model is loaded; a free one stays free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "m", "--port", "0", flag, str(port)]) == 2
        assert f"{flag}: cannot listen on 127.0.0.1:{port} (" in capsys.readouterr().err
    check_serve(ServeSettings(model="org/name", port=port))
    check_serve(ServeSettings(model="org/name", port=port))


@pytest.mark.parametrize("model", ["smollm2", "org/name", "org/na-me_1.5", "name"])
def test_a_hub_id_is_not_looked_for_here(model: str) -> None:
    """What may be a hub id is left to the hub."""
    check_serve(ServeSettings(model=model, port=0))


# ----------------------------------------------------------------- the process around


def test_main_leaves_the_process_as_it_was() -> None:
    """`main` gives back the threads' hook and the warnings' filters, after success and error."""
    hook, filters = threading.excepthook, list(warnings.filters)
    for argv in (["--version"], ["train", "--bogus"]):
        main(argv)
        assert threading.excepthook is hook and list(warnings.filters) == filters


def test_bitsandbytes_says_nothing_of_its_kernels() -> None:
    """Its warning about kernels that it looked for at import is silenced; others are not."""
    main(["--version"])
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes.nn.modules").isEnabledFor(logging.WARNING)


def test_commands_take_their_parts_from_the_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that is exchanged in its module is what a command uses."""
    import dlora.training.report

    def write_report(runs: list[Path], output: Path) -> list[Path]:
        return [output / run.name for run in runs]

    monkeypatch.setattr(dlora.training.report, "write_report", write_report)
    runs = [tmp_path / "a" / "x", tmp_path / "y"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "run.json").write_text("{}")
    assert main(["report", *map(str, runs), "--output", "r"]) == 0
    assert capsys.readouterr().out == "r/x\nr/y\n"


def refusal(value: str, kind: Any) -> str:
    """The message of a value that is refused; empty for one that is taken."""
    try:
        convert(value, kind)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_words_for_what_it_wants(name: str) -> None:
    """Whatever a setting is given, it is taken or refused with got and want, never with a crash."""
    for flag in flags_of(COMMANDS[name]).values():
        for value in ("", "x", "null", "[", "{}", "1", "\udcff"):
            message = refusal(value, flag.kind)
            assert not message or ", want " in message, flag.name


def test_usage_errors_are_usage_errors() -> None:
    """`parse` raises nothing but UsageError for wrong words."""
    for argv, _ in WRONG:
        with pytest.raises(UsageError):
            parse(argv, COMMANDS)
