"""The mutation fuzzer of `benchmarks/fuzz.py`, for a short while; its long run's result is
committed.
"""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    """The benchmark as a module."""
    spec = spec_from_file_location("fuzz", ROOT / "benchmarks/fuzz.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("direction", ["cloud", "edge"])
def test_mutated_frames_are_refused_or_harmless(fuzzer: Any, direction: str) -> None:
    """Changed frames end in an error of ours or are accepted; nothing crashes, hangs, or changes an
    honest stream.
    """
    found = fuzzer.fuzz(direction, 600, seed=1)
    assert found["failures"] == []
    assert found["outcomes"]["honest streams"] == 2
    assert found["outcomes"]["WireError"] > 120 and found["outcomes"]["accepted"] > 40


def test_the_fuzzer_notices_a_hole(fuzzer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a check is missing the fuzzer reports failures: a green run means something."""
    monkeypatch.setattr(
        "dlora.cloud.exchange.Exchange._check_site",
        lambda self, message, site: self.modules[message.site],
    )
    assert fuzzer.fuzz("cloud", 400, seed=1)["num_failures"] > 0


def test_long_run_found_nothing(fuzzer: Any) -> None:
    """The committed long run had 200,000 frames in each direction and no failure, and the document
    shows it.
    """
    result = json.loads(fuzzer.RESULT.read_text())
    assert {run["direction"] for run in result["runs"]} == {"cloud", "edge"}
    assert all(run["frames"] >= 200_000 and run["num_failures"] == 0 for run in result["runs"])
    assert fuzzer.table(result) in (ROOT / "docs/security.md").read_text()
