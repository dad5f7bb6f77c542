"""The split model as EleutherAI's lm-evaluation-harness takes models.

`SplitLM` is the harness's own class for transformers models, so that texts are tokenised, cut and
compared as there, and numbers are those of local peft. What is ours: micro-batches fill what the
server takes at once, padding and hidden states that no score needs do not travel, and answers are
kept as they come, so that an interrupted evaluation goes on.

Shapes: N tokens of a row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dlora.edge.model import SplitModel
from dlora.edge.prompt import virtual_tokens
from dlora.edge.room import fits_cache, pass_tokens
from dlora.edge.wanted_logits import wanted_logits
from dlora.errors import UsageError

__all__ = ["KeptAnswers", "SplitLM", "is_of"]

log = logging.getLogger(__name__)

_MOST_ROWS: Final = 64
"""Rows of a micro-batch that is as large as the server takes; the harness's own largest."""
_MOST_LOGITS: Final = 2**26
"""Of a micro-batch, as the edge holds them: 256 MiB in float32. A row may be over it alone."""
_ROLLING: Final = 8
"""Texts that are read to their end before their answers are kept."""

Answer = Any
"""A text, a log-likelihood, or a log-likelihood with whether it is the greedy choice."""
Request = tuple[Any, list[int], list[int]]
"""As the harness has it: what to keep the answer by, tokens of the context, of its continuation."""


