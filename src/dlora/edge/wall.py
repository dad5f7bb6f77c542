"""Around everything that is built from a cloud's words: whatever goes wrong in there is one error.

A configuration that fits no architecture, a tokenizer whose rules panic, a file that is cut off:
libraries answer with exceptions of twenty kinds. None of them is a fault of this program.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dlora.errors import DLoRAError, PeerError
from dlora.protocol.text import clean_text

__all__ = ["bounded_building", "wall"]

_MAX_MODULES: Final = 200_000
_SHARE: Final = 0.8
"""Of the memory that is free now."""


@contextmanager
def wall(what: str, address: str) -> Iterator[None]:
    """Turn what is raised inside into a PeerError of one line.

    DLoRA's own errors go through, and so does Ctrl-C. Exceptions of Rust are no
    `Exception`, so all others are caught.
    """
    try:
        yield
    except (DLoRAError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise PeerError(
            f"{what} from {address} cannot be used: {type(error).__name__}: {clean_text(error)}. "
            "Use another server."
        ) from error


@contextmanager
def bounded_building() -> Iterator[None]:
    """While a model is made: no more modules than any decoder has, and no more memory than is free.

    Raises PeerError, or MemoryError, inside.
    """
    count = 0

    def one_more(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise PeerError(f"the cloud's model has more than {_MAX_MODULES} modules")

    hook = register_module_module_registration_hook(one_more)
    try:
        with _memory_limit():
            yield
    finally:
        hook.remove()


@contextmanager
def _memory_limit() -> Iterator[None]:
    """This process may take most of what is free, and no more; where the system can say both."""
    used, free = _kib("/proc/self/status", "VmData"), _kib("/proc/meminfo", "MemAvailable")
    if used is None or free is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = (used + int(_SHARE * free)) * 1024
    limit = limit if soft == resource.RLIM_INFINITY else min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kib(file: str, name: str) -> int | None:
    """A number of one of Linux's tables; None on other systems."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
