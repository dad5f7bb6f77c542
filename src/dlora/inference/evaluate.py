"""How good an adapter is, measured on the edge: loss, exact match, choices by log-likelihood.

Shapes: B prompts, T their tokens, R continuations of all prompts, C their tokens that are read,
N tokens that are asked for, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dlora.edge.data import ChoiceRow, check_choices, load_rows, read_rows
from dlora.edge.kv_cache import CloudCache
from dlora.edge.labels import IGNORE
from dlora.edge.model import SplitModel
from dlora.edge.prompt import virtual_tokens
from dlora.edge.tokenise import tokenising_trainer
from dlora.errors import DataError, UsageError
from dlora.inference.answer import complete
from dlora.inference.prompts import pad_token
from dlora.inference.settings import EvalSettings

__all__ = ["choice_scores", "evaluate", "wilson"]


def evaluate(
    settings: EvalSettings, model: SplitModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Measure what the data's rows allow; return plain numbers, with the cost. Raises DataError."""
    source = settings.data or ""
    ((_, first),) = read_rows(source, settings.columns, limit=1)
    before = model.meter.copy()
    if "choices" in first:
        if settings.exact_match:
            raise UsageError(
                "exact_match: rows with choices are scored by log-likelihood; leave it out"
            )
        rows = read_rows(source, settings.columns, limit=settings.limit)
        number = len(rows)
        measures, predictions = _choices(model, tokenizer, check_choices(rows), settings.data_rows)
    else:
        data, origins = load_rows(
            source,
            settings.columns,
            chat=bool(tokenizer.chat_template),
            limit=settings.limit,
        )
        number = len(data)

        # Before the loss, which may take long.
        if asks_answers := settings.exact_match or settings.predictions is not None:
            _check_completions(data, settings)
        measures, predictions = _loss(model, tokenizer, data, origins, settings.data_rows), []
        if asks_answers:
            matches, predictions = _exact_match(model, tokenizer, data, settings)
            measures |= matches

    if settings.predictions is not None:
        _write_lines(settings.predictions, predictions)
    return {
        "model_id": model.link.description.model_id,
        "data": source,
        "rows": number,
        **measures,
        "cost": asdict(model.meter - before),
    }


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which holds for few rows, and near 0 and 1."""
    z, p = 1.96, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSON line for every row of data, in its order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _share(name: str, right: int, total: int) -> dict[str, Any]:
    """A share and its interval, under two names."""
    return {name: right / total, f"{name}_95": list(wilson(right, total))}


# ----------------------------------------------------------------- loss


def _loss(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    origins: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """Mean loss over all supervised tokens, tokenised and batched as in training."""
    total, count = 0.0, 0
    positions = model.options.head_positions
    model.set_options(head_positions="supervised")
    try:
        for batch in tqdm(_batches(model, tokenizer, data, origins, batch_size), desc="loss"):
            labels = batch["labels"]
            num_tokens = int((labels[:, 1:] != IGNORE).sum())
            if num_tokens:
                with torch.no_grad():
                    total += model(**batch).loss.item() * num_tokens
                count += num_tokens
    finally:
        model.set_options(head_positions=positions)
    if not count:
        raise DataError("no row has a token to predict")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": count}


def _batches(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    origins: Sequence[str],
    batch_size: int,
) -> Sequence[dict[str, Tensor]]:
    """What the trainer would feed the model: trl tokenises and collates."""
    trainer = tokenising_trainer(model, tokenizer, data, origins, batch_size)
    return list(trainer.get_eval_dataloader(trainer.train_dataset))


def _check_completions(data: Dataset, settings: EvalSettings) -> None:
    """Raises UsageError for rows that no answer can be compared with."""
    if "completion" not in data.column_names:
        name = "exact_match" if settings.exact_match else "predictions"
        raise UsageError(f"{name}: needs rows with prompt and completion, messages, or choices")


def _exact_match(
    model: SplitModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, settings: EvalSettings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The share of rows that are answered, greedily, with their very completion; every answer."""
    # Prompts of about the same length together: less padding.
    order = sorted(range(len(data)), key=lambda number: len(str(data[number]["prompt"])))
    found: dict[int, dict[str, Any]] = {}
    for start in tqdm(range(0, len(order), settings.data_rows), desc="answers"):
        numbers = order[start : start + settings.data_rows]
        chosen = [data[number] for number in numbers]
        texts, _ = complete(
            model,
            tokenizer,
            [row["prompt"] for row in chosen],
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
        )

        for number, text, row in zip(numbers, texts, chosen, strict=True):
            completion = row["completion"]
            want = completion if isinstance(completion, str) else completion[0]["content"]
            found[number] = {
                "prompt": row["prompt"],
                "completion": want,
                "prediction": text,
                "right": text.strip() == want.strip(),
            }
    rows = [found[number] for number in range(len(data))]
    return _share("exact_match", sum(row["right"] for row in rows), len(rows)), rows


# ----------------------------------------------------------------- choices


