"""The embedding and the head, which are here whole: what of them is trained, what that costs.

peft's `modules_to_save` trains a copy of one of them, `trainable_token_indices` some of its rows,
and a classifier has a new head. All of it stays here: the cloud sees embedded tokens, and gives
their gradient back where the embedding is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.edge.lora import layer_flops
from dlora.edge.model_config import read_config
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb

__all__ = [
    "CLASSIFIERS",
    "add_rows",
    "check_trained",
    "frozen_part",
    "grown_rows",
    "has_own_ends",
    "head_flops",
    "head_of",
    "own_ends",
    "rows_needed",
    "show_bias",
    "token_indices",
]

CLASSIFIERS: Final = ("classifier", "score")
"""What a classification head may be called: peft trains and saves these, and no others."""
_OWN: Final = "_has_own_ends"


def head_of(base: PreTrainedModel) -> nn.Module | None:
    """The LM head, or that of a classifier."""
    head = base.get_output_embeddings()
    named = (getattr(base, name, None) for name in CLASSIFIERS)
    return head if head is not None else next((one for one in named if one is not None), None)


def frozen_part(module: nn.Module) -> nn.Module:
    """The embedding or head as it was served, beneath what is trained of it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def show_bias(base: PreTrainedModel) -> None:
    """Let a head some of whose rows are trained show its bias: trl's fused head asks for it.

    peft's wrapper hands on the weight alone.
    """
    head = head_of(base)
    if isinstance(head, TrainableTokensWrapper):  # beside the parameters, where it is already
        object.__setattr__(head, "bias", getattr(head.original_module, "bias", None))


def head_flops(head: nn.Module | None, rows: int, *, training: bool) -> int:
    """FLOPs of a head, and of what of it is trained, on this many rows."""
    if head is None:
        return 0
    weight = frozen_part(head).get_parameter("weight")
    is_trained = isinstance(head, AuxiliaryTrainingWrapper) and any(
        parameter.requires_grad for parameter in head.parameters()
    )
    products = 1 + training + (training and is_trained)
    flops = 2 * rows * weight.numel() * products
    if isinstance(head, LoraLayer) and not head.disable_adapters:
        flops += layer_flops(head, rows, training=training, input_grad=training)
    return flops


# ----------------------------------------------------------------- what may be trained


def check_trained(config: LoraConfig, base: PreTrainedModel) -> None:
    """Raises UsageError for `modules_to_save` and `trainable_token_indices` that are not here.

    And for names of no module, and tokens without a row. Called before peft wraps anything.
    """
    embedding = base.get_input_embeddings()
    here = [module for module in (embedding, head_of(base)) if module is not None]
    modules = dict(base.named_modules(remove_duplicate=False))
    names = {name for name, module in modules.items() if any(module is one for one in here)}
    tokens = token_indices(config)

    wanted = [("modules_to_save", key) for key in config.modules_to_save or ()]
    wanted += [("trainable_token_indices", key) for key in tokens if key]
    for option, key in wanted:
        found = [name for name in modules if name.endswith(key)]  # as peft looks for them
        is_new = config.task_type == TaskType.SEQ_CLS and key in CLASSIFIERS
        if not found and not is_new:
            raise UsageError(f"{option}: {key!r} names no module. {_offer(names)}")
        if away := [name for name in found if name not in names]:
            raise UsageError(
                f"{option}: {away[0]} is in the cloud, where no weight is trained: adapt it with "
                f"target_modules. {_offer(names)}"
            )

    rows = len(frozen_part(embedding).get_parameter("weight"))
    for index in (index for indices in tokens.values() for index in indices):
        if not 0 <= index < rows:
            raise UsageError(
                f"trainable_token_indices: token {index} has no row among the {rows} that there "
                "are: say how many tokens the tokenizer has, num_tokens=len(tokenizer)"
            )


def token_indices(config: PeftConfig) -> dict[str, list[int]]:
    """Token ids whose rows are trained, by the name of their table; "" for the embedding."""
    given: Any = getattr(config, "trainable_token_indices", None) or {}
    return dict(given) if isinstance(given, Mapping) else {"": list(given)}


def _offer(names: Iterable[str]) -> str:
    return f"On the edge are {', '.join(sorted(names))}."


# ----------------------------------------------------------------- more tokens


def add_rows(base: PreTrainedModel, num_tokens: int, tables: Sequence[str] = ()) -> None:
    """Give embedding and LM head at least so many rows, as `resize_token_embeddings` does it.

    Fewer than there are change nothing: many models have rows to spare. Raises UsageError for a
    model that looks tokens up in more `tables`.
    """
    if num_tokens <= len(base.get_input_embeddings().get_parameter("weight")):
        return
    if tables:
        raise UsageError(f"num_tokens: {tables[0]} is looked up by token, too, and cannot grow")
    base.resize_token_embeddings(num_tokens)


def own_ends(base: PreTrainedModel) -> None:
    """Give embedding and head memory of their own, for others than the served ones to be put in.

    What was served may be the cloud's own memory, or another model's. Tied ends stay tied.
    """
    own: dict[int, nn.Parameter] = {}
    ends = [end for end in (base.get_input_embeddings(), head_of(base)) if end is not None]
    for part in map(frozen_part, ends):
        for name, served in list(part.named_parameters(recurse=False)):
            copied = nn.Parameter(served.detach().clone(), requires_grad=served.requires_grad)
            setattr(part, name, own.setdefault(id(served), copied))
    setattr(base, _OWN, True)


def has_own_ends(base: PreTrainedModel, description: pb.Description) -> bool:
    """Whether embedding and head are not the served ones, so that an adapter is saved with them.

    They have rows for more tokens, or came with an adapter (`own_ends`).
    """
    return getattr(base, _OWN, False) or grown_rows(base, description) > 0


def grown_rows(base: PreTrainedModel, description: pb.Description) -> int:
    """Rows of the embedding of a model that has more than the served one; else 0."""
    rows: int = base.config.get_text_config().vocab_size
    return rows if rows > read_config(description).get_text_config().vocab_size else 0


def rows_needed(config: PeftConfig, weights: Mapping[str, Tensor]) -> int:
    """Rows that embedding and LM head must have for the weights of an adapter's folder."""
    counts = [index + 1 for indices in token_indices(config).values() for index in indices]
    for name, weight in weights.items():
        owner = name.removesuffix(".weight").rpartition(".")[2]
        is_table = name.endswith(".weight") and weight.dim() == 2 and ".lora_" not in name
        if is_table and owner not in CLASSIFIERS:
            counts.append(len(weight))
    return max(counts, default=0)
