"""`dlora train --task dpo|kto|grpo`: whole runs, endings, rows and settings that cannot work."""

from __future__ import annotations

import copy
import gc
import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from conftest import NO_DRAIN, adapter, lora, make_base, make_split
from helpers import cli, dlora_command, same
from peft import LoraConfig, get_peft_model
from test_endings import At, Broken, broken, send, with_callback
from transformers import PreTrainedTokenizerFast, set_seed

import dlora
from dlora.cli.demo import serving
from dlora.cli.main import main
from dlora.cli.train_screen import ending, shown
from dlora.cloud.limits import Limits
from dlora.cloud.load import DEMO_MODEL
from dlora.cloud.model import CloudModel
from dlora.edge.data import load_rows
from dlora.edge.load import load_base
from dlora.embedded import InProcessLink
from dlora.errors import DataError, RewardError, UsageError
from dlora.privacy.recording import Recording
from dlora.runs import RunFolder, load_run, step_of
from dlora.server.server import Server
from dlora.training import report
from dlora.training.rewards import load_rewards
from dlora.training.run import train
from dlora.training.settings import TrainSettings
from dlora.training.tasks import is_figure
from dlora.training.trainer_config import trainer_config

REWARD = """
import random

def longer(completions, answer, **_):
    return [float(len(text)) for text in completions]

async def dice(completions, **_):
    return [random.random() for _ in completions]

def nothing(completions, **_):
    return [None for _ in completions]

def few(completions, **_):
    return [1.0]

def text(completions, **_):
    return ["good" for _ in completions]

def number(completions, **_):
    return 1.0

def no_number(completions, trainer_state, **_):
    return [float("nan") if trainer_state.global_step == 2 else 1.0 for _ in completions]

def fails(completions, trainer_state, **_):
    if trainer_state.global_step == 2:
        raise KeyError(completions[0])
    return [float(len(set(text))) for text in completions]
"""
PAIRS = [
    {"prompt": f"parcel {n * 37 % 91}:", "chosen": f" desk {n % 4}", "rejected": " lost" * (n % 3)}
    | ({"rejected": " the desk"} if n % 3 == 0 else {})
    for n in range(8)
]
RATED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
    for n, row in enumerate(PAIRS)
]
# A column for rewards may have the name of one that is trained on.
ASKED = [{"prompt": row["prompt"], "answer": row["chosen"], "label": "yes"} for row in PAIRS[:4]]
ROWS = {"dpo": PAIRS, "kto": RATED, "grpo": ASKED}

# Answers of a draw are learned from in two steps, twice: most checkpoints fall in between.
DRAWN = {"num_generations": 2, "max_completion_length": 5, "steps_per_generation": 4}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"lora_dropout": 0.2},
    "kto": {"lora_dropout": 0.2},
    "grpo": {"trainer": DRAWN | {"num_iterations": 2, "beta": 0.1}},
}


KTO_IS_SLOW = ["dpo", pytest.param("kto", marks=pytest.mark.slow), "grpo"]


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """The trainer collects garbage whenever it starts: not among all that is loaded here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def entries(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def settings(folder: Path, task: str, output: str = "run", **changes: Any) -> TrainSettings:
    """A run of 6 steps of 2 micro-batches of 2 rows each, over several epochs."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    values: dict[str, Any] = {
        "server": "in-process",
        "task": task,
        "data": str(write_lines(folder / f"{task}.jsonl", ROWS[task])),
        "output": folder / output,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_steps": 100,
        "give_up_after_s": 0.0,
    }
    if task == "grpo":
        values["reward"] = [f"{reward}:longer", f"{reward}:dice"]
    return TrainSettings(**(values | KINDS[task] | changes))


