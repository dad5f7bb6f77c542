"""Where a result comes from: commit, versions, machine. Every result file of a benchmark holds
it.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def provenance(*packages: str) -> dict[str, Any]:
    """Commit and changed source files of this checkout, versions of packages, and what machine this
    is.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--short", "../src"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", *packages)},
        "machine": f"{os.cpu_count()} cores, {_cpu_name()}, {platform.system()}",
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(HERE), *words], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
