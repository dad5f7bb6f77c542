"""Sampling with log-probabilities: rows of one batch, each with settings and a seed of its own.

A token is chosen here and not by transformers, so that rows of a batch may differ in all that the
SDK lets a request say. The log-probabilities are the model's own, at temperature 1 and over the
whole vocabulary: those that a forward pass over the same tokens gives.

Shapes: B rows of a batch, U prompts among them, T tokens, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from dlora.edge.kv_cache import CloudCache
from dlora.edge.model import SplitModel
from dlora.edge.room import fits_cache
from dlora.proto import dlora_pb2 as pb

__all__ = ["Choices", "Sampled", "fitting", "sample"]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How one sequence is sampled."""

    most: int
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    """Tokens after which it ends. They are part of it."""
    most_likely: int = 0
    """K: of so many tokens at each place the log-probabilities are wanted."""


@dataclass
class Sampled:
    """One sequence: a prompt, and what was sampled."""

    prompt: list[int]
    choices: Choices
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likely: list[tuple[list[int], list[float]]] = field(default_factory=list)
    """Of each token the K most likely ones there, and their log-probabilities."""
    stopped: bool = False
    """Whether it ended by itself, and not for its length."""

    @property
    def is_done(self) -> bool:
        """No further token is wanted."""
        return self.stopped or len(self.tokens) >= self.choices.most

    def forget(self) -> None:
        """Begin again."""
        self.tokens, self.logprobs, self.likely, self.stopped = [], [], [], False


class _Chooser(LogitsProcessor):
    """Chooses the next token of every row: it hands on logits which leave one token possible."""

    def __init__(
        self, rows: Sequence[Sampled], tokenizer: PreTrainedTokenizerBase, padding: int
    ) -> None:
        self.rows, self.tokenizer, self.padding = rows, tokenizer, padding
        self.generators = [_generator(row.choices.seed) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Logits [B, V] in and out; tokens and log-probabilities are noted in the rows."""
        logits_BV = scores.float().cpu()
        logprobs_BV = logits_BV.log_softmax(-1)
        chosen = [self.padding] * len(self.rows)
        for index, row in enumerate(self.rows):
            if row.is_done:
                continue
            token = _pick(logits_BV[index], row.choices, self.generators[index])
            chosen[index] = token
            row.tokens.append(token)
            row.logprobs.append(float(logprobs_BV[index, token]))
            if row.choices.most_likely:
                best = logprobs_BV[index].topk(row.choices.most_likely)
                row.likely.append((best.indices.tolist(), best.values.tolist()))
            row.stopped = token in row.choices.ends or self._says_stop(row)
        places_B1 = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, places_B1, 0.0)

    def _says_stop(self, row: Sampled) -> bool:
        """Whether the newest token ends a stop string; four tokens at most make a character."""
        stops = row.choices.stops
        if not stops:
            return False
        newest = row.tokens[-4 * (max(map(len, stops)) + 1) :]
        text = str(self.tokenizer.decode(newest))
        return any(stop in text for stop in stops)


class _Done(StoppingCriteria):
    """Says which rows are done."""

    def __init__(self, rows: Sequence[Sampled]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Bool [B]."""
        return torch.tensor([row.is_done for row in self.rows], device=input_ids.device)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _pick(logits_V: Tensor, choices: Choices, generator: torch.Generator) -> int:
    """A token, drawn as the choices say; the likeliest one at temperature 0."""
    if choices.temperature == 0:
        return int(logits_V.argmax())
    logits_1V, none = logits_V[None], torch.empty(0, dtype=torch.int64)
    if choices.temperature != 1:
        logits_1V = TemperatureLogitsWarper(choices.temperature)(none, logits_1V)
    if 0 < choices.top_k < logits_V.numel():
        logits_1V = TopKLogitsWarper(choices.top_k)(none, logits_1V)
    if choices.top_p < 1:
        logits_1V = TopPLogitsWarper(choices.top_p)(none, logits_1V)
    return int(torch.multinomial(logits_1V.softmax(-1), 1, generator=generator))


def fitting(rows: Sequence[Sampled], limits: pb.Limits, most_rows: int) -> int:
    """How many of the rows, from the first on, the server takes as one batch; one at least."""
    for count in range(min(most_rows, len(rows)), 1, -1):
        longest = max(len(row.prompt) for row in rows[:count])
        length = longest + max(row.choices.most for row in rows[:count])
        if fits_cache(limits, count, longest, length):
            return count
    return 1


def sample(
    model: SplitModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sampled], padding: int
) -> None:
    """Sample all rows together; what was sampled is noted in each.

    A prompt of several rows goes to the cloud once: its rows continue one cached sequence.
    """
    length = max(len(row.prompt) for row in rows)
    ids_BT = torch.full((len(rows), length), padding, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        ids_BT[index, length - len(row.prompt) :] = torch.tensor(row.prompt)
        mask_BT[index, length - len(row.prompt) :] = 1

    config = GenerationConfig(
        max_new_tokens=max(row.choices.most for row in rows),
        do_sample=False,
        pad_token_id=padding,
        use_cache=model.has_cache,
    )
    batch = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
    with torch.no_grad():
        cache = _shared_prompts(model, rows, batch, length + int(config.max_new_tokens or 0))
        try:
            model.generate(
                **batch,
                **({} if cache is None else {"past_key_values": cache}),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Chooser(rows, tokenizer, padding)]),
                stopping_criteria=StoppingCriteriaList([_Done(rows)]),
            )
        finally:
            if cache is not None:
                cache.close()


def _shared_prompts(
    model: SplitModel, rows: Sequence[Sampled], batch: dict[str, Tensor], expected: int
) -> CloudCache | None:
    """A cache with every row's prompt but for its last token, each prompt sent once.

    None where nothing is shared, or prompts are not taken in parts.
    """
    places: dict[tuple[int, ...], int] = {}
    order = [places.setdefault(tuple(row.prompt), len(places)) for row in rows]
    limits, shortest = model.link.description.limits, min(map(len, places))
    if len(places) == len(rows) or shortest < 2 or limits.whole_prompts or not model.has_cache:
        return None

    # With the positions that `generate` gives to left-padded prompts.
    first = torch.tensor([order.index(place) for place in range(len(places))])
    mask_UT = batch["attention_mask"][first, :-1]
    positions_UT = (mask_UT.cumsum(1) - 1).clamp(min=0)
    cache = CloudCache(expected)
    try:
        model(
            input_ids=batch["input_ids"][first, :-1],
            attention_mask=mask_UT,
            **({"position_ids": positions_UT} if model.accepts_position_ids else {}),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    except BaseException:
        cache.close()
        raise
    cache.reorder_cache(torch.tensor(order))
    return cache
