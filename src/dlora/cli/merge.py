"""Base model plus adapter as one full model, where the base is at hand."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from dlora.cli.checks import check_mergeable
from dlora.cli.settings import MergeSettings
from dlora.cloud.load import load_model
from dlora.edge.adapter_config import read_adapter_config
from dlora.edge.adapter_weights import check_adapter_weights, read_adapter_weights
from dlora.edge.ends import add_rows, rows_needed
from dlora.errors import DLoRAError, UsageError
from dlora.protocol.text import clean_text

__all__ = ["merge", "run_merge"]


def run_merge(settings: MergeSettings) -> int:
    """Merge, and warn where the adapter names another base."""
    model_id, named = merge(settings)
    if model_id != named:
        print(f"warning: the adapter was made for {named}, this is {model_id}", file=sys.stderr)
    print(f"merged model in {settings.output}")
    return 0


def merge(settings: MergeSettings) -> tuple[str, str]:
    """Write the merged model and tokenizer; return (id of the base, id that the adapter names).

    Raises UsageError if the adapter does not fit the base or `output` is not empty.
    """
    if settings.output.exists() and any(settings.output.iterdir()):
        raise UsageError(f"{settings.output} is not empty: use a new folder")

    check_mergeable(settings.adapter)
    config = read_adapter_config(settings.adapter)
    if config.task_type == TaskType.SEQ_CLS:
        raise UsageError(
            f"adapter: {settings.adapter} classifies text (task_type SEQ_CLS), and what is merged "
            "here are causal LMs: use peft's merge_and_unload on an "
            "AutoModelForSequenceClassification"
        )
    weights = read_adapter_weights(settings.adapter)
    loaded = load_model(settings.model, dtype=settings.dtype)
    add_rows(loaded.model, rows_needed(config, weights))
    misfit = f"the adapter in {settings.adapter} does not fit {settings.model}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft would warn of is refused below, by name
            model = PeftModel.from_pretrained(
                loaded.model, str(settings.adapter), ignore_mismatched_sizes=True
            )
        check_adapter_weights(model, weights, misfit)
        _untie_adapted_head(model)
        merged = model.merge_and_unload()
        _untie_other_ends(merged)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, DLoRAError):
            raise
        raise UsageError(f"{misfit}: {clean_text(error)}") from error

    # Written beside its place and moved there: what has the name is whole.
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output.parent, prefix=".merging-") as scratch:
        folder = Path(scratch) / "model"
        merged.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
        if settings.output.exists():
            settings.output.rmdir()
        folder.rename(settings.output)
    return loaded.model_id, config.base_model_name_or_path or "an unnamed model"


def _untie_adapted_head(model: PeftModel) -> None:
    """Give an LM head with an adapter a weight of its own, where it has the embedding's.

    What is added to the head would else be added to the embedding, too.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, LoraLayer):
        return
    inner = head.get_base_layer()
    if inner.weight is base.get_input_embeddings().weight:
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        _untie(base)


def _untie_other_ends(merged: PreTrainedModel) -> None:
    """Where one of two tied ends was trained, whole, let the saved model have both."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and not torch.equal(head.weight, embedding.weight):
        _untie(merged)


def _untie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
