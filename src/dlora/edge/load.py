"""Building a split model: a fresh adapter, a folder's, or none, on a model that is elsewhere.

All three take the fields of `SplitOptions` as keyword arguments: `wire`, `in_flight`, `wire_dtype`,
`retry`, `noise`, `hide_lengths`, `head_positions` and `edge_layers`. None, or nothing, is the
default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dlora.edge.adapter_config import checked_config, read_adapter_config
from dlora.edge.link import Link
from dlora.edge.model import SplitModel, check_codecs
from dlora.edge.options import OptionArguments, SplitOptions
from dlora.edge.sites import allowed_names
from dlora.edge.skeleton import build_skeleton, drop_stand_ins, edge_layers_of
from dlora.edge.wall import wall
from dlora.errors import DLoRAError, UsageError

__all__ = ["get_peft_model", "load_adapter", "load_base", "load_tokenizer"]


def get_peft_model(
    link: Link,
    config: LoraConfig,
    *,
    device: str | torch.device = "cpu",
    **options: Unpack[OptionArguments],
) -> SplitModel:
    """Put a fresh adapter on the cloud's model: `peft.get_peft_model` for a model elsewhere.

    `config` is a peft.LoraConfig or a `dlora.BottleneckConfig`. `link` comes from `dlora.connect`
    or `dlora.in_process`. `options` are the fields of `SplitOptions`: `wire_dtype` is fp32 (exact),
    fp16, bf16, int8 or int4; `wire` is plain or factored; with `edge_layers` this many of the first
    and of the last decoder layers run here. At the same seed the adapter starts with the same
    values as `peft.get_peft_model` on the full model. Raises UsageError for what cannot be
    supported, by name.
    """
    split_options = SplitOptions().changed(**options)
    check_codecs(link, split_options.codecs)
    config = checked_config(config)
    edge_layers = edge_layers_of(link, split_options.edge_layers)

    base = build_skeleton(link, edge_layers)
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
    config = read_adapter_config(folder)
    config.inference_mode = not is_trainable
    model = get_peft_model(link, config, device=device, **options)

    misfit = f"the adapter in {folder} does not fit {link.description.model_id}"
    try:
        weights = load_peft_weights(str(folder), device=str(device))
        result = set_peft_model_state_dict(model, weights)
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"{misfit}: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"{misfit}: it lacks {missing[:3]} and has unknown {result.unexpected_keys[:3]}"
        )
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
    names = [
        module.name for site in link.description.sites for module in site.modules if module.allowed
    ]
    if not names:
        raise UsageError(f"{link.address} allows no adapters")
    # peft wants a module to sit on; it is switched off at once.
    config = LoraConfig(r=1, target_modules=names[:1])
    model = get_peft_model(link, config, device=device, **options)
    model.base_model.disable_adapter_layers()
    return model.eval()


def load_tokenizer(link: Link) -> PreTrainedTokenizerBase:
    """The served model's tokenizer; only data files come from the peer, never code."""
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
    return tokenizer
