"""The command that trains at several lengths: a run that is stopped goes on as if it had not been,
and what its tables say of made-up runs is what can be worked out by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import make_base
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.embedded import InProcessLink

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, with little to do and results of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kr

    monkeypatch.setattr(kr, "RESULT", tmp_path / "kr.jsonl")
    small = {"LENGTHS": (5, 10), "LENGTH_WARMUP": 2, "CURVE_STEPS": 2, "CURVE_ROWS": 2}
    for name, value in small.items():
        monkeypatch.setattr(kr, name, value)
    often = {**kr.START, "interval": 1, "budget": 0.5, "unit": "module"}
    monkeypatch.setitem(kr.ARMS, "often", (["q_proj", "v_proj"], 2, "plain", often, ()))
    return kr


def write_rows(data: Path) -> None:
    """A task of one desk in three."""
    (data / "banking77").mkdir()
    rows = [{"prompt": f"a parcel {n} for", "completion": f" desk {n % 3}"} for n in range(200)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for part in ("train", "eval"):
        (data / f"banking77/{part}.jsonl").write_text(text)


def test_a_stopped_run_goes_on_to_the_same_result(
    kr: ModuleType, tmp_path: Path, link: InProcessLink, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Left wherever it may be, and behind a shorter run with which it shares its trunk, a long run
    has the losses, sets and scores of one that was not, and the bytes but for modules that a new
    cloud is sent again.
    """
    write_rows(tmp_path)
    spec = {
        "stage": "length",
        "task": "banking77",
        "seed": 0,
        "learning_rate": 1e-2,
        "arm": "often",
    }

    def run(steps: int, until: float) -> dict[str, Any] | None:
        return kr.one(spec | {"steps": steps}, link, tokenizer, tmp_path, until)

    parts = [run(5, -math.inf) for _ in range(3)] + [run(10, -math.inf) for _ in range(3)]
    kept = sorted(file.name for file in (tmp_path / ".checkpoints").glob("*/*"))
    (tmp_path / ".checkpoints").rename(tmp_path / "done")
    whole = {10: run(10, math.inf)}
    (tmp_path / ".checkpoints").rename(tmp_path / "too")
    whole[5] = run(5, math.inf)

    assert [one is None for one in parts] == [True, True, False, True, True, False]
    assert kept == ["2.pt", "4.pt", "6.pt", "8.pt"]
    for last in (parts[2], parts[5]):
        assert last is not None
        same = whole[last["steps"]]
        assert same is not None and len(same["sets"]) > 2
        for name in ("losses", "train_loss", "sets", "accuracy", "eval_loss", "adapter_flops"):
            assert last[name] == same[name], name
        assert [one["step"] for one in last["curve"]] == list(range(2, last["steps"] + 1, 2))
        assert same["bytes"] <= last["bytes"] < 1.5 * same["bytes"]


