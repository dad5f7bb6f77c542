"""How many parts of a micro-batch to have in flight, from what the link and two passes took.

Cheap, and asked once a run: the number that it gives is kept, and a resumed run takes the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from dlora.edge.link import Link
from dlora.edge.meter import Meter
from dlora.formulas import seconds_in_flight
from dlora.protocol.address import is_loopback

__all__ = ["CHOICES", "best_parts", "choose_parts", "measured_rtt", "on_one_machine", "stations"]

CHOICES: Final = (1, 2, 4)
_LEAST_GAIN: Final = 0.05
"""Of the seconds with fewer parts: a stream more is not taken for less."""
_SAME_MACHINE_S: Final = 0.002
"""Round trips to this machine take less; what takes longer goes through a tunnel."""
_PASSES: Final = 2
_CALLS: Final = 5


def choose_parts(
    link: Link, rows: int, round_trips: int, run: Callable[[], tuple[Meter, float]]
) -> tuple[int, str]:
    """(number of parts, why) for training micro-batches of so many rows.

    `run` makes one forward pass over the whole micro-batch, as one, and says what it cost and how
    many seconds it took. A training step waits `round_trips` times. It is taken to compute three
    times what a forward pass computes, as backward costs about twice as much, and to move twice as
    many bytes.
    """
    cost, seconds = min((run() for _ in range(_PASSES)), key=lambda one: one[1])
    rtt_s = measured_rtt(link)
    of_bytes_s = max(0.0, cost.wait_s - cost.cloud_s - cost.round_trips * rtt_s)
    cloud_s, edge_s = 3 * cost.cloud_s, 3 * (seconds - cost.wait_s)

    together = on_one_machine(link, rtt_s)
    work = stations(cloud_s, edge_s, of_bytes_s, of_bytes_s, together=together)
    number, expected = best_parts(rows, round_trips * rtt_s, work)
    guesses = ", ".join(f"{parts}: {seconds:.2f} s" for parts, seconds in expected.items())
    return number, (
        f"auto, of a round trip of {1000 * rtt_s:.1f} ms, {cloud_s:.2f} s of the cloud's and "
        f"{edge_s:.2f} s of the edge's in a micro-batch of {rows} rows ({guesses})"
    )


def best_parts(
    rows: int, round_trips_s: float, work: tuple[float, ...]
) -> tuple[int, dict[int, float]]:
    """The best of `CHOICES` for so many rows, and the seconds that each would take.

    `round_trips_s` and `work` are as of `formulas.seconds_in_flight`.
    """
    expected = {
        parts: seconds_in_flight(parts, round_trips_s, work) for parts in CHOICES if parts <= rows
    }
    best = 1
    for parts, seconds in expected.items():
        if seconds < (1 - _LEAST_GAIN) * expected[best]:
            best = parts
    return best, expected


def stations(
    cloud_s: float, edge_s: float, *transfers_s: float, together: bool
) -> tuple[float, ...]:
    """Who works for a micro-batch, and how long; halves `together` on a machine are one.

    Each direction of a link is one of its own: bytes up and bytes down pass each other.
    """
    if together:
        return cloud_s + edge_s, *transfers_s
    return cloud_s, edge_s, *transfers_s


def on_one_machine(link: Link, rtt_s: float) -> bool:
    """Whether the cloud computes on this machine, as address and round trip time have it."""
    here = is_loopback(link.address) or ":" not in link.address  # without a port: in this process
    return here and rtt_s < _SAME_MACHINE_S


def measured_rtt(link: Link) -> float:
    """Seconds of a round trip: the shortest of some calls that do next to nothing."""
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        link.ping()
        times.append(time.perf_counter() - start)
    return min(times)
