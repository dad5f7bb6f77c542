"""Chat templates refuse roles, or their order, with errors of their own: which row was it?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dlora.errors import DataError
from dlora.protocol.text import clean_text

__all__ = ["TOKENISING_ERRORS", "name_refused_row"]

TOKENISING_ERRORS = (RuntimeError, ValueError, TypeError, TemplateError)
"""What tokenising rows raises where a row, a template or a tokenizer does not suit."""


def name_refused_row(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], origins: Iterable[str]
) -> None:
    """Raises DataError for the first row whose messages the model's chat template refuses.

    Rows have prompt and completion, both texts or both messages; `origins` says where each stands.
    """
    if not tokenizer.chat_template:
        return
    for row, where in zip(rows, origins, strict=False):
        if isinstance(row.get("prompt"), list):
            try:
                tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            except Exception as error:
                raise DataError(
                    f"{where}: the model's chat template refused these messages: "
                    f"{clean_text(error)}"
                ) from error
