"""What an adapter's configuration may ask for, where the base weights are elsewhere."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, PeftConfig, PeftType, PromptLearningConfig, TaskType
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from dlora.edge.bottleneck import BottleneckConfig, load_bottleneck_config
from dlora.edge.ends import CLASSIFIERS
from dlora.edge.prompt import checked_prompt
from dlora.errors import UsageError
from dlora.protocol.text import clean_text

__all__ = [
    "check_matched",
    "checked_config",
    "checked_lora",
    "read_adapter_config",
    "read_any_config",
    "targetable",
]

# Options of LoraConfig that need nothing but A and B. Every other option must be at its default.
_SUPPORTED_OPTIONS: Final = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules target_parameters exclude_modules lora_alpha lora_dropout fan_in_fan_out "
    "use_rslora init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "modules_to_save trainable_token_indices ensure_weight_tying eva_config kind activation "
    "scale".split()
)
_REASONS: Final[Mapping[PeftType, str]] = {
    PeftType.IA3: "it scales outputs and inputs of modules, which are not deltas of what a module "
    "reads: use LoRA, or dlora.BottleneckConfig(kind='series'), which reads outputs",
    PeftType.ADALORA: "it moves ranks between modules by scores of its own: use LoRA with "
    "rank_pattern, or Kill and Revive (docs/kill-and-revive.md)",
    PeftType.TRAINABLE_TOKENS: "use LoRA's trainable_token_indices",
}
_OTHER_KINDS: Final = (
    "it reads or changes weights and layers that are in the cloud: use LoRA, a bottleneck adapter "
    "(dlora.BottleneckConfig), prompt tuning or P-tuning"
)
_SUPPORTED_INITS: Final = (True, False, "gaussian", "orthogonal", "eva")
_INIT_REASONS: Final = {
    "pissa": "it begins with the principal part of the base weights, and leaves them the rest",
    "olora": "it begins with a QR decomposition of the base weights, and leaves them the rest",
    "mica": "it begins with the smallest directions of the base weights",
    "corda": "it decomposes the base weights by what modules read, and leaves them the rest",
    "loftq": "it makes up for the rounding of base weights in low bits, of which it needs both",
    "lora_ga": "it begins with gradients of the base weights, and takes them off the weights "
    "(dlora.initialize_spectral begins with their directions alone)",
}


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The configuration of a local LoRA or bottleneck folder; asks no hub.

    Raises UsageError if there is none, and for adapters of another kind.
    """
    config = read_any_config(folder)
    if not isinstance(config, LoraConfig):
        raise UsageError(f"the adapter in {folder} is of kind {config.peft_type.value}, want LORA")
    return config


def read_any_config(folder: str | Path) -> PeftConfig:
    """The same, of whatever kind the adapter is."""
    bottleneck = load_bottleneck_config(folder)
    if bottleneck is not None:
        return bottleneck
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UsageError(f"{folder} holds no adapter: adapter_config.json is missing")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of JSON, of peft for kinds and options that it does not know
        raise UsageError(
            f"{folder}/adapter_config.json cannot be read: {clean_text(error) or 'no reason given'}"
        ) from error
    return config


def checked_config(config: PeftConfig) -> LoraConfig | PromptLearningConfig:
    """A copy of the config of LoRA, a bottleneck adapter or a prompt.

    Raises UsageError, by name, for other kinds of adapters and for options that cannot work here.
    """
    if isinstance(config, PromptLearningConfig):
        return checked_prompt(config)
    if isinstance(config, PeftConfig):
        return checked_lora(config)
    raise UsageError(f"got a {type(config).__name__}, want a peft.LoraConfig")