class KeptAnswers:
    """Answers of an evaluation that is not over yet, in a file of JSON lines.

    `of` says what they are answers of: model, adapter and settings; its hash is in the file's name,
    so that an evaluation with other settings leaves it alone. A file that is of something else is
    begun anew, and so is one without sense. The harness's own cache knows a request by its text
    alone, whatever answered, and unpickles its file.
    """

    def __init__(self, base: Path, of: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
        file = self.file = base.with_name(f"{base.name}-{digest}.part")
        self._known: dict[str, Answer] = {}
        self._asked: set[str] = set()
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        lines = text.splitlines()
        is_ours = bool(lines) and _parsed(lines[0]) == {"of": of}
        for one in map(_parsed, lines[1:] if is_ours else ()):
            if isinstance(one, dict) and one.keys() == {"key", "answer"}:
                self._known[str(one["key"])] = one["answer"]

        # Added to and not written anew: what is there stays on any ending.
        file.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_APPEND if is_ours else os.O_TRUNC
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | how, 0o600)
        self._out = os.fdopen(handle, "a", encoding="utf-8")
        if not is_ours:
            self._write({"of": of})
        elif not text.endswith("\n"):  # a line that was cut
            self._out.write("\n")

    def __len__(self) -> int:
        return len(self._known)

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Answer) -> None:
        """Keep an answer; the harness calls this as answers come."""
        key = hash_args(kind, arguments)
        if key not in self._known:
            self._known[key] = answer
            self._write({"key": key, "answer": answer})

    def get(self, kind: str, arguments: Sequence[Any]) -> Answer | None:
        """The answer to a request, or nothing. What is sampled is answered anew."""
        key = hash_args(kind, arguments)
        self._asked.add(key)
        if kind == "generate_until" and normalize_gen_kwargs(arguments[1]).get("do_sample"):
            return None
        answer = self._known.get(key)
        return tuple(answer) if isinstance(answer, list) else answer

    def close(self, *, remove: bool) -> None:
        """Nothing more comes; a file whose answers were all asked for is not needed any more.

        Others are of tasks that another evaluation was interrupted in.
        """
        self._out.close()
        if remove and self._known.keys() <= self._asked:
            self.file.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def is_of(file: Path, **of: Any) -> bool:
    """Whether a file of kept answers is of these."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        found = _parsed(lines.readline())
    known = found.get("of") if isinstance(found, dict) else None
    return isinstance(known, dict) and all(known.get(name) == value for name, value in of.items())


def _parsed(line: str) -> Any:
    """A line's value; nothing for one that was cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class SplitLM(HFLM):
    """A split model for `lm_eval.evaluate` and `simple_evaluate`.

    `batch_size` rows go at once, or fewer where the server takes fewer; "auto": as many as it
    takes. A context is cut to what model and server take, and to no more than the model's own. Not
    for several threads.
    """

    def __init__(
        self,
        model: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | Literal["auto"] = "auto",
        answers: KeptAnswers | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self._limits = model.link.description.limits
        self._ahead = virtual_tokens(model)
        """Tokens that stand before each row."""
        self._most_length = int(self._limits.max_length) - self._ahead
        self._max_length = min(self.max_length, self._most_length)
        self._most_rows = _MOST_ROWS if batch_size == "auto" else batch_size
        hosted = model.options.wire == "hosted"
        exchanged = () if hosted else model.active_set.exchanged()
        self._most_tokens = pass_tokens(model.link.description, exchanged)
        # The harness cuts windows of a text into batches of this size; ours are cut anew.
        self.batch_size_per_gpu = 2**31
        self._answers = answers
        if answers is not None:
            self.cache_hook = answers

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask a hub for the model."""
        return {}

    # -------------------------------------- what is known already

    def _answered(
        self,
        kind: str,
        requests: list[Instance],
        run: Callable[[list[Instance]], list[Answer]],
    ) -> list[Answer]:
        """Answers to all requests; those that are kept are not asked for again."""
        if self._answers is None:
            return run(requests)
        known = [self._answers.get(kind, one.args) for one in requests]
        rest = [one for one, answer in zip(requests, known, strict=True) if answer is None]
        new = iter(run(rest) if rest else ())
        return [next(new) if answer is None else answer for answer in known]

    # -------------------------------------- log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation, and whether greedy decoding would give it."""
        run = super().loglikelihood
        return self._answered("loglikelihood", requests, lambda rest: run(rest, disable_tqdm))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of what model and server take."""
        read = super().loglikelihood_rolling

        def run(rest: list[Instance]) -> list[float]:
            found: list[float] = []
            with tqdm(total=len(rest), desc="texts", disable=disable_tqdm) as bar:
                for start in range(0, len(rest), _ROLLING):
                    found += read(rest[start : start + _ROLLING], disable_tqdm=True)
                    bar.update(len(found) - bar.n)
            return found

        return self._answered("loglikelihood_rolling", requests, run)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As the harness has it. Requests that read the same tokens share a row."""
        self._check_lengths(requests)
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            read = (context + continuation)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(read), []).append(number)
        asked = {
            row: max(len(requests[number][2]) for number in numbers)
            for row, numbers in rows.items()
        }

        found: list[Any] = [None] * len(requests)
        positions = self.model.options.head_positions
        self.model.set_options(head_positions="supervised")
        silent = disable_tqdm or override_bs is not None
        try:
            with tqdm(total=len(requests), desc="log-likelihoods", disable=silent) as bar:
                for batch in self._micro_batches(asked):
                    scored = self._logprobs([(row, asked[row]) for row in batch])
                    for row, logprobs_MV in zip(batch, scored, strict=True):
                        for number in rows[row]:
                            key, _, continuation = requests[number]
                            found[number] = _score(logprobs_MV, continuation)
                            if key is not None:
                                self.cache_hook.add_partial("loglikelihood", key, found[number])
                        bar.update(len(rows[row]))
        finally:
            self.model.set_options(head_positions=positions)
        return found

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        """Say what is cut. Raises UsageError for a continuation without tokens, or too long."""
        for key, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"tasks: the continuation {(key or ('', ''))[1][:40]!r} has "
                    f"{len(continuation)} tokens, want 1 to {self.max_length}"
                )
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        if cut := sum(length > self.max_length + 1 for length in lengths):
            log.warning(
                "%d of %d questions are cut on their left: model and server take %d tokens",
                *(cut, len(requests), self.max_length),
            )

    def _micro_batches(self, asked: dict[tuple[int, ...], int]) -> Iterator[list[tuple[int, ...]]]:
        """Rows that go together, the longest first: as many as the server and the edge can hold."""
        vocab = int(self.model.get_output_embeddings().weight.shape[0])
        batch: list[tuple[int, ...]] = []
        for row in sorted(asked, key=lambda row: (-len(row), row)):
            rows, longest = len(batch) + 1, len((batch or [row])[0]) + 1
            logits = sum(asked[one] for one in (*batch, row)) * vocab
            fits = rows * (self._ahead + longest) <= self._most_tokens and logits <= _MOST_LOGITS
            # No column is left for the token behind the longest: all have to be as long.
            fits &= longest <= self._most_length or len(row) == longest - 1
            if batch and (rows > self._most_rows or not fits):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.no_grad()
    def _logprobs(self, batch: list[tuple[tuple[int, ...], int]]) -> Iterator[Tensor]:
        """Of each row the log-probabilities behind its last positions, as many as are asked for."""
        ids = [torch.tensor(row) for row, _ in batch]
        if len(ids[0]) >= self._most_length:
            most = max(count for _, count in batch)
            ids_BT = torch.stack(ids).to(self.device)
            logits_BMV = self.model(input_ids=ids_BT, logits_to_keep=most).logits.float()
            for (_, count), logits_MV in zip(batch, logits_BMV, strict=True):
                yield logits_MV[-count:].log_softmax(-1)
            return
        places = [
            torch.arange(len(row)) >= len(row) - count
            for row, (_, count) in zip(ids, batch, strict=True)
        ]
        # What follows has no part in logits.
        following = [row[place] for row, place in zip(ids, places, strict=True)]
        for logits_MV in wanted_logits(self.model, ids, places, following):
            yield logits_MV.log_softmax(-1)

    # -------------------------------------- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text. Raises UsageError for one that is longer than the limits."""
        answer = super().generate_until

        def run(rest: list[Instance]) -> list[str]:
            found: dict[int, str] = {}
            with tqdm(total=len(rest), desc="answers", disable=disable_tqdm) as bar:
                for numbers in self._answer_batches(rest):
                    texts = answer([rest[number] for number in numbers], disable_tqdm=True)
                    found |= dict(zip(numbers, texts, strict=True))
                    bar.update(len(numbers))
            return [found[number] for number in range(len(rest))]

        return self._answered("generate_until", requests, run)

    def _answer_batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Numbers of requests that are answered together: with the same settings, the longest
        first, as many as the server has room for.
        """
        sizes: list[tuple[str, int, int]] = []
        for one in requests:
            context, settings = one.args
            most = int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise UsageError(
                    f"tasks: {one.task_name} wants answers of {most} tokens, and model and server "
                    f"take sequences of up to {self.max_length} in all: the server's max_length "
                    "has to be larger"
                )
            length = min(len(self.tok_encode(context)), room)
            sizes.append((json.dumps(settings, sort_keys=True, default=str), length, most))

        batch: list[int] = []
        for number in sorted(range(len(sizes)), key=lambda n: (sizes[n][0], -sizes[n][1], n)):
            kind, longest, most = sizes[(batch or [number])[0]]
            longest += self._ahead
            rows = len(batch) + 1
            if self.model.has_cache:
                fits = fits_cache(self._limits, rows, longest, longest + most)
            else:
                fits = rows * (longest + most) <= self._most_tokens
            if batch and (rows > self._most_rows or kind != sizes[number][0] or not fits):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch


def _score(logprobs_MV: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation behind the last of these positions, and if it is greedy."""
    own_MV, ids_M = logprobs_MV[-len(continuation) :], torch.tensor(continuation)
    ids_M = ids_M.to(own_MV.device)
    total = own_MV.gather(-1, ids_M[:, None]).sum()
    return float(total), bool((own_MV.argmax(-1) == ids_M).all())
