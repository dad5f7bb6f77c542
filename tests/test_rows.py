"""What is trained is the data: rows that teach nothing, other rows, another process, roles."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import lora
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import DataError, UsageError
from dlora.inference.answer import load_for_inference
from dlora.inference.evaluate import evaluate
from dlora.inference.settings import EvalSettings
from dlora.training.run import train
from dlora.training.run_lock import run_lock
from dlora.training.settings import TrainSettings
from dlora.training.trainer import build_trainer

SHORT = {"prompt": "a", "completion": " north"}
LONG = {"prompt": "a" * 40, "completion": " north"}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def settings(data: Path, **changes: Any) -> TrainSettings:
    """A run of one step, next to its data."""
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": data.parent / "run",
        "max_steps": 1,
        "batch_size": 2,
        "report_to": [],
    }
    return TrainSettings(**(values | changes))


# ----------------------------------------------------------------- rows that teach nothing


@pytest.mark.parametrize("use", ["data", "eval_data"])
def test_rows_that_all_teach_nothing_are_refused(
    link: InProcessLink, tmp_path: Path, use: str
) -> None:
    """A run whose every completion is cut away does not end with "finished, loss 0.0"."""
    files = {"data": write(tmp_path / "a.jsonl", [SHORT] * 4)}
    files[use] = write(tmp_path / f"{use}.jsonl", [LONG] * 4)
    cut = settings(
        files.pop("data"),
        max_length=30,
        overlong="truncate",
        **{name: str(file) for name, file in files.items()},
    )
    message = rf"{use}\.jsonl:1: like all 4 rows it has no token to learn, as max_length cuts"
    with pytest.raises(DataError, match=message):
        train(cut, link)
    assert not (tmp_path / "run").exists()


def test_single_rows_that_teach_nothing_are_counted(
    link: InProcessLink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where some completions are cut away, a warning says how many and names the first."""
    data = write(tmp_path / "a.jsonl", [SHORT, LONG, LONG, SHORT])
    cut = settings(data, max_length=30, overlong="truncate")
    build_trainer(cut, dlora.get_peft_model(link, lora()), dlora.load_tokenizer(link))
    assert "2 of 4 rows have no token to learn, as max_length cuts" in caplog.text
    assert f"the first is {data}:2" in caplog.text


def test_texts_of_one_token_teach_nothing(link: InProcessLink, tmp_path: Path) -> None:
    """The kind, not only the case: rows can lack labels without being cut."""
    data = write(tmp_path / "a.jsonl", [{"text": "</s>"}] * 2)
    with pytest.raises(DataError, match=r"a\.jsonl:1: like all 2 rows it has no token to learn$"):
        train(settings(data), link)


def test_a_tokenizer_without_end_is_refused(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No answer could be taught to end: training and evaluation say so, in place of errors of
    Python.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    endless = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer", eos_token=None)
    data = write(tmp_path / "a.jsonl", [SHORT] * 2)
    with closing(InProcessLink(cloud_models("llama"), endless)) as link:
        with pytest.raises(UsageError, match="has no end token"):
            train(settings(data), link)
        model = load_for_inference(link, None)
        with pytest.raises(UsageError, match="has no end token"):
            evaluate(EvalSettings(server="s", data=str(data)), model, endless)


def test_one_end_is_taught(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A tokenizer that appends its end does not let a row end twice, nor a prompt end at all."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    appending = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with closing(InProcessLink(cloud_models("llama"), appending)) as link:
        model = dlora.get_peft_model(link, lora())
        data = write(tmp_path / "a.jsonl", [SHORT] * 2)
        trainer = build_trainer(settings(data), model, dlora.load_tokenizer(link))
    row = trainer.train_dataset[0]
    plain = [tokenizer(text)["input_ids"] for text in SHORT.values()]
    assert row["input_ids"] == [1, *plain[0], *plain[1], 2]
    assert row["labels"] == [-100] * (1 + len(plain[0])) + [*plain[1], 2]


# ----------------------------------------------------------------- the same rows, and one process


def test_resume_with_other_rows_is_refused(link: InProcessLink, tmp_path: Path) -> None:
    """A resumed run goes on with the rows that it began with, or not at all."""
    data, other = write(tmp_path / "a.jsonl", [SHORT] * 4), write(tmp_path / "b.jsonl", [SHORT] * 2)
    train(settings(data, eval_data=str(other)), link)
    run_file = tmp_path / "run" / "run.json"
    run = json.loads(run_file.read_text())
    assert [run["rows"][use]["count"] for use in ("data", "eval_data")] == [4, 2]
    run_file.write_text(json.dumps(run | {"status": "interrupted"}))

    for use, file in (("data", data), ("eval_data", other)):
        before = file.read_text()
        file.write_text(before.replace("north", "south", 1))
        with pytest.raises(UsageError, match=rf"but {use} has other rows or another order"):
            train(settings(data, eval_data=str(other), resume=True), link)
        file.write_text(before)
    assert json.loads(run_file.read_text())["status"] == "interrupted"

    # Where run.json is gone, the newest checkpoint says what the run was.
    run_file.unlink()
    data.write_text(data.read_text().replace("north", "south", 1))
    with pytest.raises(UsageError, match="but data has other rows or another order"):
        train(settings(data, eval_data=str(other), resume=True), link)


def test_two_processes_do_not_train_in_one_folder(link: InProcessLink, tmp_path: Path) -> None:
    """Whoever comes second is refused, new run or resumed, and has changed nothing."""
    data = write(tmp_path / "a.jsonl", [SHORT] * 4)
    with run_lock(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(UsageError, match="another process trains in"):
                train(settings(data, resume=resume), link)
        assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run"):
        pass  # whoever comes third may
