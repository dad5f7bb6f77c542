"""Tokenised rows as a run may use them: not too long, and with something to learn."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dlora.edge.data import load_rows
from dlora.edge.labels import IGNORE
from dlora.errors import DataError, UsageError
from dlora.runs import RunFolder
from dlora.training.settings import TrainSettings

__all__ = ["check_same_rows", "digest", "fit_rows", "refuse_or_warn", "rows_of"]

log = logging.getLogger(__name__)

_TRAINED: Final = (
    *("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label"),
)
_PER_TOKEN: Final = ("input_ids", "completion_mask", "assistant_masks", "labels")


def rows_of(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Dataset, Sequence[str]], tuple[Dataset | None, Sequence[str]]]:
    """Rows to train on and rows to evaluate, each with where they stand. Raises DataError."""
    chat = bool(tokenizer.chat_template)
    task = settings.task
    rows, origins = load_rows(settings.data, settings.columns, chat=chat, task=task)
    if settings.eval_data is not None:
        held_out = load_rows(settings.eval_data, settings.columns, chat=chat, task=task)
        return (rows, origins), held_out
    if not settings.val_size:
        return (rows, origins), (None, [])

    number = settings.val_size if settings.val_size >= 1 else settings.val_size * len(rows)
    count = max(1, round(number))
    if count >= len(rows):
        raise DataError(
            f"{settings.data}: val_size {settings.val_size:g} holds out {count} of {len(rows)} "
            "rows: nothing is left to learn"
        )

    # A choice of its own seed, in the order of the data.
    chosen = sorted(random.Random(settings.seed).sample(range(len(rows)), count))
    rest = sorted(set(range(len(rows))).difference(chosen))
    train, held = (
        (rows.select(indices), [origins[index] for index in indices]) for indices in (rest, chosen)
    )
    return train, held


def fit_rows(rows: Dataset, origins: Sequence[str], settings: TrainSettings) -> Dataset:
    """Apply `max_length` to trl's rows, and look whether they have labels.

    `origins` says where each row came from. Raises DataError for rows that are too long, where
    that is asked for, and if no row has a label; warns of single ones.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    over = [index for index, length in enumerate(lengths) if length > settings.max_length]
    if over:
        refuse_or_warn(over, lengths, origins, settings)

    kept: Sequence[int] = range(len(rows))
    if over and settings.overlong == "drop":
        kept = [index for index, length in enumerate(lengths) if length <= settings.max_length]
        if not kept:
            raise DataError(
                f"every row is longer than max_length {settings.max_length}: nothing is left"
            )
        rows = rows.select(kept)
    elif over:
        rows = _truncated(rows, settings.max_length)
    _check_labels(rows, origins, kept, truncated=set(over).intersection(kept))
    return rows


def refuse_or_warn(
    over: list[int],
    lengths: list[int],
    origins: Sequence[str],
    settings: TrainSettings,
    counted: str = "",
) -> None:
    """What there is to say about rows that are too long; `counted` says what is in a length."""
    if settings.overlong == "error":
        raise DataError(
            f"{origins[over[0]]}: {lengths[over[0]]} tokens{counted}, max_length is "
            f"{settings.max_length}; "
            f"{len(over)} of {len(lengths)} rows are longer (the longest has {max(lengths)} "
            "tokens). Raise max_length, or set overlong to drop or truncate."
        )
    log.warning(
        "%d of %d rows are over max_length %d: %s",
        *(len(over), len(lengths), settings.max_length, settings.overlong),
    )


def _truncated(rows: Dataset, limit: int) -> Dataset:
    """The first `limit` tokens of every row."""
    columns = [name for name in _PER_TOKEN if name in rows.column_names]
    return rows.map(lambda row: {name: row[name][:limit] for name in columns}, desc="Truncating")


def _check_labels(
    rows: Dataset, origins: Sequence[str], kept: Sequence[int], truncated: set[int]
) -> None:
    """Warn of rows that teach nothing; DataError if that is all of them.

    `kept` has the rows' places among `origins`. The first token is predicted from nothing, so its
    label counts for nothing.
    """
    if "labels" not in rows.column_names:
        return
    empty = [
        index
        for index, labels in enumerate(rows["labels"])
        if all(label == IGNORE for label in labels[1:])
    ]
    if not empty:
        return

    why = "no token to learn"
    if truncated.intersection(empty):
        why += ", as max_length cuts before the completion begins"
    if len(empty) == len(rows):
        raise DataError(f"{origins[kept[0]]}: like all {len(rows)} rows it has {why}")
    first = origins[kept[empty[0]]]
    log.warning("%d of %d rows have %s; the first is %s", len(empty), len(rows), why, first)


# ----------------------------------------------------------------- the same rows


def digest(rows: Dataset, *, as_text: bool = False) -> dict[str, Any]:
    """What run.json keeps of rows as they are trained: how many, and SHA-256 of ids and labels.

    Of rows that are no tokens yet (`as_text`), all their columns as they are, whatever their names.
    """
    content = hashlib.sha256()
    columns = [name for name in _TRAINED if name in rows.column_names and not as_text]
    for row in rows.select_columns(columns) if columns else rows:
        if not columns:
            content.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        for name in columns:
            values = np.asarray(row[name], dtype="<i8").ravel()
            content.update(len(values).to_bytes(8, "little") + values.tobytes())
    return {"count": len(rows), "sha256": content.hexdigest()}


def check_same_rows(folder: RunFolder, rows: dict[str, dict[str, Any]]) -> None:
    """Raises UsageError if the run in a folder was begun with other rows than these.

    `rows` has digests by use. Runs of older versions kept none.
    """
    earlier = folder.read().get("rows", {})
    for use, now in rows.items():
        before = earlier.get(use, now)
        if before != now:
            raise UsageError(
                f"--resume continues the same run, but {use} has other rows or another order than "
                f"when it began ({now.get('count')} now, {before.get('count')} then): put the old "
                "file back, or begin a new run"
            )
