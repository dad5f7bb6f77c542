"""A served tokenizer as everything here uses it: no end behind a text, no token types.

Some tokenizers append their end token to whatever they are given. Behind it a model begins another
text: an answer, or a choice to be scored, would stand there; and training would teach two ends.
"""

from __future__ import annotations

from typing import Any, Final

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from dlora.errors import PeerError
from dlora.protocol.tokens import misfit

__all__ = ["fit_tokenizer"]

_PROBE: Final = "a b"


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Change a tokenizer in place; `rows` are those of the embedding.

    Raises PeerError for one of another model, and where the end cannot be left out.
    """
    if (reason := misfit(tokenizer, rows)) is not None:
        raise PeerError(f"the served model cannot be used: {reason}")

    # Encoders' tokenizers give token types too, which no decoder takes.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    before, behind = _added_tokens(tokenizer)
    if not behind:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.post_processor = _only_before(tokenizer, before)
    if backend is None or _added_tokens(tokenizer)[1]:
        raise PeerError(
            "the served model's tokenizer appends its end to every text, and cannot be told not to"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that are put before a text, and behind it."""
    plain: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _only_before(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Any:
    """A template that puts these tokens before a text, and nothing behind it."""
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return TemplateProcessing(
        single=[*tokens, "$A"],
        pair=[*tokens, "$A", "$B:1"],
        special_tokens=sorted(set(zip(tokens, ids, strict=True))),
    )
