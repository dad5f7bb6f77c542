"""`dlora train`: the whole run, resuming, stopping, and input that cannot work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from helpers import cli, same
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, TrainerCallback

import dlora
from dlora.cli.main import main
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import DataError, DivergedError, UsageError
from dlora.server.server import Server
from dlora.training import run as training
from dlora.training.plan_settings import PlanSettings
from dlora.training.run import train
from dlora.training.settings import TrainSettings

ADAPTER = "adapter_model.safetensors"
DESKS = ("north", "south", "east", "west")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of prompt and completion."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"parcel {n * 37 % 91}:", "completion": f" {DESKS[n % 4]}"} for n in range(24)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def settings(data: Path, output: Path, **changes: Any) -> TrainSettings:
    """A run of 6 steps of 2 micro-batches."""
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": output,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 1.0,
        "lora_dropout": 0.2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_steps": 2,
    }
    return TrainSettings(**(values | changes))


class _Interrupt(TrainerCallback):
    """Sends this process a signal at a step, as a person at the keyboard would."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make runs of this test get a signal at the given step."""
    build = training.build_trainer

    def arrange(step: int | None, number: int = signal.SIGINT) -> None:
        def wrapped(*args: Any) -> Any:
            trainer = build(*args)
            if step is not None:
                trainer.add_callback(_Interrupt(step, number))
            return trainer

        monkeypatch.setattr(training, "build_trainer", wrapped)

    return arrange


def test_run_leaves_adapter_and_run_json(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """A run ends with an adapter that peft loads and a run.json with settings, versions and exact
    costs.
    """
    run = train(
        settings(data, tmp_path / "run", eval_data=str(data), eval_steps=3, save_steps=3), link
    )
    assert run == json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished" and run["steps"] == 6
    assert run["model_id"] == "example-org/llama"
    assert run["eval_loss"] < 6 and run["best_eval_loss"] <= run["eval_loss"]
    cost = run["cost"]
    assert (
        min(
            cost[name]
            for name in ("sent_bytes", "received_bytes", "adapter_flops", "head_flops", "tokens")
        )
        > 0
    )
    assert cost["micro_batches"] == 12 + 2 * 3
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-6/trainer_state.json").read_text())
    step = next(entry for entry in state["log_history"] if "loss" in entry)
    assert step["sent_mb"] > 0 and step["round_trips"] == 14 and step["tokens_per_second"] > 0
    local = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "run"))
    assert any(
        parameter.abs().max() > 0
        for name, parameter in local.named_parameters()
        if "lora_B" in name
    )


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resumed_run_equals_one_never_stopped(
    link: InProcessLink, data: Path, tmp_path: Path, interrupt_at: Callable[..., None], stop_at: int
) -> None:
    """Ctrl-C finishes the step and saves; --resume ends with the very bits of a run never
    stopped.
    """
    interrupt_at(None)
    whole = train(settings(data, tmp_path / "whole"), link)
    interrupt_at(stop_at)
    stopped = train(settings(data, tmp_path / "run"), link)
    assert stopped["status"] == "interrupted" and stopped["steps"] == stop_at + 1
    interrupt_at(None)
    resumed = train(settings(data, tmp_path / "run", resume=True), link)
    assert resumed["status"] == "finished" and resumed["steps"] == 6
    assert same(tmp_path / "whole", tmp_path / "run")
    for name in ("sent_bytes", "tokens", "micro_batches", "adapter_flops"):
        assert resumed["cost"][name] == whole["cost"][name], name


def test_a_run_turns_a_once_before_its_first_step(
    link: InProcessLink, data: Path, tmp_path: Path, interrupt_at: Callable[..., None]
) -> None:
    """`spectral_start` costs one micro-batch more of the first set's sites, turns the A of these
    and of no others, and a resumed run does not turn it again.
    """
    few = {"kr": "on", "kr_options": {"budget": 0.5}}
    still = few | {"learning_rate": 1e-9, "max_steps": 1, "save_steps": 1}
    runs = {
        turned: train(settings(data, tmp_path / str(turned), spectral_start=turned, **still), link)
        for turned in (False, True)
    }
    plain, turned = (load_file(tmp_path / f"{one}/{ADAPTER}") for one in (False, True))
    sides = [name for name in plain if ".lora_A." in name]
    changed = [name for name in sides if not torch.allclose(plain[name], turned[name], atol=1e-6)]
    assert 0 < len(changed) < len(sides)
    for name in sides:
        torch.testing.assert_close(turned[name].norm(dim=1), plain[name].norm(dim=1))
    sent = [run["cost"]["sent_bytes"] for run in runs.values()]
    assert 1.3 * sent[0] < sent[1] < 1.7 * sent[0]  # three micro-batches, and not two

    whole = train(settings(data, tmp_path / "whole", spectral_start=True, **few), link)
    assert whole["cost"]["micro_batches"] == 12 + 1
    interrupt_at(0)
    train(settings(data, tmp_path / "run", spectral_start=True, **few), link)
    interrupt_at(None)
    train(settings(data, tmp_path / "run", spectral_start=True, resume=True, **few), link)
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        *({"wire": "factored"}, {"record": 1}, {"task": "dpo"}, {"adapter": Path("mine")}),
        {"kind": "series", "target_modules": ["o_proj"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_spectral_start_elsewhere_is_refused(data: Path, changes: dict[str, Any]) -> None:
    """Settings with which there is none are named before anything is loaded, of a plan too."""
    name, value = next(iter(changes.items()))
    refused = pytest.raises(UsageError, match=f"^spectral_start is for fresh.*: got {name} {value}")
    with refused:
        settings(data, Path("nowhere"), spectral_start=True, **changes)
    if name in ("wire", "kind", "adapter"):
        with refused:
            PlanSettings(server="in-process", spectral_start=True, **changes)
    with pytest.raises(UsageError, match="^link: its table has all wires, spectral_start goes"):
        PlanSettings(server="in-process", spectral_start=True, link="home")


def test_change_is_measured_from_the_spectral_start_on(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """Of the first decision no score counts what turned A: with next to no learning all are next
    to nothing, by the change of A and B themselves.
    """
    by_change = {"signal": "norm_delta", "warmup": 1, "interval": 1, "final": 0, "unit": "module"}
    scored = {"kr": "on", "kr_options": by_change | {"budget": 0.6}, "learning_rate": 1e-9}
    train(settings(data, tmp_path / "run", spectral_start=True, **scored), link)
    lines = (tmp_path / "run/kr.jsonl").read_text().splitlines()
    scores = [line["score"] for line in map(json.loads, lines) if line["score"] is not None]
    assert scores and max(scores) < 1e-3


def test_half_written_checkpoint_is_passed_over(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """A newest checkpoint that a crash left incomplete costs its steps, not the run."""
    train(settings(data, tmp_path / "whole"), link)
    train(settings(data, tmp_path / "run"), link)
    newest = tmp_path / "run/checkpoints/checkpoint-6"
    (newest / "trainer_state.json").unlink()
    run = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"status": "failed"}))
    train(settings(data, tmp_path / "run", resume=True), link)
    assert same(tmp_path / "whole", tmp_path / "run")


def test_existing_runs_are_never_overwritten(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """A folder with a run is only ever resumed, with the same settings, and only if unfinished."""
    train(settings(data, tmp_path / "run", max_steps=1, save_steps=1), link)
    with pytest.raises(UsageError, match="already holds a run"):
        train(settings(data, tmp_path / "run"), link)
    with pytest.raises(UsageError, match="these settings differ.*: learning_rate"):
        train(
            settings(
                data, tmp_path / "run", resume=True, max_steps=1, save_steps=1, learning_rate=1.0
            ),
            link,
        )
    with pytest.raises(UsageError, match="is finished: there is nothing to resume"):
        train(settings(data, tmp_path / "run", resume=True, max_steps=1, save_steps=1), link)
    with pytest.raises(UsageError, match="holds no run"):
        train(settings(data, tmp_path / "other", resume=True), link)
    other = dlora.in_process(make_base("llama", seed=9), model_id="example-org/other")
    with pytest.raises(UsageError, match="now serves example-org/other"):
        train(settings(data, tmp_path / "run", resume=True, max_steps=1, save_steps=1), other)
    other.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["nonsense"]}, "nonsense"),
        ({"adapter": Path("nowhere")}, "holds no adapter"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"eval_data": "nowhere.jsonl", "keep_best": False}, "no such file"),
        ({"max_length": 4}, "max_length is 4"),
        ({"pad_to": 4096}, "4096 with pad_to 4096; this server takes sequences of up to"),
        ({"trainer": {"no_such_thing": 1}}, "no_such_thing"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "optim or lr_scheduler_type: .*min_lr"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(
    link: InProcessLink, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A refusal makes no folder and puts nothing into an empty one: the corrected command runs."""
    new, empty = tmp_path / "deep" / "run", tmp_path / "empty"
    empty.mkdir()
    for output in (new, empty):
        with pytest.raises(UsageError, match=message):
            train(settings(**({"data": data, "output": output, "record": 2} | changes)), link)
    assert not (tmp_path / "deep").exists()
    assert not list(empty.iterdir())
    train(settings(data, empty, record=2, max_steps=1), link)
    assert len(list((empty / "recording").glob("*.json"))) == 2


def test_a_refused_resume_changes_nothing(
    link: InProcessLink, data: Path, tmp_path: Path, interrupt_at: Callable[..., None]
) -> None:
    """Where --resume is refused, run.json and every checkpoint, complete or not, are as before."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(data.read_text())
    interrupt_at(1)
    train(settings(rows, tmp_path / "run", save_steps=1), link)
    (tmp_path / "run/checkpoints/checkpoint-2/trainer_state.json").unlink()

    def contents() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}

    before = contents()
    rows.unlink()
    with pytest.raises(DataError, match="no such file"):
        train(settings(rows, tmp_path / "run", save_steps=1, resume=True), link)
    assert contents() == before


def test_starting_from_an_existing_adapter(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """A run can start from a saved adapter: its first loss is near where the other ended, not at
    the base.
    """
    first = train(settings(data, tmp_path / "one", epochs=4.0, lora_dropout=0.0), link)
    second = train(
        settings(data, tmp_path / "two", adapter=tmp_path / "one", max_steps=1, learning_rate=1e-9),
        link,
    )
    base = train(settings(data, tmp_path / "base", max_steps=1, learning_rate=1e-9), link)
    assert second["train_loss"] < base["train_loss"] - 1
    assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1)
    assert not same(tmp_path / "one", tmp_path / "base")


def test_early_stopping_keeps_the_best_adapter(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """Evaluation that gets worse ends the run early, with the adapter of the best evaluation."""
    options = {
        "eval_data": str(data),
        "eval_steps": 1,
        "save_steps": 1,
        "early_stopping_patience": 2,
    }
    run = train(
        settings(
            data, tmp_path / "run", learning_rate=3.0, max_grad_norm=0.0, epochs=5.0, **options
        ),
        link,
    )
    assert run["steps"] < 30
    best = Path(run["best_checkpoint"])
    assert same(best, tmp_path / "run")


def test_nan_stops_before_the_update(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """A gradient that is not finite is never applied, and the last checkpoint stays usable."""

    class Poison(TrainerCallback):
        def on_substep_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))

    build = training.build_trainer
    with pytest.MonkeyPatch.context() as patch:

        def wrapped(*args: Any) -> Any:
            trainer = build(*args)
            trainer.add_callback(Poison())
            return trainer

        patch.setattr(training, "build_trainer", wrapped)
        with pytest.raises(DivergedError, match="step 4: the gradient of .*lora_A.* is not finite"):
            train(settings(data, tmp_path / "run"), link)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    train(settings(data, tmp_path / "whole"), link)
    train(settings(data, tmp_path / "run", resume=True), link)
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"question": "a"}', r"x\.jsonl:1: got columns question; want columns `prompt` and"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}',
            r"x\.jsonl:2: `completion` is missing or empty",
        ),
        ('{"prompt": "a", "completion": "b"}\nnot json', r"x\.jsonl:2: not JSON"),
        ('{"prompt": "a", "completion": 3}', r"x\.jsonl:1: `completion` is a number, want text"),
        ("[1]", r"x\.jsonl:1: got a number, want objects in the array"),
        ('{"text": "a"}\n[1]', r"x\.jsonl:2: got a list, want one JSON object"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            r"x\.jsonl:1: the last of at least two messages",
        ),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
            r"x\.jsonl:1: `messages` must be",
        ),
        (
            '{"prompt": "' + "a" * 600 + '", "completion": "b"}',
            r"x\.jsonl:1: 6\d\d tokens, max_length is 512; 1 of 1",
        ),
    ],
)
def test_bad_data_names_file_and_line(
    link: InProcessLink, tmp_path: Path, rows: str, message: str
) -> None:
    """Rows that cannot be used are refused with file, line and what is wanted, before any step."""
    (tmp_path / "x.jsonl").write_text(rows)
    with pytest.raises(DataError, match=message):
        train(settings(tmp_path / "x.jsonl", tmp_path / "run"), link)
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,completion\nparcel 1:, north\nparcel 2:, south\n"),
        ("a.jsonl", '{"text": "the north desk"}\n{"text": "the south desk"}'),
        (
            "b.jsonl",
            '{"messages": [{"role": "user", "content": "parcel"}, '
            '{"role": "assistant", "content": "north"}]}\n' * 2,
        ),
    ],
)
def test_every_form_of_data_trains(
    link: InProcessLink, tmp_path: Path, name: str, content: str
) -> None:
    """CSV, text and chat messages all make a finished run."""
    (tmp_path / name).write_text(content)
    options = {"batch_size": 2, "gradient_accumulation_steps": 1}
    assert (
        train(settings(tmp_path / name, tmp_path / "run", **options), link)["status"] == "finished"
    )


def test_only_completions_are_supervised(link: InProcessLink, tmp_path: Path) -> None:
    """With messages the loss is on the last answer alone: the head ran for its tokens and no
    others.
    """
    answer = "north"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "x" * 80},
                {"role": "assistant", "content": answer},
            ]
        }
    ] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = train(
        settings(tmp_path / "a.jsonl", tmp_path / "run", gradient_accumulation_steps=1), link
    )
    per_row = 2 * 2 * 300 * 64  # forward and backward of one row of the head
    assert run["cost"]["head_flops"] / per_row <= 2 * (len(answer) + 4) + 1


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_overlong_rows_can_be_dropped_or_truncated(
    link: InProcessLink, tmp_path: Path, overlong: str
) -> None:
    """With the option set, long rows cost a warning instead of the run."""
    rows = [{"prompt": "a" * (40 if n else 4), "completion": " north"} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "max_length": 30,
        "overlong": overlong,
        "batch_size": 6,
        "gradient_accumulation_steps": 1,
    }
    run = train(settings(tmp_path / "a.jsonl", tmp_path / "run", **options), link)
    assert run["cost"]["tokens"] == (30 * 5 + 11 if overlong == "truncate" else 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: got 1\.0, want a value in \[0, 1\)"),
        ({"epochs": 0.0}, r"epochs: got 0\.0, want more than 0, or give max_steps"),
        ({"early_stopping_patience": 2}, "needs eval_data"),
        ({"eval_data": "x.jsonl", "eval_steps": 3}, "save_steps: got 2 with eval_steps 3"),
        ({"trainer": {"bf16": True}}, "trainer: bf16 cannot be set here"),
        ({"trainer": {"no_such_thing": 1}}, "SFTConfig of trl has no argument no_such_thing"),
        ({"lr_scheduler_type": "zigzag"}, "training arguments: .*zigzag"),
        ({"target_modules": ["nonsense"]}, "nonsense.* allows: q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head.* allows: q_proj, k_proj, v_proj, o_proj"),
    ],
)
def test_bad_settings_are_refused_by_name(
    link: InProcessLink, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Settings that cannot work are refused with name and value."""
    with pytest.raises(UsageError, match=message):
        train(settings(data, tmp_path / "run", **changes), link)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
    ],
)
def test_unsupported_lora_options_are_refused_by_name(
    link: InProcessLink, option: str, value: Any
) -> None:
    """What needs the base weights is refused with the option's name, never silently wrong."""
    from peft import LoraConfig

    with pytest.raises(UsageError, match=f"LoraConfig.{option}"):
        dlora.get_peft_model(link, LoraConfig(target_modules=["q_proj"], **{option: value}))


def test_adapter_that_does_not_fit_is_refused(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """Adapter folders that are missing, of other shapes or of other modules are refused with the
    reason.
    """
    with pytest.raises(UsageError, match="holds no adapter"):
        dlora.load_adapter(link, tmp_path)
    train(settings(data, tmp_path / "run", max_steps=1), link)
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(UsageError, match="does not fit example-org/llama"):
        dlora.load_adapter(link, tmp_path / "run")
    (tmp_path / "run/adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["o_proj"]})
    )
    with pytest.raises(UsageError, match="does not fit example-org/llama"):
        dlora.load_adapter(link, tmp_path / "run")


def test_command_line_trains_from_yaml_and_flags(
    server: Server, data: Path, tmp_path: Path
) -> None:
    """Settings come from YAML, flags override them, and the result names cost and folder."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"server: {server.address}\ndata: {data}\noutput: {tmp_path / 'run'}\nmax_steps: 5\nr: 4\n"
    )
    done = cli("train", "--config", str(file), "--max-steps", "2", "--report_to", "[tensorboard]")
    assert done.returncode == 0, done.stderr
    assert "finished   after 2 steps" in done.stdout and "B up, " in done.stdout
    assert "loss" in done.stderr and "tok/s" in done.stderr, "lines in place of the bar"
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["r"] == 4
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def refused(server: Server, data: Path, tmp_path: Path, flags: list[str]) -> int:
    """Exit code of a `dlora train` that must not run."""
    words = ["--server", server.address, "--data", str(data), "--output", str(tmp_path / "run")]
    try:
        return main(["train", *words, *flags])
    except SystemExit as exit_:
        return int(exit_.code or 0)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--server", "127.0.0.1:1"], 1, "no DLoRA server answers at 127.0.0.1:1"),
        (["--data", "nowhere.jsonl"], 2, "dlora: train: --data: nowhere.jsonl: no such file"),
        (["--pad_to", "-1"], 2, "pad_to: got -1, want 0 or more"),
    ],
)
def test_user_errors_are_one_line(
    server: Server,
    data: Path,
    tmp_path: Path,
    flags: list[str],
    code: int,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """User errors end with one line that says what to do, and no traceback."""
    assert refused(server, data, tmp_path, flags) == code
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("dlora: "))
    assert message in line and error.endswith(f"{line}\n") and "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "zero"], r"(--r: got|Parser key \"r\":).* '?zero"),
        (["--no-such-flag", "1"], "(unknown flag --no-such-flag|arguments: --no_such_flag)"),
    ],
)
def test_flags_that_cannot_be_read_are_named(
    server: Server,
    data: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A misspelt flag, or a value that is none, is refused by name, with no traceback."""
    assert refused(server, data, tmp_path, flags) == 2
    error = capfd.readouterr().err
    assert re.search(message, error, re.DOTALL) and "Traceback" not in error


@pytest.mark.parametrize(("limit", "message"), [(30_000, "cannot write: is the disk full?")])
def test_full_disk_keeps_what_was_saved(
    server: Server, data: Path, tmp_path: Path, limit: int, message: str
) -> None:
    """When nothing more can be written the run ends with one line for the reason and one that says
    what to type, and earlier checkpoints still resume.
    """
    words = [
        "--server",
        server.address,
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--save_steps",
        "1",
    ]
    code = f"""
import resource, signal
from transformers import TrainerCallback
from dlora.training import run as training
from dlora.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Full(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:  # from now on no file can grow beyond this, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
build = training.build_trainer
def wrapped(*args):
    trainer = build(*args); trainer.add_callback(Full()); return trainer
training.build_trainer = wrapped
raise SystemExit(main(["train", *{words!r}, "--max_steps", "4"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and message in done.stderr, done.stderr[-2000:]
    assert "continue with the same command and --resume" in done.stderr.splitlines()[-1]
    assert main(["train", *words, "--max_steps", "4", "--resume"]) == 0
    assert (
        main(
            [
                "train",
                *words[:4],
                "--output",
                str(tmp_path / "whole"),
                *words[6:],
                "--max_steps",
                "4",
            ]
        )
        == 0
    )
    assert same(tmp_path / "whole", tmp_path / "run")


def test_merged_model_has_the_split_models_logits(
    link: InProcessLink, data: Path, tmp_path: Path, model_folder: Path
) -> None:
    """`dlora merge` writes a full model whose logits are those of the split model."""
    from transformers import AutoModelForCausalLM

    train(settings(data, tmp_path / "run"), link)
    done = [
        "--model",
        str(model_folder),
        "--adapter",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "merged"),
    ]
    assert main(["merge", *done]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    split = dlora.load_adapter(link, tmp_path / "run", is_trainable=False, wire_dtype="fp32")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            split(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert main(["merge", *done]) == 2, "an existing folder is not overwritten"


def test_serve_command_stops_cleanly(model_folder: Path) -> None:
    """`dlora serve` says what it serves and when it is ready, and SIGTERM ends it with code 0."""
    command = [sys.executable, "-m", "dlora", "serve", "--model", str(model_folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, process.stderr.read()
        timer.cancel()
    text = "".join(lines)
    assert "tiny-llama" in text and "21 modules at 12 sites" in text and "stopping" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_to": 512}, "512 with pad_to 512; this server takes sequences of up to 256"),
        ({"batch_size": 24, "pad_to": 256}, "6144 tokens and this server takes 4096 a micro-batch"),
        ({"batch_size": 16, "pad_to": 256}, "MiB of activations of 16: lower batch_size"),
        (
            {"eval_batch_size": 24, "pad_to": 256, "eval_data": True, "keep_best": False},
            "6144 tokens and this server takes 4096",
        ),
    ],
)
def test_what_the_server_would_refuse_is_refused_before_the_first_step(
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Padding or batches over the server's limits end a run before it begins, not at the first long
    row.
    """
    cloud = CloudModel(
        make_base("llama"),
        model_id="small",
        limits=Limits(max_length=256, max_tokens=4096, max_inflight_bytes=16 * 2**20),
    )
    with closing(InProcessLink(cloud, tokenizer)) as link:
        if "eval_data" in changes:
            changes = changes | {"eval_data": str(data)}
        with pytest.raises(UsageError, match=message):
            train(settings(data, tmp_path / "run", **changes), link)


def test_recording_goes_on_where_the_checkpoint_was(
    link: InProcessLink, data: Path, tmp_path: Path, interrupt_at: Callable[..., None]
) -> None:
    """A resumed recording has the micro-batches of one never stopped, also after an epoch's shorter
    last step.
    """
    # An epoch has 12 micro-batches: 5, 5 and 2.
    options = {"gradient_accumulation_steps": 5, "epochs": 2.0, "record": 24, "save_steps": 1}
    interrupt_at(None)
    train(settings(data, tmp_path / "whole", **options), link)
    interrupt_at(3)
    train(settings(data, tmp_path / "run", **options), link)
    interrupt_at(None)
    train(settings(data, tmp_path / "run", resume=True, **options), link)
    whole, again = (tmp_path / name / "recording" for name in ("whole", "run"))
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in again.iterdir()) and len(files) == 4 * 24
    for file in (
        file for file in files if file.endswith((".edge", ".safetensors"))
    ):  # .cloud: with the time it took
        assert (whole / file).read_bytes() == (again / file).read_bytes(), file


def test_a_recording_that_comes_too_late_says_so(
    link: InProcessLink,
    data: Path,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that is resumed behind what is to be recorded does not leave its user without a
    word.
    """
    interrupt_at(2)
    train(settings(data, tmp_path / "run", record=2), link)
    interrupt_at(None)
    train(settings(data, tmp_path / "run", record=4, resume=True), link)
    assert "nothing more is recorded: the checkpoint is 6 micro-batches into the run" in caplog.text
    assert "first 4, of which 2 are there" in caplog.text
