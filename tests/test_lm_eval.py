"""`dlora eval --tasks`: lm-eval-harness on the split model, against its own class on local peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import lora, make_base, make_local, make_split
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cli.main import main
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.adapter_results import card_with_results, note_results
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.inference.settings import EvalSettings
from dlora.server.server import Server

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval import evaluate, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dlora.inference import lm_harness, tasks
from dlora.inference.lm_harness import SplitLM
from dlora.inference.tasks import load_tasks, measure_tasks

_WORDS = "gate lift ward bed door lamp pump tray".split()
_ROWS = [
    {
        "q": f"the {_WORDS[n]} {'of the desk ' * (n % 3)}is",
        "choices": [f" {_WORDS[n]}", " the message of the desk", f" {n}"],
        "gold": n % 3,
    }
    for n in range(8)
]
_TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["Q"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} and so on, to its end, which is further than a window"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are prepared in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks, one of each kind, and one whose data is on a hub."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    for name, text in _TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntest_split: test\nfewshot_split: test\n{data}{text}"
        )
    (folder / "broken.yaml").write_text("task: broken\noutput_type: nothing\n")
    (folder / "code.yaml").write_text(
        (folder / "answer.yaml")
        .read_text()
        .replace("task: answer", "task: code\nunsafe_code: true")
    )
    hub = "task: far\ndataset_path: example-org/far\ntest_split: test\noutput_type: multiple_choice"
    (folder / "far.yaml").write_text(hub)
    return folder


@pytest.fixture(scope="module")
def link(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A connection to it."""
    made = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


@pytest.fixture
def folder(link: Any, tmp_path: Path) -> Path:
    """An adapter whose effect is large."""
    make_split(link, lora()).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def wire() -> str:
    """Where the adapter is computed."""
    return "plain"


@pytest.fixture
def words(server: Server, folder: Path, tasks_path: Path, wire: str) -> list[str]:
    """The flags of every command here."""
    served = ["eval", "--server", server.address, "--adapter", str(folder), "--wire_dtype", "fp32"]
    consent = ["--wire", wire, "--upload_consent", str(wire == "hosted").lower()]
    return [*served, *consent, "--tasks_path", str(tasks_path)]


@pytest.fixture(scope="module")
def local(tasks_path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the harness's own class says of local peft, with two examples before a question."""
    lm = HFLM(pretrained=make_local("llama", lora()).eval(), tokenizer=tokenizer, batch_size=2)
    manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        lm, tasks=list(_TASKS), task_manager=manager, num_fewshot=2, bootstrap_iters=0
    )
    return found


