"""The split model against its reference: peft on the full model, on one machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, adapter, batches, lora, make_base, make_local, make_split
from helpers import assert_same_after_twenty_steps, assert_same_grads
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import dlora
from dlora.embedded import InProcessLink

Links = Callable[[str], Any]


@pytest.mark.parametrize("wire", ["plain", "factored"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_matches_local(links: Links, family: str, wire: str) -> None:
    """Loss and every adapter gradient equal local peft's, with padding, unequal lengths and
    accumulation.
    """
    local, split = (
        make_local(family, lora(family)),
        make_split(links(family), lora(family), wire=wire),
    )
    for name, parameter in adapter(local).items():
        assert torch.equal(parameter, adapter(split)[name]), (
            "the two must start from the same adapter"
        )
    for batch in batches(3):
        want, got = local(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        got.backward()
    assert_same_grads(local, split)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_local(links: Links, family: str) -> None:
    """Without labels, logits at every attended position equal local peft's."""
    local, split = (
        make_local(family, lora(family)).eval(),
        make_split(links(family), lora(family)).eval(),
    )
    batch = batches()[0]
    del batch["labels"]
    with torch.no_grad():
        want, got = local(**batch).logits, split(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_twenty_steps_match_local(links: Links, family: str) -> None:
    """After 20 AdamW steps the change of the adapter differs by at most 1e-4 of its norm."""
    assert_same_after_twenty_steps(
        make_local(family, lora(family)), make_split(links(family), lora(family))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(options),
)
def test_lora_options_match_local(links: Links, options: dict[str, Any]) -> None:
    """Whatever LoraConfig option is accepted means on the split model what it means in peft."""
    local, split = make_local("llama", lora(**options)), make_split(links("llama"), lora(**options))
    batch = batches()[0]
    for model in (local, split):
        for name, parameter in adapter(model).items():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.02)  # B starts at zero for some options
        model(**batch).loss.backward()
    assert_same_grads(local, split)


def test_dropout_draws_the_same_masks(links: Links) -> None:
    """Without padding LoRA dropout draws local peft's masks, so even dropout runs match."""
    local, split = (
        make_local("llama", lora(lora_dropout=0.3)),
        make_split(links("llama"), lora(lora_dropout=0.3)),
    )
    batch = batches()[0] | {"attention_mask": torch.ones(3, 11, dtype=torch.long)}
    for model in (local, split):
        torch.manual_seed(5)
        model(**batch).loss.backward()
    assert_same_grads(local, split)


def test_left_padding_matches_local(links: Links) -> None:
    """A loss on the first real token, predicted from padding, is still local peft's."""
    local, split = make_local("llama", lora()), make_split(links("llama"), lora())
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    want, got = local(**batch).loss, split(**batch).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    want.backward()
    got.backward()
    assert_same_grads(local, split)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_position_ids_are_honoured(links: Links, family: str) -> None:
    """Two sequences packed into one row by position_ids give local peft's loss, not that of one
    long row.
    """
    local, split = make_local(family, lora(family)), make_split(links(family), lora(family))
    ids = batches(rows=1, length=10)[0]["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    # transformers looks for packed sequences only where no KV cache is made; trl passes the same.
    packed = batch | {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]),
        "use_cache": False,
    }
    want = local(**packed).loss.item()
    assert split(**packed).loss.item() == pytest.approx(want, rel=1e-6)
    assert split(**batch).loss.item() != pytest.approx(want, rel=1e-4)


def test_supervised_head_and_full_head_agree(links: Links) -> None:
    """Computing the head at supervised positions alone changes neither loss nor gradients."""
    grads = []
    for positions in ("supervised", "all"):
        split = make_split(links("llama"), lora())
        split.set_options(head_positions=positions)
        split(**batches()[0]).loss.backward()
        grads.append(split)
    assert_same_grads(*grads)


def test_switched_off_adapter_is_the_base(links: Links) -> None:
    """With the adapter disabled the split model is the base model, and no site is exchanged."""
    split = make_split(links("llama"), lora()).eval()
    batch = batches()[0]
    del batch["labels"]
    with torch.no_grad(), split.disable_adapter():
        got = split(**batch).logits
        want = make_base("llama").eval()(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-5)
    assert split.meter.round_trips == 1


def test_batch_without_any_label_gives_zero_gradients(links: Links) -> None:
    """A micro-batch with nothing to learn from is no error in a sum over many: its gradients are
    zero.
    """
    split = make_split(links("llama"), lora())
    batch = batches()[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    split(**batch, num_items_in_batch=torch.tensor(7)).loss.backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in adapter(split).values()
    )