def test_rows_are_read_in_one_order(kr: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two evaluations see the rows in the same order, by which their answers are paired."""
    rows = [{"prompt": "a " * (n % 7), "completion": f" desk {n}"} for n in range(120)]
    orders = [
        [
            row["completion"]
            for batch in kr.batches(rows, tokenizer, 6, 20, None)
            for row in batch["rows"]
        ]
        for _ in range(2)
    ]
    assert orders[0] == orders[1] and len(orders[0]) == 120


def test_one_seed_gets_no_verdict(
    kr: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run over a coarser wire is compared with exact runs of its own base, and a single seed of
    it is not called a pass or a miss.
    """

    def made(seed: int, accuracy: float, **values: Any) -> dict[str, Any]:
        cost = {"bytes": 100, "adapter_flops": 100}
        run = {"stage": "final", "task": "banking77", "arm": "FT", "learning_rate": 8e-3}
        return run | {"seed": seed, "accuracy": accuracy, **cost, **values}

    import kr_report

    runs = [made(0, rate == 8e-3, stage="tune", learning_rate=rate) for rate in kr.SWEPT["FT"]] + [
        made(seed, 0.6) for seed in range(3)
    ]
    exact = [made(seed, 0.7, stage="whole", run=kr_report.TWINS["FT"]) for seed in range(3)]
    coarse = made(1, 0.5, stage="whole", run="q,k,v hosted fp16", arm="FT hosted", bytes=4)
    monkeypatch.setattr(kr_report, "CODECS", tmp_path / "codecs.jsonl")
    kr_report.CODECS.write_text("".join(json.dumps(line) + "\n" for line in (*exact, coarse)))
    (row,) = kr_report.short_table(runs, ["q,k,v hosted fp16"]).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[5:11] == ["**0.500** (0.500)", "-0.100", "one seed", "-0.200", "one seed", "4.0"]


def long_run(arm: str, steps: int, right: str, **values: Any) -> dict[str, Any]:
    """A line of a result file."""
    cost = {"bytes": 100 * steps, "adapter_flops": 100 * steps, "edge_flops": 100 * steps}
    shares = {"accuracy": right.count("1") / len(right), "rows": len(right), "right": right}
    run = {"stage": "length", "task": "banking77", "arm": arm, "learning_rate": 4e-3, "seed": 0}
    return run | {"steps": steps} | cost | shares | values


FEW = {"bytes": 1800, "adapter_flops": 2700}  # an eighth, and 18 %, of FT's 150 steps below


def test_claims_by_length(kr: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim is judged by the best arm within its bytes and FLOPs, on the rows that it and FT both
    answered, at each length that both were run for; what was not run says so.
    """
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150, 600, 1250))
    runs = [
        *(long_run("FT", steps, "1" * 90 + "0" * 10) for steps in (150, 600)),
        long_run("spread v", 150, "1" * 50 + "0" * 50, **FEW),
        long_run("v int4, dx dropped", 150, "0" + "1" * 88 + "0" * 11, **FEW),
        long_run("gate,up hosted int4", 150, "1" * 100, **FEW),
        long_run("v int4, dx dropped", 600, "1" * 100, bytes=9000, adapter_flops=9000),
    ]
    rows = [line.split("|") for line in kr_report.table(runs).splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]

    (paper, choice, cheap), table = cells[2:5], {row[1]: row for row in cells[8:]}
    assert paper[2] == "**PASS**: -0.020 ± 0.027 (`v int4, dx dropped`, one seed, not settled)"
    assert choice[2] == "**MISS**: -0.400 ± 0.096 (`spread v`, one seed)"
    assert cheap[2] == "**PASS**: +0.100 ± 0.059 (`gate,up hosted int4`, one seed)"
    assert paper[3:5] == ["no run keeps to it yet", "not run yet"]  # too many bytes
    assert table["FT"][8:10] == ["**0.900**", "**0.900**"]
    assert table["v int4, dx dropped"][5:7] == ["15.0", "15.0"]


def test_no_rounding_decides_a_verdict(kr: ModuleType) -> None:
    """Exactly the margin below FT is within it, however a mean of floats comes out."""
    import kr_report

    assert kr_report.is_within(-kr_report.MARGIN - 4e-18)
    assert not kr_report.is_within(-kr_report.MARGIN - 1 / 4500)  # a row of three runs


@pytest.mark.parametrize(
    ("arm", "cost", "of_the_paper", "cheap"),
    [
        ("spread v", {}, True, False),
        ("spread v", {"bytes": 1900}, True, False),  # a budget is kept to 2 %
        ("spread v", {"bytes": 1950}, False, False),
        ("spread v", {"adapter_flops": 3000}, False, False),
        ("gate,up hosted int4", {}, False, True),
        ("gate,up hosted int4", {"bytes": 1900, "adapter_flops": 9000}, False, True),
        ("gate,up hosted int4", {"bytes": 1950}, False, False),
        ("FT hosted", {}, False, True),
    ],
)
def test_limits_of_a_claim(
    kr: ModuleType, arm: str, cost: dict[str, int], of_the_paper: bool, cheap: bool
) -> None:
    """Bytes, adapter FLOPs, wire and modules each shut an arm out of the claim that they limit."""
    import kr_report

    run, full = long_run(arm, 150, "1", **FEW | cost), long_run("FT", 150, "1")
    shares = {name: kr_report.share({0: run}, {0: full}, name) for name in FEW}
    assert kr_report.is_of_the_paper(arm, shares) == of_the_paper
    assert kr_report.is_cheap(arm, shares) == cheap


def test_sets_that_change_are_compared_with_the_one_that_does_not(
    kr: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the seeds that both have, and a cell says how many those are, as the accuracies' do."""
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150,))
    still = [long_run("spread v", 150, "1" * 6 + "0" * 4, **FEW, seed=seed) for seed in range(2)]
    moving = [long_run("KR v cover", 150, "0" * 10, **FEW, seed=seed) for seed in range(3)]
    text = kr_report.table([long_run("FT", 150, "1" * 9 + "0"), *still, *moving])
    assert "`KR v cover` -0.600 ± 0.304 (2 seeds: worse)" in text
    assert "**0.600** (2 seeds) -0.300 ± 0.284 (one seed)" in text
    assert "**0.000** (3 seeds) -0.900 ± 0.186 (one seed)" in text


