"""trl's trainers, unchanged, on the split model: every figure that they log is local peft's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import adapter, batches, lora, make_local, make_split
from datasets import Dataset
from helpers import assert_same_grads, local_classifier
from transformers import PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head, use_adapter

import dlora
from dlora.cloud.model import CloudModel
from dlora.edge.link import RetryPolicy
from dlora.embedded import InProcessLink
from dlora.errors import PeerLost, UsageError
from dlora.server.server import Server, ServerOptions

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # its notice would be an error here

_PAIRS = [
    {
        "prompt": f"message {'of the desk ' * (n % 3)}{n}",
        "chosen": f" desk {n}",
        "rejected": " the" * n,
    }
    for n in range(1, 5)
]
_RATED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(n % 2)}
    for n, row in enumerate(_PAIRS)
]
_PROMPTS = [{"prompt": row["prompt"]} for row in _PAIRS]
_RANKED = [{key: row[key] for key in ("chosen", "rejected")} for row in _PAIRS]
_COMPLETED = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _PAIRS]

# What differs from run to run, and what looks at logits of padding, which never travels.
_NOT_COMPARED = ("runtime", "per_second", "step_time", "total_flos", "logits/", "sampling/")
_ON_POLICY = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 1.0}

# trainer -> the wire of its split model; plain if it is not here
_WIRES = {"DPO-ipo": "hosted", "KTO": "factored", "GRPO": "hosted"}

# trainer -> (what its config takes, rows)
_TRAINERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "SFT": ({}, _COMPLETED),
    "DPO": ({"beta": 0.5}, _PAIRS),
    "DPO-ipo": ({"beta": 0.5, "loss_type": "ipo"}, _PAIRS),
    "DPO-precomputed": ({"precompute_ref_log_probs": True}, _PAIRS),
    "KTO": ({"beta": 0.5}, _RATED),
    "ORPO": ({"beta": 0.5, "max_length": 64}, _PAIRS),
    "CPO": ({"beta": 0.5, "max_length": 64}, _PAIRS),
    "GRPO": (_ON_POLICY, _PROMPTS),
    "RLOO": (_ON_POLICY, _PROMPTS),
    "Reward": ({"center_rewards_coefficient": 0.01}, _RANKED),
}


# trainer -> micro-batches of the three steps, forward passes alone counted in, as the table of
# docs/trainers.md has them
_STREAMS = {
    **dict.fromkeys(("SFT", "ORPO", "CPO", "Reward"), 3),
    **dict.fromkeys(("DPO", "DPO-ipo"), 3 * 2),
    "DPO-precomputed": 3 + 1,
    "KTO": 3 * 4,
    "GRPO": 3 * 2,
    "RLOO": 3 * 3,
}


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many different characters were written."""
    return [float(len(set(text))) for text in completions]


