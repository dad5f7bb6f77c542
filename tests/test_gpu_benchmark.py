"""The command for whoever has a GPU, as far as a machine without one goes."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_check_of_the_gpu_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU with tiny models every check passes or says what the machine lacks, the result file
    and the table hold each of them, and a check that fails is not hidden.
    """
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None and spec.loader is not None
    gpu = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", gpu)
    spec.loader.exec_module(gpu)

    output = tmp_path / "gpu.json"
    code = gpu.main(["run", "--device", "cpu", "--output", str(output)])
    said = capsys.readouterr().out
    checks = json.loads(output.read_text())["checks"]
    outcomes = {name: one["outcome"] for name, one in checks.items()}
    failed = {name: checks[name] for name, one in outcomes.items() if one == "failed"}
    assert not failed and code == 0
    left_out = {name for name, one in outcomes.items() if one == "left out"}
    assert left_out <= {"device_map over two GPUs", "device_map over memory"}
    for part in (
        "parity fp32",
        "parity bf16",
        "quantize nf4",
        "device_map over disk",
        "speed of 2",
    ):
        assert any(name.startswith(part) for name in outcomes), part
    assert all(name in said for name in outcomes)
    assert gpu.main(["table", "--output", str(output)]) == 0
    assert all(name in capsys.readouterr().out for name in ["parity fp32"])

    bench = gpu.Bench("cpu", True)
    bench.check("a wrong result", lambda: gpu.within(0.5, 0.1))
    assert bench.found["a wrong result"]["outcome"] == "failed"
