"""Rows and what makes tokens of them: which row did a chat template refuse, and do rows end?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dlora.errors import DataError, UsageError
from dlora.protocol.text import clean_text

__all__ = ["tokenising"]

_FOLLOWS = ("completion", "chosen", "rejected")
"""Columns of messages that follow a prompt."""
_ERRORS = (RuntimeError, ValueError, TypeError, TemplateError)
"""What tokenising rows raises where a row, a template or a tokenizer does not suit."""


@contextmanager
def tokenising(
    tokenizer: PreTrainedTokenizerBase,
    *data: tuple[Iterable[dict[str, Any]] | None, Iterable[str]],
    refused: str,
) -> Iterator[None]:
    """A trainer is made, which tokenises `data`: pairs of rows and where each row stands.

    Raises DataError for the first row that the chat template refuses, and UsageError, which begins
    with `refused`, for all else, a tokenizer without an end token included.
    """
    _check_end(tokenizer)
    try:
        yield
    except _ERRORS as error:
        # Roles that a template refuses; a logger that is not installed, no chat template.
        for rows, origins in data:
            _name_refused_row(tokenizer, rows or [], origins)
        raise UsageError(f"{refused}: {str(error).splitlines()[0]}") from error


def _check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError for a tokenizer without an end token, which trl puts behind every row."""
    if tokenizer.eos_token is None:
        raise UsageError(
            "this model's tokenizer has no end token (eos_token), so that no row, and no answer "
            "learnt from it, has an end: name one in the served model's tokenizer_config.json"
        )


def _name_refused_row(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], origins: Iterable[str]
) -> None:
    """Raises DataError for the first row whose messages the model's chat template refuses.

    Rows have a prompt and what may follow it, all texts or all messages; `origins` says where each
    stands.
    """
    if not tokenizer.chat_template:
        return
    for row, where in zip(rows, origins, strict=False):
        if isinstance(row.get("prompt"), list):
            follows = [row[name] for name in _FOLLOWS if isinstance(row.get(name), list)]
            try:
                for messages in follows or [[]]:
                    tokenizer.apply_chat_template(row["prompt"] + messages, tokenize=False)
            except Exception as error:
                raise DataError(
                    f"{where}: the model's chat template refused these messages: "
                    f"{clean_text(error)}"
                ) from error
