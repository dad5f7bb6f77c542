"""Answers on the edge: prompts to texts, in batches, streamed, or turn by turn over one KV cache.

`complete` answers a batch, `complete_file` batch after batch, `Pieces` hands out words as they
come. `Continuing` answers sequences that begin alike, such as the turns of a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from dlora.edge.classifier import refuse_classifier
from dlora.edge.ends import frozen_part
from dlora.edge.kv_cache import CloudCache
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import load_adapter, load_base
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.edge.options import Wire
from dlora.edge.prompt import virtual_tokens
from dlora.errors import DLoRAError, UsageError
from dlora.inference.prompts import Prompt, encode_prompts, pad_token, to_text

__all__ = [
    "Continuing",
    "Pieces",
    "check_options",
    "check_room",
    "complete",
    "complete_file",
    "cost_line",
    "generate",
    "load_for_inference",
    "share_ends",
]

_KEPT_OF_SERVED: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def load_for_inference(
    link: Link,
    adapter: Path | None,
    *,
    wire: Wire = "plain",
    wire_dtype: str = "fp16",
    upload_consent: bool = False,
    give_up_after_s: float = 600.0,
    device: str = "cpu",
    edge_layers: tuple[int, int] = (0, 0),
) -> SplitModel:
    """The served model with an adapter, or as it is, ready to answer.

    Of the provider's generation config the special tokens are kept, and nothing that would change
    how answers are made: that is for the settings here to say.
    """
    options: dict[str, Any] = {
        "wire": wire,
        "wire_dtype": wire_dtype,
        "upload_consent": upload_consent,
        "retry": RetryPolicy(give_up_after_s=give_up_after_s),
        "device": device,
        "edge_layers": edge_layers,
    }
    model = (
        load_base(link, **options)
        if adapter is None
        else load_adapter(link, adapter, is_trainable=False, **options)
    )
    refuse_classifier(model.get_base_model(), "answering")
    served = model.generation_config
    kept = {name: getattr(served, name) for name in _KEPT_OF_SERVED}
    model.get_base_model().generation_config = GenerationConfig(**kept)
    return model


def share_ends(model: SplitModel, other: SplitModel) -> None:
    """Let two models of the same served one hold a single embedding and head, as both are frozen.

    A second adapter then takes no more memory than its own.
    """
    for kept, twin in (
        (model.get_input_embeddings(), other.get_input_embeddings()),
        (model.get_output_embeddings(), other.get_output_embeddings()),
    ):
        # Where an adapter is on them, that is its own, and what it is on is shared. Where tokens
        # were added to one of the models, or a table came with its adapter, the two differ.
        kept, twin = frozen_part(kept), frozen_part(twin)
        for name, parameter in kept.named_parameters(recurse=False):
            if torch.equal(parameter, twin.get_parameter(name)):
                setattr(twin, name, parameter)


def complete(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> tuple[list[str], int]:
    """Answer a batch of prompts: (texts without special tokens, number of new tokens).

    `options` are those of `generate`. Raises UsageError for those that cannot work, and for a
    prompt that leaves no room for an answer.
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

    ids_BT = generate(model, batch, streamer=streamer, **options)
    new_BT = ids_BT[:, batch["input_ids"].shape[1] :]
    num_new = int((new_BT != options["pad_token_id"]).sum())
    return tokenizer.batch_decode(new_BT, skip_special_tokens=True), num_new


def complete_file(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    batch_size: int,
    chat: bool,
    **options: Any,
) -> Iterator[tuple[list[tuple[Prompt, str]], int]]:
    """Answer prompts batch by batch, in order: (prompts with completions, new tokens) of each.

    Raises UsageError, before the first answer, for messages that the chat template refuses.
    """
    for number, prompt in enumerate(prompts, 1):
        try:
            to_text(tokenizer, prompt, chat=chat)
        except UsageError as error:
            raise UsageError(f"prompt {number} of {len(prompts)}: {error}") from error
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        texts, num_tokens = complete(model, tokenizer, chosen, chat=chat, **options)
        yield list(zip(chosen, texts, strict=True)), num_tokens


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """`model.generate` on its device, with transformers' own refusals as UsageError."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    try:
        with torch.no_grad():
            ids_BT: Tensor = model.generate(**inputs, **options)
    except DLoRAError:
        raise
    except ValueError as error:
        raise UsageError(f"transformers refused: {str(error).splitlines()[0]}") from error
    return ids_BT


def check_options(options: dict[str, Any]) -> None:
    """Raises UsageError for options that `generate` lacks, or that ask for several answers."""
    beside_config = {"tokenizer", "stop_strings", "prompt_lookup_num_tokens"}
    known = GenerationConfig().to_dict().keys() | beside_config
    if unknown := sorted(options.keys() - known):
        raise UsageError(
            f"generation: {unknown[0]} is not an option of transformers.GenerationConfig"
        )
    if (options.get("num_return_sequences") or 1) > 1:
        raise UsageError(
            "generation: num_return_sequences gives several answers to a prompt, want 1"
        )


def check_room(model: SplitModel, length: int, wanted: int, where: str = "") -> int:
    """How many of the `wanted` new tokens fit behind `length` tokens. UsageError if none does."""
    limit = int(model.link.description.limits.max_length) - virtual_tokens(model)
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
        """Token ids whose keys and values the cache holds."""

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """As `model.generate`, for ids of shape [1, T]."""
        config = options.get("generation_config") or self.model.generation_config
        own_cache = self._needs_own_cache(config, options) or virtual_tokens(self.model)
        if own_cache or input_ids.shape[0] > 1:
            ids_1T: Tensor = self.model.generate(input_ids=input_ids, **options)
            return ids_1T

        # Keep what both have in common, but for the last token: a pass needs one at least.
        ids: list[int] = input_ids[0].tolist()
        pairs = zip(ids, self.known, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.cache.crop(min(common, len(ids) - 1) - len(self.known))

        # The cloud makes room once, for turns to come as well.
        new = options.get("max_new_tokens", config.max_new_tokens) or 0
        if len(ids) + new > self.cache.expected_length:
            self.cache.expected_length = 2 * (len(ids) + new) + 256

        try:
            ids_1T = self.model.generate(input_ids=input_ids, past_key_values=self.cache, **options)
        except BaseException:
            # Ctrl-C, most of all: what the cache holds by then is not worth knowing.
            self.close()
            raise
        self.known = ids_1T[0].tolist()[: self.cache.get_seq_length()]
        return ids_1T

    @staticmethod
    def _needs_own_cache(config: GenerationConfig, options: dict[str, Any]) -> bool:
        """Beams and drafts make caches of their own; some calls want none at all."""
        beams = max(
            options.get("num_beams", config.num_beams) or 1,
            options.get("num_return_sequences", config.num_return_sequences) or 1,
        )
        drafts = options.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
        return bool(beams > 1 or drafts or options.get("use_cache", config.use_cache) is False)

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