@pytest.mark.parametrize("task", KTO_IS_SLOW)
def test_a_run_logs_what_trls_trainer_logs_of_local_peft(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, task: str
) -> None:
    """Losses, rewards and lengths of every step are those of trl's trainer on local peft, where the
    reference is a copy of the adapter: rows, seeds and settings arrive unchanged.
    """
    chosen = settings(tmp_path, task, wire_dtype="fp32", max_steps=3, lora_dropout=0.0)
    train(chosen, link)
    base = make_base("llama")
    set_seed(chosen.seed)
    local = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    rewards = {"reward_funcs": load_rewards(chosen.reward)} if task == "grpo" else {}
    trainer = getattr(trl, f"{task.upper()}Trainer")(
        model=local,
        args=trainer_config(replace(chosen, output=tmp_path / "local")),
        train_dataset=load_rows(chosen.data, task=task)[0],
        processing_class=copy.deepcopy(tokenizer),
        **rewards,
    )
    trainer.train()
    want = [entry for entry in trainer.state.log_history if "loss" in entry]
    got = [entry for entry in entries(tmp_path / "run") if "loss" in entry]
    assert len(want) == len(got) == 3
    for one, other in zip(want, got, strict=True):
        names = [name for name in one if name == "loss" or is_figure(name)]
        assert len(names) > 1
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("task", KTO_IS_SLOW)
def test_a_run_that_ends_again_and_again_equals_one_that_did_not(
    link: InProcessLink, tmp_path: Path, task: str
) -> None:
    """After Ctrl-C, and after a fault between micro-batches or in a reward, each resumed, the
    adapter has the very bits of a run never stopped; with answers drawn, rated by chance and
    learned from across checkpoints and epochs too.
    """
    whole = train(settings(tmp_path, task, "whole"), link)
    assert (whole["status"], whole["steps"]) == ("finished", 6)
    with with_callback(At("on_step_begin", 0, send(signal.SIGINT))):
        assert train(settings(tmp_path, task), link)["status"] == "interrupted"

    # Of six steps four are behind the second ending; grpo draws anew for the fifth.
    raised: Any = RewardError if task == "grpo" else Broken
    with pytest.MonkeyPatch.context() as patch, pytest.raises(raised) as caught:
        if task == "grpo":
            patch.setattr(
                sys.modules[__name__], "REWARD", REWARD.replace("float(len(text))", "text.rating")
            )
        with with_callback(At("on_substep_end", 4, broken)):
            train(settings(tmp_path, task, resume=True), link)
    assert "4 of 4 finished steps are saved in" in caught.value.__notes__[-1]
    again = train(settings(tmp_path, task, resume=True), link)
    assert (again["status"], again["steps"]) == ("finished", 6)
    assert same(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "ref").exists()
    whole_log, log = (
        {entry["step"]: entry["loss"] for entry in entries(tmp_path / name) if "loss" in entry}
        for name in ("whole", "run")
    )
    assert log == whole_log


# ----------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("task", KTO_IS_SLOW)
def test_a_run_of_a_task_is_recorded(link: InProcessLink, tmp_path: Path, task: str) -> None:
    """`record` keeps the first micro-batches, each with the tokens that its embeddings are of and
    with labels; a run that goes on records the next ones, and nothing of the reference.
    """
    with with_callback(At("on_step_begin", 0, send(signal.SIGINT))):
        train(settings(tmp_path, task, record=3, wire_dtype="fp32"), link)
    assert len(Recording(tmp_path / "run" / "recording")) == 2
    train(settings(tmp_path, task, record=3, wire_dtype="fp32", resume=True), link)
    recording = Recording(tmp_path / "run" / "recording")
    assert len(recording) == 3
    table = make_base("llama").get_input_embeddings()
    for number in range(3):
        view, truth, _ = recording.read(number)
        ids_N = truth.input_ids.reshape(-1)[view.positions]
        assert torch.allclose(view.entry, table(ids_N), atol=1e-6)
        assert truth.supervised.any()


