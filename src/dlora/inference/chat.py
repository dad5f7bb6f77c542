"""A chat on the edge: history, system prompt, streaming.

The cloud keeps the KV cache between turns: what both turns begin with does not travel again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlora.edge.model import SplitModel
from dlora.errors import UsageError
from dlora.inference.answer import Continuing, Pieces, check_options, check_room, generate
from dlora.inference.prompts import encode_prompts, pad_token

__all__ = ["Chat"]


class Chat:
    """One conversation. Raises UsageError if the model has no chat template."""

    def __init__(
        self,
        model: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        **options: Any,
    ) -> None:
        if not tokenizer.chat_template:
            raise UsageError("this model has no chat template: use `dlora generate`")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.system = system
        self.turns = Continuing(model)
        self.messages: list[dict[str, str]] = []
        self.num_tokens = 0
        """New tokens of the last answer."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, with the system prompt alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, write: Callable[[str], Any]) -> str:
        """Answer the user; words go to `write` as they come.

        On KeyboardInterrupt the answer ends there, what was said so far stays in the
        history, and the exception goes on to the caller.
        """
        self.messages.append({"role": "user", "content": text})
        pieces = Pieces(self.tokenizer, write)
        answered = False
        try:
            batch = encode_prompts(self.tokenizer, [self.messages])
            options = self._options(length=batch["input_ids"].shape[1])
            generate(self.turns, batch, streamer=pieces, **options)
            answered = True
        except KeyboardInterrupt:
            answered = True
            pieces.end()
            raise
        finally:
            self.num_tokens = pieces.num_tokens
            if answered:
                self.messages.append({"role": "assistant", "content": pieces.text})
            else:
                self.messages.pop()  # so that the same can be said again
        return pieces.text

    def _options(self, length: int) -> dict[str, Any]:
        """Options of `generate` behind `length` tokens. UsageError for those that cannot work."""
        options = {"pad_token_id": pad_token(self.tokenizer), **self.options}
        wanted = options.get("max_new_tokens", 256)
        options["max_new_tokens"] = check_room(self.model, length, wanted)
        if "stop_strings" in options:
            options["tokenizer"] = self.tokenizer
        check_options(options)
        if options.get("num_beams", 1) > 1:
            raise UsageError(
                "generation: num_beams gives its answer only at the end, which is no chat"
            )
        return options

    def close(self) -> None:
        """Free the cloud's cache."""
        self.turns.close()
