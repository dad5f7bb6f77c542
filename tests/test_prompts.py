"""Virtual tokens in front of a text (prompt tuning, P-tuning): like local peft's, at two round
trips a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, batches, make_base, make_split
from helpers import assert_same_grads
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft import get_peft_model as peft_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import dlora
from dlora.edge.describe import describe_adapter
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.sites import refuse_head
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.inference.answer import Continuing, check_room, load_for_inference
from dlora.inference.evaluate import choice_scores

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")


def prompt(**options: Any) -> PromptTuningConfig:
    """Four virtual tokens."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


def encoder(**options: Any) -> PromptEncoderConfig:
    """Four virtual tokens that an MLP makes."""
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32, **options
    )


def answer(model: Any) -> torch.Tensor:
    """What a model says after two prompts of unequal lengths, padded on the left."""
    return model.generate(
        input_ids=torch.tensor([[0, 7, 8], [5, 6, 9]]),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        max_new_tokens=5,
        do_sample=False,
    )


@pytest.mark.parametrize(
    ("family", "wire", "make"),
    [
        ("llama", "plain", prompt),
        ("llama", "hosted", encoder),
        pytest.param("gpt2", "factored", prompt, marks=pytest.mark.slow),
    ],
)
def test_three_steps_are_local_pefts(
    links: Callable[[str], GrpcLink], tmp_path: Path, family: str, wire: str, make: Any
) -> None:
    """Loss, gradients and change of the virtual tokens in three steps equal local peft's at two
    round trips each; and what is saved gives the same logits and answers, here and there.
    """
    torch.manual_seed(1)
    local_base = make_base(family)
    torch.manual_seed(1)
    local = peft_model(local_base, make())
    consent = wire == "hosted"
    split = make_split(links(family), make(), wire=wire, upload_consent=consent)
    start = {name: parameter.detach().clone() for name, parameter in adapter(split).items()}
    optimizers = [torch.optim.SGD(adapter(model).values(), lr=0.1) for model in (local, split)]
    for batch in batches(3):
        want, got = (model(**batch).loss for model in (local, split))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        want.backward()
        got.backward()
        assert_same_grads(local, split, tolerance=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert split.meter.round_trips == 2 * 3
    assert all((adapter(split)[name] - before).any() for name, before in start.items())

    split.save_pretrained(tmp_path)
    other = make_base(family)
    other.name_or_path = split.link.description.model_id
    plain = PeftModel.from_pretrained(other, str(tmp_path)).eval()
    again = load_for_inference(split.link, tmp_path, wire_dtype="fp32")
    batch = batches(1)[0]
    attended_BT = torch.nn.functional.pad(batch["attention_mask"], (4, 0), value=1).bool()
    with torch.no_grad():
        want, *others = (model(**batch).logits for model in (split.eval(), plain, again))
    for logits in others:
        torch.testing.assert_close(logits[attended_BT], want[attended_BT], rtol=1e-4, atol=1e-4)
    assert torch.equal(answer(again), answer(plain))
    assert torch.equal(answer(again), answer(split))


def test_virtual_tokens_are_all_that_travels_more(link: InProcessLink) -> None:
    """What a text costs more with virtual tokens in front are their rows: up embedded, down the
    gradient of all that entered; without them the base model answers.
    """
    split, batch = make_split(link, prompt()), batches(1)[0]
    split(**batch).loss.backward()
    rows = int(batch["attention_mask"].sum()) + 3 * 4
    kept = int((batch["labels"][:, 1:] != -100).sum())
    payload = (rows + kept) * 64 * 4
    assert split.meter.sent_bytes == pytest.approx(payload, rel=0.05)
    assert split.meter.received_bytes == pytest.approx(payload, rel=0.05)

    base = dlora.edge.load.load_base(link, wire_dtype="fp32")
    with torch.no_grad(), split.disable_adapter():
        torch.testing.assert_close(split(**batch).loss, base(**batch).loss)


def test_a_checkpoint_goes_on(link: InProcessLink, tmp_path: Path) -> None:
    """A trainer's run that goes on from a checkpoint ends with the bits of one that was never
    stopped, and a saved prompt can be trained on; that of P-tuning is refused, as its encoder is
    not saved.
    """
    rows = [{"input_ids": [5, 6, 7 + n, 9], "labels": [5, 6, 7 + n, 9]} for n in range(8)]

    def run(folder: str, steps: int, **resume: Any) -> torch.Tensor:
        split = make_split(link, prompt())
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            lr_scheduler_type="constant",
            learning_rate=0.1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(split, arguments, train_dataset=rows).train(**resume)
        return split.prompt_encoder["default"].embedding.weight.detach().clone()

    whole = run("whole", 4)
    cut = run("cut", 2)
    on = run("cut", 4, resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert torch.equal(on, whole) and not torch.equal(cut, whole)

    again = dlora.load_adapter(link, tmp_path / "cut/checkpoint-4", wire_dtype="fp32")
    assert torch.equal(again.prompt_encoder["default"].embedding.weight, whole)
    again(**batches(1)[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter(again).values())

    make_split(link, encoder()).save_pretrained(tmp_path / "p")
    with pytest.raises(UsageError, match="cannot be trained on"):
        dlora.load_adapter(link, tmp_path / "p")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "every layer.*use prompt",
        ),
        (IA3Config(target_modules=["k_proj"]), "IA3 is not supported.*kind='series'"),
        (AdaLoraConfig(total_step=10), "ADALORA is not supported.*rank_pattern"),
        (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), "use LoRA for it"),
        (PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens: got 0"),
    ],
)
def test_other_kinds_are_refused(link: InProcessLink, config: Any, message: str) -> None:
    """Kinds of adapters that cannot be here are refused by name, with what to use."""
    with pytest.raises(UsageError, match=message):
        dlora.get_peft_model(link, config)


def test_a_prompt_stands_alone(link: InProcessLink) -> None:
    """Nothing is put beside a prompt, and drafts behind one are refused, not wrong."""
    split = make_split(link, prompt())
    with pytest.raises(UsageError, match="prompts stand alone"):
        split.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="without drafts"):
        split.generate(torch.tensor([[5, 6]]), prompt_lookup_num_tokens=2)


def test_commands_take_a_prompt(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A prompt's folder answers, turn by turn too, and is described; `dlora train` and scores of
    choices refuse it by name; room is left for its tokens.
    """
    make_split(link, prompt()).save_pretrained(tmp_path)
    lines = dict(describe_adapter(tmp_path, link.description))
    assert "PROMPT_TUNING, 4 virtual tokens" in lines["adapter"] and lines["fit"] == "yes"
    assert "4 virtual tokens, PROMPT_TUNING." in (tmp_path / "README.md").read_text()

    model = load_for_inference(link, tmp_path, wire_dtype="fp32")
    limit = link.description.limits.max_length
    assert check_room(model, 5, limit) == limit - 5 - 4
    turns, ids = Continuing(model), torch.tensor([[5, 6]])
    for _ in range(2):  # of which the second begins with the first
        want = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        ids = turns.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(ids, want)
        ids = torch.cat([ids, torch.tensor([[9, 10]])], dim=1)
    with pytest.raises(UsageError, match="score this adapter by loss"):
        choice_scores(model, tokenizer, [("the desk", [" a", " b"])])
    with pytest.raises(UsageError, match="prompts are trained from Python"):
        refuse_head(model, link.description)
