"""Half of a 95 % interval, of what the tables of `kr.py` and `paper.py` show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # quantiles of t, by the number of seeds


def over_seeds(values: Sequence[float]) -> float:
    """Of the mean of a few seeds, two at least: t."""
    return T_95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))


def over_rows(gaps: Sequence[float]) -> float:
    """Of the mean of many rows."""
    return 1.96 * statistics.pstdev(gaps) / math.sqrt(len(gaps))


def by_row(mine: Sequence[str], theirs: Sequence[str]) -> tuple[float, float]:
    """Mean difference of two arms, and half of its interval, from a digit for every row of each run
    (`kr.marks`): of single runs as McNemar's test has it, of several over the rows' means of them,
    so that it says nothing about other seeds.
    """
    sides = [
        [statistics.fmean(map(int, row)) for row in zip(*runs, strict=True)]
        for runs in (mine, theirs)
    ]
    gaps = [a - b for a, b in zip(*sides, strict=True)]
    return statistics.fmean(gaps), over_rows(gaps)


def of_share(share: float, rows: int) -> float:
    """Of a share of so many rows: binomial."""
    return 1.96 * math.sqrt(share * (1 - share) / rows)
