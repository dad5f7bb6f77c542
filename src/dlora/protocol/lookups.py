"""What a causal LM looks up by token ids: its embedding and, in some, tables of their own.

The edge looks up and sends all of it side by side; the cloud takes it apart again. Token ids never
travel.

Shapes: B batch, T tokens, W summed widths of what is looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.protocol.decoder import decoder_of, embedding_of

__all__ = ["Lookups", "find_tables"]


@dataclass(frozen=True, eq=False)
class Lookups:
    """The token embedding, and tables beside it by their names in the model."""

    embedding: nn.Module
    tables: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def named(cls, model: PreTrainedModel, tables: Iterable[str]) -> Lookups:
        """Those of a model whose tables have these names."""
        return cls(embedding_of(model), {name: model.get_submodule(name) for name in tables})

    @property
    def modules(self) -> list[nn.Module]:
        """All of them, in the order in which their rows stand side by side."""
        return [self.embedding, *self.tables.values()]

    @property
    def widths(self) -> list[int]:
        """How wide the rows of each are."""
        return [int(_weight(module).shape[1]) for module in self.modules]

    @property
    def num_rows(self) -> int:
        """Token ids that all of them know."""
        return min(len(_weight(module)) for module in self.modules)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """[B, T, W] of these tokens."""
        rows = [module(ids_BT) for module in self.modules]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def apart(self, rows_BTW: Tensor) -> list[Tensor]:
        """What each has looked up."""
        return list(rows_BTW.split(self.widths, dim=-1))


def _weight(module: nn.Module) -> Tensor:
    """The table [tokens, width] of an embedding; the first, where some of it is trained."""
    return next(module.parameters())


@torch.no_grad()
def find_tables(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, nn.Module]:
    """Embeddings inside the decoder, beside its own, that one forward reads at the token ids."""
    found = _looked_up(model, ids_BT)
    if not found:
        return {}
    # Tables of positions are called with ids, too, for their number alone.
    others = _looked_up(model, ids_BT.flip(1))
    return {
        path: model.get_submodule(path)
        for path, rows in found.items()
        if path in others and not torch.equal(rows, others[path])
    }


def _looked_up(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, Tensor]:
    """What embeddings inside the decoder, beside its own, give that are called with these ids."""
    decoder, embedding = decoder_of(model), embedding_of(model)
    found: dict[str, Tensor] = {}

    def note(path: str, args: tuple[object, ...], output: object) -> None:
        given = args[0] if args else None
        if isinstance(given, Tensor) and isinstance(output, Tensor) and torch.equal(given, ids_BT):
            found[path] = output

    inside = {id(module) for module in decoder.modules()}
    hooks = [
        module.register_forward_hook(lambda _, args, output, path=path: note(path, args, output))
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding and id(module) in inside
    ]
    try:
        if hooks:
            decoder(input_ids=ids_BT)
    except TypeError:  # it takes no ids: they have no other way in
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found
