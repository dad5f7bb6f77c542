"""Where the parts of a model are to live: what a provider writes down, read. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dlora.errors import UsageError

__all__ = ["PLANS", "Device", "read_device_map", "read_max_memory"]

Device = int | str
"""The number of a GPU, cpu, disk, or a device as torch writes it."""

PLANS: Final = ("auto", "balanced", "sequential")
"""Plans that are made at load, from the memory of each device."""

_SIZE: Final = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)", re.IGNORECASE)


def read_device_map(value: str) -> str | dict[str, Device]:
    """A plan by its name, or the JSON file that says for every module where it lives.

    Raises UsageError for a file that cannot be read or says something else.
    """
    if value in PLANS:
        return value
    file = Path(value).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"device_map: got {value!r}, want {', '.join(PLANS)} or a JSON file "
            f"({error.strerror}: {file})"
        ) from error
    except ValueError as error:
        raise UsageError(f"device_map: {file} is not JSON: {error}") from error

    if not isinstance(found, dict) or not found:
        raise UsageError(f"device_map: {file} wants names of modules, each with its device")
    return {name: _device(device, f"device_map: {name}") for name, device in found.items()}


def read_max_memory(value: Mapping[str, str]) -> dict[Device, str]:
    """Device -> the most that weights may take there, such as 20GiB. Raises UsageError."""
    for device, size in value.items():
        if not _SIZE.fullmatch(size.strip()):
            raise UsageError(f"max_memory: {device}: got {size!r}, want a size such as 20GiB")
    return {_device(device, "max_memory"): size.strip() for device, size in value.items()}


def _device(value: object, what: str) -> Device:
    """The number of a GPU, or a device by its name."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"disk|[a-z]+(:\d+)?", value):
        return value
    raise UsageError(f"{what}: got {value!r}, want the number of a GPU, cpu or disk")
