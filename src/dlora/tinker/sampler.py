"""Sampling sessions: requests of one session that wait are answered together.

Shapes: T tokens of a prompt, K most likely tokens.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from tinker import types
from tinker.proto import tinker_public_pb2 as public

from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.inference.answer import check_room
from dlora.tinker.adapter import logits_of
from dlora.tinker.models import Models, Weights
from dlora.tinker.rows import Row
from dlora.tinker.sampling import Choices, Sampled, fitting, sample

__all__ = ["Asked", "Sampler", "SamplingSession"]

_MOST_SNAPSHOTS: Final = 16
"""Weights that were saved for a sampling client alone, in memory, the newest of all adapters."""
_MOST_SAMPLES: Final = 1024
_MOST_LIKELY: Final = 100

# Fields of a request that are not served, each with the value that asks for nothing.
_NOT_SERVED: Final = {
    "target_prompt_logprobs": None,
    "prompt_alt_tokens_k": 0,
    "record_stability_info": False,
}


@dataclass
class Asked:
    """One request, and what was sampled for it until now."""

    request: types.SampleRequest
    prompt: list[int]
    rows: list[Sampled]


@dataclass
class SamplingSession:
    """Weights to sample with, and the requests that wait."""

    session_id: str
    model_path: str | None
    weights: Weights | None
    """None: the served model as it is."""
    waiting: list[Asked] = field(default_factory=list)


class Sampler:
    """Answers the requests of sampling sessions."""

    def __init__(self, models: Models, batch_size: int) -> None:
        self.models, self.batch_size = models, batch_size
        self._sessions: dict[str, SamplingSession] = {}
        self._snapshots: OrderedDict[str, None] = OrderedDict()

    def open(self, session_id: str, model_path: str | None, weights: Weights | None) -> None:
        """Begin a session. Of weights without a path only the newest are kept."""
        self._sessions[session_id] = SamplingSession(session_id, model_path, weights)
        if weights is not None and model_path is None:
            self._snapshots[session_id] = None
        while len(self._snapshots) > _MOST_SNAPSHOTS:
            old, _ = self._snapshots.popitem(last=False)
            self._sessions.pop(old, None)

    def session(self, session_id: str) -> SamplingSession:
        """Raises KeyError for one that is not there, or not any more."""
        return self._sessions[session_id]

    def close(self, prefix: str) -> None:
        """End the sessions whose ids begin so."""
        for name in [name for name in list(self._sessions) if name.startswith(prefix)]:
            self._sessions.pop(name, None)
            self._snapshots.pop(name, None)

    # ----------------------------------------------------------------- requests

    def ask(self, session: SamplingSession, request: types.SampleRequest) -> Asked:
        """Let a request wait. Raises UsageError for what cannot be answered."""
        prompt = _prompt(request, self.models.vocab)
        choices = self._choices(request, len(prompt))
        _check_scores(request, len(prompt))
        seed, rows = choices.seed, []
        for number in range(request.num_samples):
            own = choices if seed is None else _with_seed(choices, seed + number)
            rows.append(Sampled(prompt, own))
        asked = Asked(request, prompt, rows)
        session.waiting.append(asked)
        return asked

    def _choices(self, request: types.SampleRequest, length: int) -> Choices:
        given = request.sampling_params
        limit = int(self.models.link.description.limits.max_length)
        most = limit if given.max_tokens is None else given.max_tokens
        _check_range("max_tokens", most, 1, math.inf)
        _check_range("temperature", given.temperature, 0, math.inf)
        _check_range("top_p", given.top_p, 0, 1)
        _check_range("top_k", given.top_k, -1, math.inf)
        _check_range("num_samples", request.num_samples, 1, _MOST_SAMPLES)
        _check_range("topk_sample_logprobs", request.topk_sample_logprobs, 0, _MOST_LIKELY)

        ends, stops = self._stops(given.stop)
        return Choices(
            most=check_room(self.models.base, length, most),
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            seed=given.seed,
            stops=stops,
            ends=ends,
            most_likely=min(request.topk_sample_logprobs, self.models.vocab),
        )

    def _stops(
        self, given: str | Sequence[str] | Sequence[int] | None
    ) -> tuple[frozenset[int], tuple[str, ...]]:
        """(tokens, texts) that end an answer: an empty list switches the model's own ends off."""
        listed = [given] if isinstance(given, str) else list(given or ())
        if given is not None and not listed:
            return frozenset(), ()
        texts = tuple(one for one in listed if isinstance(one, str))
        if "" in texts:
            raise UsageError("stop: an empty text would end every answer")
        return self.models.ends | {one for one in listed if isinstance(one, int)}, texts

    def answer(self, session: SamplingSession, asked: Asked) -> bytes:
        """Sample what is lacking, together with others that wait; return the SDK's message.

        Raises UsageError for a session that has ended: nobody waits for its answers.
        """
        try:
            if session.session_id not in self._sessions:
                raise UsageError(f"sampling session {session.session_id} has ended")
            model = self.models.sampling(session.weights)
            while lacking := [row for row in asked.rows if not row.is_done]:
                # What waits for the same weights comes along, as far as there is room.
                others = [
                    row
                    for other in list(session.waiting)
                    for row in other.rows
                    if other is not asked and not row.is_done
                ]
                rows = [*lacking, *others]
                rows = rows[: fitting(rows, self.models.link.description.limits, self.batch_size)]

                try:
                    sample(model, self.models.tokenizer, rows, self.models.padding)
                except BaseException:
                    for row in rows:
                        row.forget()
                    raise
            return _message(asked, model).SerializeToString()
        finally:
            session.waiting.remove(asked)


