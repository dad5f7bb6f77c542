"""Building a split model: a fresh adapter, a folder's, or none, on a model that is elsewhere.

All three take the fields of `SplitOptions` as keyword arguments: `wire`, `in_flight`, `wire_dtype`,
`retry`, `noise`, `hide_lengths`, `head_positions`, `cache_prefix` and `edge_layers`. None, or
nothing, is the default.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Final, Unpack

import torch
from peft import LoraConfig, PeftConfig, PromptLearningConfig, TaskType
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dlora.edge.adapter_config import (
    check_matched,
    checked_config,
    read_any_config,
    targetable,
)
from dlora.edge.adapter_weights import put_adapter_weights, read_adapter_weights
from dlora.edge.classifier import labels_in
from dlora.edge.ends import add_rows, check_trained, head_of, rows_needed
from dlora.edge.experts import check_parameters
from dlora.edge.link import Link
from dlora.edge.model import SplitModel, check_options
from dlora.edge.options import OptionArguments, SplitOptions
from dlora.edge.prompt import check_prompt, without_draw
from dlora.edge.sites import allowed_names
from dlora.edge.skeleton import build_skeleton, drop_stand_ins, edge_layers_of
from dlora.edge.tokenizer import fit_tokenizer
from dlora.edge.wall import wall
from dlora.errors import DLoRAError, UsageError

__all__ = ["get_peft_model", "load_adapter", "load_base", "load_tokenizer"]

log = logging.getLogger(__name__)

_ALL_LINEAR: Final = "all-linear"
"""peft's word for every linear module but the head."""


def get_peft_model(
    link: Link,
    config: PeftConfig,
    *,
    device: str | torch.device = "cpu",
    num_labels: int | None = None,
    num_tokens: int = 0,
    **options: Unpack[OptionArguments],
) -> SplitModel:
    """Put a fresh adapter on the cloud's model: `peft.get_peft_model` for a model elsewhere.

    `config` is a peft.LoraConfig, a `dlora.BottleneckConfig`, or one of prompt tuning or P-tuning,
    which take no exchange. `link` comes from `dlora.connect`
    or `dlora.in_process`. `options` are the fields of `SplitOptions`: `wire_dtype` is fp32 (exact),
    fp16, bf16, int8 or int4; `wire` is plain or factored; with `edge_layers` this many of the first
    and of the last decoder layers run here. At the same seed the adapter starts with the same
    values as `peft.get_peft_model` on the full model.

    `num_labels` is for task type SEQ_CLS: the outputs of its new head, 2 by default.
    `num_tokens=len(tokenizer)` after `tokenizer.add_tokens(...)` gives embedding and LM head rows
    for the new tokens, as `resize_token_embeddings` does; they stay here. Raises UsageError for
    what cannot be supported, and for targets and patterns that match no module, by name.
    """
    model = _put_on(link, config, device, options, num_labels, num_tokens)
    if not isinstance(config, LoraConfig):
        return model
    tuner = model.base_model
    # Those that hold others, such as a layer, are excluded by no name.
    modules = [name for name, one in tuner.model.named_modules() if hasattr(one, "weight")]
    targeted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    if not isinstance(config.target_modules, str):  # peft takes some names for those of experts
        taken = model.peft_config["default"].target_modules
        config = dataclasses.replace(config, target_modules=taken)
    check_matched(config, targeted, modules, allowed_names(link.description))
    return model


