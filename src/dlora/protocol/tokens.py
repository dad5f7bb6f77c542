"""Whether a tokenizer and an embedding are of one model: both halves look, each at what it has."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedTokenizerBase

__all__ = ["misfit", "without_row"]

_PROBE: Final = "The quick brown fox, 12 345."


def without_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Tokens whose id is behind the embedding's last row."""
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}


def misfit(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """Why a tokenizer cannot feed an embedding of this many rows; None if it can.

    Added tokens without a row are no reason: in text models of picture models some are there, and
    no text makes them unless it names them. Padding is masked, and another token can stand for it.
    """
    if not len(tokenizer) or not tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        return "its tokenizer makes no tokens of a text: its files are cut, or of another kind"

    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    over = without_row(tokenizer, rows)
    if bad := sorted(token for token in over if token not in added or token in needed):
        return (
            f"its tokenizer has {len(bad)} tokens behind the embedding's {rows} rows, such as "
            f"{bad[0]!r} with number {over[bad[0]]}: tokenizer and weights are not of one model"
        )
    return None