def _choices(
    model: SplitModel, tokenizer: PreTrainedTokenizerBase, rows: list[ChoiceRow], batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Shares of rows whose right choice is the likeliest: in all, and per character of it; and
    what was chosen in every row.
    """
    right = right_norm = 0
    found: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt))
    for start in tqdm(range(0, len(order), batch_size), desc="choices"):
        numbers = order[start : start + batch_size]
        chosen = [rows[number] for number in numbers]
        scores = choice_scores(model, tokenizer, [(row.prompt, row.choices) for row in chosen])
        for number, row, score in zip(numbers, chosen, scores, strict=True):
            normed = [nats / len(choice) for nats, choice in zip(score, row.choices, strict=True)]
            best = max(range(len(score)), key=score.__getitem__)
            right += best == row.answer
            right_norm += max(range(len(score)), key=normed.__getitem__) == row.answer
            found[number] = {
                "prompt": row.prompt,
                "choices": list(row.choices),
                "answer": row.answer,
                "prediction": best,
                "right": best == row.answer,
                "log_likelihoods": score,
            }

    # What always taking the choice that is right most often would get.
    most_frequent = max(Counter(row.answer for row in rows).values())
    shares = (
        _share("accuracy", right, len(rows))
        | _share("accuracy_norm", right_norm, len(rows))
        | {"majority_choice": most_frequent / len(rows)}
    )
    return shares, [found[number] for number in range(len(rows))]


def choice_scores(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, Sequence[str]]],
) -> list[list[float]]:
    """Log-likelihood in nats of every choice as the continuation of its prompt.

    `questions` are (prompt, choices). The prompts are read once, in one pass; a second pass reads
    the continuations, all of them at once, each behind a copy of its prompt's KV cache. Where all
    continuations have one token the second pass is not needed. Raises DataError for a choice
    without tokens, UsageError for an adapter that is a prompt.
    """
    if virtual_tokens(model):
        raise UsageError(
            "choices share their prompt's KV cache, and peft puts virtual tokens in front of each "
            "of its passes: score this adapter by loss or exact match"
        )
    prompts: list[list[int]] = []
    tails: list[list[int]] = []
    owners: list[int] = []
    # `owners`: of each tail, the index of its prompt.
    for number, (prompt, choices) in enumerate(questions):
        start = _ids(tokenizer, prompt)
        prompts.append(start)
        for choice in choices:
            whole = _ids(tokenizer, prompt + choice)
            # As lm-eval has it: the prompt's own tokens, then what the whole text has beyond them.
            if len(whole) <= len(start):
                raise DataError(
                    f"question {number + 1} of this batch: choice {choice[:40]!r} adds no token to "
                    "its prompt"
                )
            tails.append(whole[len(start) :])
            owners.append(number)

    totals = [0.0] * len(tails)
    with torch.no_grad():
        for rows, logprobs_NV in _tail_logprobs(model, tokenizer, prompts, tails, owners):
            for row, position, logprobs_V in zip(*rows, logprobs_NV, strict=True):
                totals[row] += logprobs_V[tails[row][position]].item()

    scores: list[list[float]] = [[] for _ in questions]
    for owner, total in zip(owners, totals, strict=True):
        scores[owner].append(total)
    return scores


def _tail_logprobs(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    tails: list[list[int]],
    owners: list[int],
) -> Iterator[tuple[tuple[list[int], list[int]], Tensor]]:
    """((row of each, position in it), log-probabilities [N, V]), in two parts at most.

    Together they cover every token of every tail.
    """
    if model.generation_config.use_cache is False:
        raise UsageError(
            "choices share their prompt's KV cache, and this model is served without one"
        )
    pad = pad_token(tokenizer)
    longest = max(len(prompt) for prompt in prompts)
    prompt_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    )

    # The last token of a tail predicts nothing that is asked for.
    num_read = max(len(tail) for tail in tails) - 1
    cache = CloudCache(expected_length=longest + num_read)
    try:
        # The prompts: their last token predicts the first of every tail.
        logits_BV = _pass(model, prompt_BT, mask_BT, cache, logits_to_keep=1)[:, -1]
        first = (list(range(len(tails))), [0] * len(tails))
        yield first, logits_BV.float().log_softmax(-1)[owners]
        if not num_read:
            return

        # The tails, each behind a copy of its prompt's cache.
        cache.reorder_cache(torch.tensor(owners))
        tail_RC = torch.tensor([(tail[:-1] + [pad] * num_read)[:num_read] for tail in tails])
        read_RC = torch.tensor(
            [[1] * (len(tail) - 1) + [0] * (num_read - len(tail) + 1) for tail in tails]
        )
        mask_RT = torch.cat([mask_BT[owners], read_RC], dim=1)
        logits_RCV = _pass(model, tail_RC, mask_RT, cache)
        rows, columns = read_RC.nonzero(as_tuple=True)
        logprobs_NV = logits_RCV[rows, columns].float().log_softmax(-1)
        yield (rows.tolist(), (columns + 1).tolist()), logprobs_NV
    finally:
        cache.close()


def _pass(
    model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, cache: CloudCache, **options: Any
) -> Tensor:
    """Logits of new tokens behind what the cache holds; `mask_BT` is of both."""
    position_ids = {}
    if model.accepts_position_ids:
        # They pass over padding.
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        position_ids["position_ids"] = positions_BT[:, -ids_BT.shape[1] :].to(model.device)
    logits: Tensor = model(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        past_key_values=cache,
        use_cache=True,
        **position_ids,
        **options,
    ).logits
    return logits


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids
