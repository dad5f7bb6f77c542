"""Tokenised rows of every task: cut or refused by length, counted, and known to fit the server.

Preference rows keep prompt and completions apart (`prompt_ids`, `chosen_ids`, ...). Rows of grpo
are prompts as they were read, and their answers are as long as they may become.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from datasets import Dataset
from transformers import TrainingArguments

from dlora.edge.choose_parts import CHOICES
from dlora.edge.description import has_cache
from dlora.edge.model import SplitModel
from dlora.edge.templates import tokenising
from dlora.errors import DataError, UsageError
from dlora.formulas import pass_bytes
from dlora.training.row_sizes import RowSizes
from dlora.training.rows import fit_rows, refuse_or_warn
from dlora.training.settings import TrainSettings
from dlora.training.tasks import SEQUENCES

__all__ = ["check_room", "check_streams", "fit_task_rows"]

log = logging.getLogger(__name__)

_MIB: Final = 2**20
_COMPLETIONS: Final = {"dpo": ("chosen_ids", "rejected_ids"), "kto": ("completion_ids",)}


def fit_task_rows(
    rows: Dataset,
    origins: Sequence[str],
    settings: TrainSettings,
    trainer: Any,
    *,
    training: bool,
) -> tuple[Dataset, RowSizes]:
    """Apply `max_length` to a trainer's rows, and count them; `training`: they are not held out.

    Raises DataError, naming a row.
    """
    if settings.task == "sft":
        rows = fit_rows(rows, origins, settings)
        return rows, RowSizes.of(rows)
    if settings.task == "grpo":
        return _fit_prompts(rows, origins, settings, trainer, training=training)

    names = _COMPLETIONS[settings.task]
    lengths = _lengths(rows, names)
    over = [index for index, length in enumerate(lengths) if length > settings.max_length]
    if over:
        refuse_or_warn(over, lengths, origins, settings)
        if settings.overlong == "truncate":
            rows, origins = _cut(rows, origins, names, settings.max_length)
        else:
            rows = _without(rows, over)
    if not len(rows):
        raise DataError(
            f"{origins[0]}: like all rows it is longer than max_length {settings.max_length}, and "
            "nothing is left"
        )
    if settings.task == "dpo":
        return rows, _sizes(rows, names)

    # Completions of rows that are gone are not compared with either: paired again, as trl does.
    if over:
        rows = rows.map(_paired, batched=True, batch_size=settings.batch_size, desc="Pairing")
    mixed = max(_lengths(rows, ("KL_completion_ids",)))
    return rows, replace(_sizes(rows, names), beside=min(mixed, settings.max_length))


def _without(rows: Dataset, over: Sequence[int]) -> Dataset:
    """All rows but these."""
    return rows.select(sorted(set(range(len(rows))).difference(over)))


def _paired(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Each prompt of a batch with the completion of the row before it."""
    completions = rows["completion_ids"]
    return {"KL_completion_ids": completions[-1:] + completions[:-1]}


def _lengths(rows: Dataset, names: Sequence[str]) -> list[int]:
    """Of each row the longest sequence: the prompt with one of these completions."""
    longest = [max(map(len, ids)) for ids in zip(*(rows[name] for name in names), strict=True)]
    prompts = map(len, rows["prompt_ids"])
    return [prompt + most for prompt, most in zip(prompts, longest, strict=True)]