def test_log_report_and_card_have_what_the_task_logs(
    link: InProcessLink,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Accuracies and margins stand in the log, in run.json, at the end on the screen, in the card
    and in the report; a step costs one round trip more than of sft, the reference's, as announced.
    """
    chosen = settings(tmp_path, "dpo", val_size=2, eval_steps=3, save_steps=3)
    caplog.set_level(logging.INFO)
    with shown(chosen) as screen:
        run = train(chosen, link, screen)
    said = capsys.readouterr().out + caplog.text
    figures = run["figures"]
    names = ("rewards/accuracies", "rewards/margins")
    steps = [entry for entry in entries(tmp_path / "run") if "loss" in entry]
    assert {name: steps[-1][name] for name in names}.items() <= figures.items()
    assert 0 <= figures["eval_rewards/accuracies"] <= 1 and run["best_eval_loss"] < 0.69

    # Two micro-batches of three sites: two each, one, and one of the reference.
    assert steps[0]["round_trips"] == 2 * (2 * 3 + 1 + 1)
    assert "16 round trips" in said and "6 pairs of" in said and "dpo with beta 0.1" in said
    assert (
        f"reward accuracy {figures['rewards/accuracies']:.3f}"
        in dict(ending(run, chosen))["learned"]
    )
    card = (tmp_path / "run/README.md").read_text()
    assert (
        f"| reward margin | {figures['rewards/margins']:.4f} |" in card and "| task | dpo |" in card
    )
    table = dict(report._rows([load_run(tmp_path / "run")]))
    assert table["held-out reward accuracy"] == [f"{figures['eval_rewards/accuracies']:.4f}"]
    assert table["trained"] == ["dpo, FT"]


def test_preferences_of_an_adapter_are_compared_with_it(
    link: InProcessLink, tmp_path: Path
) -> None:
    """A run that starts from an adapter has that as its reference: at its first step nothing
    differs, and the adapter that is left is one adapter.
    """
    train(settings(tmp_path, "dpo", "first", max_steps=1, lora_dropout=0.0), link)
    second = {"adapter": tmp_path / "first", "lora_dropout": 0.0, "max_steps": 2}
    train(settings(tmp_path, "dpo", **second), link)
    first, last = (entry for entry in entries(tmp_path / "run") if "loss" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert abs(last["rewards/margins"]) > 0.01
    assert first["round_trips"] == 2 * (2 * 3 + 1 + 4)  # the reference's sites are asked too
    assert not (tmp_path / "run/ref").exists() and not same(tmp_path / "first", tmp_path / "run")


def test_trained_rows_are_those_of_the_reference(link: InProcessLink, tmp_path: Path) -> None:
    """Rows of the embedding that an adapter has trained are its reference's too: at the first step
    nothing differs.
    """
    rows = list(range(3, 290))
    model = make_split(link, lora(trainable_token_indices={"embed_tokens": rows}))
    for name, parameter in adapter(model).items():
        parameter.data += 0.1 * torch.randn_like(parameter) * ("tokens_delta" in name)
    model.save_pretrained(tmp_path / "first")
    train(
        settings(tmp_path, "dpo", adapter=tmp_path / "first", lora_dropout=0.0, max_steps=1), link
    )
    (first,) = (entry for entry in entries(tmp_path / "run") if "loss" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("task", "as_messages"), [("dpo", False), ("dpo", True), ("kto", True), ("grpo", True)]
)
def test_rows_become_what_the_trainer_reads(
    link: InProcessLink, tmp_path: Path, task: str, as_messages: bool
) -> None:
    """Texts and messages of each task train; columns may have other names; messages may stand
    without a prompt of their own.
    """
    rows: list[dict[str, Any]] = []
    for row in ROWS[task]:
        new = dict(row)
        if as_messages:
            new["prompt"] = [{"role": "user", "content": row["prompt"]}]
            for name in {"chosen", "rejected", "completion"} & row.keys():
                new[name] = [{"role": "assistant", "content": row[name]}]
            if task == "dpo":  # as some data has it: whole conversations
                prompt = new.pop("prompt")
                new |= {name: prompt + new[name] for name in ("chosen", "rejected")}
        else:
            new["question"] = new.pop("prompt")
        rows.append(new)
    columns = {} if as_messages else {"prompt": "question"}
    data = write_lines(tmp_path / "rows.jsonl", rows)
    run = train(settings(tmp_path, task, data=str(data), columns=columns, max_steps=1), link)
    assert run["status"] == "finished" and run["rows"]["data"]["count"] == len(rows)


# ----------------------------------------------------------------- rewards


def test_a_reward_that_fails_loses_nothing(link: InProcessLink, tmp_path: Path) -> None:
    """A reward that gives no number ends the run with one line; the steps before it are saved, and
    nothing of an answer is in run.json.
    """
    names = {"reward": [f"{tmp_path}/reward.py:no_number"], "trainer": DRAWN | {"beta": 0.0}}
    message = "returned nan for answer 1 of 8, want a finite number"
    with pytest.raises(RewardError, match=message) as caught:
        train(settings(tmp_path, "grpo", **names), link)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["status"], run["steps"]) == ("failed", 2)
    assert run["error"] == str(caught.value).splitlines()[0] and "parcel" not in json.dumps(run)
    assert "2 of 2 finished steps are saved" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fails"], r"raised KeyError at reward.py:\d+: mend it"),
        (["few"], "returned 1 numbers for 2 answers, want one for each"),
        (["text"], "returned a str for answer 1 of 2, want a number"),
        (["number"], "returned a float, want a list of 2 numbers"),
        (["nothing"], r"2 of 2 answers have no number of any reward \(None\)"),
        (["nothing", "dice"], None),
        (["dice", "longer"], None),
    ],
)
def test_a_reward_gives_a_number_for_each_answer(
    tmp_path: Path, names: list[str], message: str | None
) -> None:
    """What a reward raises or returns is refused in one line that names it; of several, some may
    leave an answer out, and they may be asynchronous.
    """
    (tmp_path / "reward.py").write_text(REWARD)
    rewards = load_rewards([f"{tmp_path}/reward.py:{name}" for name in names])
    state = SimpleNamespace(global_step=2)
    asked: dict[str, Any] = {"answer": ["", ""], "trainer_state": state}
    wrong = nullcontext() if message is None else pytest.raises(RewardError, match=message)
    with wrong as caught:
        for reward in rewards:
            assert len(reward(prompts=["a", "b"], completions=["c", "dd"], **asked)) == 2
    assert caught is None or str(caught.value).startswith(f"reward {tmp_path}/reward.py:{names[0]}")


# ----------------------------------------------------------------- refusals


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "dpo",
            {"prompt": "a", "chosen": " b"},
            "got columns prompt, chosen; task dpo wants `prom",
        ),
        ("dpo", {"prompt": "a", "chosen": "", "rejected": "c"}, "`chosen` is missing or empty"),
        ("dpo", {"prompt": "a", "chosen": " ", "rejected": "c"}, "`chosen` is empty"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": 3}, "`rejected` is a number, want text"),
        ("dpo", {"chosen": MESSAGES, "rejected": MESSAGES}, "`chosen` must have role assistant"),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, "`label` is 1, want true"),
        ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "`label` is 'good', want"),
        ("kto", {"prompt": "a", "completion": "b", "label": None}, "`label` is missing or empty"),
        ("grpo", {"prompt": "a", "completions": "b"}, "'completions' cannot be handed to rewards"),
        ("grpo", {"question": "a"}, "got columns question; task grpo wants `prompt`"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, task: str, row: Any, message: str) -> None:
    """A row that nothing can be learned from is refused with file, line and what is wanted."""
    is_first = "got columns" in message or isinstance(row.get("chosen"), list)
    file = write_lines(tmp_path / "x.jsonl", [row] if is_first else [ROWS[task][0], row])
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_rows(str(file), task=task)
    assert str(caught.value).startswith(f"{file}:{1 if is_first else 2}: ")


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_messages_that_the_template_refuses_name_file_and_line(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    task: str,
) -> None:
    """A role that the model's chat template does not take is refused where it stands."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = [{"prompt": [{"role": role, "content": "a"}]} | answers for role in ("user", "system")]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    with (
        closing(InProcessLink(cloud_models("llama"), strict)) as other,
        pytest.raises(DataError, match=r"rows.jsonl:2: the model's chat template .*no system"),
    ):
        train(settings(tmp_path, task, data=str(data)), other)


