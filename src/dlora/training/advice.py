"""Which way to train over a link: a table of sensible choices, and the fastest of them.

All rows come of one calibration (`calibrate.py`), of passes over the plain wire and a hosted step,
and `planner.predict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import groupby
from typing import Any, Final

from dlora.edge.link import Link
from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.kill_revive.units import check_measurable
from dlora.protocol.codecs import mix
from dlora.training.calibrate import Calibration
from dlora.training.link_speed import HERE, link_speed
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_traffic import Load
from dlora.training.planner import Prediction, calibrated, planned_model, predict
from dlora.training.settings import TrainSettings

__all__ = ["SEEN", "WIRE_DTYPES", "Row", "advise", "choose", "command", "mark", "table"]

_EXACT: Final = ("fp16", "exact")
MIXES: Final = {
    "plain": (_EXACT,),
    "factored": (_EXACT, ("int4", "drop")),
    "hosted": (_EXACT, ("int4", "exact")),
}
"""By wire (wire dtype, input gradient) of what is advised: those whose accuracy was measured in
whole runs, at all sites where it is coarse (docs/benchmarks.md says how far it held)."""

WIRE_DTYPES: Final = tuple(sorted({one for mixes in MIXES.values() for one, _ in mixes}))
"""What to calibrate for `choose`."""

SEEN: Final = {
    "plain": "rows at the entry and at sites",
    "factored": "these rows, and B",
    "hosted": "these rows, and the adapter itself",
}
"""By wire, the least first: what the cloud gets to see, in the words of docs/privacy.md. Each shows
what those before it show."""

_PARTS: Final = (2, 4)
_ACCUMULATED: Final = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train."""

    choice: PlanSettings
    seconds: float
    """Of an optimizer step."""
    prediction: Prediction
    as_local: bool
    """It trains what local tuning would with these settings: all modules, as many rows a step."""
    mark: str = ""
    """A star: the fastest that shows no more, of those that train as local tuning does. A plus:
    faster still, of all."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step over its seconds: what rows are compared by."""
        choice = self.choice
        tokens = choice.batch_size * choice.length * choice.gradient_accumulation_steps
        return tokens / max(self.seconds, 1e-9)


def advise(
    settings: PlanSettings,
    link: Link,
    model: SplitModel | None = None,
    load: Load | None = None,
) -> list[Row]:
    """Every choice over the link that `settings.link` names, with its prediction, marked.

    `model` is one that `planned_model` made of `settings.for_table`; `load` is what travels of a
    micro-batch.
    """
    speed = HERE if settings.link is None else link_speed(settings.link)
    base = replace(
        settings, link=None, rtt_ms=speed.rtt_ms, up_mbit=speed.up_mbit, down_mbit=speed.down_mbit
    ).for_table
    model = planned_model(base, link) if model is None else model
    measured = calibrated(base, model, WIRE_DTYPES)
    return choose(base, model, measured, load)


def choose(
    base: PlanSettings, model: SplitModel, measured: Calibration, load: Load | None = None
) -> list[Row]:
    """Every choice with its prediction, marked; the link's numbers are those of `base`."""
    wires = [wire for wire in SEEN if wire != "hosted" or measured.hosted is not None]
    choices = _choices(base, model, wires)
    return mark(
        _best_parts([_row(base, one, predict(one, model, measured, load)) for one in choices])
    )


def _row(base: PlanSettings, choice: PlanSettings, prediction: Prediction) -> Row:
    same = ("sites", "kr", "gradient_accumulation_steps")
    is_exact = (choice.wire_dtype, choice.input_grad) == _EXACT
    return Row(
        choice=choice,
        seconds=prediction.seconds,
        prediction=prediction,
        as_local=is_exact and all(getattr(choice, name) == getattr(base, name) for name in same),
    )


