"""What training would learn from data, as lines to read: `dlora data`.

With a server rows are counted in tokens of its model, made by the trainer's own code, and what is
learned is told from what is only read. Without one they are counted in characters.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dlora.edge.data import load_rows, read_rows
from dlora.edge.data_forms import form_of
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link
from dlora.edge.load import load_tokenizer
from dlora.edge.task_forms import task_form
from dlora.edge.tokenise import tokenising_trainer
from dlora.errors import DataError
from dlora.training.calibrate import calibrate
from dlora.training.data_settings import DataSettings
from dlora.training.link_speed import link_speed
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_run import load_of
from dlora.training.planner import planned_model, predict
from dlora.training.readable import readable_bytes, readable_time
from dlora.training.row_sizes import RowSizes

__all__ = ["describe", "histogram"]

_COLUMNS: Final = 80
_BARS: Final = 8
_SHOWN_TOKENS: Final = 60
"""Of one part of a row that is shown: its first and its last."""


def describe(settings: DataSettings, link: Link | None = None) -> Iterator[str]:
    """Lines about the data, and what an epoch costs. Raises DataError for what is no data at all.

    Rows that cannot be trained on are counted, and the first of them named.
    """
    tokenizer = None if link is None else load_tokenizer(link)
    chat = tokenizer is None or bool(tokenizer.chat_template)
    refused: list[str] = []
    rows, origins = load_rows(
        settings.data, settings.columns, chat=chat, refused=refused, task=settings.task
    )
    if not len(rows):
        raise DataError(refused[0])

    yield f"data         {settings.data}: {len(rows) + len(refused)} rows"
    ((where, first),) = read_rows(settings.data, settings.columns, limit=1)
    if settings.task == "sft":
        names, as_messages = form_of(where, first), isinstance(rows[0].get("prompt"), list)
    else:
        _, names, as_messages = task_form(where, first, settings.task)
    yield f"form         {', '.join(names)}{', as messages' * as_messages}"
    if refused:
        yield f"refused      {len(refused)} rows; the first is {refused[0]}"

    if link is None or tokenizer is None:
        yield from _in_characters(settings, rows)
        return
    plan = _plan_settings(settings)
    model = planned_model(plan, link)
    trainer = tokenising_trainer(model, tokenizer, rows, origins, settings.batch_size)
    tokens = trainer.train_dataset
    lengths = [len(ids) for ids in tokens["input_ids"]]
    learned = [sum(label != IGNORE for label in labels[1:]) for labels in tokens["labels"]]
    yield from _lengths(lengths, "tokens")
    yield from _unfit(settings, origins, lengths, learned)
    for index in range(min(settings.show, len(tokens))):
        yield from _shown(tokenizer, tokens[index], origins[index], learned[index])
    yield from _epoch(settings, plan, model, lengths, learned)


# ----------------------------------------------------------------- rows


def _in_characters(settings: DataSettings, rows: Dataset) -> Iterator[str]:
    """What can be said without a tokenizer."""
    texts = [{name: _plain(row[name]) for name in rows.column_names} for row in rows]
    yield from _lengths([sum(map(len, row.values())) for row in texts], "characters")
    for row in texts[: settings.show]:
        yield ""
        for name, text in row.items():
            yield from _wrapped(name, _escaped(text))
    yield ""
    if settings.task == "sft":
        yield "With --server the same in tokens, with what is learned, and what an epoch costs."


def _plain(value: Any) -> str:
    """A column's text; of messages all of them."""
    try:
        return "\n".join(f"[{message['role']}] {message['content']}" for message in value)
    except (TypeError, KeyError):  # a text, or a column for rewards
        return str(value)


def _lengths(lengths: Sequence[int], unit: str) -> Iterator[str]:
    ordered = sorted(lengths)
    middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    total = sum(ordered)
    yield (
        f"lengths      {ordered[0]} to {ordered[-1]} {unit}, median {middle}, 95 % up to {high}; "
        f"{total} in all"
    )
    yield from histogram(lengths)