@pytest.mark.parametrize("wire", ["plain", "hosted"])
def test_the_command_gives_the_harness_numbers_on_local_peft(
    words: list[str],
    folder: Path,
    local: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Choices, answers and perplexity of a text, with examples before each question, are those of
    local peft; they stand in a table of 80 columns, in the adapter's folder and in its README.
    """
    output, rows = tmp_path / "out.json", tmp_path / "rows.jsonl"
    files = ["--output", str(output), "--predictions", str(rows)]
    assert main([*words, "--tasks", "choose,answer,read", "--num_fewshot", "2", *files]) == 0
    out = capsys.readouterr().out
    found = json.loads((folder / "evaluation.json").read_text())
    assert json.loads(output.read_text())["tasks"].keys() == found.keys() == _TASKS.keys()
    for name, one in found.items():
        assert one["rows"] == 8 and one["num_fewshot"] == 2
        assert len(one["metrics"]) == (2 if name == "choose" else 1)
        for metric in one["metrics"]:
            want = local["results"][name][f"{metric['metric']},{metric['filter']}"]
            assert metric["value"] == pytest.approx(want, rel=1e-4)
            assert f"{metric['value']:.4f}" in (folder / "README.md").read_text()

    # Not the figures alone: every answer, and every log-likelihood.
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for name in ("choose", "answer", "read"):
        mine = [line for line in lines if line["task"] == name]
        for got, want in zip(mine, local["samples"][name], strict=True):
            if name == "choose":
                scores = [[float(nats) for nats, _ in one["filtered_resps"]] for one in (got, want)]
                assert scores[0] == pytest.approx(scores[1], rel=1e-4)
            elif name == "answer":
                assert got["resps"] == want["resps"]

    shown = [line for line in out.splitlines() if "/" not in line]
    assert len(shown) > 9 and max(map(len, shown)) <= 80 and str(folder / "evaluation.json") in out
    assert not list(folder.glob("*.part"))


def settings(tasks_path: Path, *tasks: str, **others: Any) -> EvalSettings:
    """Settings of `dlora eval` with tasks of the folder."""
    return EvalSettings(server="x", tasks=list(tasks), tasks_path=tasks_path, **others)


def measured(
    asked: EvalSettings, model: Any, tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[float]]:
    """What the command finds of each task, without its table."""
    found = measure_tasks(asked, model, tokenizer, load_tasks(asked))
    return {
        name: [metric["value"] for metric in one["metrics"]] for name, one in found["tasks"].items()
    }


@pytest.mark.parametrize(
    ("wire", "limits", "batch_size", "scored", "answered"),
    [
        ("plain", {}, 3, 8, 3),
        ("plain", {"max_tokens": 200}, "auto", 3, 1),
        ("plain", {"max_tokens": 90}, 64, 5, 2),
        ("plain", {"max_message_bytes": 200_000}, "auto", 3, 1),
        ("hosted", {"max_tokens": 90}, 64, 5, 2),
        ("hosted", {"max_message_bytes": 100_000}, "auto", 3, 1),
    ],
)
def test_micro_batches_fill_what_the_server_takes(
    tasks_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    wire: str,
    limits: dict[str, int],
    batch_size: Any,
    scored: int,
    answered: int,
) -> None:
    """With "auto" and with a number of rows no micro-batch is over the server's limits, and none is
    smaller than it has to be; the figures are the same.
    """
    cloud = CloudModel(make_base("llama"), model_id="example-org/llama", limits=Limits(**limits))
    with closing(InProcessLink(cloud, tokenizer)) as link:
        split = make_split(link, lora(), wire=wire, upload_consent=wire == "hosted").eval()
        whole = load_tasks(settings(tasks_path, "choose", "answer"))
        lm = SplitLM(split, tokenizer, batch_size=batch_size)
        found = evaluate(lm, whole, bootstrap_iters=0, log_samples=False)
        assert found["results"]["choose"]["acc,none"] == 0.25
        assert (split.meter.micro_batches, split.meter.passes) == (scored, 6 * answered)
        assert split.options.head_positions == "auto"


def test_an_interrupted_evaluation_goes_on(
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After Ctrl-C the same command asks only for what is missing and finds the same; what was kept
    is for its user alone, is of no other adapter, outlives an evaluation with other settings, and
    goes at the end.
    """
    command = [*words, "--tasks", "choose,answer", "--batch_size", "4", "--output"]
    other = folder.parent / "whole.json"
    assert main([*command, str(other)]) == 0
    once = lm_harness.wanted_logits

    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(lm_harness, "wanted_logits", counted)
    stop = 4
    assert main([*command, str(folder.parent / "half.json")]) == 130
    assert "answers are kept: the same command goes on with them" in capsys.readouterr().err
    (part,) = folder.glob("evaluation-*.part")
    assert part.stat().st_mode & 0o777 == 0o600
    text = part.read_text()
    kept = len(text.splitlines()) - 1
    assert kept >= 12 and "message" not in text
    calls, stop = [], 0
    assert main([*command, str(folder.parent / "chat.json"), "--chat"]) == 0
    assert part.read_text() == text
    calls = []
    with part.open("a") as file:
        file.write('{"key": "cut')
    assert main([*command, str(folder.parent / "half.json")]) == 0
    assert sum(calls) == 24 - kept and not part.exists()
    one, two = (json.loads((folder.parent / f"{n}.json").read_text()) for n in ("whole", "half"))
    assert one["tasks"] == two["tasks"]

    # The kept answers of another adapter.
    header, _, rest = text.partition("\n")
    of = {"of": json.loads(header)["of"] | {"adapter": "other"}}
    part.write_text(f"{json.dumps(of)}\n{rest}")
    calls = []
    assert main([*command, str(folder.parent / "half.json")]) == 0
    assert sum(calls) == 24


def test_the_chat_template_is_the_harness_own(
    link: Any, tasks_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With `chat` questions are put into the template as the harness does it for local peft, and
    `limit` takes the first rows.
    """
    split = make_split(link, lora()).eval()
    got = measured(settings(tasks_path, "read", "choose", chat=True, limit=5), split, tokenizer)
    lm = HFLM(pretrained=make_local("llama", lora()).eval(), tokenizer=tokenizer, batch_size=2)
    manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
    want = simple_evaluate(
        lm,
        tasks=["read", "choose"],
        task_manager=manager,
        limit=5,
        apply_chat_template=True,
        bootstrap_iters=0,
    )["results"]
    assert got["read"] == pytest.approx([want["read"]["word_perplexity,none"]], rel=1e-4)
    assert got["choose"] == [want["choose"]["acc,none"], want["choose"]["acc_norm,none"]]


def test_texts_longer_than_the_limits(
    tasks_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A context is cut on the left as the harness cuts it, with one line that says so, a text is
    read in windows, and an answer that cannot fit is refused by name.
    """
    cloud = CloudModel(make_base("llama"), model_id="x/llama", limits=Limits(max_length=16))
    lm = HFLM(
        pretrained=make_local("llama", lora()).eval(),
        tokenizer=tokenizer,
        batch_size=2,
        max_length=16,
    )
    manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
    want = simple_evaluate(lm, tasks=["read", "choose"], task_manager=manager, bootstrap_iters=0)
    with closing(InProcessLink(cloud, tokenizer)) as link:
        split = make_split(link, lora()).eval()
        with caplog.at_level(logging.WARNING, "dlora"):
            caplog.clear()
            got = measured(settings(tasks_path, "read", "choose"), split, tokenizer)
        assert got["read"] == pytest.approx([want["results"]["read"]["word_perplexity,none"]], 1e-4)
        assert got["choose"][0] == want["results"]["choose"]["acc,none"]
        said = [one.getMessage() for one in caplog.records if one.name.startswith("dlora")]
        assert len(said) == 1 and "of 24 questions are cut on their left" in said[0]

        one = Instance("generate_until", {}, ("the desk", {"until": [], "max_gen_toks": 99}), 0)
        with pytest.raises(UsageError, match="answers of 99 tokens, and model and server take"):
            SplitLM(split, tokenizer).generate_until([one])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "chose"], "unknown task 'chose'; did you mean choose"),
        (["--tasks", "nothing*"], "unknown task 'nothing*'; `lm-eval ls tasks` lists"),
        (["--tasks", "far"], "their data is on the Hugging Face hub and not here: Couldn't reach"),
        (["--tasks", "choose", "--tasks_path", "no"], "--tasks_path: no such folder: no"),
        (["--tasks", "choose", "--data", "x.jsonl"], "give data or tasks, not both"),
        (["--tasks", "choose", "--exact_match"], "--exact_match: goes with data alone"),
        (["--tasks", "choose", "--num_fewshot", "-1"], "--num_fewshot: got -1, want 0 or more"),
        (["--data", "x.jsonl"], "--tasks_path: goes with tasks alone"),
        ([], "give data or tasks"),
        (["--tasks", "broken"], "lm-eval cannot make them"),
        (["--tasks", "code"], "code runs what the model writes, as code"),
    ],
)
def test_wrong_commands_are_one_line(
    tasks_path: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot work is said in a line before a server is asked."""
    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    common = ["eval", "--server", "127.0.0.1:1", "--tasks_path", str(tasks_path)]
    assert main([*common, *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dlora: ") and message in said


def test_results_stand_in_a_readme_as_long_as_they_are_true(tmp_path: Path) -> None:
    """What a README says otherwise stays; a newer result takes an older one's place; of an adapter
    that was trained further nothing is said that was measured before.
    """
    weights, readme = tmp_path / "adapter_model.safetensors", tmp_path / "README.md"
    weights.write_bytes(b"first")
    one = {"metrics": [], "rows": 3, "of_rows": 8, "num_fewshot": 0, "harness": "lm-eval 1"}
    metric = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": None}
    note_results(tmp_path, {"a": one | {"metrics": [metric]}})
    assert readme.read_text().startswith(f"# {tmp_path.name}")
    readme.write_text("# Mine\n" + readme.read_text() + "## By me\n\nas it was\n")
    note_results(tmp_path, {"b": one | {"metrics": [metric | {"value": 0.25, "filter": "strict"}]}})
    note_results(tmp_path, {"a": one | {"metrics": [metric | {"value": 0.75}]}})
    text = readme.read_text()
    assert "| a | acc | 0.7500 |  | 0 | 3 of 8 |" in text and "0.5000" not in text
    assert "| b | acc (strict) | 0.2500 |" in text and text.count("## Evaluation") == 1
    assert text.startswith("# Mine\n") and text.endswith("## By me\n\nas it was\n")

    assert "| b | acc (strict) |" in card_with_results("# Of a run\n", tmp_path)

    weights.write_bytes(b"second")
    later = card_with_results(text, tmp_path)
    assert "Evaluation" not in later and "0.75" not in later and "as it was" in later
    assert card_with_results("# Of a run\n", tmp_path) == "# Of a run\n"