def _cut(
    rows: Dataset, origins: Sequence[str], names: Sequence[str], limit: int
) -> tuple[Dataset, Sequence[str]]:
    """The first `limit` tokens of every sequence, of rows that then still say something."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        room = max(0, limit - len(row["prompt_ids"]))
        return {name: row[name][:room] for name in names}

    rows = rows.map(cut, desc="Truncating")
    columns = [rows[name] for name in names]
    says = [
        all(ids) and len(set(map(tuple, ids))) == len(names) for ids in zip(*columns, strict=True)
    ]
    kept = [index for index, fine in enumerate(says) if fine]
    if len(kept) < len(rows):
        log.warning(
            "%d of %d rows are dropped: max_length %d leaves no completion, or no difference "
            "between two; the first is %s",
            *(len(rows) - len(kept), len(rows), limit, origins[says.index(False)]),
        )
    return rows.select(kept), [origins[index] for index in kept] or origins


def _sizes(rows: Dataset, names: Sequence[str]) -> RowSizes:
    """All sequences, those of a row next to each other."""
    prompts = [len(ids) for ids in rows["prompt_ids"]]
    columns = [[len(ids) for ids in rows[name]] for name in names]
    learned = [one for row in zip(*columns, strict=True) for one in row]
    of_prompt = [prompt for prompt in prompts for _ in names]
    lengths = [prompt + one for prompt, one in zip(of_prompt, learned, strict=True)]
    noun = "pair" if len(names) > 1 else "row"
    return RowSizes(lengths, learned, sequences=len(names), noun=noun)


def _fit_prompts(
    rows: Dataset,
    origins: Sequence[str],
    settings: TrainSettings,
    trainer: Any,
    *,
    training: bool,
) -> tuple[Dataset, RowSizes]:
    """Prompts that leave room for an answer."""
    answer = trainer.args.max_completion_length
    if answer >= settings.max_length:
        raise UsageError(
            f"trainer: max_completion_length {answer} leaves no prompt in max_length "
            f"{settings.max_length}: lower it, or raise max_length"
        )
    with tokenising(trainer.processing_class, (rows, origins), refused="prompts"):
        prompts = [len(ids) for ids in trainer._tokenize_prompts(list(rows["prompt"]))[0]]
    lengths = [prompt + answer for prompt in prompts]
    over = [index for index, length in enumerate(lengths) if length > settings.max_length]
    if over:
        refuse_or_warn(over, lengths, origins, settings, f" with an answer of {answer}")
        rows = _without(rows, over)
        lengths = [length for length in lengths if length <= settings.max_length]
    at_once = trainer.args.generation_batch_size // trainer.args.num_generations
    if training and len(rows) < at_once:
        raise DataError(
            f"{origins[0]}: {len(rows)} prompts fit, and a step takes {at_once}: give more, lower "
            "batch_size or gradient_accumulation_steps, or raise trainer.num_generations"
        )
    return rows, RowSizes(lengths, [answer] * len(lengths), noun="prompt", learned_is="up to ")


# ----------------------------------------------------------------- the server


def check_room(
    sizes: RowSizes,
    settings: TrainSettings,
    arguments: TrainingArguments,
    model: SplitModel,
    *,
    training: bool,
) -> None:
    """Raises UsageError if a batch of the longest rows, padded, is more than the server takes."""
    limits, pad_to = model.link.description.limits, settings.pad_to
    longest = max(*sizes.lengths, sizes.beside)
    padded = math.ceil(longest / pad_to) * pad_to if pad_to else longest
    row = f"the longest row has {longest} tokens"
    if pad_to:
        row += f", {padded} with pad_to {pad_to}"
    if padded > limits.max_length:
        raise UsageError(
            f"{row}; this server takes sequences of up to {limits.max_length}: lower max_length "
            "and set overlong to drop or truncate" + (", or lower pad_to" if pad_to else "")
        )

    size = arguments.per_device_train_batch_size
    size = size if training else arguments.per_device_eval_batch_size
    batch = min(size * sizes.sequences, len(sizes.lengths)) if settings.task != "grpo" else size
    tokens, needed = batch * padded, 0.0
    if training:
        needed = pass_bytes(batch, padded, limits.bytes_per_token, limits.bytes_per_token_squared)
    if tokens > limits.max_tokens or needed > limits.max_inflight_bytes:
        raise UsageError(
            f"{row}; a batch of {batch} x {padded} makes {tokens} tokens and this server takes "
            f"{limits.max_tokens} a micro-batch; it needs {needed / _MIB:.0f} MiB of activations "
            f"of {limits.max_inflight_bytes / _MIB:.0f}: lower batch_size"
            + (" (and raise gradient_accumulation_steps as much)" if training else "")
        )
    if settings.task == "grpo":
        drawn = arguments.generation_batch_size if training else size
        _check_cache(drawn, padded, padded - sizes.learned[0], model)


def _check_cache(drawn: int, length: int, prompt: int, model: SplitModel) -> None:
    """Raises UsageError if the answers that are drawn at once do not fit into the server."""
    limits = model.link.description.limits
    if not has_cache(limits):
        log.warning("this model is served without a KV cache: each token of an answer costs a pass")
    cached = drawn * (length * limits.cache_bytes_per_token + limits.cache_bytes_per_sequence)
    if drawn * prompt > limits.max_tokens or cached > limits.max_inflight_bytes:
        raise UsageError(
            f"{drawn} answers are drawn at once, from {drawn * prompt} tokens of prompts, with "
            f"{cached / _MIB:.0f} MiB of KV cache; this server takes {limits.max_tokens} tokens "
            f"and {limits.max_inflight_bytes / _MIB:.0f} MiB: lower trainer.generation_batch_size "
            "or trainer.max_completion_length"
        )


def check_streams(settings: TrainSettings, model: SplitModel) -> None:
    """Raises UsageError where a step holds more streams than this tenant may have.

    The policy's streams, one for each part, wait for their backward pass while the reference is
    asked.
    """
    allowed = model.link.description.limits.max_streams
    if settings.task not in ("dpo", "kto") or not allowed:
        return
    if allowed < 2:
        raise UsageError(
            f"a step of task {settings.task} holds two streams at once (the policy's, and the "
            f"reference's), and {model.link.address} allows {allowed} here: ask for a larger "
            "quota, or train with trl's precompute_ref_log_probs from Python (docs/trainers.md)"
        )
    parts = max(CHOICES) if settings.in_flight == "auto" else int(settings.in_flight)
    parts = min(parts, settings.batch_size * SEQUENCES[settings.task])
    parts = 1 if settings.wire == "hosted" else parts
    if parts >= allowed:
        raise UsageError(
            f"a step of task {settings.task} holds {parts} streams for its parts in flight while "
            f"it asks the reference, and {model.link.address} allows {allowed} in all: set "
            f"in_flight to {allowed - 1} or less"
        )
    log.info(
        "a step of task %s holds up to %d streams at once, of %d that are allowed here",
        *(settings.task, 2 * parts, allowed),
    )
