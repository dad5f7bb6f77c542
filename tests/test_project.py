"""Rules of the project itself: generated code, documents that agree with code and results, demo
data.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import dlora
from dlora.cli.demo import data_file, show_end
from dlora.cli.settings import DemoSettings
from dlora.protocol.channel import PROTOCOL_VERSION

SOURCE = Path(dlora.__file__).parent
ROOT = SOURCE.parents[1]


def test_generated_stubs_are_not_stale(tmp_path: Path) -> None:
    """The committed stubs are what the compiler makes of dlora.proto today."""
    source = SOURCE.parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(SOURCE / "proto/dlora.proto")], check=True)
    made = sorted((tmp_path / "dlora/proto").iterdir())
    assert len(made) == 3
    for file in made:
        assert file.read_text() == (SOURCE / "proto" / file.name).read_text(), (
            f"{file.name}: run `make stubs`"
        )


def test_wire_document_states_the_protocol_version() -> None:
    """The wire document speaks of the version in the code."""
    text = (SOURCE.parents[1] / "docs/wire-protocol.md").read_text()
    assert f"version {PROTOCOL_VERSION}" in text


def test_the_threat_model_names_tests_that_exist() -> None:
    """Every test that docs/security.md leans on is there, by its whole name or its beginning."""
    text = (ROOT / "docs/security.md").read_text()
    named = set(re.findall(r"`(test_[a-z0-9_]+(?:\.py|\.\.\.)?)`", text))
    files = list((ROOT / "tests").glob("test_*.py"))
    tests = {one for file in files for one in re.findall(r"def (test_\w+)", file.read_text())}
    there = tests | {file.name for file in files}
    assert len(named) > 40
    for name in named:
        start = name.removesuffix("...")
        assert name in there or (start != name and any(one.startswith(start) for one in tests)), (
            name
        )


def test_every_promise_of_the_threat_model_names_its_evidence() -> None:
    """No row of the table of who can do what, and no point below it, stands on a word alone."""
    text = (ROOT / "docs/security.md").read_text()
    head, _, rest = text.partition("## How it is done")
    points = re.split(r"\n(?=[-#|])", rest.partition("## One tenant")[0])
    rows = [line for line in head.splitlines() if line.startswith("| ") and "---" not in line]
    for promise in [*rows[1:], *(point for point in points if point.startswith("- "))]:
        assert re.search(r"`test_|`benchmarks/|not tested", promise), promise


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("local_vs_split", "benchmarks"),
        ("weak_edge", "benchmarks"),
        ("decoding", "benchmarks"),
        ("load", "benchmarks"),
        ("links", "benchmarks"),
        ("codecs", "benchmarks"),
        ("cache_prefix", "slow-link"),
        ("preferences", "trainers"),
        ("plan", "benchmarks"),
        ("quantized", "benchmarks"),
        ("families", "models"),
        ("privacy", "privacy"),
        ("attacks", "security"),
        ("hostile_clouds", "security"),
        ("soak", "security"),
        ("kr_report", "kill-and-revive"),
    ],
)
def test_benchmark_document_shows_the_result_file(
    name: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of a document are those that the benchmark makes of its committed result."""
    root = ROOT
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = spec_from_file_location(name, root / f"benchmarks/{name}.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there for their module
    spec.loader.exec_module(module)
    read = getattr(module, "load_results", lambda: json.loads(module.RESULT.read_text()))
    text = " ".join((root / f"docs/{document}.md").read_text().split())
    more = getattr(module, "appendix", lambda runs: [])(read())
    for shown in (module.table(read()), *more):
        assert " ".join(shown.split()) in text


def test_readme_shows_the_end_of_the_committed_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first screen shows what the demo prints of its committed result."""
    run = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    show_end(DemoSettings(), run)
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text()


def test_documents_keep_to_100_columns() -> None:
    """Prose and code blocks of README and docs can be read in a narrow window; tables cannot."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            is_url = re.fullmatch(r"\S+|.*\]: \S+", line.strip())
            assert len(line) <= 100 or line.startswith("|") or is_url, f"{file.name}:{number}"


def demo_rows(name: str) -> list[tuple[list[str], str]]:
    """(words of the message, desk) of every row."""
    rows = [json.loads(line) for line in data_file(name).read_text().splitlines()]
    return [
        (re.findall(r"[a-z']+", row["prompt"].lower())[1:-1], row["completion"].strip())
        for row in rows
    ]


def test_demo_data_is_fair() -> None:
    """Over 300 training and 60 held-out rows, no five words in a row shared, no answer over 20
    %.
    """
    train, heldout = demo_rows("train.jsonl"), demo_rows("heldout.jsonl")
    assert len(train) >= 300 and len(heldout) >= 60
    for rows in (train, heldout):
        assert max(Counter(desk for _, desk in rows).values()) <= 0.2 * len(rows)
        assert not any(desk.lower() in words for words, desk in rows)
    grams = [
        {tuple(words[i : i + 5]) for words, _ in rows for i in range(len(words) - 4)}
        for rows in (train, heldout)
    ]
    assert not grams[0] & grams[1]
    openings = Counter(tuple(words[:3]) for words, _ in train + heldout)
    assert max(openings.values()) <= 2
