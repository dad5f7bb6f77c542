"""`docs/first-hour.md`, walked from its first command to its last in a fresh clone, and the
notebook.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/first-hour.md"
HOME = "/home/alice/dlora"
"""Where the page has the clone."""
LONG_S = 900.0


def commands(page: str) -> list[tuple[str, str]]:
    """(command, output) of all console blocks of the page."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                line, _, output = output.partition("\n")
                command += f"\n{line}"
            found.append((command, output))
    return found


class Walk:
    """A folder in which commands run one after another, as at a terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[str]]()
        self.environment = os.environ | {"COLUMNS": "80", "DLORA_CACHE": str(folder / "cache")}
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "DLORA_TOKEN"):
            self.environment.pop(name, None)

    def run(self, command: str) -> tuple[int, str]:
        """(exit code, what was printed). Of one in the background what it prints until it is
        ready, and 0.
        """
        if command.startswith(". ") and command.endswith("/bin/activate"):
            path = f"{self.folder / command[2:].removesuffix('/activate')}:{os.environ['PATH']}"
            self.environment["PATH"] = path
            return 0, ""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command.removesuffix('&')}" if command[-1] == "&" else command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        timer = threading.Timer(LONG_S, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            said = "".join(self._until(process, command))
        finally:
            timer.cancel()
        return 0 if command[-1] == "&" else process.wait(), self.plain(said)

    def _until(self, process: subprocess.Popen[str], command: str) -> Iterator[str]:
        """What is printed until the end, or until a server is ready. Ctrl-C where it is wanted."""
        interrupt, said = re.search(r"# Ctrl-C at (.+)", command), ""
        assert process.stdout
        while character := process.stdout.read(1):
            yield character
            said += character
            if interrupt and interrupt[1] in said:
                os.killpg(process.pid, signal.SIGINT)
                interrupt = None
            if command[-1] == "&" and re.search(
                r"^(ready|serving|.*Uvicorn running).*\n", said, re.M
            ):
                return

    def plain(self, said: str) -> str:
        """Without bars, and with the page's folder in place of this one."""
        lines = said.replace("\r", "\n").replace(str(self.folder), HOME).split("\n")
        return "\n".join(line.rstrip() for line in lines if not re.search(r"\d+%\|", line))

    def close(self) -> None:
        """End what still runs."""
        for process in self.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with process:  # waits, and closes its pipe
                pass


def without_numbers(text: str) -> str:
    """The same text, whatever the machine's speed, the day, and the names of keys."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+", "N", text)


def clone(folder: Path) -> Path:
    """The tracked files of this tree as they are."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    for name in files.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    """Every command of the page works in this order in a fresh clone, and prints what the page
    shows, but for numbers.
    """
    walk, checker = Walk(clone(tmp_path)), doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    try:
        for command, want in commands(PAGE.read_text()):
            code, said = walk.run(command)
            ends_badly = "# refused" in command or "# Ctrl-C" in command
            assert (code != 0) == ends_badly, f"{command}\n{said}"
            got, shown = without_numbers(said), without_numbers(want)
            assert checker.check_output(shown, got, flags), f"{command}\n{said}"
    finally:
        walk.close()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every cell of the notebook works in this order, on the real model."""
    cells = json.loads((ROOT / "docs/first-steps.ipynb").read_text())["cells"]
    found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(found)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/adapter_config.json").is_file()


if __name__ == "__main__":  # the page as it comes out in this folder
    walk, page = Walk(clone(Path(sys.argv[1]))), PAGE.read_text()
    try:
        for command, _ in commands(page):
            code, said = walk.run(command)
            print(f"$ {command}\n{said.strip()}\n[{code}]", flush=True)
    finally:
        walk.close()