def checked_lora(config: PeftConfig) -> LoraConfig:
    """A copy of the config; refuses, by name, options that need the base weights.

    It is for causal LMs, or for classifiers, whose head is then among `modules_to_save`.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise UsageError(
            f"{getattr(config.peft_type, 'value', config.peft_type)} is not supported: "
            f"{_REASONS.get(config.peft_type, _OTHER_KINDS)}"
        )
    config = dataclasses.replace(config, task_type=config.task_type or TaskType.CAUSAL_LM)
    if config.task_type == TaskType.SEQ_CLS:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *CLASSIFIERS})
    elif config.task_type != TaskType.CAUSAL_LM:
        raise UsageError(
            f"task_type {config.task_type} is not supported: a decoder has an LM head (CAUSAL_LM) "
            "or one that classifies a text (SEQ_CLS) here"
        )

    _check_init(config.init_lora_weights)
    plain = type(config)()
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in _SUPPORTED_OPTIONS and value and value != getattr(plain, option.name):
            raise UsageError(
                f"LoraConfig.{option.name}={value!r} is not supported: the edge has no base "
                "weights, only B(A(x))"
            )

    if isinstance(config, BottleneckConfig):
        _check_bottleneck(config)
    return config


def _check_init(init: Any) -> None:
    """Raises UsageError for a way to begin that needs base weights."""
    if init not in _SUPPORTED_INITS:
        names = (name for name in _INIT_REASONS if str(init).startswith(name))
        why = _INIT_REASONS.get(next(names, ""), "it is not known here, and may need base weights")
        raise UsageError(
            f"LoraConfig.init_lora_weights={init!r}: {why}. They stay in the cloud: use 'eva', "
            "which begins with what modules read (dlora.initialize_eva), 'orthogonal', 'gaussian' "
            "or True"
        )


def _check_bottleneck(config: BottleneckConfig) -> None:
    """Raises UsageError for what LoRA has and bottleneck adapters have not."""
    if config.target_parameters:
        raise UsageError("bottleneck adapters sit on linear modules: no target_parameters")
    if config.rank_pattern or config.alpha_pattern or config.use_rslora:
        raise UsageError(
            "bottleneck adapters have one size and one scale: no rank_pattern, alpha_pattern or "
            "use_rslora"
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise UsageError(
            "bottleneck adapters are saved alone: no modules_to_save, no trainable_token_indices, "
            "no task_type SEQ_CLS"
        )


def targetable(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Of these modules, by full name, those that peft adapts when it is given their names.

    In some mixtures it takes the names of modules that other versions of transformers had for those
    of fused experts, and adapts these instead; in some recurrent models it refuses a few.
    """

    def stays(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, [])
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            return False
        return set(config.target_modules or ()) == {name} and not config.target_parameters

    return [name for name in names if stays(name)]


def check_matched(
    config: LoraConfig, targeted: Sequence[str], modules: Sequence[str], allowed: str
) -> None:
    """Raises UsageError for a target, a layer, or a key of a pattern, that matches no module.

    peft is content if one of them matches, and passes over the others. `targeted` are the full
    names of modules with an adapter, `modules` those of all that could have one, `allowed` is what
    the message offers.
    """
    targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
    checks: tuple[tuple[str, Iterable[Any], Callable[[Any], re.Pattern[str]]], ...] = (
        ("target_modules", targets, _ends_in),
        ("rank_pattern", config.rank_pattern or (), _ends_in_pattern),
        ("alpha_pattern", config.alpha_pattern or (), _ends_in_pattern),
        ("layers_pattern", _listed(config.layers_pattern), _has_layers),
        ("layers_to_transform", _listed(config.layers_to_transform), _in_layer(config)),
    )
    for what, keys, pattern in checks:
        for key in keys:
            fits = pattern(key)  # made once for each key: there may be hundreds of both
            if not any(fits.match(name) for name in targeted):
                raise UsageError(
                    f"{what}: {key!r} matches no module with an adapter. This server allows: "
                    f"{allowed}."
                )

    is_pattern = isinstance(config.exclude_modules, str)
    for key in _listed(config.exclude_modules):
        excluded = re.compile(f"({key})$") if is_pattern else _ends_in(key)
        if not any(excluded.match(name) for name in modules):
            raise UsageError(
                f"exclude_modules: {key!r} names no module that could have an adapter. This "
                f"server allows: {allowed}."
            )


def _listed(given: Any) -> list[Any]:
    """What may be one, several or none, as peft takes it."""
    if given is None or isinstance(given, str | int):
        return [] if given in (None, "") else [given]
    return list(given)


def _ends_in(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({re.escape(key)})$")


def _ends_in_pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _has_layers(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*?\.){pattern}\.\d+\.")


def _in_layer(config: LoraConfig) -> Callable[[int], re.Pattern[str]]:
    """Layers by number; where none of their names is given, peft counts the first in a name."""
    names = "|".join(map(str, _listed(config.layers_pattern)))
    before = rf"(.*?\.)?({names})\." if names else r"((?!\d+\.)[^.]+\.)*"
    return lambda number: re.compile(rf"{before}{number}\.")
