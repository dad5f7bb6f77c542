"""Why a model cannot be served, in words of our own: found by trying the parts that it needs.

What a library raises names a line of the library, and seldom the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dlora.cloud.zero_edge import sample_ids
from dlora.errors import INSTEAD, DLoRAError
from dlora.protocol.decoder import decoder_of, embedding_of, run_decoder
from dlora.protocol.text import clean_text

__all__ = ["why_not"]

log = logging.getLogger(__name__)


def why_not(model: PreTrainedModel, error: Exception) -> str:
    """The reason why loading or trying a model has ended by an exception, and what to do."""
    if isinstance(error, DLoRAError):
        return f"{str(error).rstrip('.')}. {INSTEAD}"
    log.debug("%s, as it was raised", type(model).__name__, exc_info=error)
    name = type(error).__name__
    if not _runs(lambda: model(input_ids=_ids(model), attention_mask=torch.ones_like(_ids(model)))):
        return (
            "the whole model cannot run over a few tokens of text alone either "
            f"({name}): transformers wants more than text, or its files do not fit together. Try "
            "it there first"
        )
    if not _runs(lambda: _on_embeddings(model)):
        return (
            "its decoder does not run on embeddings alone: it looks at token ids as well, which "
            f"never leave the edge ({name}). {INSTEAD}"
        )
    return (
        f"for a reason that DLoRA does not know ({name}: {clean_text(error)}). {INSTEAD} Please "
        "report this line"
    )


@torch.no_grad()
def _runs(run: Callable[[], Any]) -> bool:
    """Whether a call ends without an exception."""
    try:
        run()
    except Exception:
        return False
    return True


def _ids(model: PreTrainedModel) -> torch.Tensor:
    return sample_ids(model, 2, 4)


def _on_embeddings(model: PreTrainedModel) -> Any:
    return run_decoder(decoder_of(model), inputs_embeds=embedding_of(model)(_ids(model)))