def histogram(lengths: Sequence[int], width: int = 40) -> Iterator[str]:
    """A line for each of up to 8 ranges of equal size: from, to, a bar, how many."""
    least, most = min(lengths), max(lengths)
    step = math.ceil((most - least + 1) / _BARS)
    counts = [0] * math.ceil((most - least + 1) / step)
    for length in lengths:
        counts[(length - least) // step] += 1

    digits = len(str(least + len(counts) * step - 1))
    for number, count in enumerate(counts):
        first = least + number * step
        bar = "#" * math.ceil(width * count / max(counts))
        yield f"  {first:>{digits}}-{first + step - 1:<{digits}}  {bar:{width}} {count}"


def _unfit(
    settings: DataSettings, origins: Sequence[str], lengths: Sequence[int], learned: Sequence[int]
) -> Iterator[str]:
    """Rows that training would refuse, cut or learn nothing from."""
    over = [index for index, length in enumerate(lengths) if length > settings.max_length]
    empty = [index for index, count in enumerate(learned) if not count]
    yield (
        f"too long     {_counted(over, origins)} over max_length {settings.max_length}"
        + (": --overlong drop or truncate, or a larger --max_length" if over else "")
    )
    yield f"no label     {_counted(empty, origins)} without a token to learn"


def _counted(indices: Sequence[int], origins: Sequence[str]) -> str:
    if not indices:
        return "no row"
    return f"{len(indices)} rows (the first is {origins[indices[0]]})"


def _shown(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], origin: str, learned: int
) -> Iterator[str]:
    """A row's tokens between bars, by what is read only and what is learned."""
    yield ""
    yield f"{origin}: {len(row['input_ids'])} tokens, {learned} learned"
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for is_read, part in groupby(pairs, key=lambda pair: pair[1] == IGNORE):
        texts = [_escaped(tokenizer.decode([token])) for token, _ in part]
        if (left := len(texts) - 2 * _SHOWN_TOKENS) > 0:
            texts[_SHOWN_TOKENS:-_SHOWN_TOKENS] = [f" ... {left} tokens ... "]
        yield from _wrapped("read" if is_read else "learned", "|".join(texts))


def _escaped(text: str) -> str:
    """Text on one line, without characters that steer a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _wrapped(name: str, text: str) -> Iterator[str]:
    width = _COLUMNS - 13
    most = 12 * width
    shown = text if len(text) <= most else f"{text[:most]} ..."
    lines = textwrap.wrap(shown, width, drop_whitespace=False) or [""]
    for number, line in enumerate(lines):
        yield f"  {'' if number else name:11}{line}".rstrip()


# ----------------------------------------------------------------- an epoch


def _plan_settings(settings: DataSettings) -> PlanSettings:
    """A plan of the same connection and adapter; lengths come when they are known."""
    speed = link_speed(settings.link)
    return PlanSettings(
        server=settings.server or "",
        target_modules=settings.target_modules,
        r=settings.r,
        wire=settings.wire,
        wire_dtype=settings.wire_dtype,
        upload_consent=settings.upload_consent,
        batch_size=settings.batch_size,
        rtt_ms=speed.rtt_ms,
        up_mbit=speed.up_mbit,
        down_mbit=speed.down_mbit,
    )


def _epoch(
    settings: DataSettings,
    plan: PlanSettings,
    model: Any,
    lengths: Sequence[int],
    learned: Sequence[int],
) -> Iterator[str]:
    """Steps, bytes and time of all rows once, in batches of shuffled rows as in training."""
    size = settings.batch_size
    fit = [min(length, settings.max_length) for length in lengths]
    rows = RowSizes(fit, [min(pair) for pair in zip(fit, learned, strict=True)])
    length = rows.padded(size)
    supervised = min(length - 1, round(sum(learned) / len(learned)))
    plan = dataclasses.replace(plan, length=length, supervised=supervised)
    cost = predict(plan, model, calibrate(plan, model), load_of(rows, model, size))

    steps = rows.micro_batches(size)
    sent, received = steps * cost.sent_bytes, steps * cost.received_bytes
    yield ""
    padding = "padding" if model.link.description.all_rows else "padding (which stays here)"
    yield f"an epoch     {steps} steps of {size} rows, {length} tokens a row with {padding}"
    yield (
        f"crosses      {readable_bytes(sent)} up, {readable_bytes(received)} down, "
        f"{steps * cost.round_trips} round trips, on the {plan.wire} wire"
    )
    took = readable_time(steps * cost.seconds)
    yield f"takes        about {took} over {link_speed(settings.link)}"
