"""What the README of an adapter's folder says, and what is said where adapters would be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig, TaskType

from dlora.edge.ends import grown_rows
from dlora.errors import UsageError

__all__ = ["card_head", "how_to_load", "refuse_merging", "write_card"]


def write_card(model: PeftModel, output_dir: str) -> None:
    """Write README.md of an adapter's folder: base, kind, how to load it. One that is there stays.

    Takes the place of peft's method, whose template asks for what nobody has filled in.
    """
    file = Path(output_dir) / "README.md"
    if file.exists():
        return
    own, config = model.get_base_model(), model.active_peft_config
    base, grown = own.name_or_path, grown_rows(own, model.link.description)
    labels = own.config.num_labels if config.task_type == TaskType.SEQ_CLS else None
    text = (
        f"{card_head(base, classifies=labels is not None)}\n# {_what(config)} for {base}\n\n"
        f"{_size(config)}. Made with DLoRA.\n\n"
        f"{how_to_load(base, Path(output_dir).name, num_labels=labels, num_tokens=grown)}"
    )
    file.write_text(text, encoding="utf-8")


def card_head(base: str, *, classifies: bool = False) -> str:
    """The lines that programs read: base, library, task."""
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["dlora", "lora"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def how_to_load(
    base: str,
    folder: str,
    *,
    bottleneck: bool = False,
    num_labels: int | None = None,
    num_tokens: int = 0,
) -> str:
    """The section on using an adapter, with the base at hand and without.

    `num_labels` are a classifier's, `num_tokens` the rows of an embedding with new tokens.
    """
    library, call = "from peft import PeftModel", "PeftModel.from_pretrained"
    if bottleneck:  # which peft does not know
        library, call = "import dlora", "dlora.apply_bottleneck"
    head, more = "AutoModelForCausalLM", ""
    if num_labels is not None:
        head, more = "AutoModelForSequenceClassification", f", num_labels={num_labels}"
    grow = f"base.resize_token_embeddings({num_tokens})\n" if num_tokens else ""
    here = (
        "## How to load it\n\nWhere the base model is:\n\n```python\n"
        f"{library}\nfrom transformers import {head}\n\n"
        f"base = {head}.from_pretrained({base!r}{more})\n{grow}"
        f"model = {call}(base, {folder!r})\n```\n\n"
        "With the base model in the cloud, and text and adapter here:\n\n"
    )
    if num_labels is not None:
        return (
            f"{here}```python\nimport dlora\n\n"
            f'model = dlora.load_adapter(dlora.connect("HOST:PORT"), {folder!r})\n```\n'
        )
    return f"{here}```\ndlora generate --server HOST:PORT --adapter {folder} --prompt ...\n```\n"


def _what(config: PeftConfig) -> str:
    return "A prompt" if isinstance(config, PromptLearningConfig) else "A LoRA adapter"


def _size(config: PeftConfig) -> str:
    if isinstance(config, PromptLearningConfig):
        return f"{config.num_virtual_tokens} virtual tokens, {config.peft_type.value}"
    return f"Rank {config.r}, alpha {config.lora_alpha}, on {_targets(config)}"


def _targets(config: LoraConfig) -> str:
    """Modules, and fused weights of experts."""
    if isinstance(config.target_modules, str):
        names = [config.target_modules]
    else:
        names = sorted(config.target_modules or ())
    return ", ".join((*names, *sorted(config.target_parameters or ())))


def refuse_merging(*_: Any, **__: Any) -> NoReturn:
    """In place of peft's `merge_and_unload` and `merge_adapter`. Raises UsageError."""
    raise UsageError(
        "the base weights are in the cloud, so that nothing can be merged here: save the adapter "
        "and use `dlora merge --model BASE --adapter FOLDER --output NEW` where the base is, or "
        "peft's merge_and_unload there"
    )
