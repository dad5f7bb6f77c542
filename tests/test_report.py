"""`dlora report` on runs that were really made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dlora.cli.main import main
from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.runs import load_run
from dlora.training.run import train
from dlora.training.settings import TrainSettings


@pytest.fixture(scope="module")
def runs(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Folders of an FT run and of one with Kill and Revive, both with evaluation."""
    folder, link = tmp_path_factory.mktemp("runs"), InProcessLink(cloud_models("llama"), tokenizer)
    data = folder / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"parcel {n}:", "completion": " north"}) for n in range(8))
    )
    common: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "eval_data": str(data),
        "eval_steps": 4,
    }
    common |= {"batch_size": 2, "max_steps": 8, "save_steps": 4, "report_to": []}
    train(TrainSettings(**common, output=folder / "full"), link)
    options = {
        "budget": 0.5,
        "average": False,
        "warmup": 2,
        "interval": 2,
        "final": 0,
        "revive": "random",
    }
    train(TrainSettings(**common, output=folder / "few", kr="on", kr_options=options), link)
    link.close()
    return folder / "full", folder / "few"


def test_report_is_one_file_with_figures_and_exact_costs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page needs nothing from elsewhere, shows every figure, and tells the runs' own costs side
    by side.
    """
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.split()}
    assert names == {
        "report.html",
        "learning.png",
        "units-2.png",
        "step-1.png",
        "step-2.png",
        "costs.png",
    }
    assert all((tmp_path / "report" / name).stat().st_size > 2000 for name in names)
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and not re.search(
        r'(src|href)="(?!data:)', page
    )
    full, few = map(load_run, runs)
    assert few.traffic < full.traffic
    assert (
        f"{few.traffic / full.traffic:.1%}" in page
        and "Kill and Revive" in page
        and "<td>FT</td>" in page
    )


def test_axes_add_up_to_the_whole_run(runs: tuple[Path, Path]) -> None:
    """The last point of a curve against traffic is the run's traffic."""
    run = load_run(runs[1])
    assert run.axis("MB")[-1] * 1e6 == pytest.approx(run.traffic, rel=0.01)
    assert run.axis("step")[-1] == 8


def test_a_run_that_goes_on_can_be_read(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A last line that is half-written is left out; one in the middle, or no run at all, is an
    error for the user.
    """
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    whole = len(load_run(folder).log)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"loss": 1.')
    assert len(load_run(folder).log) == whole
    assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 0
    (folder / "kr.jsonl").write_text('{"st\n{"step": 1}\n')
    assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 2
    assert main(["report", str(tmp_path / "none"), "--output", str(tmp_path / "report")]) == 2
