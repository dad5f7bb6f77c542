"""Rules of the project itself: who imports whom, generated code, demo data, public names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import dlora
from dlora.demo import data_file
from dlora.wire import PROTOCOL_VERSION

SOURCE = Path(dlora.__file__).parent
CLOUD = {"cloud", "exchange", "adapter_store", "server", "load", "quantize", "tenancy", "identity"}
CLOUD |= {"metrics", "keys", "replicas"}
EDGE = {"edge", "conversation", "micro_batch", "kv_cache", "client", "link", "training", "data", "accounting"}
EDGE |= {
    "adapter_config",
    "bottleneck",
    "edge_sites",
    "noise",
    "skeleton",
    "recording",
    "attacks",
    "audit",
    "planner",
    "kill_revive",
    "reviver",
    "inference",
    "chat",
    "evaluate",
    "api",
    "info",
}


def imported(name: str) -> set[str]:
    """Modules of this package that a file imports, directly."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    nodes = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    nodes += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {node.split(".")[1] for node in nodes if node.startswith("dlora.")}


def reached(name: str) -> set[str]:
    """Modules of this package that a file imports, directly or through others."""
    found, left = set(), {name}
    while left:
        one = left.pop()
        new = {other for other in imported(one) if (SOURCE / f"{other}.py").exists()} - found
        found |= new
        left |= new
    return found


@pytest.mark.parametrize("name", sorted(EDGE))
def test_edge_never_reaches_the_cloud_half(name: str) -> None:
    """An edge needs none of the cloud's code, not even through others."""
    assert not reached(name) & CLOUD


@pytest.mark.parametrize("name", sorted(CLOUD))
def test_cloud_never_reaches_the_edge_half(name: str) -> None:
    """A cloud knows nothing of data, adapters or training."""
    assert not reached(name) & EDGE


@pytest.mark.parametrize("name", ["sites", "held_layers", "wire", "edge_files", "private_files", "errors"])
def test_what_both_halves_use_reaches_neither(name: str) -> None:
    """What is shared knows nothing of either half."""
    assert not reached(name) & (EDGE | CLOUD)


def test_only_the_command_line_prints_or_sets_up_logging() -> None:
    """Library code raises and logs; printing and exiting is for the commands."""
    for file in SOURCE.glob("*.py"):
        if file.name not in ("__main__.py", "demo.py"):
            assert not re.search(r"\bprint\(|sys\.exit|basicConfig|SystemExit", file.read_text()), file.name


def test_generated_stubs_are_not_stale(tmp_path: Path) -> None:
    """The committed stubs are what the compiler makes of dlora.proto today."""
    source = SOURCE.parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(SOURCE / "proto/dlora.proto")], check=True)
    made = sorted((tmp_path / "dlora/proto").iterdir())
    assert len(made) == 3
    for file in made:
        assert file.read_text() == (SOURCE / "proto" / file.name).read_text(), f"{file.name}: run `make stubs`"


def test_public_names_exist() -> None:
    """Every name in an `__all__` is there, in the package and in every module."""
    for file in SOURCE.glob("*.py"):
        module = import_module("dlora" if file.stem == "__init__" else f"dlora.{file.stem}")
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{file.stem}.{name}"


def test_wire_document_states_the_protocol_version() -> None:
    """The wire document speaks of the version in the code."""
    text = (SOURCE.parents[1] / "docs/wire-protocol.md").read_text()
    assert f"version {PROTOCOL_VERSION}" in text


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("local_vs_split", "benchmarks"),
        ("weak_edge", "benchmarks"),
        ("decoding", "benchmarks"),
        ("load", "benchmarks"),
        ("plan", "benchmarks"),
        ("quantized", "benchmarks"),
        ("privacy", "privacy"),
        ("kr", "kill-and-revive"),
    ],
)
def test_benchmark_document_shows_the_result_file(name: str, document: str) -> None:
    """The tables of a document are those that the benchmark makes of its committed result."""
    root = SOURCE.parents[1]
    spec = spec_from_file_location(name, root / f"benchmarks/{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    read = getattr(module, "load_results", lambda: json.loads(module.RESULT.read_text()))
    assert module.table(read()) in (root / f"docs/{document}.md").read_text()


def demo_rows(name: str) -> list[tuple[list[str], str]]:
    """(words of the message, desk) of every row."""
    rows = [json.loads(line) for line in data_file(name).read_text().splitlines()]
    return [(re.findall(r"[a-z']+", row["prompt"].lower())[1:-1], row["completion"].strip()) for row in rows]


def test_demo_data_is_fair() -> None:
    """Over 300 training and 60 held-out rows, no five words in a row shared, no answer over 20 %."""
    train, heldout = demo_rows("train.jsonl"), demo_rows("heldout.jsonl")
    assert len(train) >= 300 and len(heldout) >= 60
    for rows in (train, heldout):
        assert max(Counter(desk for _, desk in rows).values()) <= 0.2 * len(rows)
        assert not any(desk.lower() in words for words, desk in rows)
    grams = [{tuple(words[i : i + 5]) for words, _ in rows for i in range(len(words) - 4)} for rows in (train, heldout)]
    assert not grams[0] & grams[1]
    openings = Counter(tuple(words[:3]) for words, _ in train + heldout)
    assert max(openings.values()) <= 2