def test_labels_of_tables_are_words(tmp_path: Path) -> None:
    """A table says true and false in any case."""
    (tmp_path / "a.csv").write_text("prompt,completion,label\na,b,True\na,c,false\n")
    rows, _ = load_rows(str(tmp_path / "a.csv"), task="kto")
    assert rows["label"][:] == [True, False]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "sft",
            {"reward": ["r.py:a"]},
            "reward: got r.py:a with task sft: rewards are for task gr",
        ),
        ("dpo", {"reward": ["r.py:a"]}, "reward: got r.py:a with task dpo"),
        ("kto", {"kind": "series", "target_modules": ["q_proj"]}, "kind: got series with task kto"),
        ("grpo", {"reward": []}, "reward: task grpo wants one or more"),
        ("grpo", {"pad_to": 8}, "pad_to: got 8 with task grpo"),
        ("grpo", {"overlong": "truncate"}, "overlong: got truncate with task grpo"),
        ("grpo", {"trainer": {"use_vllm": True}}, "trainer: use_vllm cannot be set here"),
        ("dpo", {"columns": {"text": "a"}}, "want prompt, chosen or rejected"),
    ],
)
def test_settings_without_use_are_refused_by_name(
    tmp_path: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    """A setting that a task has no use for is refused by name and value, and never passed over."""
    values: dict[str, Any] = {"reward": ["r.py:a"]} if task == "grpo" else {}
    common = {"server": "s", "data": "d", "output": tmp_path / "run", "task": task}
    with pytest.raises(UsageError, match=message):
        TrainSettings(**(common | values | changes))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "nowhere.py:a"], "--reward: nowhere.py: no such file"),
        (["--reward", "reward.py"], "--reward: got 'reward.py', want FILE.py:NAME"),
        (["--reward", "reward.py:longr"], "reward.py has no function longr; did you mean longer?"),
        (["--reward", "broken.py:a"], "--reward: broken.py:2: not Python"),
        (["--reward", "reward.py:dice", "--data", "pairs.jsonl"], "got columns chosen"),
    ],
)
def test_rewards_and_columns_are_looked_at_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """A reward's file and name, and the columns of the data, are refused with one line before a
    server is asked.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "broken.py").write_text("def a():\n  return )\n")
    write_lines(tmp_path / "rows.jsonl", ASKED)
    write_lines(tmp_path / "pairs.jsonl", [{"chosen": "a"}])
    common = ["--server", "127.0.0.1:1", "--task", "grpo", "--output", "run"]
    data = [] if "--data" in words else ["--data", "rows.jsonl"]
    assert main(["train", *common, *data, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_arguments_of_the_tasks_trainer_are_checked_by_name(tmp_path: Path) -> None:
    """--trainer reaches the fields of the task's own configuration, and no others."""
    with pytest.raises(UsageError, match="DPOConfig of trl has no argument bta; did you mean beta"):
        trainer_config(settings(tmp_path, "dpo", trainer={"bta": 1.0}))
    with pytest.raises(UsageError, match="training arguments: generation_batch_size"):
        trainer_config(settings(tmp_path, "grpo", trainer={"num_generations": 3}))
    config: Any = trainer_config(settings(tmp_path, "dpo", trainer={"beta": 0.7}))
    assert config.beta == 0.7


