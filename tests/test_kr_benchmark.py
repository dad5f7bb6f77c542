"""The command that trains for two epochs: a run that is stopped goes on as if it had not been."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dlora.embedded import InProcessLink

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, with little to do and results of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kr

    monkeypatch.setattr(kr, "RESULT", tmp_path / "kr.jsonl")
    for name, value in {"LENGTHS": (5, 10), "CURVE_STEPS": 2, "CURVE_ROWS": 2}.items():
        monkeypatch.setattr(kr, name, value)
    often = {**kr.START, "interval": 1, "budget": 0.5, "unit": "module"}
    monkeypatch.setitem(kr.ARMS, "often", (["q_proj", "v_proj"], 2, "plain", often, ()))
    return kr


def test_a_stopped_run_goes_on_to_the_same_result(
    kr: ModuleType, tmp_path: Path, link: InProcessLink, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Left wherever it may be, and behind a shorter run with which it shares its trunk, a long run
    has the losses, sets and scores of one that was not, and the bytes but for modules that a new
    cloud is sent again.
    """
    (tmp_path / "banking77").mkdir()
    rows = [{"prompt": f"a parcel {n} for", "completion": f" desk {n % 3}"} for n in range(200)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for part in ("train", "eval"):
        (tmp_path / f"banking77/{part}.jsonl").write_text(text)
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


def test_claims_by_length(kr: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim is judged by the best arm within its bytes and FLOPs, on the rows that it and FT both
    answered, at each length that both were run for; what was not run says so.
    """
    import kr_report

    monkeypatch.setattr(kr, "LENGTHS", (150, 600, 1250))
    arms = ("FT", "spread v", "v int4, dx dropped", "FT gate,up hosted rank 4")
    monkeypatch.setattr(kr, "LENGTH", dict.fromkeys(arms, 4e-3))
    few = {"bytes": 1800, "adapter_flops": 2700}
    runs = [
        *(long_run("FT", steps, "1" * 90 + "0" * 10) for steps in (150, 600)),
        long_run("spread v", 150, "1" * 50 + "0" * 50, **few),
        long_run("v int4, dx dropped", 150, "0" + "1" * 88 + "0" * 11, **few),
        long_run("FT gate,up hosted rank 4", 150, "1" * 100, **few),
        long_run("v int4, dx dropped", 600, "1" * 100, bytes=9000, adapter_flops=9000),
    ]
    rows = [line.split("|") for line in kr_report.table(runs).splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]

    (paper, choice, cheap), table = cells[2:5], {row[1]: row for row in cells[8:]}
    assert paper[2] == "**PASS**: -0.020 ± 0.027 (`v int4, dx dropped`, one seed, not settled)"
    assert choice[2] == "**MISS**: -0.400 ± 0.096 (`spread v`, one seed)"
    assert cheap[2] == "**PASS**: +0.100 ± 0.059 (`FT gate,up hosted rank 4`, one seed)"
    assert paper[3:5] == ["not run yet", "not run yet"]  # too many bytes
    assert table["FT"][8:10] == ["**0.900**", "**0.900**"]
    assert table["v int4, dx dropped"][5:7] == ["15.0", "15.0"]


def test_gap_by_row_is_of_pairs(kr: ModuleType) -> None:
    """The interval is that of the rows on which two runs differ, not of two independent shares."""
    import kr_report

    mine, full = (
        {seed: {"right": marks} for seed in range(2)} for marks in ("1100" * 50, "1010" * 50)
    )
    gap, half = kr_report.gap_by_row(mine, full)
    assert gap == 0 and half == pytest.approx(1.96 * math.sqrt(0.5 / 200))
