"""Names of devices, as both halves take them. No torch here before a device is tried."""

from __future__ import annotations

import difflib
import re
from typing import Final

from dlora.errors import UsageError
from dlora.protocol.text import clean_text

__all__ = ["check_device_name", "try_device"]

_KINDS: Final = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "meta")
_NAME: Final = re.compile(rf"({'|'.join(_KINDS)})(:\d+)?")
_SEVERAL: Final = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_name(name: str) -> None:
    """Raises UsageError for what is the name of no single device."""
    if name in _SEVERAL:
        raise UsageError(
            f"device: got {name!r}, want one device such as cuda or cuda:1. A server spreads its "
            f"model over several with --device_map {name}"
        )
    if not _NAME.fullmatch(name):
        near = difflib.get_close_matches(name.partition(":")[0].lower(), _KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"device: got {name!r}, want cpu, cuda, cuda:1 or mps{hint}")


def try_device(name: str) -> None:
    """Raises UsageError if this machine, or this torch, has no such device."""
    import torch

    check_device_name(name)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        reason = clean_text(str(error).partition("\n")[0])
        raise UsageError(f"device: {name!r} cannot be used here: {reason}") from error