def _with_seed(choices: Choices, seed: int) -> Choices:
    return Choices(**{**vars(choices), "seed": seed % 2**63})


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        ends = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise UsageError(f"{name}: got {value}, want {ends}")


def _prompt(request: types.SampleRequest, vocab: int) -> list[int]:
    """The prompt's token ids. Raises UsageError for images, and for fields that are not served."""
    for name, nothing in _NOT_SERVED.items():
        if (getattr(request, name) or nothing) != nothing:
            raise UsageError(f"{name} is not served here")
    try:
        prompt = [int(one) for one in request.prompt.to_ints()]
    except ValueError as error:
        raise UsageError(f"prompt: only tokens are served here: {error}") from error
    if not prompt:
        raise UsageError("prompt has no tokens")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise UsageError(f"prompt: a token is outside of 0 to {vocab - 1}")
    return prompt


def _check_scores(request: types.SampleRequest, length: int) -> None:
    _check_range("topk_prompt_logprobs", request.topk_prompt_logprobs, 0, _MOST_LIKELY)
    last = request.prompt_logprobs_last_n
    if last is not None:
        if not request.prompt_logprobs:
            raise UsageError("prompt_logprobs_last_n needs prompt_logprobs")
        _check_range("prompt_logprobs_last_n", last, 1, length - 1)


def _message(asked: Asked, model: SplitModel) -> public.SampleResponse:
    """The answer as the SDK reads it."""
    message = public.SampleResponse()
    for row in asked.rows:
        ended = public.STOP_REASON_STOP if row.stopped else public.STOP_REASON_LENGTH
        one = message.sequences.add(
            stop_reason=ended,
            tokens=np.asarray(row.tokens, dtype=np.int32).tobytes(),
            logprobs=np.asarray(row.logprobs, dtype=np.float32).tobytes(),
        )
        if row.choices.most_likely:
            _put_likely(one.topk_sampled_logprobs, row.likely, row.choices.most_likely)
    if asked.request.prompt_logprobs or asked.request.topk_prompt_logprobs:
        _score_prompt(message, asked, model)
    return message


def _put_likely(
    message: public.TopkLogprobs,
    likely: Sequence[tuple[Sequence[int], Sequence[float]]],
    width: int,
) -> None:
    message.token_ids = np.asarray([ids for ids, _ in likely], dtype=np.int32).tobytes()
    message.logprobs = np.asarray([values for _, values in likely], dtype=np.float32).tobytes()
    message.k, message.length = width, len(likely)


def _score_prompt(message: public.SampleResponse, asked: Asked, model: SplitModel) -> None:
    """Put in log-probabilities of the prompt's tokens: none for the first, or before the last n."""
    ids_T, request = torch.tensor(asked.prompt), asked.request
    length, wide = len(ids_T), min(request.topk_prompt_logprobs, _vocab_of(model))
    last = request.prompt_logprobs_last_n
    first = 1 if last is None else length - last
    found_T = np.full(length, np.nan, dtype=np.float32)
    likely = [([0] * wide, [-99999.0] * wide) for _ in range(length)]

    if first < length:
        row = Row(ids_T[:-1], ids_T[1:, None], {}, flat=True)
        places = torch.arange(1, length) >= first
        with torch.no_grad():
            logits = logits_of(model, [row], [places])[0].cpu()
        logprobs = logits.log_softmax(-1)
        found_T[first:] = logprobs.gather(-1, ids_T[first:, None])[:, 0].numpy()
        if wide:
            best = logprobs.topk(wide)
            likely[first:] = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    if request.prompt_logprobs:
        message.prompt_logprobs = found_T.tobytes()
    if wide:
        _put_likely(message.topk_prompt_logprobs, likely, wide)


def _vocab_of(model: SplitModel) -> int:
    """Tokens that a logit is made for."""
    return int(model.get_output_embeddings().weight.shape[0])
