"""What `dlora status` shows: who uses a server, how much, and how fast since the last look.

The last look is kept in a file of the user's own, so that a command that comes once a day still
says what the day was like.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dlora.cli.lines import table_lines
from dlora.files import default_cache, write_private
from dlora.server.metrics import ServerStatus
from dlora.training.readable import counted, readable_bytes, readable_time

__all__ = ["Look", "as_json", "earlier_look", "keep_look", "look_at", "status_lines"]

_IN: Final = "dlora_received_bytes_total"
_OUT: Final = "dlora_sent_bytes_total"
_TOKENS: Final = "dlora_tokens_total"
_COMPUTE: Final = "dlora_compute_seconds_total"
_COUNTERS: Final = (_IN, _OUT, _TOKENS, _COMPUTE)


@dataclass(frozen=True)
class Look:
    """What was there at a moment, in seconds since 1970."""

    time_s: float
    tenants: Mapping[str, Mapping[str, float]]

    def since(self, before: Look | None) -> tuple[float, dict[str, dict[str, float]]]:
        """(seconds, tenant -> counter -> how much more a second); none without an earlier look.

        Counters that are smaller than before are of a server that was started since.
        """
        seconds = 0.0 if before is None else self.time_s - before.time_s
        if before is None or seconds <= 0:
            return 0.0, {}
        rates = {}
        for tenant, values in self.tenants.items():
            old = before.tenants.get(tenant, {})
            if any(values.get(name, 0.0) < old.get(name, 0.0) for name in _COUNTERS):
                return 0.0, {}
            rates[tenant] = {
                name: (values.get(name, 0.0) - old.get(name, 0.0)) / seconds for name in _COUNTERS
            }
        return seconds, rates


def earlier_look(port: int) -> Look | None:
    """The last look at the server of this port; None where there is none that can be read."""
    try:
        kept = json.loads(_file(port).read_text(encoding="utf-8"))
        tenants = {
            str(tenant): {str(name): float(value) for name, value in values.items()}
            for tenant, values in kept["tenants"].items()
        }
        return Look(float(kept["time_s"]), tenants)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def keep_look(port: int, look: Look) -> None:
    """Keep it for the next command. Where it cannot be kept there are no rates, and no error."""
    counters = {
        tenant: {name: values.get(name, 0.0) for name in _COUNTERS}
        for tenant, values in look.tenants.items()
    }
    try:
        _file(port).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"time_s": look.time_s, "tenants": counters})
        write_private(_file(port), content.encode())
    except OSError:
        return


def look_at(status: ServerStatus) -> Look:
    """What there is now."""
    return Look(time.time(), status.tenants)


def _file(port: int) -> Path:
    return default_cache() / f"status-{port}.json"


def status_lines(status: ServerStatus, look: Look, before: Look | None) -> Iterator[str]:
    """Lines for a person."""
    seconds, rates = look.since(before)
    since = f"; rates of the last {readable_time(seconds)}" if rates else ""
    yield (
        f"{status.state}, {status.queue_length:.0f} waiting for a compute slot; "
        f"{counted(len(look.tenants), 'tenant')}{since}"
    )
    heads = ["tenant", "streams", "held", "kept", "tok/s", "busy", "in/s", "out/s"]
    yield from table_lines(
        [*heads, "tokens", "in", "out", "refused"],
        [_cells(name, look.tenants[name], rates.get(name)) for name in sorted(look.tenants)],
    )
    if not rates:
        yield "tok/s, busy, in/s and out/s are since the last look: they come with the next"


def _cells(
    tenant: str, values: Mapping[str, float], rates: Mapping[str, float] | None
) -> list[str]:
    """A row of the table: what is there now, rates, and totals since the server began."""

    def value(name: str) -> float:
        return values.get(name, 0.0)

    return [
        tenant,
        f"{value('dlora_streams'):.0f}",
        _short(value("dlora_inflight_bytes")),
        _short(value("dlora_kept_bytes")),
        "-" if rates is None else f"{rates[_TOKENS]:.0f}",
        "-" if rates is None else f"{rates[_COMPUTE]:.0%}",
        "-" if rates is None else _short(rates[_IN]),
        "-" if rates is None else _short(rates[_OUT]),
        _number(value(_TOKENS)),
        _short(value(_IN)),
        _short(value(_OUT)),
        f"{value('dlora_refusals_total'):.0f}",
    ]


def _short(count: float) -> str:
    """Bytes without a space: 1.23MB."""
    return readable_bytes(count).replace(" ", "")


def _number(count: float) -> str:
    """A number in at most six characters."""
    for unit in ("", "k", "M", "G"):
        if count < 9999.5:
            return f"{count:.0f}{unit}"
        count /= 1000
    return f"{count:.0f}T"


def as_json(status: ServerStatus, look: Look, before: Look | None) -> dict[str, Any]:
    """The same for a program: names as in the metrics, rates a second."""
    seconds, rates = look.since(before)
    return {
        "state": status.state,
        "time": look.time_s,
        "queue_length": status.queue_length,
        "seconds_since_last_look": seconds or None,
        "tenants": {
            tenant: {**values, "per_second": rates.get(tenant)}
            for tenant, values in sorted(look.tenants.items())
        },
    }