@pytest.mark.parametrize(
    ("allowed", "in_flight", "refusal"),
    [
        (1, 1, r"two streams at once .* allows 1 here"),
        (3, 4, r"holds 4 streams for its parts in flight .* allows 3 .* in_flight to 2 or less"),
        (3, 2, None),
    ],
)
def test_a_tenant_with_few_streams_is_told_before_the_run(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    allowed: int,
    in_flight: int,
    refusal: str | None,
) -> None:
    """A step of dpo holds two streams, one of them for each part in flight: whoever may have fewer
    is refused at once, with one line. What that advises trains: the reference's parts wait for
    each other.
    """
    options = replace(NO_DRAIN, max_streams=allowed)
    told = nullcontext() if refusal is None else pytest.raises(UsageError, match=refusal)
    with (
        Server(cloud_models("llama"), tokenizer, options=options) as server,
        closing(dlora.connect(server.address, cache=tmp_path / "cache")) as connected,
        told,
    ):
        changes = {"in_flight": in_flight, "max_steps": 1, "give_up_after_s": 60.0}
        train(settings(tmp_path, "dpo", **changes), connected)
    assert (tmp_path / "run").exists() == (refusal is None)


@pytest.mark.parametrize(
    ("task", "overlong"), [("dpo", "error"), ("kto", "error"), ("kto", "drop"), ("dpo", "truncate")]
)
def test_long_rows_are_refused_dropped_or_cut(
    link: InProcessLink, tmp_path: Path, task: str, overlong: str
) -> None:
    """max_length holds for the prompt with the longer completion, and no sequence is longer."""
    rows = [dict(ROWS[task][0]), dict(ROWS[task][1]), dict(ROWS[task][2])]
    rows[1]["chosen" if task == "dpo" else "completion"] = " desk" * 20
    data = write_lines(tmp_path / "long.jsonl", rows)
    chosen = settings(tmp_path, task, data=str(data), max_length=24, overlong=overlong, max_steps=1)
    if overlong == "error":
        with pytest.raises(DataError, match=r"long.jsonl:2: \d+ tokens, max_length is 24; 1 of 3"):
            train(chosen, link)
        return
    seen: list[Any] = []
    noted = At("on_train_begin", 0, lambda train_dataloader, **_: seen.append(train_dataloader))
    with with_callback(noted):
        run = train(chosen, link)
    assert run["rows"]["data"]["count"] == (2 if overlong == "drop" else 3)

    # No prompt meets the completion of a row that was dropped.
    if task == "kto":
        kept = seen[0].dataset
        assert sorted(kept["KL_completion_ids"]) == sorted(kept["completion_ids"])


