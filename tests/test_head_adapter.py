"""An adapter on the LM head, which is on the edge: like local peft's, trained, saved and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCAB, adapter, batches, lora, make_local, make_split
from peft import PeftModel
from peft import get_peft_model as peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dlora
from dlora.cli.merge import merge
from dlora.cli.settings import MergeSettings
from dlora.edge.describe import describe_adapter
from dlora.embedded import InProcessLink
from dlora.errors import UsageError

TARGETS = ["q_proj", "lm_head"]


def test_it_is_local_pefts(link: InProcessLink) -> None:
    """Loss and all adapter gradients equal local peft's, and nothing more crosses than without."""
    local, split = (
        make(*given, lora(target_modules=TARGETS))
        for make, given in ((make_local, ("llama",)), (make_split, (link,)))
    )
    (batch,) = batches()
    want, got = local(**batch).loss, split(**batch).loss
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    mine, theirs = adapter(split), adapter(local)
    assert mine.keys() == theirs.keys() and any("lm_head" in name for name in mine)
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)

    without = make_split(link, lora(target_modules=["q_proj"]))
    without(**batch).loss.backward()
    assert split.meter.sent_bytes == without.meter.sent_bytes

    # Its FLOPs are those that torch counts, over and above the head's own.
    head = split.get_output_embeddings()
    states_ND = torch.randn(batch["labels"].shape[0] * 9, 64, requires_grad=True)
    counted = []
    for one in (head, head.base_layer):
        with FlopCounterMode(display=False) as counter:
            one(states_ND).sum().backward()
        counted.append(counter.get_total_flops() / len(states_ND))
    more = split.meter.head_flops - without.meter.head_flops
    rows = without.meter.head_flops / counted[1]
    assert more == pytest.approx(rows * (counted[0] - counted[1]))


def test_bottlenecks_do_not_sit_there(link: InProcessLink) -> None:
    """A bottleneck adapter on the head is refused by name, as it would be computed as a LoRA."""
    with pytest.raises(UsageError, match="lm_head cannot be adapted"):
        dlora.get_peft_model(link, dlora.BottleneckConfig(target_modules=TARGETS))


def test_it_is_described_as_what_fits(link: InProcessLink, tmp_path: Path) -> None:
    """`dlora info` finds the head's adapter on the edge, where it is no site; one for a head of
    another width does not fit.
    """
    make_split(link, lora(target_modules=TARGETS)).save_pretrained(tmp_path)
    shown = dict(describe_adapter(tmp_path, link.description))
    assert (shown["fit"], shown["sites"][:8]) == ("yes", "3 active")
    other = type(link.description)()
    other.CopyFrom(link.description)
    other.hidden_width += 1
    assert "lm_head has widths" in dict(describe_adapter(tmp_path, other))["fit"]
    other.CopyFrom(link.description)
    larger = json.loads(other.config_json) | {"vocab_size": VOCAB + 1}
    other.config_json = json.dumps(larger)
    assert f"lm_head has widths (64, {VOCAB})" in dict(describe_adapter(tmp_path, other))["fit"]


def test_a_tied_head_is_merged_alone(tmp_path: Path) -> None:
    """A merged adapter on a head that has the embedding's weight changes the head alone: answers
    are those of the model with its adapter.
    """
    config = copy.deepcopy(FAMILIES["llama"][0])
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base: LlamaForCausalLM = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model: PeftModel = peft_model(base, lora(target_modules=TARGETS))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(
        MergeSettings(
            model=str(tmp_path / "base"), adapter=tmp_path / "adapter", output=tmp_path / "whole"
        )
    )
    ids = torch.randint(VOCAB, (1, 9))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
