"""Parts that not everybody needs: whether they are installed, and what to type if they are not.

DLoRA is installed from its sources, so the packages of an extra are named themselves. No torch
here.
"""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from typing import Final

from packaging.requirements import Requirement

from dlora.errors import UsageError

__all__ = ["check_extra", "install_command", "is_installed", "missing_extra"]

_MODULES: Final = {
    "api": ("fastapi", "openai", "uvicorn"),
    "eval": ("lm_eval",),
    "quantize": ("bitsandbytes",),
    "ray": ("ray",),
    "report": ("jinja2", "matplotlib"),
    "server": ("cryptography", "filelock", "prometheus_client"),
    "tinker": ("fastapi", "openai", "tinker", "uvicorn"),
}
"""Extra -> the modules that it brings."""


def check_extra(extra: str, what: str) -> None:
    """Raises UsageError if a module of an extra is not installed. Imports none of them."""
    if not all(is_installed(module) for module in _MODULES[extra]):
        raise missing_extra(extra, what)


def missing_extra(extra: str, what: str) -> UsageError:
    """The error for a part that is not installed: what wants it, and what to type."""
    names = ", ".join(_MODULES[extra])
    return UsageError(f"{what} needs {names}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """What installs an extra's packages for this Python, as one line of a shell."""
    packages = [shlex.quote(package) for package in _packages(extra)]
    if not packages:
        return f"install the extra `{extra}` as Install in the README says"
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install" if is_installed("pip") else f"uv pip install --python {python}"
    return " ".join([pip, *packages])


def is_installed(module: str) -> bool:
    """Whether a module could be imported. It is not."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return find_spec(module) is not None


def _packages(extra: str) -> list[str]:
    """The packages of an extra with the versions that they must have, as pip takes them."""
    try:
        known = [Requirement(line) for line in requires("dlora") or ()]
    except PackageNotFoundError:  # run from a folder of sources
        return []
    return [
        f"{one.name}{one.specifier}"
        for one in known
        if one.marker is not None
        and one.marker.evaluate({"extra": extra})
        and not one.marker.evaluate({"extra": ""})
    ]
