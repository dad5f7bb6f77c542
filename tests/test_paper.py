"""The command that makes the paper's tables: on tiny models of its three families, and its
projection by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import make_base
from transformers import PreTrainedTokenizerFast

import dlora

ROOT = Path(__file__).parents[1]
TARGETS = {
    "llama": {"lora": ["q_proj", "k_proj", "v_proj"], "series": ["o_proj"]},
    "opt": {"lora": ["q_proj", "k_proj", "v_proj"], "series": ["out_proj"]},
    "bloom": {"lora": ["query_key_value"], "series": ["dense"]},
}
ARMS = {
    "base": {"kind": "none"},
    "FT": {
        "r": 4,
        "learning_rate": 1e-2,
        "kr": {"policy": "all", "signal": "delta_norm", "interval": 1},
    },
    "KR": {"r": 4, "learning_rate": 1e-2, "kr": {"budget": 0.5, "interval": 1}},
    "KR series": {"kind": "series", "r": 4, "learning_rate": 1e-2, "kr": {}, "beside": "FT"},
}


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, imported as it imports its neighbours when it is started."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import paper

    yield paper
    paper.close_cloud()


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[str]]:
    """Writes model, made-up rows and a config of a family; the words that name them on the command
    line.
    """

    def make(family: str, **values: Any) -> list[str]:
        make_base(family).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        for task, choices in (("boolq", ["true", "false"]), ("arc_easy", ["answer1", "answer2"])):
            folder = tmp_path / "data/commonsense" / task
            folder.mkdir(parents=True)
            for part in ("train", "eval"):
                options = "" if task == "boolq" else "\n\nAnswer1: left Answer2: right"
                rows = [
                    {
                        "instruction": f"Ask: n{i}?{options}\n\nAnswer format: x",
                        "choices": choices,
                        "answer": choices[i % 2],
                    }
                    for i in range(9)
                ]
                (folder / f"{part}.jsonl").write_text(
                    "".join(json.dumps(row) + "\n" for row in rows)
                )
        config = {
            "models": {family: {"id": str(tmp_path / "model"), "targets": TARGETS[family]}},
            "tasks": ["boolq", "arc_easy"],
            "arms": ARMS,
            "runs": [{"arms": list(ARMS)}],
            "steps": 3,
            "batch_size": 2,
            "dtype": "fp32",
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config | values))
        words = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path / "data")]
        return [
            *words,
            "--results",
            str(tmp_path / "runs.jsonl"),
            "--images",
            str(tmp_path / "images"),
        ]

    return make


def runs(tmp_path: Path) -> list[dict[str, Any]]:
    """Finished runs, without what differs from one time to the next."""
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "changed_files")}
        for line in lines
    ]


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one == "llama" else pytest.mark.slow) for one in TARGETS],
)
def test_the_command_runs_every_arm_and_shows_it(
    paper: ModuleType,
    setting: Callable[..., list[str]],
    tmp_path: Path,
    family: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In each of the paper's families all arms run once, and tables and figures show them."""
    words = setting(family, personal=[{"users": ["boolq", "arc_easy[0/2]"], "arms": ["FT"]}])
    paper.main(["run", *words])
    first = runs(tmp_path)
    assert [(run["task"], run["arm"]) for run in first] == [
        *((task, arm) for task in ("boolq", "arc_easy") for arm in ARMS),
        *(("arc_easy[0/2]", "FT"), ("boolq+arc_easy[0/2]", "FT")),
    ]
    assert first[-1]["steps"] == 6 and set(first[-1]["by_task"]) == {"boolq", "arc_easy"}
    full, kr = first[1], first[2]
    assert sum(kr["bytes"].values()) < sum(full["bytes"].values()) and full["round_trips"] == 3 * (
        2 * 3 + 1
    )
    assert full["variation"]["steps"] == [1, 2] and all(
        min(values) > 0 for values in full["variation"]["values"]
    )
    paper.main(["run", *words])
    assert runs(tmp_path) == first
    capsys.readouterr()
    paper.main(["table", *words])
    shown = capsys.readouterr().out
    assert (
        "10 of 10 runs of the config are done." in shown
        and "| mean |" in shown
        and all(f"| {arm} |" in shown for arm in ARMS)
    )
    if family == "llama":  # one is enough
        paper.main(["figures", *words])
        assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_a_stopped_run_goes_on_to_the_same_result(
    paper: ModuleType, setting: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Stopped at any step and started again, Kill and Revive comes to the same losses, sets, bytes
    and accuracy.
    """
    arms = {
        "KR": {
            "r": 4,
            "learning_rate": 1e-2,
            "kr": {"revive": "random", "budget": 0.7, "interval": 1, "final": 0},
        }
    }
    setting("llama", arms=arms, runs=[{"arms": ["KR"], "tasks": ["boolq"]}], steps=5)
    config = paper.load_config(tmp_path / "tiny.yaml")
    (spec,) = paper.specs(config)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    whole = paper.one(spec, config, tmp_path / "data", folder, lambda: False)
    assert len({str(units) for _, units in whole["sets"]}) > 1
    found, times = None, 0
    while found is None:
        calls = itertools.count()
        found = paper.one(
            spec, config, tmp_path / "data", folder, lambda calls=calls: next(calls) >= 2
        )
        times += 1
    assert times == 3 and not list(folder.iterdir())
    assert whole | {"seconds": 0} == found | {"seconds": 0}


def test_ctrl_c_ends_after_a_step_and_loses_none(
    paper: ModuleType,
    setting: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the middle of a step ends the command in order; the same command goes on to the
    losses of a run that was never stopped, and says how much is left.
    """
    words = setting("llama", runs=[{"arms": ["FT"], "tasks": ["boolq", "arc_easy"]}], steps=3)
    paper.main(["run", *words])
    whole = runs(tmp_path)
    assert "1 of 2, about 00:0" in capsys.readouterr().out
    (tmp_path / "runs.jsonl").unlink()

    take_step, taken = paper.kr.take_step, []

    def interrupted(*args: Any) -> float:
        taken.append(args[2])
        if len(taken) == 2:
            signal.raise_signal(signal.SIGINT)
        return take_step(*args)

    monkeypatch.setattr(paper.kr, "take_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    paper.main(["run", *words])
    assert "goes on where it was\n0 of 2 runs" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    paper.main(["run", *words])
    assert taken == [0, 1, 2, 0, 1, 2] and runs(tmp_path) == whole


def test_the_product_default_trains_the_spread_set(
    paper: ModuleType, setting: Callable[..., list[str]], tmp_path: Path
) -> None:
    """`KR` with default options and the baseline `spread` are the same run."""
    arms = {
        "KR": {"r": 4, "learning_rate": 1e-2, "kr": {"budget": 0.5, "interval": 1}},
        "spread": {"r": 4, "learning_rate": 1e-2, "kr": {"budget": 0.5, "policy": "spread"}},
    }
    paper.main(
        ["run", *setting("llama", arms=arms, runs=[{"arms": ["KR", "spread"], "tasks": ["boolq"]}])]
    )
    kr, spread = runs(tmp_path)
    assert kr["losses"] == spread["losses"] and kr["bytes"] == spread["bytes"]


def test_choices_score_the_same_one_token_or_many(
    paper: ModuleType,
    setting: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one token tells the choices apart, the way for choices of any length is as accurate."""
    import kr
    from peft import LoraConfig

    setting("llama")
    link, tokenizer = paper.open_cloud(str(tmp_path / "model"), "fp32", "cpu", "eager", "none")
    config = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    model = dlora.get_peft_model(link, config, wire_dtype="fp32")
    model.set_options(head_positions="supervised")
    rows = kr.read(tmp_path / "data", "arc_easy", "eval")
    for number, row in enumerate(rows):
        row["choices"] = ["answer1", "answer2", "answer3"][: 2 + number % 2]
    assert paper.one_token_tells(tokenizer, rows)
    fast = paper.measure(model, tokenizer, rows)
    monkeypatch.setattr(paper, "one_token_tells", lambda *_: False)
    slow = paper.measure(model, tokenizer, rows)
    assert fast["accuracy"] == slow["accuracy"] and fast["majority"] == slow["majority"]
    assert 0 < fast["accuracy"] < 1


def test_quantize_is_passed_on_or_refused(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A low-bit base reaches the loader where it knows one, and is refused by name where it does
    not.
    """
    asked: list[str] = []
    link = SimpleNamespace(close=lambda: None)
    model = SimpleNamespace(set_attn_implementation=lambda name: None)

    def knows(name: str, *, dtype: str, device: str, quantize: str = "none") -> Any:
        asked.append(quantize)
        return SimpleNamespace(model=model, tokenizer=None, model_id=name)

    monkeypatch.setattr("dlora.in_process", lambda model, tokenizer, model_id: link)
    monkeypatch.setattr("dlora.cloud.load.load_model", knows)
    assert paper.open_cloud("low-bit", "fp32", "cpu", "eager", "int8")[0] is link and asked == [
        "int8"
    ]
    monkeypatch.setattr("dlora.cloud.load.load_model", lambda name, *, dtype, device: None)
    with pytest.raises(ValueError, match="'int4', and this version of dlora loads no low-bit base"):
        paper.open_cloud("other", "fp32", "cpu", "eager", "int4")


HUB_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"question": "is it", "passage": "p", "label": 1},
        "question: is it?\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        "g\n\nSolution1: a Solution2: b\n\n",
        "solution2",
    ),
    "social_iqa": (
        {
            "context": "c.",
            "question": "q?",
            "answerA": "x",
            "answerB": "y",
            "answerC": "z",
            "label": "3",
        },
        *("c. q?\n\nAnswer1: x Answer2: y Answer3: z\n\n", "answer3"),
    ),
    "hellaswag": (
        {"activity_label": "A", "ctx": "c", "endings": ["a", "b", "c", "d"], "label": "0"},
        *("A: c\n\nEnding1: a Ending2: b Ending3: c Ending4: d\n\n", "ending1"),
    ),
    "winogrande": (
        {"sentence": "s _ t", "option1": "a", "option2": "b", "answer": "2"},
        *("s _ t\n\nOption1: a Option2: b\n\n", "option2"),
    ),
    "arc_easy": (
        {
            "question": "q",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        *("q\n\nAnswer1: a Answer2: b Answer3: c\n\n", "answer2"),
    ),
    "openbookqa": (
        {
            "question_stem": "q",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        *("q\n\nAnswer1: a Answer2: b\n\n", "answer1"),
    ),
}


def test_hub_rows_become_instructions(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in each hub data set's own columns becomes a question with its options and the right
    answer, in a file.
    """
    import datasets
    import paper_data

    by_source = {paper_data.TASKS[task][:2]: row for task, (row, *_) in HUB_ROWS.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, part, split: [by_source[name, part]])
    paper_data.fetch(tmp_path, list(HUB_ROWS))
    for task, (_, text, answer) in HUB_ROWS.items():
        (row,) = paper.kr.read(tmp_path, task, "eval")
        assert text in row["prompt"] and row["answer"] == answer and answer in row["choices"]
        assert paper.kr.read(tmp_path, task, "train") == [row]
    assert paper_data.TASKS["arc_challenge"][-1] is paper_data.TASKS["arc_easy"][-1]


TEXT_ROWS = [  # (lead, question and options, right answer) -> (prompt, choices, completion)
    (
        (
            "Please choose the correct answer to the question",
            "Where is it?\n\nAnswer1: in Answer2: out there",
            "answer2",
        ),
        ("Question: Where is it?\nAnswer:", ["in", "out there"], " out there"),
    ),
    (
        (
            "Please choose the correct ending to complete the given sentence",
            "Doors: A man opens\n\nEnding1: a door. Ending2: the: sea.",
            "ending2",
        ),
        ("Doors: A man opens", ["a door.", "the: sea."], " the: sea."),
    ),
    (
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence",
            "_ was late.\n\nOption1: Kim Option2: Lee",
            "option1",
        ),
        ("Sentence:", ["Kim was late.", "Lee was late."], " Kim was late."),
    ),
]


@pytest.mark.parametrize(("given", "want"), TEXT_ROWS)
def test_options_become_continuations(paper: ModuleType, given: Any, want: Any) -> None:
    """A question in the options' own words has the options, and the right one, of the same question
    by number.
    """
    lead, asked, answer = given
    numbers = [f"{answer[:-1]}1", f"{answer[:-1]}2"]
    text = f"{lead}: {asked}\n\nAnswer format: {'/'.join(numbers)}"
    row = paper.as_text({"instruction": text, "choices": numbers, "answer": answer, "prompt": text})
    assert (row["prompt"], row["choices"], row["completion"]) == want
    assert row["completion"] == " " + row["answer"] == " " + row["choices"][numbers.index(answer)]
    same = {"instruction": f"{lead}: is it?", "choices": ["true", "false"], "answer": "true"}
    assert paper.as_text(same) == same
    with pytest.raises(ValueError, match="no options .* in .*is it"):
        paper.as_text({"instruction": f"{lead}: is it?", "choices": numbers, "answer": answer})


def test_arms_may_have_modules_wire_and_base_of_their_own(
    paper: ModuleType, setting: Callable[..., list[str]], tmp_path: Path
) -> None:
    """An arm's own modules, wire and byte budget are those of its run, its own low-bit base that of
    its spec.
    """
    ours = {
        "targets": ["up_proj"],
        "wire": "factored",
        "r": 4,
        "learning_rate": 1e-2,
        "kr": {"share_of_ft": 0.4},
    }
    arms = ARMS | {"ours": ours, "FT int8": ARMS["FT"] | {"quantize": "int8"}}
    words = setting(
        "llama", arms=arms, form="text", runs=[{"arms": ["FT", "ours"]}], tasks=["arc_easy"]
    )
    paper.main(["run", *words])
    full, mine = runs(tmp_path)
    assert (
        mine["settings"]["form"] == "text"
        and 0 <= mine["accuracy"] <= 1
        and mine["eval_loss"] is None
    )
    assert {name.rpartition(".")[2] for name in mine["variation"]["units"]} == {"up_proj"}
    assert 0 < sum(mine["bytes"].values()) <= 0.45 * sum(full["bytes"].values())  # and both ends
    config = paper.load_config(tmp_path / "tiny.yaml")
    wanted = dataclasses.replace(config, runs=[{"arms": ["FT", "FT int8"]}])
    assert [spec["settings"]["quantize"] for spec in paper.specs(wanted)] == ["none", "int8"]


def test_projection_equals_arithmetic_by_hand(paper: ModuleType) -> None:
    """Bytes, round trips and FLOPs projected for the three models are those of their public
    shapes.
    """
    step = {
        "batch": 10,
        "length": 100,
        "supervised": 1,
        "r": 8,
    }  # 1000 tokens, 10 of them supervised
    row = 2 * 4096  # bytes of a token's hidden state in 16 bits
    found = {
        name: paper.paper_tables.project(name, **step) for name in paper.paper_tables.PROJECTED
    }
    llama = found["LLaMA-7B"]["FT"]
    assert llama["sent"] == row * (1000 + 10 + 32 * 3 * 1000 + 31 * 1000)
    assert llama["received"] == row * (10 + 32 * 3 * 1000 + 32 * 1000)
    assert llama["round trips"] == 65
    # B A x: 8 (4096 + 4096); gradients of B, at the rank, of A, and of x but at the lowest site
    assert llama["adapters"] == 2 * 1000 * 8 * 4096 * (93 * 6 + 3 * 5)
    assert llama["edge"] - llama["adapters"] == 4 * 10 * 32000 * 4096
    linears = 2 * 1000 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 4 * 10 * 100 * 100 * 4096
    assert llama["cloud"] == 2 * linears - 2 * 1000 * 3 * 4096**2 + 3 * attention
    few = found["LLaMA-7B"]["an eighth of the sites"]
    assert few["sent"] == row * (1000 + 10 + 4 * 3 * 1000 + 3 * 1000) and few["round trips"] == 9
    assert found["OPT-6.7B"]["FT"]["bytes"] == llama["bytes"]
    assert found["OPT-6.7B"]["FT"]["edge"] - llama["adapters"] == 4 * 10 * 50272 * 4096
    bloom = found["BLOOM-7B1"]["FT"]
    assert (
        bloom["sent"] == row * (1000 + 10 + 30 * 3 * 1000 + 29 * 1000)
        and bloom["round trips"] == 61
    )
    assert bloom["adapters"] == 2 * 1000 * 8 * (30 * (4096 + 3 * 12288 + 4096) + 29 * 4096)
    assert bloom["edge"] - bloom["adapters"] == 4 * 10 * 250880 * 4096


@pytest.mark.parametrize("name", ["smollm2-text", "7b"])
def test_configs_ask_for_all_eight_tasks(paper: ModuleType, name: str) -> None:
    """In the options' own words and for the paper's models FT and Kill and Revive are asked for on
    each of the eight tasks.
    """
    import paper_data

    config = paper.load_config(ROOT / f"benchmarks/paper/{name}.yaml")
    asked = {(spec["task"], spec["arm"]) for spec in paper.specs(config)}
    assert {
        (task, arm) for task in paper_data.TASKS for arm in ("base", "FT", "KR", "random")
    } <= asked


def test_by_number_every_run_is_kept_and_none_is_open(paper: ModuleType) -> None:
    """The config of options by their number asks for the runs of its result file, and no others."""
    file = ROOT / "benchmarks/paper/smollm2.yaml"
    config = paper.load_config(file)
    done = {paper.key(run) for run in paper.load_results(config.result(file))}
    assert done == {paper.key(spec) for spec in paper.specs(config)}


def test_intervals_pair_what_can_be_paired(paper: ModuleType) -> None:
    """A difference is paired by row where all runs kept which rows were right, by seed where some
    did not and both arms have several, and is as of independent runs elsewhere.
    """
    half_width = paper.paper_tables.gap_half_width

    def made(*shares: float, right: Sequence[str] = ("",) * 3) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "accuracy": share, "rows": 100, "right": right[seed]}
            for seed, share in enumerate(shares)
        ]

    # Differences of 0.01, 0.02 and 0.03 have a standard deviation of 0.01; t of two degrees.
    assert half_width(made(0.11, 0.52, 0.93), made(0.1, 0.5, 0.9)) == pytest.approx(
        4.30 * 0.01 / math.sqrt(3)
    )
    mine, theirs = made(0.5, right=["1010" * 25]), made(0.25, right=["1000" * 25])
    assert half_width(mine, theirs) == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 100))
    two = made(0.5, 0.25, right=["1010" * 25, "1000" * 25])
    assert half_width(two, theirs) == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 4 / 100))
    two[1]["right"] = ""
    assert half_width(two, made(0.25, 0.25)) == pytest.approx(12.71 * 0.25 / 2)
    alone = 1.96 * math.sqrt((0.5 * 0.5 + 0.25 * 0.75) / 100)
    assert half_width(mine, made(0.25)) == pytest.approx(alone)
    assert half_width(made(0.5), made(0.25)) == pytest.approx(alone)


def test_document_shows_the_result_file(paper: ModuleType) -> None:
    """The tables of docs/reproduction.md are those that the command makes of the committed
    results.
    """
    text = " ".join((ROOT / "docs/reproduction.md").read_text().split())
    for name in ("smollm2", "smollm2-text"):
        file = ROOT / f"benchmarks/paper/{name}.yaml"
        config = paper.load_config(file)
        done = paper.finished(config, config.result(file))
        made = paper.paper_tables.tables(config, paper.specs(config), done)
        assert done and " ".join(made.split()) in text, name
    assert " ".join(paper.paper_tables.projection_table().split()) in text