def _put_on(
    link: Link,
    config: PeftConfig,
    device: str | torch.device,
    options: OptionArguments,
    num_labels: int | None = None,
    num_tokens: int = 0,
) -> SplitModel:
    """A fresh adapter or prompt on the cloud's model, with those targets that match."""
    split_options = SplitOptions().changed(**options)
    check_options(link, split_options)
    config = checked_config(config)
    edge_layers = edge_layers_of(link, split_options.edge_layers)

    classifies = config.task_type == TaskType.SEQ_CLS
    if num_labels is not None and not classifies:
        raise UsageError("num_labels is of a classifier: say task_type SEQ_CLS in the config")
    base = build_skeleton(
        link, edge_layers, (2 if num_labels is None else num_labels) if classifies else None
    )
    add_rows(base, num_tokens, link.description.tables)
    if isinstance(config, LoraConfig):
        check_trained(config, base)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL_LINEAR:
            config.target_modules = _all_linear(base, link)
        check_parameters(config, base, link.description, split_options.wire)
    else:
        check_prompt(config, link.description)
    config.base_model_name_or_path = link.description.model_id
    try:
        model = SplitModel(base, config, link, split_options, edge_layers)
    except ValueError as error:
        if isinstance(error, DLoRAError):
            raise
        # peft names the targets that it did not find; name what there is.
        allowed = allowed_names(link.description)
        raise UsageError(f"{error} This server allows: {allowed}.") from error

    drop_stand_ins(base)
    model.eval() if config.inference_mode else model.train()
    return model.to(device)


def _allowed(link: Link) -> list[str]:
    """Full names of all modules that this server lets edges adapt."""
    return [
        module.name for site in link.description.sites for module in site.modules if module.allowed
    ]


def _all_linear(base: PreTrainedModel, link: Link) -> set[str]:
    """All modules that this server lets edges adapt; says what peft would have taken beside."""
    names = set(targetable(_allowed(link), base))
    head = head_of(base)
    others = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in names
    ]
    if others:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in others)
        log.warning(
            "all-linear: %d modules are adapted; %d that this server cannot or does not let edges "
            "adapt are left out: %s",
            *(len(names), len(others), ", ".join(kinds)),
        )
    return names


def load_adapter(
    link: Link,
    folder: str | Path,
    *,
    is_trainable: bool = True,
    device: str | torch.device = "cpu",
    **options: Unpack[OptionArguments],
) -> SplitModel:
    """Put an existing adapter folder, made here or by peft, on the cloud's model.

    `options` are as for `get_peft_model`. Raises UsageError for a folder that does not fit: another
    kind of adapter, other modules, other shapes.
    """
    folder = Path(folder).expanduser()
    config = read_any_config(folder)
    config.inference_mode = not is_trainable
    if is_trainable and isinstance(config, PromptLearningConfig):
        config = without_draw(config)
    weights = read_adapter_weights(folder, device)
    misfit = f"the adapter in {folder} does not fit {link.description.model_id}"
    rows, labels = rows_needed(config, weights), labels_in(weights)
    model = _put_on(link, config, device, options, labels, rows)

    put_adapter_weights(model, weights, misfit)
    return model


def load_base(
    link: Link,
    *,
    device: str | torch.device = "cpu",
    **options: Unpack[OptionArguments],
) -> SplitModel:
    """The served model as it is: no adapter is active, and a pass takes one round trip.

    `options` are as for `get_peft_model`.
    """
    names = _allowed(link)
    if not names:
        raise UsageError(f"{link.address} allows no adapters")
    # peft wants a module to sit on; it is switched off at once.
    config = LoraConfig(r=1, target_modules=names[:1])
    model = get_peft_model(link, config, device=device, **options)
    model.base_model.disable_adapter_layers()
    return model.eval()


def load_tokenizer(link: Link) -> PreTrainedTokenizerBase:
    """The served model's tokenizer; only data files come from the peer, never code.

    It appends no end token. Raises UsageError where none is served, PeerError for one that cannot
    be used.
    """
    folder = link.edge_files()
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError(
            f"{link.address} serves no tokenizer with {link.description.model_id}: load one "
            "yourself"
        )
    with wall("the tokenizer", link.address):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        with safe_open(folder / "edge.safetensors", framework="numpy") as weights:
            rows = weights.get_slice("embedding.weight").get_shape()[0]
        fit_tokenizer(tokenizer, rows)
    return tokenizer
