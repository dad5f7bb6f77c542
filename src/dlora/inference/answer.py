"""Answers on the edge: prompts to texts, in batches, streamed, or turn by turn over one KV
cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from dlora.edge.data import read_rows
from dlora.edge.kv_cache import CloudCache
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import load_adapter, load_base
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.errors import DataError, DLoRAError, UsageError

__all__ = [
    "Continuing",
    "Pieces",
    "Prompt",
    "complete",
    "cost_line",
    "load_for_inference",
    "load_prompts",
    "to_text",
]

Prompt = str | list[dict[str, str]]
"""Text, or the messages of a chat."""


def load_for_inference(
    link: Link,
    adapter: Path | None,
    *,
    wire_dtype: str = "fp16",
    give_up_after_s: float = 600.0,
    device: str = "cpu",
    edge_layers: tuple[int, int] = (0, 0),
) -> SplitModel:
    """The served model with an adapter, or as it is, ready to answer."""
    options: dict[str, Any] = {
        "wire_dtype": wire_dtype,
        "retry": RetryPolicy(give_up_after_s=give_up_after_s),
        "device": device,
        "edge_layers": edge_layers,
    }
    return (
        load_base(link, **options)
        if adapter is None
        else load_adapter(link, adapter, is_trainable=False, **options)
    )


def load_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: rows with `prompt` or `messages`, or one prompt a line. Raises
    DataError.
    """
    if file.suffix not in (".jsonl", ".json", ".csv"):
        try:
            lines: list[Prompt] = [
                line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
        except UnicodeDecodeError:
            raise DataError(f"{file}: not UTF-8 text") from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        if not lines:
            raise DataError(f"{file}: no prompts")
        return lines
    found: list[Prompt] = []
    for where, row in read_rows(str(file)):
        prompt = row.get("prompt", row.get("messages"))
        if not prompt or not isinstance(prompt, (str, list)):
            raise DataError(
                f"{where}: got columns {', '.join(row)}; want `prompt` or `messages`, not empty"
            )
        if isinstance(prompt, list) and not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
        ):
            raise DataError(f"{where}: messages must be a list of {{role, content}}")
        found.append(prompt)
    return found


def to_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = False
) -> tuple[str, bool]:
    """The text that the model reads, and whether the tokenizer still has to add its special tokens.

    Messages, and with `chat` text as a user's message, go through the chat template, which
    brings special tokens of its own. Raises UsageError if the tokenizer has none.
    """
    if isinstance(prompt, str) and not chat:
        return prompt, True
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template: give plain text prompts")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except (
        Exception
    ) as error:  # a template may refuse roles, or their order, with errors of its own
        raise UsageError(f"the model's chat template refused these messages: {error}") from error
    return text, False


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], *, chat: bool = False
) -> dict[str, Tensor]:
    """A left-padded batch: input_ids and attention_mask, [B, T]."""
    texts = [to_text(tokenizer, prompt, chat=chat) for prompt in prompts]
    rows = [tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in texts]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise UsageError(f"prompt {empty[0] + 1} of {len(rows)} has no tokens")
    length = max(len(row) for row in rows)
    ids, mask = (
        torch.zeros(len(rows), length, dtype=torch.int64),
        torch.zeros(len(rows), length, dtype=torch.int64),
    )
    ids += pad_token(tokenizer)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or what serves as one: masked, it changes nothing."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def complete(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> tuple[list[str], int]:
    """Answer a batch of prompts; return the texts, without special tokens, and the number of new
    tokens.

    `options` are those of `generate`.
    """
    batch = encode_prompts(tokenizer, prompts, chat=chat)
    lengths = batch["attention_mask"].sum(1).tolist()
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    where = "" if len(prompts) == 1 else f" (prompt {longest + 1} of {len(prompts)} in this batch)"
    wanted = options.get("max_new_tokens") or model.generation_config.max_new_tokens or 20
    options["max_new_tokens"] = check_room(model, lengths[longest], wanted, where)
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    options.setdefault("pad_token_id", pad_token(tokenizer))
    check_options(options)
    if options.get("num_beams", 1) > 1:
        streamer = None  # beams are known only at the end
    ids: Tensor = generate(model, batch, streamer=streamer, **options)
    new = ids[:, batch["input_ids"].shape[1] :]
    num_new = int((new != options["pad_token_id"]).sum())
    return tokenizer.batch_decode(new, skip_special_tokens=True), num_new


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """`model.generate` on its device, with transformers' own refusals as UsageError."""
    try:
        with torch.no_grad():
            found: Tensor = model.generate(
                **{name: one.to(model.device) for name, one in batch.items()}, **options
            )
    except DLoRAError:
        raise
    except ValueError as error:
        raise UsageError(f"transformers refused: {str(error).splitlines()[0]}") from error
    return found


