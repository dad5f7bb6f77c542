"""`dlora tinker`, through the official SDK: its client, its types, its errors."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, VOCAB, make_base
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.inference.api import ApiServer
from dlora.server.server import Server

tinker = pytest.importorskip("tinker", reason="the extra `tinker` is not installed")

from tinker import types

from dlora.tinker.app import build_app
from dlora.tinker.checkpoints import Checkpoints
from dlora.tinker.models import Models
from dlora.tinker.service import Service

# The SDK leaves the connection open over which it asked for its configuration.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
BASE = "example-org/llama"
KEY = "tml-of-a-test"


@pytest.fixture(scope="module")
def service(
    cloud_models: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Iterator[Service]:
    """The interface's service over a real socket, on the exact wire."""
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
        yield Service(
            Models(link, tokenizer, {"wire_dtype": "fp32"}),
            Checkpoints(tmp_path_factory.mktemp("saved")),
            name=BASE,
            lora_alpha=32,
            max_adapters=100,
            batch_size=3,
            everywhere=False,
        )
        link.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """Its address."""
    app = build_app(service, api_key=KEY)
    with ApiServer(app, "127.0.0.1", 0, path="").running() as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """The SDK's client, pointed at it."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as made:
        yield made
    del made
    with warnings.catch_warnings(action="ignore"):
        gc.collect()


def local_twin(seed: int = 3, rank: int = 4) -> PeftModel:
    """Local peft with the adapter that the SDK asks for."""
    base = make_base("llama")
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=32, target_modules=names))


def rows(count: int = 5, seed: int = 0) -> list[list[int]]:
    """Token ids of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def datum(tokens: list[int], skip: int = 2, **inputs: Any) -> Any:
    """A row of next-token prediction, the first targets without weight."""
    weights = [0.0] * skip + [1.0] * (len(tokens) - 1 - skip)
    given = inputs or {"weights": weights}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **given},
    )


def local_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def test_cross_entropy_is_local_pefts(client: Any, service: Service) -> None:
    """Loss, log-probabilities and every adapter gradient of a pass equal local peft's."""
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    output = training.forward_backward([datum(one) for one in rows()], "cross_entropy").result()

    local = local_twin()
    loss = torch.zeros(())
    for one, got in zip(rows(), output.loss_fn_outputs, strict=True):
        logprobs = local_logprobs(local, one)
        loss = loss - logprobs[2:].sum()
        torch.testing.assert_close(got["logprobs"].to_torch()[2:], logprobs[2:].detach())
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)

    wanted = {name: one.grad for name, one in local.named_parameters() if one.requires_grad}
    adapter = service.run(training.model_id).adapter
    assert adapter.parameters.keys() == wanted.keys()
    for name, parameter in adapter.parameters.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_step_is_torchs_adamw(client: Any, service: Service) -> None:
    """Steps with weight decay and a clipped norm leave the weights that torch's AdamW leaves."""
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    settings = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-7, "weight_decay": 0.1}
    local, batch = local_twin(), [datum(one) for one in rows()]
    mine = {name: one for name, one in local.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(
        mine.values(), lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1
    )
    for _ in range(2):
        training.forward_backward(batch, "cross_entropy")
        params = types.AdamParams(learning_rate=0.01, grad_clip_norm=0.5, **settings)
        metrics = training.optim_step(params).result().metrics

        loss = sum(-local_logprobs(local, one)[2:].sum() for one in rows())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mine.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["unclipped_grad_l2:mean"] == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in service.run(training.model_id).adapter.parameters.items():
        torch.testing.assert_close(parameter, mine[name], rtol=1e-3, atol=1e-4)


def test_samples_have_the_log_probabilities_of_a_forward_pass(client: Any) -> None:
    """What was sampled with has, in a pass over prompt and answer, the log-probabilities that came
    with it; they repeat with a seed, stop where they should, and differ without.
    """
    training = client.create_lora_training_client(BASE, rank=4, seed=5).result()
    for _ in range(2):
        training.forward_backward([datum(one) for one in rows()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.02)).result()
    sampling = training.save_weights_and_get_sampling_client().result()
    prompt = rows()[0]
    ask = types.SamplingParams(max_tokens=6, seed=1, temperature=0.7, top_k=50, stop=[])
    given = types.ModelInput.from_ints(prompt)
    answer = sampling.sample(
        given, 4, ask, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3
    ).result()
    again = sampling.sample(given, 4, ask).result()
    assert [one.tokens for one in answer.sequences] == [one.tokens for one in again.sequences]
    assert len({tuple(one.tokens) for one in answer.sequences}) > 1

    for one in answer.sequences:
        whole = prompt + one.tokens
        asked = datum(whole, skip=0, weights=[1.0] * (len(whole) - 1))
        forward = training.forward([asked], "cross_entropy").result()
        want = forward.loss_fn_outputs[0]["logprobs"].to_torch()
        begin = len(prompt) - 1
        torch.testing.assert_close(torch.tensor(one.logprobs), want[begin:], rtol=1e-4, atol=1e-4)
        got = answer.prompt_logprobs
        assert got[0] is None and got[1:] == pytest.approx(want[:begin].tolist(), abs=1e-4)
        assert [len(best) for best in one.topk_logprobs] == [3] * 6 and one.stop_reason == "length"
    assert answer.topk_prompt_logprobs[0] is None and len(answer.topk_prompt_logprobs[1]) == 2
