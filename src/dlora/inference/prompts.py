"""Prompts: read from files, put through the model's chat template, made a batch of token ids.

Shapes: B prompts, T tokens of the longest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dlora.edge.data import ROW_FILES, check_messages, check_text, read_rows
from dlora.errors import DataError, UsageError
from dlora.protocol.text import clean_text

__all__ = ["Prompt", "continued", "encode_prompts", "load_prompts", "pad_token", "to_text"]

Prompt = str | list[dict[str, str]]
"""Text, or the messages of a chat."""


# ----------------------------------------------------------------- files


def load_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: rows with `prompt` or `messages`, or one prompt a line.

    Raises DataError, naming file and line.
    """
    if file.suffix.lower() not in ROW_FILES:
        return _read_lines(file)

    prompts: list[Prompt] = []
    for where, row in read_rows(str(file)):
        prompt = row.get("prompt", row.get("messages"))
        if not prompt or not isinstance(prompt, (str, list)):
            raise DataError(
                f"{where}: got columns {', '.join(row)}; want `prompt` or `messages`, not empty"
            )
        if isinstance(prompt, str):
            check_text(where, "prompt", prompt)
        else:
            check_messages(where, prompt)
        prompts.append(prompt)
    return prompts


def _read_lines(file: Path) -> list[Prompt]:
    """Every line that is not blank."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None

    # At newlines alone: form feeds and Unicode's separators of lines stand inside of prompts.
    whole = (line.removesuffix("\r") for line in text.split("\n"))
    lines: list[Prompt] = [line for line in whole if line.strip()]
    if not lines:
        raise DataError(f"{file}: no prompts")
    return lines


def continued(output: Path, prompts: list[Prompt]) -> int:
    """How many prompts are answered in `output` already.

    A last line that was not written to its end, and only that, is cut off. Raises UsageError if
    the file holds anything else.
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


# ----------------------------------------------------------------- templates and tokens


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
    except Exception as error:
        # A template may refuse roles, or their order, with errors of its own.
        raise UsageError(
            f"the model's chat template refused these messages: {clean_text(error)}"
        ) from error
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
    ids_BT = torch.full((len(rows), length), pad_token(tokenizer), dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_BT[number, length - len(row) :] = torch.tensor(row)
        mask_BT[number, length - len(row) :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or what serves as one: masked, it changes nothing."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
