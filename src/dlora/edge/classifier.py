"""A classification head on the edge, in place of the LM head: peft's task type SEQ_CLS.

The model is the architecture's own `...ForSequenceClassification`, whose decoder is in the cloud as
any other's. Its head is drawn here, and is trained and saved with the adapter. It reads one token
of each row, the last that is no padding, so that no other hidden state has to come back.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from dlora.edge.ends import CLASSIFIERS
from dlora.edge.labels import HeadRequest
from dlora.errors import ModelError, UsageError
from dlora.protocol.decoder import DecoderOutput, decoder_of, decoders_of, prefix_of

__all__ = [
    "draw_head",
    "empty_classifier",
    "empty_head",
    "is_classifier",
    "labels_in",
    "last_token",
    "reads_last_token",
    "refuse_classifier",
]


def is_classifier(base: PreTrainedModel) -> bool:
    """Whether this model has a classification head."""
    return any(hasattr(base, name) for name in CLASSIFIERS)


def labels_in(weights: Mapping[str, Tensor]) -> int | None:
    """The number of labels of a classifier with these weights; None where no head is in them."""
    heads = (f"{name}.weight" for name in CLASSIFIERS)
    ends = tuple(f".{name}" for name in heads)
    return next((len(weight) for name, weight in weights.items() if name.endswith(ends)), None)


def refuse_classifier(base: PreTrainedModel, what: str) -> None:
    """Raises UsageError where text is wanted of a classifier; `what` wants it."""
    if is_classifier(base):
        raise UsageError(
            f"{what} wants an adapter that writes text, and this one classifies it (task_type "
            "SEQ_CLS): from Python, dlora.load_adapter(cloud, folder)(**tokens).logits"
        )


# ----------------------------------------------------------------- the model


def empty_classifier(config: PreTrainedConfig, num_labels: int) -> PreTrainedModel:
    """The architecture with a head for so many labels. Raises UsageError where there is none."""
    if num_labels < 1:
        raise UsageError(f"num_labels: got {num_labels}, want 1 or more")
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UsageError(
            f"task_type SEQ_CLS: transformers has no classifier of model type {config.model_type}: "
            "use CAUSAL_LM, and let the completion be the label"
        )
    config.num_labels = num_labels
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, trust_remote_code=False
    )
    model.generate = model.prepare_inputs_for_generation = _generates_nothing
    return model


def _generates_nothing(*_: Any, **__: Any) -> NoReturn:
    raise UsageError("a classifier (task_type SEQ_CLS) generates no text: call it for its logits")


def empty_head(model: PreTrainedModel, width: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Give a classifier's head memory; return its parameters.

    Raises ModelError for parameters that peft would not save, and for another width.
    """
    inside, real = prefix_of(model, decoder_of(model)), []
    for name, parameter in list(model.named_parameters()):
        if name.startswith(inside):
            continue
        if name.partition(".")[0] not in CLASSIFIERS:
            raise ModelError(f"task_type SEQ_CLS: peft would not save {name} of this classifier")
        place, _, own = name.rpartition(".")
        filled = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(place), own, filled)
        real.append(filled)
    if not real or real[0].shape[-1] != width:
        raise ModelError(
            f"task_type SEQ_CLS: {type(model).__name__} has no head for hidden states of width "
            f"{width}"
        )
    return real


def draw_head(model: PreTrainedModel) -> None:
    """Draw the head as transformers draws one that a checkpoint lacks."""
    for name in CLASSIFIERS:
        if (head := getattr(model, name, None)) is not None:
            for module in head.modules():
                model._init_weights(module)


# ----------------------------------------------------------------- what its head reads


def last_token(ids_BT: Tensor, pad: int | None) -> HeadRequest:
    """The last token of each row that is no padding; without a padding token the last of all."""
    is_token_BT = torch.ones_like(ids_BT) if pad is None else (ids_BT != pad).int()
    last_B = (torch.arange(ids_BT.shape[1], device=ids_BT.device) * is_token_BT).argmax(-1)
    keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    keep_BT[torch.arange(len(ids_BT), device=ids_BT.device), last_B] = True
    return HeadRequest(keep_BT)


def reads_last_token(base: PreTrainedModel, width: int) -> bool:
    """Whether the head's logits depend on what `last_token` names, and on nothing else.

    Tried on two rows, padded on either side. Of another classifier all hidden states come back.
    """
    config, decoders = base.config.get_text_config(), decoders_of(base)
    pad, config.pad_token_id = config.pad_token_id, 0
    ids_BT = torch.tensor([[0, 0, 1, 2, 1], [2, 1, 1, 0, 0]], device=base.device)
    own = [decoder.__dict__.get("forward") for decoder in decoders]
    dtype = base.get_input_embeddings().get_parameter("weight").dtype
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        hidden_BTD = torch.randn(*ids_BT.shape, width, device=base.device).to(dtype)
        hidden_BTD.requires_grad_(True)
        try:
            for decoder in decoders:
                decoder.forward = lambda *_, **__: DecoderOutput(last_hidden_state=hidden_BTD)
            logits = base.forward(input_ids=ids_BT, attention_mask=(ids_BT != 0).long()).logits
        finally:
            config.pad_token_id = pad
            for decoder, forward in zip(decoders, own, strict=True):
                decoder.__dict__.pop("forward")
                if forward is not None:
                    decoder.forward = forward
        (grad_BTD,) = torch.autograd.grad(logits.float().sum(), hidden_BTD)
    read_BT = grad_BTD.abs().sum(-1) > 0
    keep_BT = last_token(ids_BT, 0).keep_BT
    return keep_BT is not None and torch.equal(read_BT, keep_BT)