def _choices(base: PlanSettings, model: SplitModel, wires: Sequence[str]) -> Iterator[PlanSettings]:
    """The rows of the table, and all numbers of parts, of which the best will be taken."""
    few = not _refuses_few(model)
    offered = set(model.link.description.wire_dtypes)
    for wire in wires:
        for wire_dtype, input_grad in MIXES[wire]:
            if not mix(wire_dtype, wire).dtypes <= offered or (input_grad == "drop" and not few):
                continue
            is_exact = (wire_dtype, input_grad) == _EXACT
            for kr in ("off", "on") if is_exact and few else ("off",):
                made: dict[str, Any] = {
                    "wire": wire,
                    "upload_consent": wire == "hosted",
                    "wire_dtype": wire_dtype,
                    "input_grad": input_grad,
                    "kr": kr,
                }
                yield replace(base, **made)
                if wire != "hosted":
                    for parts in _PARTS:
                        if parts <= base.batch_size:
                            yield replace(base, **made, in_flight=parts)
                elif base.gradient_accumulation_steps == 1:
                    yield replace(base, **made, gradient_accumulation_steps=_ACCUMULATED)


def _refuses_few(model: SplitModel) -> bool:
    """Whether Kill and Revive, which trains few sites at a time, refuses the adapter."""
    try:
        check_measurable(model)
    except UsageError:
        return True
    return len(model.sites) < 2


def _best_parts(rows: Sequence[Row]) -> list[Row]:
    """Of rows that differ in their number of parts alone, those of one part and of the best."""
    found: list[Row] = []
    for _, same in groupby(rows, key=lambda row: replace(row.choice, in_flight=1)):
        one, *several = same
        found += [one, min(several, key=lambda row: row.seconds)] if several else [one]
    return found


def mark(rows: Sequence[Row]) -> list[Row]:
    """The same rows, of which the fastest are marked, for each level of what may be seen.

    Where more may be seen, what shows less may be used too: so a row that is slower than one that
    shows less has no mark.
    """
    fastest, as_local = set(), set()
    numbers = sorted(range(len(rows)), key=lambda number: -rows[number].tokens_per_s)
    for level in range(len(SEEN)):
        wires = list(SEEN)[: level + 1]
        allowed = [number for number in numbers if rows[number].choice.wire in wires]
        fastest.update(allowed[:1])
        as_local.update([number for number in allowed if rows[number].as_local][:1])
    marks = {**dict.fromkeys(fastest, "+"), **dict.fromkeys(as_local, "*")}
    return [replace(row, mark=marks.get(number, "")) for number, row in enumerate(rows)]


def command(row: Row, data: str | None = None) -> list[str]:
    """`dlora train` as this row has it, to be completed with output and, without it, with data."""
    words = ["dlora", "train", "--server", row.choice.server]
    words += ["--data", data or "private.jsonl", "--output", "runs/mine"]
    for one in fields(TrainSettings):
        if one.name in ("server", "data"):
            continue
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(row.choice, one.name, default)
        if value != default:
            words.append(f"--{one.name}")
            if value is not True:
                words.append(_word(value))
    return words


def _word(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines for a person, a headline first; they fit 80 columns."""
    cells = [list(_HEADS), *map(_cells, rows)]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(size) if number in _NUMBERS else cell.ljust(size)
            for number, (cell, size) in enumerate(zip(line, sizes, strict=True))
        ).rstrip()
        for line in cells
    ]


_HEADS: Final = (
    *("", "wire", "codec", "parts", "accum.", "sites", "s/step", "tok/s"),
    *("MB up", "MB down", "sees"),
)
_NUMBERS: Final = range(3, 10)
"""Columns of numbers."""
_SEES: Final = {"plain": "rows", "factored": "+B", "hosted": "+A,B"}
"""`SEEN` in a column."""


def _cells(row: Row) -> list[str]:
    choice, found = row.choice, row.prediction
    return [
        row.mark,
        choice.wire,
        choice.wire_dtype + ("-dx" if choice.input_grad == "drop" else ""),
        str(found.in_flight),
        str(choice.gradient_accumulation_steps),
        str(found.active_sites),
        f"{row.seconds:.2f}",
        f"{row.tokens_per_s:.0f}",
        _mb(found.sent_bytes),
        _mb(found.received_bytes),
        _SEES[choice.wire],
    ]


def _mb(size: int) -> str:
    """In no more than six places up to ten thousand."""
    return f"{size / 1e6:.{2 if size < 1e8 else 1}f}"