def check_options(options: dict[str, Any]) -> None:
    """Raises UsageError for options that `generate` does not have, or that give several answers to
    a prompt.
    """
    known = GenerationConfig().to_dict().keys() | {
        "tokenizer",
        "stop_strings",
        "prompt_lookup_num_tokens",
    }
    if unknown := sorted(options.keys() - known):
        raise UsageError(
            f"generation: {unknown[0]} is not an option of transformers.GenerationConfig"
        )
    if (options.get("num_return_sequences") or 1) > 1:
        raise UsageError(
            "generation: num_return_sequences gives several answers to a prompt, want 1"
        )


def check_room(model: SplitModel, length: int, wanted: int, where: str = "") -> int:
    """How many of the `wanted` new tokens fit behind `length` ones. Raises UsageError if none
    does.
    """
    limit = int(model.link.description.limits.max_length)
    if length >= limit:
        raise UsageError(
            f"the prompt has {length} tokens, this server takes sequences of up to {limit}: "
            f"shorten it{where}"
        )
    return min(wanted, limit - length)


class Pieces(TextStreamer):
    """A streamer that hands finished words to `write`, and keeps the whole text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text, self.num_tokens = write, "", 0

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first ones are the prompt."""
        if not self.next_tokens_are_prompt:
            self.num_tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Words that will not change any more."""
        self.text += text
        if text:
            self.write(text)


class Continuing:
    """`generate` for one sequence after another that mostly begin alike, as the turns of a chat do.

    The KV cache stays in the cloud between calls; tokens that the next call has in common
    with it are not sent again.
    """

    def __init__(self, model: SplitModel) -> None:
        self.model, self.device = model, model.device
        self.cache = CloudCache()
        self.cache.activate_past_recording()  # turns may go back behind a sliding window
        self.known: list[int] = []

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """As `model.generate`, for ids of shape [1, T]."""
        config = options.get("generation_config") or self.model.generation_config
        beams = max(
            options.get("num_beams", config.num_beams) or 1,
            options.get("num_return_sequences", config.num_return_sequences) or 1,
        )
        use_cache = options.get("use_cache", config.use_cache)
        drafts = options.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
        if (
            beams > 1 or drafts or use_cache is False or input_ids.shape[0] > 1
        ):  # each with a cache of its own
            found: Tensor = self.model.generate(input_ids=input_ids, **options)
            return found
        ids: list[int] = input_ids[0].tolist()
        same = sum(
            1
            for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.known, strict=False))
        )
        self.cache.crop(min(same, len(ids) - 1) - len(self.known))
        new = options.get("max_new_tokens", config.max_new_tokens) or 0
        if len(ids) + new > self.cache.expected_length:  # with room for turns to come
            self.cache.expected_length = 2 * (len(ids) + new) + 256
        try:
            found = self.model.generate(input_ids=input_ids, past_key_values=self.cache, **options)
        except (
            BaseException
        ):  # Ctrl-C, most of all: what the cache holds by then is not worth knowing
            self.cache.reset()
            self.known = []
            raise
        self.known = found[0].tolist()[: self.cache.get_seq_length()]
        return found

    def close(self) -> None:
        """Free the cloud's cache."""
        self.cache.reset()
        self.known = []


def cost_line(cost: Meter, num_tokens: int, seconds: float) -> str:
    """What an answer cost, for a person."""
    tokens = max(1, num_tokens)
    line = (
        f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / max(seconds, 1e-9):.1f}/s), "
        f"{cost.round_trips / tokens:.1f} round trips and "
        f"{(cost.sent_bytes + cost.received_bytes) / tokens / 1024:.0f} KiB a token"
    )
    return line + (f", {cost.retries} retries" if cost.retries else "")


def continued(output: Path, prompts: list[Prompt]) -> int:
    """How many prompts are answered in `output` already. Raises UsageError if it holds anything
    else.

    A last line that was not written to its end, and only that, is cut off.
    """
    if not output.exists():
        return 0
    *lines, rest = output.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        answers = isinstance(row, dict) and isinstance(row.get("completion"), str)
        if not answers or number >= len(prompts) or row["prompt"] != prompts[number]:
            raise UsageError(
                f"{output}:{number + 1} does not answer the prompt there: use another file"
            )
    if rest and not rest.startswith(b'{"prompt": '[: len(rest)]):
        raise UsageError(f"{output} holds something else than answers: use another file")
    if rest:
        with output.open("r+b") as file:
            file.truncate(output.stat().st_size - len(rest))
    return len(lines)


def complete_file(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    batch_size: int,
    chat: bool,
    **options: Any,
) -> Iterator[tuple[list[tuple[Prompt, str]], int]]:
    """Answer prompts batch by batch, in order: (prompts with completions, new tokens) of each
    batch.
    """
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        texts, num_tokens = complete(model, tokenizer, chosen, chat=chat, **options)
        yield list(zip(chosen, texts, strict=True)), num_tokens
