"""Which modules an adapter of the SDK sits on: attention, MLP, LM head, by the names of modules."""

from __future__ import annotations

import re
from typing import Final

from peft import LoraConfig
from tinker import types
from transformers import PreTrainedModel

from dlora.edge.adapter_config import targetable
from dlora.edge.link import Link
from dlora.errors import UsageError

__all__ = ["is_attention", "lora_config"]

_ATTENTION: Final = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*|mixer|mamba)\.")
"""A part of a module's name, before its last; recurrent layers stand for attention. Else: MLP."""


def lora_config(
    link: Link, skeleton: PreTrainedModel, asked: types.LoraConfig, alpha: int
) -> LoraConfig:
    """peft's configuration for what the SDK asks for.

    Raises UsageError where the server lets edges adapt no module of a kind that was asked for, and
    where there is nothing to train.
    """
    if asked.rank < 1:
        raise UsageError(f"rank: got {asked.rank}, want at least 1")
    allowed = [one.name for site in link.description.sites for one in site.modules if one.allowed]
    names = targetable(allowed, skeleton)
    attention = [name for name in names if is_attention(name)]
    mlp = [name for name in names if not is_attention(name)]

    targets: list[str] = []
    for flag, wanted, found in (
        ("train_attn", asked.train_attn, attention),
        ("train_mlp", asked.train_mlp, mlp),
        ("train_unembed", asked.train_unembed, _head_names(skeleton)),
    ):
        if wanted and not found:
            raise UsageError(
                f"{flag}: {link.address} lets edges adapt no such module: set {flag}=False"
            )
        targets += found if wanted else []
    if not targets:
        raise UsageError("nothing to train: set train_attn, train_mlp or train_unembed")
    return LoraConfig(r=asked.rank, lora_alpha=alpha, target_modules=targets)


def is_attention(name: str) -> bool:
    """Whether a module, by its full name, is a part of attention, or of what stands for it."""
    return _ATTENTION.search(name) is not None


def _head_names(skeleton: PreTrainedModel) -> list[str]:
    """The LM head's full name, in a list."""
    head = skeleton.get_output_embeddings()
    return [name for name, module in skeleton.named_modules() if module is head]
