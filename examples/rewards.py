"""Rewards for `dlora train --task grpo --reward examples/rewards.py:wanted_word,...`.

Each gets prompts, completions and all other columns of the rows as lists of one length, and
returns a number for each completion. With messages a completion is a list of messages.
"""

from __future__ import annotations

from typing import Any


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def wanted_word(completions: list[Any], wanted: list[str], **_: Any) -> list[float]:
    """1 where the wanted word is in the answer."""
    return [
        float(word.lower() in _text(completion).lower())
        for completion, word in zip(completions, wanted, strict=True)
    ]


def short(completions: list[Any], **_: Any) -> list[float]:
    """From 0 for long answers to 0.2 for short ones."""
    return [0.2 / (1 + len(_text(completion)) / 40) for completion in completions]
