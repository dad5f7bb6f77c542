"""The split models behind the interface: one for each adapter in training, and some to sample with.

All are of one served model over one link, and share embedding and head. A model to sample with is
kept for each kind of adapter, and takes the weights of whoever asks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tinker import types
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dlora.edge.adapter_config import read_adapter_config
from dlora.edge.adapter_weights import put_adapter_weights, read_adapter_weights
from dlora.edge.classifier import refuse_classifier
from dlora.edge.ends import has_own_ends, rows_needed
from dlora.edge.link import Link
from dlora.edge.load import get_peft_model, load_adapter, load_base
from dlora.edge.model import SplitModel
from dlora.inference.answer import share_ends
from dlora.inference.prompts import pad_token
from dlora.tinker.adapter import without_loss
from dlora.tinker.targets import lora_config

__all__ = ["Models", "Weights", "weights_of"]

_MOST_SAMPLERS: Final = 4
"""Models to sample with that are kept, each for adapters of another configuration."""


@dataclass(frozen=True)
class Weights:
    """An adapter's weights as they were once, and the configuration that they are of."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Weights:
        """Those of an adapter folder. Raises UsageError for a folder that holds none."""
        return cls(read_adapter_config(folder), read_adapter_weights(folder))

    @property
    def kind(self) -> str:
        """The same for weights that fit on the same model, with embedding and head among them."""
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        return json.dumps([self.config.to_dict(), shapes], sort_keys=True, default=_listed)


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def weights_of(model: SplitModel) -> Weights:
    """A copy of the weights of a model's adapter, and of embedding and head that are its own."""
    own = has_own_ends(model.get_base_model(), model.link.description)
    with _quiet():
        tensors = get_peft_model_state_dict(model, save_embedding_layers=own)
    return Weights(
        model.peft_config["default"],
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
    )


class Models:
    """Builds split models over one link."""

    def __init__(
        self, link: Link, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
    ) -> None:
        self.link, self.tokenizer, self.options = link, tokenizer, dict(options)
        self.padding = pad_token(tokenizer)
        self.base = load_base(link, **self.options)
        """The served model as it is."""
        self.vocab = int(self.base.get_input_embeddings().weight.shape[0])
        """Token ids that there are."""
        served = self.base.generation_config.eos_token_id
        ends = served if isinstance(served, list) else [served, tokenizer.eos_token_id]
        self.ends = frozenset(int(one) for one in ends if one is not None)
        """Tokens that end an answer, unless a request says otherwise."""
        self._to_sample(self.base)
        self._samplers: dict[str, tuple[SplitModel, Weights]] = {}

    def fresh(self, asked: types.LoraConfig, alpha: int) -> SplitModel:
        """A fresh adapter. Raises UsageError for what the server does not allow."""
        config = lora_config(self.link, self.base.get_base_model(), asked, alpha)
        with torch.random.fork_rng(devices=[]), _quiet():
            if asked.seed is None:
                torch.seed()
            else:
                torch.manual_seed(asked.seed)
            return self._sharing(get_peft_model(self.link, config, **self.options))

    def load(self, folder: Path) -> SplitModel:
        """A saved adapter, to go on training it. Raises UsageError for one that does not fit."""
        with _quiet():
            model = load_adapter(self.link, folder, **self.options)
            refuse_classifier(model.get_base_model(), "the Tinker interface")
            return self._sharing(model)

    def put(self, model: SplitModel, weights: Weights) -> None:
        """Give a model's adapter these weights. Raises UsageError where they do not fit."""
        with _quiet():
            put_adapter_weights(model, weights.tensors, "the saved adapter does not fit")

    def sampling(self, weights: Weights | None) -> SplitModel:
        """A model to sample with that has these weights, until the next call."""
        if weights is None:
            return self.base
        model, known = self._samplers.pop(weights.kind, (None, None))
        if model is None:
            with _quiet():
                rows = rows_needed(weights.config, weights.tensors)
                options = {"num_tokens": rows, **self.options}
                model = self._to_sample(get_peft_model(self.link, weights.config, **options))
        if known is not weights:
            self.put(model, weights)
        self._samplers[weights.kind] = model, weights
        while len(self._samplers) > _MOST_SAMPLERS:
            del self._samplers[next(iter(self._samplers))]
        return model

    def _to_sample(self, model: SplitModel) -> SplitModel:
        """Nothing of the provider's settings changes how answers are made."""
        model.get_base_model().generation_config = GenerationConfig(pad_token_id=self.padding)
        model.set_options(head_positions="supervised")
        return self._sharing(without_loss(model.eval()))

    def _sharing(self, model: SplitModel) -> SplitModel:
        share_ends(self.base, model)
        return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warning that an adapter on a tied head cannot be merged as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        yield