def test_gap_by_row_is_of_pairs(kr: ModuleType) -> None:
    """The interval is that of the rows on which two runs differ, averaged over seeds, not of two
    independent shares.
    """
    import kr_report

    mine = {0: {"right": "1110" * 50}, 1: {"right": "1100" * 50}}
    full = {0: {"right": "1101" * 50}, 1: {"right": "1100" * 50}}
    gap, half = kr_report.gap_by_row(mine, full)
    assert gap == 0 and half == pytest.approx(1.96 * math.sqrt((0.25 + 0.25) / 4 / 200))


def test_when_a_curve_reaches_full_tuning(kr: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first point with FT's accuracy counts, but for those at which the rate had begun to
    fall.
    """
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150, 600))
    accuracies = {125: 0.3, 250: 0.5, 375: 0.6, 500: 0.9}
    curve = [{"step": step, "accuracy": value} for step, value in accuracies.items()]
    runs = [long_run("FT", 150, "1100"), long_run("FT", 600, "1111")]
    runs += [long_run("spread v", 600, "1110", curve=curve)]
    assert kr_report.reached(runs).splitlines()[-1] == "| spread v | 250 | not in 600 |"


def test_arms_are_compared_by_row_and_by_seed(
    kr: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of two arms is over the rows of the seeds that both have, at each length; of
    several seeds it says each, and the t-interval over them.
    """
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150, 600))
    runs = [long_run("spread v", 150, "1100"), long_run("KR v cover", 150, "1100")]
    runs += [long_run("spread v", 600, "1100", seed=seed) for seed in range(2)]
    runs += [long_run("KR v cover", 600, right, seed=n) for n, right in enumerate(("1000", "1100"))]
    (line,) = (line for line in kr_report.pairs(runs).splitlines() if "KR v cover" in line)
    by_row = 1.96 * math.sqrt(3 / 64) / math.sqrt(4)  # of the rows' gaps: 0, -0.5, 0, 0
    by_seed = 12.71 * 0.25 / 2
    assert line == (
        f"| KR v cover | spread v | +0.000 ± 0.000 | -0.125 ± {by_row:.3f} "
        f"(by seed -0.250, +0.000: ± {by_seed:.3f}) |"
    )


