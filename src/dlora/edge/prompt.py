"""Virtual tokens in front of every text: prompt tuning and P-tuning.

They are rows of embeddings that are trained, and enter the cloud like those of other tokens. There
is no site: a micro-batch takes two round trips, and the gradient of what entered comes back. peft
puts them in front of embeddings, labels and masks; behind that a split model sees a longer text.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningInit,
    TaskType,
)

from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb

__all__ = ["check_prompt", "checked_prompt", "trains_prompt", "virtual_tokens", "without_draw"]

_INSTEAD: Final = "use prompt tuning or P-tuning, whose virtual tokens enter as embeddings, or LoRA"
_OTHER: Final = f"it wants more of each text than its tokens: {_INSTEAD}"
_REASONS: Final = dict.fromkeys(
    (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE),
    f"it puts keys and values into the attention of every layer, in the cloud: {_INSTEAD}",
)


def checked_prompt(config: PromptLearningConfig) -> PromptLearningConfig:
    """A copy of the config; refuses, by name, what needs more than the entry of the model."""
    kind = config.peft_type.value
    if config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        raise UsageError(f"{kind} is not supported: {_REASONS.get(config.peft_type, _OTHER)}")
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise UsageError(f"{kind} with task_type {config.task_type}: use LoRA for it")
    if getattr(config, "modules_to_save", None):
        raise UsageError(f"{kind} is saved alone: no modules_to_save")
    config = dataclasses.replace(config, task_type=TaskType.CAUSAL_LM)
    if (config.num_virtual_tokens or 0) < 1:
        raise UsageError(f"num_virtual_tokens: got {config.num_virtual_tokens}, want 1 or more")
    return config


def without_draw(config: PromptLearningConfig) -> PromptLearningConfig:
    """The config of a saved prompt that is trained on, whose values need not be made.

    Raises UsageError for P-tuning: peft saves what its encoder gives, and not the encoder.
    """
    if isinstance(config, PromptEncoderConfig):
        raise UsageError(
            "a saved P-tuning adapter cannot be trained on: its folder has the virtual tokens, and "
            "not the encoder that made them: use prompt tuning, or is_trainable=False"
        )
    changed: PromptLearningConfig = dataclasses.replace(
        config, prompt_tuning_init=PromptTuningInit.RANDOM, tokenizer_kwargs=None
    )
    return changed


def check_prompt(config: PeftConfig, description: pb.Description) -> None:
    """Raises UsageError for a model that a prompt cannot stand before."""
    if description.tables:
        raise UsageError(
            f"{config.peft_type.value}: virtual tokens have no row in {description.tables[0]}, "
            "which this model looks up beside the embedding: use LoRA"
        )


def virtual_tokens(model: PeftModel) -> int:
    """How many stand in front of each text now."""
    config = model.active_peft_config
    return config.num_virtual_tokens if config.is_prompt_learning else 0


def trains_prompt(model: PeftModel) -> bool:
    """Whether a prompt's values ask for gradients."""
    encoders = getattr(model, "prompt_encoder", None)
    return encoders is not None and any(one.requires_grad for one in encoders.parameters())