@pytest.mark.parametrize("wire_dtype", ["fp16", "bf16", "int8", "int4"])
def test_short_wire_dtypes_are_close(links: Links, wire_dtype: str) -> None:
    """Fewer bytes cost gradients no more than this share of their norm, tiny losses included."""
    local, split = (
        make_local("llama", lora()),
        make_split(links("llama"), lora(), wire_dtype=wire_dtype),
    )
    batch = batches()[0]
    for model in (local, split):
        (1e-6 * model(**batch).loss).backward()  # plain fp16 would round these gradients to zero
    want, got = (
        torch.cat([p.grad.flatten() for p in adapter(model).values()]) for model in (local, split)
    )
    assert (got - want).norm() <= {"fp16": 0.005, "bf16": 0.02, "int8": 0.05, "int4": 0.5}[
        wire_dtype
    ] * want.norm()


def test_in_process_equals_grpc_bit_for_bit(links: Links, cloud_models: Links) -> None:
    """The embedded transport runs the same arithmetic: gradients are the same bits."""
    embedded = InProcessLink(cloud_models("llama"))
    found = []
    for link in (links("llama"), embedded):
        split = make_split(link, lora())
        split(**batches()[0]).loss.backward()
        found.append({name: parameter.grad for name, parameter in adapter(split).items()})
    embedded.close()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_saved_adapter_reloads_in_peft(links: Links, tmp_path: Path) -> None:
    """The saved folder names the public model, loads in peft on the full model, and gives equal
    logits.
    """
    split = make_split(links("llama"), lora())
    optimizer = torch.optim.AdamW(adapter(split).values(), lr=1e-2)
    split(**batches()[0]).loss.backward()
    optimizer.step()
    split.save_pretrained(str(tmp_path / "adapter"))
    local = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "adapter")).eval()
    assert local.peft_config["default"].base_model_name_or_path == "example-org/llama"
    again = dlora.load_adapter(
        links("llama"), tmp_path / "adapter", wire_dtype="fp32", is_trainable=False
    )
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        want = local(input_ids=ids).logits
        for model in (split.eval(), again):
            torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)


def test_generate_without_cache_gives_local_tokens(links: Links) -> None:
    """Greedy tokens of a left-padded batch equal local peft's."""
    local, split = make_local("llama", lora()).eval(), make_split(links("llama"), lora()).eval()
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    assert torch.equal(split.generate(**batch, **options), local.generate(**batch, **options))


class Rows(torch.utils.data.Dataset):
    """Rows of equal length for the plain Trainer."""

    def __init__(self) -> None:
        self.batch = batches(rows=12)[0]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


def assert_same_change(
    local: torch.nn.Module, split: torch.nn.Module, start: dict[str, torch.Tensor]
) -> None:
    """The adapters' changes differ by at most 1e-4 of their norm."""
    want, got = (
        torch.cat([(p.detach() - start[name]).flatten() for name, p in adapter(model).items()])
        for model in (local, split)
    )
    assert want.norm() > 1e-3
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_plain_trainer_trains_the_split_model_unchanged(links: Links, tmp_path: Path) -> None:
    """transformers' Trainer with accumulation and evaluation ends with local peft's adapter and
    eval loss.
    """
    local, split = make_local("llama", lora()), make_split(links("llama"), lora())
    start = {name: parameter.detach().clone() for name, parameter in adapter(local).items()}
    losses = []
    for name, model in (("local", local), ("split", split)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert_same_change(local, split, start)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_sft_trainer_with_half_precision_autocast_runs(
    links: Links, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """trl's own default of bf16 autocast also trains: the loss falls, and the adapter stays
    fp32.
    """
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"prompt": f"message {n * 7}", "completion": f" desk {n % 3}"} for n in range(8)]
    )
    split = make_split(links("llama"), lora(), wire_dtype="bf16")
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 2e-2,
        "logging_steps": 1,
    }
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, bf16=True, **options
    )
    trainer = SFTTrainer(
        model=split, args=arguments, train_dataset=rows, processing_class=copy.deepcopy(tokenizer)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.dtype == torch.float32 for parameter in adapter(split).values())


def test_sft_trainer_trains_the_split_model_unchanged(
    links: Links, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """trl's SFTTrainer at its defaults (but fp32), on prompts and completions, ends with local
    peft's adapter.
    """
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"prompt": f"message {n * 7}", "completion": f" desk {n % 3}"} for n in range(8)]
    )
    local, split = make_local("llama", lora()), make_split(links("llama"), lora())
    start = {name: parameter.detach().clone() for name, parameter in adapter(local).items()}
    for name, model in (("local", local), ("split", split)):
        arguments = SFTConfig(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            num_train_epochs=3,
            learning_rate=1e-3,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        trainer.evaluate()
    assert_same_change(local, split, start)
