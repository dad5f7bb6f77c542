"""Architectures of every kind, tiny and random: the split against local peft.

What a record is checked for stands in `benchmarks/families.py`, which also makes the table of all.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base, make_split
from peft import LoraConfig, get_peft_model
from test_faults import PHASES, FaultyLink, Mortal, run

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.cloud_layers import CloudLayers
from dlora.errors import ModelError, UsageError
from dlora.trial import _Trial

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# What people use most beside those of `conftest.FAMILIES`, one of each kind: a rotation that
# depends on length, fused experts of four makes, latent attention, layers that differ, states in
# place of keys and values, alone and between attention.
USUAL = [
    "phi3",
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v3",
    "granitemoehybrid",
    "gemma4_text",
    "mamba",
    "jamba",
]
MORE = [
    "olmoe",
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    "deepseek_v2",
    "glm4_moe",
    "llama4_text",
    "falcon_h1",
    "nemotron_h",
    "kimi_linear",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma",
    "cohere",
    "cohere2",
    "falcon",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "mpt",
    "phi",
    "starcoder2",
    "stablelm",
    "olmo2",
    "smollm3",
    "ernie4_5",
    "hunyuan_v1_dense",
    "minimax_m2",
    "mamba2",
    "bert",
    "bigbird_pegasus",
]


@pytest.fixture(scope="module")
def families() -> Iterator[Any]:
    """The sweep over all architectures, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("families")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("architecture", USUAL)
def test_architecture_trains_and_answers_as_local_peft(families: Any, architecture: str) -> None:
    """All linears, padding on each side, cached answers and the saved adapter are local peft's."""
    record = families.check(architecture, thorough=False)
    assert record["status"] == "right", record
    assert record["cache"], record


@pytest.mark.slow
def test_server_of_a_mixture_killed_in_a_step(families: Any, tmp_path: Path) -> None:
    """Over a socket, kills in forward and in backward change no bit of a mixture's adapter."""
    import_module("tiny_models").build("mixtral").save_pretrained(tmp_path / "mixtral")
    server = Mortal(tmp_path / "mixtral")
    try:
        link = dlora.connect(f"127.0.0.1:{server.port}", cache=tmp_path)
        want, _ = run(link, tmp_path)
        kills = {number: PHASES[number] for number in (1, 4)}
        got, shaken = run(FaultyLink(link, kills, server.kill), tmp_path)
        link.close()
    finally:
        server.end()
    assert shaken.meter.retries >= len(kills)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:The following .*pattern keys:RuntimeWarning")  # peft's
def test_fused_experts_are_refused_with_what_to_do(families: Any) -> None:
    """Neither peft's word for a fused weight, nor names that it takes for one, gets an adapter."""
    link = dlora.in_process(import_module("tiny_models").build("mixtral"), model_id="tiny/mixtral")
    for options, message in (
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"0.mlp.experts.gate_up_proj is a fused weight .*--wire hosted --upload_consent true",
        ),
        (
            {"target_modules": ["w2"]},
            r"0.mlp.experts.down_proj is a fused weight .*--wire hosted --upload_consent true",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            dlora.get_peft_model(link, LoraConfig(r=2, **options))
    link.close()


def test_what_differs_from_the_whole_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge whose gradients, or whose states with padding, are others is found before a model is
    served.
    """
    own = CloudLayers.micro_batch

    def skewed(self: CloudLayers, new: Any, **options: Any) -> Any:
        micro_batch = own(self, new, **options)
        backward = micro_batch.backward
        micro_batch.backward = lambda grad: backward(1.1 * grad)
        return micro_batch

    monkeypatch.setattr(CloudLayers, "micro_batch", skewed)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be served: .*gradient of"):
        dlora.in_process(make_base("llama"), model_id="x/y")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("deepseek_v4", "cannot be split: its decoder .* looks at token ids as well"),
        ("roberta", "cannot be served: .* Without padding they do not: it sees by token ids"),
        ("inkling2_text", "cannot be split: its token embedding is more than a table"),
        ("xlnet", "cannot be split: it has no linear module .* not one row for each token"),
    ],
)
def test_refusal_says_the_reason_in_words_of_our_own(
    families: Any, architecture: str, reason: str
) -> None:
    """One line has the architecture, what it does that cannot be split, and what to do instead."""
    base = import_module("tiny_models").build(architecture)
    with pytest.raises(ModelError, match=f"^{type(base).__name__} {reason}.*Serve another model"):
        dlora.in_process(base, model_id="x/y")


def test_model_that_cannot_read_text_alone_is_refused() -> None:
    """Where transformers itself cannot run the model, that is the reason."""
    base = make_base("llama")
    base.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ModelError, match="the whole model cannot run .* text alone either"):
        CloudModel(base, model_id="x/y")


def test_whatever_fails_in_the_trial_names_architecture_and_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception of a library is one line of a ModelError."""

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(CloudLayers, "micro_batch", broken)
    with pytest.raises(ModelError, match="LlamaForCausalLM .*tried it .*KeyError: 'no such thing'"):
        dlora.in_process(make_base("llama"), model_id="x/y")


def test_model_is_tried_once_and_served_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second link to the same model, or a copy, costs no trial and computes the same; other
    weights are tried.
    """
    runs: list[str] = []
    own = _Trial.run
    monkeypatch.setattr(_Trial, "run", lambda self: (runs.append("tried"), own(self))[1])
    base = make_base("llama")
    first = dlora.in_process(base, model_id="x/y")
    again = dlora.in_process(base, model_id="x/y", limits=Limits(recompute=True))
    other = dlora.in_process(copy.deepcopy(base), model_id="x/y")
    assert len(runs) == 1

    losses = []
    for link in (first, again, other):
        torch.manual_seed(1)
        split = make_split(link, lora(init_lora_weights=False))
        losses.append(split(**batches()[0]).loss)
        losses[-1].backward()
        grads = [parameter.grad for parameter in adapter(split).values()]
        assert all(grad is not None and grad.any() for grad in grads)
    assert losses[0].item() == losses[1].item() == losses[2].item()

    with torch.no_grad():
        base.model.norm.weight.mul_(2)
    dlora.in_process(base, model_id="x/y")
    assert len(runs) == 2


def test_what_a_trial_found_holds_for_the_next_link(families: Any) -> None:
    """A model whose loss needs all hidden states is served with them by a second link as well."""
    base = import_module("tiny_models").build("bart")
    found = [dlora.in_process(base, model_id="x/y").description.full_head for _ in range(2)]
    assert found == [True, True]


def test_copy_of_a_served_model_is_a_model_of_its_own() -> None:
    """A deep copy runs its own layers: an adapter that local peft puts on it is used."""
    base = make_base("llama")
    dlora.in_process(base, model_id="x/y")
    local = get_peft_model(copy.deepcopy(base), lora(init_lora_weights=False))
    with local.disable_adapter():
        want = local(**batches()[0]).loss
    assert local(**batches()[0]).loss.item() != want.item()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE)
def test_more_architectures_do(families: Any, architecture: str) -> None:
    """The same holds for those that are used less, or stand for a kind of their own."""
    record = families.check(architecture)
    assert record["status"] == "right", record
