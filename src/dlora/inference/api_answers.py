"""How the API answers: one thread, one batch at a time, of requests that came together.

Requests that decode greedily under the same settings share a batch, as far as it fits the server;
others take their turn alone, and then the KV cache of the request before is used again. Every row
of a batch ends for itself: at its end token, a stop string, its own length, or since its client has
left.

Shapes: B rows of a batch, T tokens of the longest prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cli.serving.utils import DirectStreamer, ReasoningText, _StreamError
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dlora.edge.model import SplitModel
from dlora.edge.room import fits_cache
from dlora.errors import DLoRAError
from dlora.inference.answer import Continuing, check_room
from dlora.inference.prompts import pad_token

__all__ = ["CLIENT_LEFT", "Answers", "ClientLeft", "cut"]

_MOST_ROWS: Final = 8
"""Of a batch. Each waits for the slowest pass of all."""

CLIENT_LEFT: ContextVar[asyncio.Event | None] = ContextVar("client_left", default=None)
"""Set when the client of the request that is handled here has gone away."""


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


class _Pieces(DirectStreamer):
    """Text of one answer as it comes, up to a stop string, of which no part is shown."""

    def __init__(
        self, tokenizer: Any, loop: Any, queue: Any, parser: Any, stops: list[str]
    ) -> None:
        self.stops, self.held, self.stopped = stops, "", False
        super().__init__(tokenizer, loop, queue, response_parser=parser)
        self._first = False  # there is no prompt among what it gets

    def _enqueue(self, item: Any) -> None:
        is_text = isinstance(item, str) and not isinstance(item, ReasoningText)
        if is_text and not self.stopped:
            text = self.held + item
            shown = cut(text, self.stops)
            self.stopped = len(shown) < len(text)
            begun = 0 if self.stopped else _begun(text, self.stops)
            self.held = text[len(text) - begun :]
            item = shown[: len(shown) - begun]
        elif self.held:
            super()._enqueue(self.held)
            self.held = ""

        # What a parser makes of the rest, behind a stop string, is nobody's.
        if item is None or (item and not (self.stopped and not is_text)):
            super()._enqueue(item)

    @property
    def is_cancelled(self) -> bool:
        """The client has left."""
        return bool(self._cancelled.is_set())


def _begun(text: str, stops: list[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next(
        (
            length
            for length in range(min(longest, len(text)), 0, -1)
            if any(stop.startswith(text[-length:]) for stop in stops)
        ),
        0,
    )


class _Answer:
    """One request: its prompt, settings, and the tokens until now."""

    def __init__(self, ids: list[int], config: Any, pieces: _Pieces) -> None:
        self.ids, self.config, self.pieces = ids, config, pieces
        self.most, self.tokens = int(config.max_new_tokens), list[int]()
        self.future: Future[list[int]] = Future()
        self.on_error: Any = None
        """Called with an error, beside the future."""

        ends = config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # Rows that end early are filled with padding, which these would count.
        penalties = (config.repetition_penalty or 1.0) != 1.0 or config.no_repeat_ngram_size
        penalties = penalties or any(getattr(config, "request_penalties", ()))
        alone = config.do_sample or config.prompt_lookup_num_tokens or (config.num_beams or 1) > 1
        self.key = None if alone or penalties else _settings_of(config)
        """Answers of the same key may share a batch; None: it takes its turn alone."""

    @property
    def is_done(self) -> bool:
        """No further token is wanted."""
        return self.future.done() or self.pieces.is_cancelled

    def take(self, token: int) -> None:
        """The next token."""
        if self.is_done:
            return
        self.tokens.append(token)
        self.pieces.put(torch.tensor([token]))
        ended = token in self.ends or self.pieces.stopped
        if ended:  # not by its length, though it may just have reached it
            self.config.max_new_tokens = None
        if ended or len(self.tokens) >= self.most:
            self.finish()

    def finish(self) -> None:
        """Hand out what there is, unless that was done."""
        if not self.future.done():
            self.pieces.end()
            self.future.set_result(self.tokens)

    def fail(self, error: BaseException) -> None:
        """Hand out the error instead."""
        if not self.future.done():
            if self.on_error is not None:
                self.on_error(error)
            self.future.set_exception(error)


def _settings_of(config: GenerationConfig) -> str:
    """Everything but what is each row's own, as something to compare."""
    own = ("max_new_tokens", "request_stops", "request_seed")  # greedy: a seed does nothing
    return repr(sorted((k, repr(v)) for k, v in config.to_dict().items() if k not in own))


class _Rows(BaseStreamer, StoppingCriteria):
    """Hands the tokens of each pass to the rows' answers, and says which of them are done.

    As a criterion it sees a token before it is decided whether another is made. With drafts it
    would also see those that are not taken: then tokens come as to a streamer.
    """

    def __init__(self, answers: list[_Answer], length: int, *, drafts: bool) -> None:
        self.answers, self.length, self.drafts = answers, length, drafts
        """`length`: tokens of each row that are known."""
        self.in_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then the tokens of one pass of the one row."""
        if not self.in_prompt:
            for token in value.flatten().tolist():
                self.answers[0].take(token)
        self.in_prompt = False

    def end(self) -> None:
        """Each row has its own."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Which rows are done, [B]; `input_ids` [B, T] with what is new."""
        if not self.drafts:
            for answer, tokens in zip(self.answers, input_ids[:, self.length :], strict=True):
                for token in tokens.tolist():
                    answer.take(token)
            self.length = input_ids.shape[1]
        return torch.tensor([answer.is_done for answer in self.answers], device=input_ids.device)


