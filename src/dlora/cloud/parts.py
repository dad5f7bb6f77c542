"""A model as the cloud's half sees it: its decoder, and what is looked up before it.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dlora.cloud.leftovers import own_attributes
from dlora.protocol.decoder import decoder_of, embedding_of, last_hidden, run_decoder
from dlora.protocol.lookups import Lookups, find_tables

__all__ = ["Parts"]


@dataclass(frozen=True, eq=False)
class Parts:
    """A causal LM taken apart."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    lookups: Lookups

    @classmethod
    def of(cls, model: PreTrainedModel, ids_BT: Tensor) -> Parts:
        """The parts of a model, found by one forward over these tokens. Raises ModelError."""
        lookups = Lookups(embedding_of(model), find_tables(model, ids_BT))
        return cls(model, decoder_of(model), lookups)

    @property
    def name(self) -> str:
        """The architecture, for messages."""
        return type(self.model).__name__

    @property
    def weight(self) -> Tensor:
        """The token embedding's, whose dtype and device are those of what goes in."""
        return self.lookups.embedding.get_parameter("weight")

    def run(self, ids_BT: Tensor, *, cache: Any = None, mask: Tensor | None = None) -> Any:
        """The decoder's own forward over tokens, as a pass does it; what it returns."""
        inputs: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.lookups.tables:
            inputs["input_ids"] = ids_BT
        else:
            inputs["inputs_embeds"] = self.lookups.embedding(ids_BT)
        with own_attributes():
            return run_decoder(self.decoder, cache=cache, **inputs)

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor, *, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        """Its last hidden states, [B, T, D]."""
        return last_hidden(self.run(ids_BT, cache=cache, mask=mask))
