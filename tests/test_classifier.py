"""A classification head on the edge (task type SEQ_CLS): like local peft's, and as frugal as it can
be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCAB, adapter, lora, make_split
from helpers import local_classifier
from peft import PeftModel
from peft import get_peft_model as peft_model
from transformers import AutoModelForSequenceClassification

import dlora
from dlora.edge.classifier import empty_classifier
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.model import SplitModel
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.inference.answer import load_for_inference


def classifier(link: Any, family: str = "llama", **options: Any) -> SplitModel:
    """A split classifier with the family's usual adapter."""
    return make_split(link, lora(family, task_type="SEQ_CLS"), **options)


def rows(seed: int, side: str = "right", labels: int = 3) -> dict[str, torch.Tensor]:
    """A batch of texts of unequal lengths, with padding on this side, and a class for each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (4, 1), generator=generator)
    places = torch.arange(9)[None]
    mask_BT = (places < lengths if side == "right" else places >= 9 - lengths).long()
    ids_BT = torch.randint(5, VOCAB, (4, 9), generator=generator) * mask_BT
    labels_B = torch.randint(0, labels, (4,), generator=generator)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_B}


@pytest.mark.parametrize(
    ("family", "wire", "side"),
    [
        ("llama", "plain", "right"),
        ("llama", "hosted", "left"),
        pytest.param("gpt2", "factored", "right", marks=pytest.mark.slow),
    ],
)
def test_three_steps_are_local_pefts(
    links: Callable[[str], GrpcLink], tmp_path: Path, family: str, wire: str, side: str
) -> None:
    """Loss, gradients and change of adapter and head in three steps equal local peft's, and what is
    saved gives the same logits on the local base.
    """
    consent = wire == "hosted"
    split = classifier(links(family), family, num_labels=3, wire=wire, upload_consent=consent)
    local = local_classifier(family, split, num_labels=3)
    start = {name: parameter.detach().clone() for name, parameter in adapter(local).items()}
    assert adapter(split).keys() == start.keys() and any("score" in name for name in start)

    models = (local, split)
    optimizers = [torch.optim.SGD(adapter(model).values(), lr=0.05) for model in models]
    for seed in range(3):
        batch = rows(seed, side)
        want, got = (model(**batch).loss for model in models)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip((want, got), optimizers, strict=True):
            loss.backward()
            if optimizer is optimizers[1]:
                for name, parameter in adapter(local).items():
                    mine = adapter(split)[name].grad
                    torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all((adapter(split)[name] - before).any() for name, before in start.items())

    split.save_pretrained(tmp_path)
    base = local_classifier(family, split, num_labels=3, bare=True)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    batch = rows(7, side)
    with torch.no_grad():
        want = split.eval()(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, want, rtol=1e-4, atol=1e-5)
        again = dlora.load_adapter(split.link, tmp_path, wire_dtype="fp32", is_trainable=False)
        torch.testing.assert_close(again(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_it_begins_as_local_peft_does(model_folder: Path, link: InProcessLink) -> None:
    """At the same seed head and adapter begin with the values that they have where transformers
    draws the head of a local checkpoint and peft puts the adapter on it.
    """
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=3, dtype=torch.float32
    )
    local = peft_model(base, lora(task_type="SEQ_CLS"))
    torch.manual_seed(5)
    split = dlora.get_peft_model(link, lora(task_type="SEQ_CLS"), num_labels=3)
    for name, parameter in adapter(local).items():
        torch.testing.assert_close(adapter(split)[name], parameter, rtol=0, atol=0)


def test_one_hidden_state_a_row_comes_back(link: InProcessLink) -> None:
    """Of each row the hidden state that the head reads crosses the wire, and no other. The head's
    FLOPs are counted; where nobody knows what a head reads, all states come back.
    """
    split, batch = classifier(link, num_labels=3), rows(1)
    received = []
    for reads_last in (True, False):
        split._calls._reads_last = reads_last
        before = split.meter.copy()
        with torch.no_grad(), split.disable_adapter():
            logits = split(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        cost = split.meter - before
        received.append((cost.received_bytes, logits.logits))
        assert cost.head_flops == 2 * 4 * 9 * 64 * 3
    few, all_of_them = received
    tokens = int(batch["attention_mask"].sum())
    assert all_of_them[0] - few[0] == pytest.approx((tokens - 4) * 64 * 4, rel=0.01)
    torch.testing.assert_close(few[1], all_of_them[1])


def test_what_is_no_text_is_refused(link: InProcessLink, tmp_path: Path) -> None:
    """A classifier generates nothing, and its folder answers no prompt; other tasks, and labels
    without the task, are refused by name.
    """
    split = classifier(link, num_labels=1)
    with pytest.raises(UsageError, match="generates no text"):
        split.generate(torch.tensor([[5, 6]]))
    split.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="classifies it"):
        load_for_inference(link, tmp_path)
    with pytest.raises(UsageError, match="task_type TOKEN_CLS is not supported"):
        dlora.get_peft_model(link, lora(task_type="TOKEN_CLS"))
    with pytest.raises(UsageError, match="num_labels is of a classifier"):
        dlora.get_peft_model(link, lora(), num_labels=2)
    with pytest.raises(UsageError, match="built for another"):
        split.add_adapter("other", lora())


def test_family_without_classifier_is_refused() -> None:
    """An architecture that has no classifier in transformers is refused, with what to use."""
    config = copy.deepcopy(FAMILIES["llama"][0])
    config.model_type = "mamba"
    with pytest.raises(UsageError, match="no classifier of model type mamba"):
        empty_classifier(config, 2)
