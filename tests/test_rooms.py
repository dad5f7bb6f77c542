"""Who may import whom, by folder: a new file is covered the moment it exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import dlora
from dlora.extras import is_installed

SOURCE = Path(dlora.__file__).parent

# A room is a folder of src/dlora, or a file beside the folders. Each may import these rooms and
# whatever they may import; those in `OPEN` are open to all.
OPEN = {"errors", "extras", "version", "proto"}
MAY_IMPORT = {
    "errors": set(),
    "extras": set(),
    "version": set(),
    "proto": set(),
    "files": set(),
    "protocol": set(),
    "formulas": {"protocol"},
    "cloud": {"formulas", "files"},
    "server": {"cloud"},
    "edge": {"formulas", "files"},
    "kill_revive": {"edge"},
    "inference": {"edge"},
    "tinker": {"inference", "privacy"},
    "runs": {"edge"},
    "privacy": {"runs"},
    "training": {"kill_revive", "privacy"},
    "trial": {"cloud", "edge"},
    "embedded": {"trial"},
    "cli": {"server", "training", "inference", "tinker", "embedded"},
    "__init__": {"cloud", "edge", "embedded", "kill_revive"},
    "__main__": {"cli"},
}


def room_of(file: Path, source: Path = SOURCE) -> str:
    """The folder that a file is in, or its own name where it is in none."""
    parts = file.relative_to(source).parts
    return parts[0] if len(parts) > 1 else file.stem


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import of this package, `from dlora import x` included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, one.name) for one in node.names if one.name.startswith("dlora.")
            )
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(
                    f"{file}:{node.lineno}: relative imports hide who imports whom"
                )
            if node.module == "dlora":
                yield from ((node.lineno, f"dlora.{one.name}") for one in node.names)
            elif node.module and node.module.startswith("dlora."):
                yield node.lineno, node.module


def allowed(room: str) -> set[str]:
    """The rooms that a room may import: those of its row, and theirs."""
    found = {room} | OPEN
    for other in MAY_IMPORT[room]:
        found |= {other} | allowed(other)
    return found


def violations(source: Path = SOURCE) -> list[str]:
    """Every import that runs where it must not, as file:line and both rooms."""
    found = []
    for file in sorted(source.rglob("*.py")):
        room = room_of(file, source)
        if room == "proto":  # generated
            continue
        if room not in MAY_IMPORT:
            found.append(f"{file.relative_to(source)}: room {room} has no row in MAY_IMPORT")
            continue
        for line, module in imported_modules(file):
            target = module.split(".")[1]
            if target in MAY_IMPORT and target not in allowed(room):
                found.append(f"{file.relative_to(source)}:{line}: {room} must not import {target}")
    return found


def module_graph(source: Path = SOURCE) -> dict[str, set[str]]:
    """Module -> modules of this package that it imports when it is loaded (not inside
    functions).
    """
    graph: dict[str, set[str]] = {}
    for file in source.rglob("*.py"):
        name = ".".join(("dlora", *file.relative_to(source).with_suffix("").parts))
        tree = ast.parse(file.read_text())
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        graph[name] = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in inside and node.module
        }
    return {name: {one for one in found if one in graph} for name, found in graph.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, (*way, name)):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, ()))), [])


def test_imports_follow_the_rooms() -> None:
    """No file imports a room that its own may not know: an edge needs no cloud, a cloud no edge."""
    assert violations() == []


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("edge/new.py", "from dlora.cloud.model import CloudModel", "edge must not import cloud"),
        ("cloud/new.py", "from dlora.edge.link import Link", "cloud must not import edge"),
        ("server/new.py", "import dlora.edge.link", "server must not import edge"),
        (
            "protocol/new.py",
            "from dlora.cloud.load import load_model",
            "protocol must not import cloud",
        ),
        ("formulas.py", "from dlora.edge.meter import Meter", "formulas must not import edge"),
        (
            "inference/new.py",
            "from dlora.kill_revive.decide import decide",
            "inference must not import kill_revive",
        ),
        (
            "privacy/new.py",
            "from dlora.training.run import train",
            "privacy must not import training",
        ),
        (
            "runs.py",
            "from dlora.training.settings import TrainSettings",
            "runs must not import training",
        ),
        ("training/new.py", "from dlora import cli", "training must not import cli"),
        (
            "edge/deep/new.py",
            "def f():\n    from dlora import server",
            "edge must not import server",
        ),
        ("cellar/new.py", "import json", "room cellar has no row"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, says: str) -> None:
    """Each kind of forbidden import is seen, whatever its form and wherever it stands."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n")
    (found,) = violations(tmp_path)
    assert says in found


def test_modules_import_each_other_in_no_circle(tmp_path: Path) -> None:
    """Every module can be read before those that need it; a planted circle is seen."""
    assert circle(module_graph()) == []
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.py").write_text(f"from dlora.{other} import x\n")
    assert circle(module_graph(tmp_path)) == ["dlora.a", "dlora.b", "dlora.c", "dlora.a"]


def test_only_the_command_line_prints_or_sets_up_logging() -> None:
    """Library code raises and logs; printing and exiting is for the commands."""
    for file in SOURCE.rglob("*.py"):
        if room_of(file) not in ("cli", "__main__"):
            assert not re.search(r"\bprint\(|sys\.exit|basicConfig|SystemExit", file.read_text()), (
                file
            )


def test_nothing_unpickles() -> None:
    """No line of the source can turn bytes into objects of any kind, or text into code."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "np.load", "eval", "exec", "compile"}, file


@pytest.mark.parametrize(
    "action",
    [
        "import dlora",
        "import dlora.cloud.limits",
        "import dlora.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass",
        "import dlora.cli.main as m\ntry: m.main(['train', '--help'])\nexcept SystemExit: pass",
        *(
            f"import dlora.{'.'.join(file.relative_to(SOURCE).with_suffix('').parts)}"
            for file in sorted(SOURCE.rglob("settings.py"))
        ),
    ],
)
def test_names_settings_and_help_load_no_torch(action: str) -> None:
    """`import dlora`, every settings module and `--help` are fast: none of them loads torch."""
    code = f"import sys\n{action}\nassert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    """Every name in an `__all__` is there, in the package and in every module."""
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if parts[0] in ("proto", "__main__"):
            continue
        if parts[0] == "tinker" and not is_installed("tinker"):
            continue
        module = import_module(".".join(("dlora", *parts)).removesuffix(".__init__"))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{'.'.join(parts)}.{name}"