def test_the_best_of_several_rates_counts(kr: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each length an arm has the learning rate that is best over the seeds that all rates have;
    all that were tried there are in a table of their own.
    """
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150, 600))
    runs = [long_run("FT", 150, "1000"), long_run("FT", 600, "1100")]
    lower = {"learning_rate": 2e-3}
    runs += [long_run("FT", 600, "1110", **lower), long_run("FT", 600, "0000", seed=1, **lower)]
    arms = kr_report.by_length(runs)
    assert arms["FT"] == {150: {0: runs[0]}, 600: {0: runs[2], 1: runs[3]}}
    assert "| FT | q, k, v r=8 | plain | 0.004, 0.002 |" in kr_report.table(runs)
    assert kr_report.rates(runs).splitlines()[2:] == [
        "| FT | 600 | 0.002 | **0.375** (2 seeds) |",
        "| FT | 600 | 0.004 | **0.500** |",
    ]


def test_rate_of_a_long_run(kr: ModuleType) -> None:
    """The rate grows, is constant until a fifth is left, and then falls to zero: until there it is
    the same whatever the length.
    """
    monkey = [kr.share_of_rate(step, 10) for step in range(11)]
    assert monkey == [0.5, *[1.0] * 8, 0.5, 0.0]
    short = [kr.share_of_rate(step, 5) for step in range(6)]
    assert short == [*monkey[:5], 0.0]


def test_long_runs_come_shorter_first(kr: ModuleType) -> None:
    """A run that may begin where a shorter one forked comes behind it in the list."""
    runs = [kr.key(spec) for spec in kr.specs([]) if spec["stage"] == "length"]
    assert len(runs) == len(set(runs))
    for number, run in enumerate(runs):
        assert not [other for other in runs[number:] if other[:5] == run[:5] and other < run]


def test_sites_are_told_by_their_gradient(kr: ModuleType) -> None:
    """What `sites` shows of a group is its gradient's norm for each megabyte of every wire."""
    import kr_report

    of = {"norm": 20.0, "bytes": {"plain": 10e6, "factored": 4e6, "hosted": 1e6}}
    runs = [{"stage": "tune", "arm": "FT v", "accuracy": value} for value in (0.25, 0.5)]
    assert kr_report.probed(runs, {"arms": {"FT v": of}}).splitlines()[-1] == (
        "| FT v | v | 20 | 10.0, 4.0, 1.0 | 2.0, 5.0, 20.0 | 0.500 |"
    )


def batch_of_one() -> dict[str, Any]:
    """What a step is given, for a tiny model."""
    ids = torch.tensor([[5, 6, 7]])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_gradient_of_a_site_is_the_weights(kr: ModuleType) -> None:
    """`weight_gradients` is what backward leaves in a weight, and it leaves the base as it was."""
    base, batch = make_base("llama").requires_grad_(False), batch_of_one()
    found = kr.weight_gradients(base, batch | {"rows": []}, ["v_proj"])
    weights = {path: one.weight for path, one in base.named_modules() if path.endswith("v_proj")}
    assert not any(weight.requires_grad for weight in weights.values())
    for weight in weights.values():
        weight.requires_grad_()
    base(**batch).loss.backward()
    assert found.keys() == weights.keys()
    for path, weight in weights.items():
        torch.testing.assert_close(found[path], weight.grad)


def test_a_spectral_start_comes_before_the_first_step(
    kr: ModuleType,
    link: InProcessLink,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An arm with one begins with another A, at the price of one micro-batch more."""
    monkeypatch.setitem(kr.ARMS, "often, spectral", kr.ARMS["often"])
    write_rows(tmp_path)
    wanted = {"stage": "length", "task": "banking77", "seed": 0, "learning_rate": 0.01, "steps": 5}
    plain, turned = (
        kr.one(wanted | {"arm": arm}, link, tokenizer, tmp_path)
        for arm in ("often", "often, spectral")
    )
    assert plain["losses"] != turned["losses"]
    assert plain["bytes"] < turned["bytes"] < 1.5 * plain["bytes"]


def test_b_has_a_rate_of_its_own(kr: ModuleType) -> None:
    """With a ratio every B, and nothing else, is trained at so many times the rate."""
    model = dlora.get_peft_model(
        dlora.in_process(make_base("llama")), LoraConfig(r=2, target_modules=["v_proj"])
    )
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = kr.optimizer_of(model, 0.1, 4.0).param_groups
    (rest, slow), (sides, fast) = ((one["params"], one["lr"]) for one in groups if one["params"])
    assert (slow, fast) == (0.1, 0.4)
    assert {"lora_B" in names[id(p)] for p in sides} == {True}
    assert {"lora_A" in names[id(p)] for p in rest} == {True}
    assert len(rest) + len(sides) == len(names)
