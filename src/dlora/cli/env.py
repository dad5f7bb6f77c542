"""`dlora env`: what a bug report should say about the machine and what is installed. No secrets."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

import dlora
from dlora.files import default_cache

__all__ = ["environment"]

_VARIABLES: Final = re.compile(
    "(DLORA|HF|TRANSFORMERS|TORCH|PYTORCH|CUDA|OMP|MKL|GRPC|RAY|TOKENIZERS|TQDM)_.*|.*_proxy", re.I
)
_SHOWN: Final = re.compile(
    "OMP_.*|MKL_NUM_THREADS|CUDA_VISIBLE_DEVICES|HF_(HUB|DATASETS)_OFFLINE|TOKENIZERS_PARALLELISM|"
    "GRPC_VERBOSITY|TQDM_DISABLE|HF_HUB_DISABLE_TELEMETRY"
)
"""Variables whose value cannot be a secret, nor a path with a name in it."""


def environment() -> Iterator[tuple[str, str]]:
    """(name, value) pairs: versions, machine, devices, packages, variables that are set."""
    yield "dlora", f"{dlora.__version__} in {Path(dlora.__file__).parent}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    yield "machine", f"{os.cpu_count()} cores, {_memory()}"
    yield "torch", _torch()
    yield "cache", str(default_cache())
    for name, found in sorted(_packages()):
        yield name, found
    for name in sorted(os.environ):
        if _VARIABLES.fullmatch(name):
            yield name, os.environ[name] if _SHOWN.fullmatch(name) else "is set"


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size / 2**30:.1f} GiB of memory"


def _torch() -> str:
    """Its version, threads, and what it can compute on."""
    import torch

    kind = torch.accelerator.current_accelerator()
    devices = ["cpu"]
    if kind is not None:
        names = [str(kind)] * torch.accelerator.device_count()
        if kind.type == "cuda":
            names = [torch.cuda.get_device_name(number) for number in range(len(names))]
        devices += names
    return f"{torch.__version__}, {torch.get_num_threads()} threads, on {', '.join(devices)}"


def _packages() -> Iterator[tuple[str, str]]:
    """Every package that DLoRA may use, with its version; "-": not installed."""
    try:
        known = [Requirement(line) for line in requires("dlora") or ()]
    except PackageNotFoundError:  # run from a folder of sources
        return
    for one in known:
        extra = re.search(r'extra == "(\w+)"', str(one.marker or ""))
        if one.name == "dlora" or (extra and extra[1] == "dev"):
            continue
        try:
            yield one.name, version(one.name)
        except PackageNotFoundError:
            yield one.name, f"- (extra {extra[1]})" if extra else "- (missing)"