WAYS: dict[str, dict[str, Any]] = {
    "hosted": {"wire": "hosted", "upload_consent": True},
    "factored, in flight": {"wire": "factored", "in_flight": 2},
    "kill and revive": {
        "kr": "on",
        "kr_options": {"budget": 0.4, "interval": 2, "drop_steps": 0},
        "target_modules": ["q_proj", "v_proj", "o_proj"],
    },
    "int8, dropped input gradients": {"wire_dtype": "int8", "input_grad": "drop"},
    "layers here": {"edge_first": 1, "edge_last": 1},
    "padded": {"pad_to": 8},
    "prefixes": {"cache_prefix": True, "target_modules": r".*layers\.2.*q_proj"},
    "noise": {"noise_entry": 0.1, "noise_tail": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", ROWS)
def test_a_task_goes_every_way_that_answers_go(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    task: str,
    way: str,
) -> None:
    """Wires, parts in flight, Kill and Revive, codecs, layers and prefixes hold for every task, and
    a run that is stopped in any of them ends with the bits of one that was not.
    """
    if task == "grpo" and way in ("padded", "prefixes"):
        pytest.skip("refused by name")
    limits = replace(Limits(), edge_first=1, edge_last=1)
    cloud = CloudModel(make_base("llama"), model_id="example-org/llama", limits=limits)
    with (
        Server(cloud, tokenizer, options=NO_DRAIN) as server,
        closing(dlora.connect(server.address, cache=tmp_path / "cache")) as connected,
    ):
        whole = train(settings(tmp_path, task, "whole", **WAYS[way]), connected)
        with with_callback(At("on_step_begin", 2, send(signal.SIGINT))):
            train(settings(tmp_path, task, **WAYS[way]), connected)
        again = train(settings(tmp_path, task, resume=True, **WAYS[way]), connected)
    assert whole["steps"] == again["steps"] == 6
    assert same(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------- the real model, over a socket


@pytest.fixture(scope="module")
def real_server() -> Iterator[str]:
    """A server process with SmolLM2."""
    with serving(DEMO_MODEL) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_a_killed_run_of_the_real_model_goes_on_bit_for_bit(
    real_server: str, tmp_path: Path, task: str
) -> None:
    """An edge process that is killed in the middle of a step, and the same command with --resume,
    end with the very bits of a run that nobody killed.
    """
    (tmp_path / "reward.py").write_text(REWARD)
    data = write_lines(tmp_path / "rows.jsonl", ROWS[task][:4])
    words = ["--server", real_server, "--task", task, "--data", str(data), "--max_steps", "4"]
    words += ["--batch_size", "2", "--save_steps", "1", "--report_to", "none"]
    words += ["--target_modules", r".*layers\.2\d.*[qv]_proj", "--save_total_limit", "9"]
    if task == "grpo":  # steps 2 and 4 learn from answers that were drawn for the step before
        words += ["--reward", f"{tmp_path}/reward.py:longer,{tmp_path}/reward.py:dice"]
        words += ["--trainer.num_generations", "2", "--trainer.steps_per_generation", "2"]
        words += ["--trainer.max_completion_length", "6"]
    assert cli("train", *words, "--output", str(tmp_path / "whole")).returncode == 0

    output = ["--output", str(tmp_path / "run")]
    with subprocess.Popen(dlora_command("train", *words, *output)) as process:
        while not (tmp_path / "run/checkpoints/checkpoint-1/trainer_state.json").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    saved = RunFolder(tmp_path / "run").newest_complete()
    assert saved is not None and step_of(saved) < 4
    done = cli("train", *words, *output, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_dpo_raises_the_share_of_preferred_answers(
    real_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On pairs about things that no training pair is about, the real model comes to find the
    preferred answer the likelier one.
    """
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    preferences = import_module("preferences")
    link = dlora.connect(real_server, cache=tmp_path / "cache")
    with closing(link):
        rows, tokenizer = preferences.held_out(), dlora.load_tokenizer(link)
        before = preferences.measure(load_base(link), tokenizer, rows)
    after = preferences.one_seed(real_server, 0, tmp_path)["after"]
    assert before["preferred"] < 0.4 and after["preferred"] > 0.8