class _Penalties(LogitsProcessor):
    """OpenAI's penalties: tokens of the answer so far lower their own logits.

    `presence` once, `frequency` as often as they were said; `start` is where the answer begins.
    """

    def __init__(self, presence: float, frequency: float, start: int) -> None:
        self.presence, self.frequency, self.start = presence, frequency, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Lower logits, [B, V]."""
        said = input_ids[:, self.start :]
        ones = torch.ones_like(said, dtype=scores.dtype)
        counts_BV = torch.zeros_like(scores).scatter_add_(1, said, ones)
        return scores - self.frequency * counts_BV - self.presence * (counts_BV > 0)


class Answers:
    """What transformers' handlers ask for answers, in place of their own threads."""

    def __init__(self, model: SplitModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.turns = model, tokenizer, Continuing(model)
        self.waiting: deque[_Answer] = deque()
        self._changed, self._holds = threading.Condition(), 0
        threading.Thread(target=self._work, name="dlora-answers", daemon=True).start()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Requests that come inside the context begin together, when it ends."""
        with self._changed:
            self._holds += 1
        try:
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify_all()

    # ----------------------------------------------------------------- as the handlers call it

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Begin an answer; its pieces come through the queue."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        answer = self._ask(inputs, gen_config, loop, queue, response_parser)
        answer.on_error = lambda error: loop.call_soon_threadsafe(
            queue.put_nowait, _StreamError(str(error))
        )
        self._submit(answer)
        return queue, answer.pieces

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Tensor]:
        """(text, tokens of the prompt, new tokens). Raises ClientLeft as soon as that is so."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        answer = self._ask(inputs, gen_config, loop, queue, None)
        self._submit(answer)

        tokens, left = asyncio.wrap_future(answer.future), CLIENT_LEFT.get()
        leaving = asyncio.ensure_future((left or asyncio.Event()).wait())
        both: set[asyncio.Future[Any]] = {tokens, leaving}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not tokens.done():
                answer.pieces.cancel()
        if not tokens.done():
            raise ClientLeft
        text = self.tokenizer.decode(tokens.result(), skip_special_tokens=True)
        text = cut(str(text), answer.pieces.stops)
        return text, len(answer.ids), torch.tensor(tokens.result())

    def _ask(self, inputs: Any, config: Any, loop: Any, queue: Any, parser: Any) -> _Answer:
        ids = inputs["input_ids"][0].tolist()
        config.max_new_tokens = check_room(self.model, len(ids), config.max_new_tokens)
        if config.pad_token_id is None:
            config.pad_token_id = pad_token(self.tokenizer)
        core: Any = self.tokenizer
        stops = getattr(config, "request_stops", [])
        return _Answer(ids, config, _Pieces(core._tokenizer, loop, queue, parser, stops))

    def _submit(self, answer: _Answer) -> None:
        with self._changed:
            self.waiting.append(answer)
            self._changed.notify_all()

    # ----------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            answers = self._next()
            try:
                self._generate(answers)
            except Exception as error:  # whatever it is: those who wait have to hear of it
                for answer in answers:
                    answer.fail(_readable(error))
            for answer in answers:
                answer.finish()

    def _next(self) -> list[_Answer]:
        """Wait for a request; with it come others that fit into its batch."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self.waiting and not self._holds)
                wanted = [answer for answer in self.waiting if not answer.is_done]
                for answer in self.waiting:
                    if answer.is_done:  # its client left before its turn
                        answer.finish()
                self.waiting = deque(wanted)
                if wanted:
                    break

            chosen = [wanted[0]]
            for answer in wanted[1:]:
                if answer.key is not None and answer.key == chosen[0].key:
                    chosen += [answer] if self._fits([*chosen, answer]) else []
            self.waiting = deque(answer for answer in wanted if answer not in chosen)
            return chosen

    def _fits(self, answers: list[_Answer]) -> bool:
        """Whether the server takes them as one batch."""
        limits = self.model.link.description.limits
        longest = max(len(answer.ids) for answer in answers)
        length = longest + max(answer.most for answer in answers)
        rows = len(answers)
        return rows <= _MOST_ROWS and fits_cache(limits, rows, longest, length)

    def _generate(self, answers: list[_Answer]) -> None:
        """Answer them, each as if it were alone."""
        config = copy.deepcopy(answers[0].config)
        config.max_new_tokens = max(answer.most for answer in answers)
        if (seed := getattr(config, "request_seed", None)) is not None:
            torch.manual_seed(seed)

        length = max(len(answer.ids) for answer in answers)
        ids_BT = torch.full((len(answers), length), config.pad_token_id, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, answer in enumerate(answers):
            ids_BT[row, length - len(answer.ids) :] = torch.tensor(answer.ids)
            mask_BT[row, length - len(answer.ids) :] = 1

        drafts = bool(config.prompt_lookup_num_tokens)
        rows = _Rows(answers, length, drafts=drafts)
        presence, frequency = getattr(config, "request_penalties", (0.0, 0.0))
        processors = [_Penalties(presence, frequency, length)] if presence or frequency else []
        with torch.no_grad():
            self.turns.generate(
                ids_BT.to(self.model.device),
                attention_mask=mask_BT.to(self.model.device),
                generation_config=config,
                streamer=rows if drafts else None,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([rows]),
                tokenizer=self.tokenizer,
            )


def _readable(error: Exception) -> Exception:
    """The same error; its message fits into JSON that is put together by hand, as streams do."""
    if not isinstance(error, DLoRAError):
        return error
    return type(error)(json.dumps(str(error))[1:-1].replace('\\"', "'"))
