"""The tokenizer that is served with a model: checked once, before anything is served."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlora.cloud.checkpoint import first_line, reading
from dlora.errors import ModelError
from dlora.protocol.tokens import misfit, without_row

__all__ = ["load_tokenizer"]

log = logging.getLogger(__name__)

_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Any of these says that a folder has a tokenizer."""


def load_tokenizer(
    source: str | Path, name: str, model: PreTrainedModel
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or a hub's repository; None, with a warning, where there is none.

    Raises ModelError for files that cannot be read, and for a tokenizer of another model.
    """
    if Path(source).is_dir():
        if not any((Path(source) / file).is_file() for file in _FILES):
            log.warning("no tokenizer is served with %s: there is none beside it", name)
            return None
        with reading(f"the tokenizer of {name} cannot be read"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False
            )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            log.warning("no tokenizer is served with %s: %s", name, first_line(error))
            return None
    with reading(f"the tokenizer of {name} cannot be used"):
        _fit(tokenizer, name, model.get_input_embeddings().weight.shape[0])
    return tokenizer


def _fit(tokenizer: PreTrainedTokenizerBase, name: str, rows: int) -> None:
    """Let padding have a row of the embedding; ModelError for a tokenizer of another model."""
    if (reason := misfit(tokenizer, rows)) is not None:
        raise ModelError(f"{name} cannot be served: {reason}")
    _check_template(tokenizer, name)

    over = without_row(tokenizer, rows)
    if tokenizer.pad_token in over:
        log.warning(
            "%s: the embedding has no row for the padding token %r: %r stands for it",
            *(name, tokenizer.pad_token, tokenizer.eos_token),
        )
        tokenizer.pad_token = tokenizer.eos_token
    if over:
        log.warning("%s: texts with %s cannot be used: no row", name, ", ".join(sorted(over)[:3]))
    if tokenizer.eos_token_id is None:
        log.warning("%s: its tokenizer has no end token: answers have no end of their own", name)


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError for a chat template that is no template, as one that was cut."""
    given = tokenizer.chat_template
    for template in given.values() if isinstance(given, dict) else filter(None, [given]):
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
            )
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{name} cannot be served: its chat template is broken in line {error.lineno} "
                f"({error.message}): get it again"
            ) from error
        except Exception as error:  # it may want other messages than this one
            log.debug("%s: its chat template refused a short message: %s", name, error)