def train(
    name: str, model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> list[dict[str, Any]]:
    """Three steps of plain SGD, so that the adapter moves by its gradients; what was logged."""
    options, rows = _TRAINERS[name]
    kind = name.partition("-")[0]
    if kind in ("ORPO", "CPO"):
        import trl.experimental.cpo as cpo
        import trl.experimental.orpo as orpo

        module: Any = {"ORPO": orpo, "CPO": cpo}[kind]
    else:
        module = trl
    arguments = getattr(module, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rewards = {"reward_funcs": distinct} if rows is _PROMPTS else {}
    trainer = getattr(module, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **rewards,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("name", _TRAINERS)
def test_trainer_logs_and_learns_what_local_peft_does(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """Three steps of the trainer, with padding: losses, gradient norms, rewards, entropies, token
    accuracies and the adapter's change are those of local peft.
    """
    wire = _WIRES.get(name, "plain")
    if name == "Reward":
        split = make_split(link, lora(task_type="SEQ_CLS"), num_labels=1)
        local = local_classifier("llama", split, num_labels=1)
    else:
        local = make_local("llama", lora())
        split = make_split(link, lora(), wire=wire, upload_consent=wire == "hosted")
    start = {key: parameter.detach().clone() for key, parameter in adapter(local).items()}
    want = train(name, local, tokenizer, tmp_path / "local")
    got = train(name, split, tokenizer, tmp_path / "split")

    assert len(want) == len(got) == 4
    assert split.meter.micro_batches == _STREAMS[name]
    for one, other in zip(want, got, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if not any(part in key for part in _NOT_COMPARED):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert sum(entry.get("grad_norm", 0) for entry in want) > 0
    for key in start:
        moved = (adapter(local)[key] - start[key]).detach()
        assert moved.any(), key
        difference = (adapter(split)[key] - adapter(local)[key]).detach()
        assert difference.norm() <= 1e-3 * moved.norm(), key


def test_supervised_positions_stay_in_their_rows(link: InProcessLink) -> None:
    """Row b of the logits holds local peft's at the supervised positions of row b, in order."""
    local, split = make_local("llama", lora()), make_split(link, lora())
    batch = batches(rows=4)[0]
    batch["labels"][2] = -100
    kept_BT = batch["labels"][:, 1:] != -100
    want, got = local(**batch).logits[:, :-1], split(**batch).logits
    assert got.shape[:2] == (4, int(kept_BT.sum(1).max()) + 1)
    for row, kept_T in enumerate(kept_BT):
        mine = got[row, : int(kept_T.sum())]
        torch.testing.assert_close(mine, want[row, kept_T], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_fused_head_gives_each_token_its_value(link: InProcessLink, training: bool) -> None:
    """What trl's fused head says of each token is local peft's, through the model and through its
    base; and no more hidden states come back than have labels, in evaluation too.
    """
    local, split = make_local("llama", lora()), make_split(link, lora())
    batch = batches(rows=4)[0]
    for model in (local, split):
        model.train(training)
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))

    want = local(**batch, fused_lm_head=True)
    for model in (split, split.get_base_model()):
        before = split.meter.head_flops
        got = model(**batch, fused_lm_head=True)
        assert got.keys() == want.keys()
        for name, values in want.items():
            torch.testing.assert_close(got[name], values, rtol=1e-5, atol=1e-5)
        rows = int((batch["labels"][:, 1:] != -100).sum()) + 1
        assert split.meter.head_flops - before == 2 * rows * 64 * 300 * 2
        got.loss.backward()


def test_deep_copy_keeps_what_the_original_was(link: InProcessLink) -> None:
    """A copied model has the loss of the original at that time, learns by itself, and leaves the
    original's gradients alone.
    """
    split = make_split(link, lora())
    batch = batches()[0]
    before = split(**batch).loss.item()
    reference = copy.deepcopy(split)
    for parameter in adapter(split).values():
        parameter.data.mul_(1.5)
    assert split(**batch).loss.item() != pytest.approx(before, rel=1e-4)
    loss = reference(**batch).loss
    assert loss.item() == pytest.approx(before, rel=1e-6)
    loss.backward()
    assert all(parameter.grad is None for parameter in adapter(split).values())
    local = make_local("llama", lora())
    local(**batch).loss.backward()
    assert_same_grads(local, reference)


def test_copy_as_a_reference_model_is_refused(link: InProcessLink) -> None:
    """A split model given as `ref_model` is refused by name, and not with trl's traceback."""
    reference = copy.deepcopy(make_split(link, lora()))
    add_fused_lm_head(reference)
    with pytest.raises(UsageError, match="ref_model"):
        reference(**batches()[0], fused_lm_head=True)


@pytest.mark.parametrize("idle", ["drop", "cloud"])
def test_active_set_is_of_the_adapter_that_it_was_chosen_for(
    link: InProcessLink, idle: Any
) -> None:
    """While the frozen copy of an adapter is in use all of its modules count; afterwards the idle
    modules are idle, and untrained, as before.
    """
    split = make_split(link, lora()).eval()
    split.add_adapter("ref", lora())
    for name, parameter in split.named_parameters():
        if ".default." in name:
            split.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    batch = batches()[0]
    with torch.no_grad():
        want = split(**batch).loss.item()
        split.set_active(split.adapted_modules[:2], idle=idle)
        chosen, trained = split(**batch).loss.item(), adapter(split).keys()
        with use_adapter(split, "ref"):
            assert split(**batch).loss.item() == pytest.approx(want, rel=1e-6)
        assert split(**batch).loss.item() == pytest.approx(chosen, rel=1e-6)
    assert adapter(split).keys() == trained
    assert len(trained) == 4


@pytest.mark.parametrize(("name", "enough"), [("DPO", 2), ("DPO-precomputed", 1)])
def test_a_tenant_needs_two_streams_for_a_reference(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    enough: int,
) -> None:
    """While the policy's stream waits for its backward pass the reference has one of its own: with
    a limit of one stream that is refused after a wait, in words that say why. Precomputed, one is
    enough.
    """
    options = ServerOptions(drain_s=0.0, max_streams=1)
    with Server(cloud_models("llama"), tokenizer, options=options) as server:
        link = dlora.connect(server.address, cache=tmp_path / "cache")
        split = make_split(link, lora(), retry=RetryPolicy(give_up_after_s=0.5))
        if enough == 1:
            assert len(train(name, split, tokenizer, tmp_path / "run")) == 4
        else:
            with pytest.raises(PeerLost, match="streams"):
                train(name, split, tokenizer, tmp_path / "run")
        link.close()


def test_what_trl_says_no_to(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A second adapter and a reference that follows the policy are refused by trl itself; the copy
    of the adapter that it makes is saved beside it, and a switched-off adapter is one round trip.
    """
    common: dict[str, Any] = {
        "train_dataset": Dataset.from_list(_PAIRS),
        "processing_class": copy.deepcopy(tokenizer),
    }
    options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    split = make_split(link, lora())
    with pytest.raises(ValueError, match="peft_config"):
        arguments = trl.DPOConfig(**options)
        trl.DPOTrainer(model=split, args=arguments, peft_config=lora(), **common)
    with pytest.raises((ValueError, NotImplementedError), match="sync_ref_model"):
        arguments = trl.DPOConfig(**options, sync_ref_model=True)
        trl.DPOTrainer(model=split, args=arguments, **common)

    split = make_split(link, lora())
    trl.DPOTrainer(model=split, args=trl.DPOConfig(**options), **common)
    split.save_pretrained(str(tmp_path / "adapter"))
    files = {file.parent.name for file in (tmp_path / "adapter").rglob("adapter_model.safetensors")}
    assert files == {"adapter", "ref"}
    before = split.meter.round_trips
    with torch.no_grad(), split.disable_adapter():
        split(**batches()[0])
    assert split.meter.round_trips - before == 1
