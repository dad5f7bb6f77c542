"""`dlora tinker`, through the official SDK: its client, its types, its errors."""

from __future__ import annotations

import gc
import http.client
import io
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, VOCAB, lora, make_base, make_split
from google.protobuf.proto import parse_length_prefixed
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

import dlora
from dlora.cli.tinker import build_service
from dlora.edge.load import load_base
from dlora.errors import UsageError
from dlora.inference.api import ApiServer
from dlora.privacy.recording import Recorder, Recording
from dlora.proto import dlora_pb2 as pb
from dlora.server.server import Server
from dlora.tinker.settings import TinkerSettings

tinker = pytest.importorskip("tinker", reason="the extra `tinker` is not installed")

from tinker import types
from tinker.proto import request_conv

from dlora.tinker.app import build_app
from dlora.tinker.models import weights_of
from dlora.tinker.sampling import Choices, Sampled, sample
from dlora.tinker.service import Service
from dlora.tinker.targets import is_attention

# The SDK leaves the connection open over which it asked for its configuration.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
BASE = "example-org/llama"
KEY = "tml-of-a-test"


def settings(output: Path, **others: Any) -> TinkerSettings:
    """Settings of `dlora tinker`, on the exact wire."""
    return TinkerSettings(server="127.0.0.1:1", wire_dtype="fp32", output=output, **others)


@pytest.fixture(scope="module")
def service(
    cloud_models: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Iterator[Service]:
    """The interface's service over a real socket, on the exact wire."""
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
        yield build_service(
            settings(tmp_path_factory.mktemp("saved"), max_adapters=100, batch_size=8), link
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


def rows(count: int = 4, seed: int = 0) -> list[list[int]]:
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
    output = training.forward_backward([datum(one) for one in rows(10)], "cross_entropy").result()

    local = local_twin()
    loss = torch.zeros(())
    for one, got in zip(rows(10), output.loss_fn_outputs, strict=True):
        logprobs = local_logprobs(local, one)
        loss = loss - logprobs[2:].sum()
        torch.testing.assert_close(got["logprobs"].to_torch()[2:], logprobs[2:].detach())
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(service, training, local)


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


SAMPLED = [0.1, -0.4, 0.7, 0.2, -0.9, 0.5, 0.3, -0.2, 0.6, -0.1, 0.8]


def reinforced(number: int, tokens: list[int]) -> Any:
    """A row of reinforcement: two tokens of prompt, others sampled with other log-probabilities."""
    length = len(tokens) - 3
    logprobs = [-5.0 + one for one in SAMPLED[:length]]
    advantages = [1.0 if (number + place) % 2 else -0.5 for place in range(length)]
    given = {"logprobs": [0.0, 0.0, *logprobs], "advantages": [0.0, 0.0, *advantages]}
    return datum(tokens, **given)


def local_loss(kind: str, logprobs: torch.Tensor, inputs: Any) -> torch.Tensor:
    """The losses, written down once more from the SDK's documentation."""
    q, a = (inputs[name].to_torch()[2:] for name in ("logprobs", "advantages"))
    ratio, clipped = (logprobs - q).exp(), (logprobs - q).exp().clamp(0.9, 1.1)
    if kind == "importance_sampling":
        return -(ratio * a).sum()
    if kind == "ppo":
        return -torch.min(ratio * a, clipped * a).sum()
    if kind == "cispo":
        return -(clipped.detach() * logprobs * a).sum()
    return -(logprobs * a - 0.5 * 0.3 * (logprobs - q) ** 2).sum()


CLIP = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}


@pytest.mark.parametrize(
    ("kind", "config"),
    [("importance_sampling", None), ("ppo", CLIP), ("cispo", CLIP), ("dro", {"beta": 0.3})],
)
def test_losses_of_reinforcement_are_as_documented(
    client: Any, service: Service, kind: str, config: Any
) -> None:
    """Loss and adapter gradients equal those of the documented formula over local peft."""
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    batch = [reinforced(number, one) for number, one in enumerate(rows())]
    output = training.forward_backward(batch, kind, config).result()

    local, loss = local_twin(), torch.zeros(())
    for one, asked in zip(rows(), batch, strict=True):
        loss = loss + local_loss(kind, local_logprobs(local, one)[2:], asked.loss_fn_inputs)
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    assert_gradients(service, training, local)


def assert_gradients(service: Service, training: Any, local: PeftModel) -> None:
    """Every adapter gradient equals local peft's."""
    wanted = {name: one.grad for name, one in local.named_parameters() if one.requires_grad}
    adapter = service.run(training.model_id).adapter
    assert adapter.parameters.keys() == wanted.keys()
    for name, parameter in adapter.parameters.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5 * scale)


def test_a_pass_that_fails_adds_nothing(client: Any, service: Service) -> None:
    """A pass that fails in its second micro-batch leaves the gradients that were there before."""
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    training.forward_backward([datum(one) for one in rows()], "cross_entropy").result()
    parameters = service.run(training.model_id).adapter.parameters.values()
    before = [one.grad.clone() for one in parameters]
    batch = [reinforced(number, one) for number, one in enumerate(rows(10))]
    last = dict(batch[-1].loss_fn_inputs)
    del last["logprobs"]
    batch[-1] = types.Datum(batch[-1].model_input, last)
    with refused(tinker.RequestFailedError, "logprobs is missing"):
        training.forward_backward(batch, "ppo").result()
    assert all(torch.equal(one.grad, want) for one, want in zip(parameters, before, strict=True))


def test_losses_of_ones_own_and_several_targets(client: Any, service: Service) -> None:
    """A custom loss, which the SDK computes from log-probabilities of a pass, and one over several
    targets at each position, dense and sparse, give local peft's gradients.
    """

    def squares(data: Any, logprobs: Any) -> Any:
        return sum((one[2:] ** 2).sum() for one in logprobs), {"mine": 1.0}

    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    batch = [
        types.Datum(one.model_input, {"target_tokens": one.loss_fn_inputs["target_tokens"]})
        for one in map(datum, rows())
    ]
    metrics = training.forward_backward_custom(batch, squares).result().metrics
    local = local_twin()
    loss = sum((local_logprobs(local, one)[2:] ** 2).sum() for one in rows())
    loss.backward()
    assert metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4) and metrics["mine"] == 1.0
    assert_gradients(service, training, local)

    # Two targets at each position, of which the second has no weight but at one place.
    ids = torch.tensor(rows()[0])
    targets = torch.stack([ids[1:], ids[1:] + 1], dim=1).clamp(max=VOCAB - 1)
    weights = torch.zeros(targets.shape)
    weights[3] = torch.tensor([0.25, 0.75])
    given = {"target_tokens": targets, "weights": weights}
    asked = types.Datum(types.ModelInput.from_ints(ids[:-1].tolist()), given)
    assert asked.loss_fn_inputs["weights"].sparse_crow_indices is not None
    output = training.forward_backward([asked], "cross_entropy").result()
    logits = local(input_ids=ids[None, :-1]).logits[0, 3].log_softmax(-1)
    want = logits[targets[3]].detach()
    torch.testing.assert_close(output.loss_fn_outputs[0]["logprobs"].to_torch()[3], want)
    (-(logits[targets[3]] * weights[3]).sum()).backward()
    assert_gradients(service, training, local)


def train(training: Any, steps: int, lr: float = 0.02) -> list[float]:
    """Losses of steps on the same rows."""
    losses, batch = [], [datum(one) for one in rows()]
    for _ in range(steps):
        done = training.forward_backward(batch, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=lr)).result()
        losses.append(done.result().metrics["loss:sum"])
    return losses


def test_what_is_saved_goes_on_bit_for_bit(client: Any, service: Service) -> None:
    """Training falls; a state that is saved and loaded, as a new adapter or onto another, goes on
    with the same bits; without its optimizer it does not; the folder is peft's.
    """
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    losses = train(training, 3)
    assert losses[-1] < 0.9 * losses[0]
    path = training.save_state("early", user_metadata={"why": "a test"}).result().path
    want = train(training, 2)

    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert train(again, 2) == want
    other = client.create_lora_training_client(BASE, rank=4, seed=9).result()
    with warnings.catch_warnings(action="ignore"):
        other.load_state_with_optimizer(path).result()
    assert train(other, 2) == want
    fresh = client.create_training_client_from_state(path).result()
    got = train(fresh, 2)
    assert got[0] == want[0] and got[1] != want[1]

    folder = service.checkpoints.found(path).folder
    local = PeftModel.from_pretrained(make_base("llama"), folder)
    asked = datum(rows()[0])
    output = (
        client.create_training_client_from_state(path).result().forward([asked], "cross_entropy")
    )
    logprobs = output.result().loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(logprobs[2:], local_logprobs(local, rows()[0])[2:].detach())
    with pytest.raises(tinker.RequestFailedError, match="take another name"):
        training.save_state("early").result()
    assert training.save_state("early", overwrite=True).result().path == path


def test_several_adapters_and_the_base(client: Any, service: Service, url: str) -> None:
    """Adapters of one edge do not touch each other, and each sampling client keeps the weights that
    it was made with.
    """
    first = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    second = client.create_lora_training_client(BASE, rank=2, seed=4, train_mlp=False).result()
    third = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    batch = [datum(one) for one in rows()]
    passes = [one.forward_backward(batch, "cross_entropy") for one in (first, second, first)]
    for one in (first, second):
        one.optim_step(types.AdamParams(learning_rate=0.02))
    untouched = third.forward(batch, "cross_entropy").result()
    assert untouched.metrics == passes[0].result().metrics
    assert passes[2].result().metrics == passes[0].result().metrics

    path = first.save_weights_for_sampler("mine").result().path
    prompt, ask = types.ModelInput.from_ints(rows()[0]), types.SamplingParams(max_tokens=3, seed=0)
    clients = [
        client.create_sampling_client(base_model=BASE).result(),
        client.create_sampling_client(model_path=path).result(),
        second.save_weights_and_get_sampling_client().result(),
        first.save_weights_and_get_sampling_client().result(),
    ]
    train(first, 2)
    futures = [one.sample(prompt, 2, ask) for one in clients for _ in range(2)]
    answers = [
        torch.tensor([one.logprobs for one in future.result().sequences]) for future in futures
    ]
    for alone, together in zip(answers[::2], answers[1::2], strict=True):
        torch.testing.assert_close(alone, together)  # two requests may have shared a batch
    base, saved, others, snapshot = answers[::2]
    torch.testing.assert_close(saved, snapshot)
    for one, two in ((base, saved), (base, others), (saved, others)):
        assert not torch.allclose(one, two, rtol=1e-3)
    assert clients[1].get_base_model() == BASE
    assert torch.equal(
        service.models.base.get_input_embeddings().weight,
        service.run(first.model_id).adapter.model.get_input_embeddings().weight,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_prompt_of_several_samples_is_sent_once(
    links: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    """Rows of unequal prompts, some of them the same, are sampled with the log-probabilities of a
    forward pass, and a prompt travels once for all of its rows.
    """
    model = load_base(links(family), wire_dtype="fp32")
    model.get_base_model().generation_config = GenerationConfig()
    prompts = [rows()[0], rows()[1][:3], rows()[0], rows()[1][:3], rows()[0]]
    sampled = [Sampled(one, Choices(most=4, seed=number)) for number, one in enumerate(prompts)]
    before = model.meter.copy()
    sample(model, tokenizer, sampled, 0)

    answered = (model.meter - before).tokens
    assert answered == sum(len(one) - 1 for one in prompts[:2]) + 4 * len(prompts)
    local = make_base(family)
    for one in sampled:
        want = local_logprobs(local, one.prompt + one.tokens)[len(one.prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(one.logprobs), want, rtol=1e-4, atol=1e-4)
    assert len({tuple(one.tokens) for one in sampled}) > 2


def test_answers_end_where_they_should(
    client: Any, tokenizer: PreTrainedTokenizerFast, service: Service
) -> None:
    """Tokens and texts end an answer and are part of it; at temperature 0 it is the greedy one."""
    sampling = client.create_sampling_client(base_model=BASE).result()
    prompt = rows()[0]
    given = types.ModelInput.from_ints(prompt)
    greedy = types.SamplingParams(max_tokens=8, temperature=0, stop=[])
    tokens = sampling.sample(given, 1, greedy).result().sequences[0].tokens
    local = make_base("llama")
    want = local.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert tokens == want[0, len(prompt) :].tolist()

    for stop in ([tokens[2]], [tokenizer.decode(tokens[:3])], tokenizer.decode(tokens[1:3])):
        params = types.SamplingParams(max_tokens=8, temperature=0, stop=stop)
        got = sampling.sample(given, 1, params).result().sequences[0]
        assert got.stop_reason == "stop" and got.tokens == tokens[: len(got.tokens)]
        assert len(got.tokens) <= 3
    logprobs = sampling.compute_logprobs(given).result()
    assert logprobs[0] is None and len(logprobs) == len(prompt)


def refused(kind: type[Exception], message: str) -> Any:
    """What the SDK has to raise."""
    return pytest.raises(kind, match=message)


def test_what_is_not_there_is_refused_in_the_sdks_errors(client: Any) -> None:
    """What is refused at once is an error of HTTP's, what fails later is a failed request; each
    says what was got and what there is, and what follows works.
    """
    bad, failed, missing = tinker.BadRequestError, tinker.RequestFailedError, tinker.NotFoundError
    make = client.create_lora_training_client
    with refused(bad, "got 'other/model', this server has 'example-org/llama'"):
        make("other/model").result()
    with refused(bad, "optimizer: dimuon is not served here"):
        make(BASE, optimizer=types.DimuonOptimizerConfig()).result()
    with refused(failed, "rank: got 0, want at least 1"):
        make(BASE, rank=0).result()

    training = make(BASE, rank=2, seed=1).result()
    one, image = datum(rows()[0]), types.ImageChunk(data=b"", format="png")
    long = datum([5] * 400)
    far = types.Datum(types.ModelInput.from_ints([VOCAB]), {"target_tokens": [1]})
    for asked, loss, message in (
        ([one], "gspo", "loss_fn: 'gspo' is not computed here: use one of cross_entropy"),
        ([one], "ppo", "weights is no input of this loss"),
        ([datum(rows()[0], advantages=[0.0] * (len(rows()[0]) - 1))], "ppo", "logprobs is missing"),
        ([types.Datum(types.ModelInput(chunks=[image]), {})], "cross_entropy", "image is not"),
        ([one, far], "cross_entropy", r"data\[1\]: model_input: a token is outside of 0 to 299"),
        ([one, long], "cross_entropy", r"data\[1\] has 399 tokens"),
    ):
        with refused(failed, message) as error:
            training.forward_backward(asked, loss).result()
        assert error.value.category == types.RequestErrorCategory.User
    with refused(failed, "clip is no option of ppo"):
        training.forward_backward([reinforced(0, rows()[0])], "ppo", {"clip": 1.0}).result()
    with refused(bad, "optim_params: dimuon"):
        training.optim_step(types.DimuonParams(learning_rate=1.0)).result()
    metrics = training.optim_step(types.AdamParams()).result().metrics
    assert metrics["unclipped_grad_l2:mean"] == 0.0  # nothing was left of what failed

    for path, message in (("../up", "path: got"), ("a b", "path: got")):
        with refused(bad, message):
            training.save_state(path).result()
    with refused(bad, "was not saved here"):
        client.create_sampling_client(f"tinker://{training.model_id}/weights/none").result()
    with refused(bad, "kind: inflight is not served here"):
        training.save_weights_and_get_sampling_client(kind="inflight").result()
    with refused(missing, "save_weights_external is not served"):
        training.save_weights_external("x").result()

    sampling = client.create_sampling_client(base_model=BASE).result()
    prompt = types.ModelInput.from_ints(rows()[0])
    for params, more, message in (
        ({"temperature": -1.0}, {}, "temperature: got -1.0, want 0 or more"),
        ({"max_tokens": 0}, {}, "max_tokens: got 0"),
        ({}, {"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k is not served here"),
    ):
        with refused(bad, message):
            sampling.sample(prompt, 1, types.SamplingParams(**params), **more).result()
    assert sampling.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result().sequences


def test_only_loopback_and_the_key_are_answered(client: Any, url: str) -> None:
    """Other names of the host, as of a web page that points at it, and other keys are refused."""
    host, port = url.removeprefix("http://").split(":")
    for headers, status in (
        ({"Host": "evil.example", "X-API-Key": KEY}, 400),
        ({"X-API-Key": "tml-other"}, 401),
        ({"Origin": "http://evil.example", "X-API-Key": KEY}, 403),
        ({"X-API-Key": KEY}, 200),
        ({"Host": f"localhost:{port}", "X-API-Key": KEY}, 200),
    ):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/api/v1/get_server_capabilities", headers=headers)
        assert connection.getresponse().status == status
        connection.close()
    stranger = tinker.ServiceClient(base_url=url, **{"api_key": "tml-other"})
    with refused(tinker.AuthenticationError, "missing or wrong"):
        stranger.create_sampling_client(base_model=BASE).result()


def test_what_is_served_and_saved_can_be_asked(client: Any, url: str, service: Service) -> None:
    """Capabilities, adapters and what they saved are listed; a session that ends frees its own."""
    rest = tinker.RestClient(base_url=url, **{"api_key": KEY})
    (served,) = rest.get_server_capabilities().result().supported_models
    assert served.model_name == BASE and served.max_context_length == 256

    with tinker.ServiceClient(base_url=url, **{"api_key": KEY}) as own:
        training = own.create_lora_training_client(
            BASE, rank=2, train_unembed=False, user_metadata={"a": "b"}
        ).result()
        info = training.get_info()
        assert info.model_data.model_name == BASE and info.lora_rank == 2
        assert training.get_tokenizer()("the desk")["input_ids"]
        path = training.save_state("one").result().path
        run = rest.get_training_run(training.model_id).result()
        assert run.last_checkpoint.tinker_path == path and run.user_metadata == {"a": "b"}
        assert rest.get_weights_info_by_tinker_path(path).result().train_unembed is False
        again = rest.get_training_run_by_tinker_path(path).result()
        assert again.training_run_id == run.training_run_id
        training.load_state(path).result()
        other = training.save_state("two").result().path
        rest.delete_checkpoint_from_tinker_path(other).result()
        sampling = own.create_sampling_client(base_model=BASE).result()
        assert rest.get_sampler(sampling._sampling_session_id).result().base_model == BASE
        (listed,) = rest.list_checkpoints(training.model_id).result().checkpoints
        assert listed.checkpoint_id == "weights/one" and listed.size_bytes > 0
        run_id = training.model_id
    while run_id in service.runs:
        time.sleep(0.01)
    assert rest.get_training_run(run_id).result().user_metadata == {"a": "b"}
    rest.delete_checkpoint(run_id, "weights/one").result()
    assert not service.checkpoints.of_run(run_id)


def documented() -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Client -> methods served, done in the SDK, and not served, as docs/tinker.md has them."""
    text = (Path(__file__).parent.parent / "docs/tinker.md").read_text()
    lines = text.partition("## Every method")[2].partition("\n## ")[0].splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
    return {
        client.strip().strip("`"): tuple(re.findall(r"`(\w+)`", cell) for cell in cells)
        for client, *cells in rows
    }


def test_every_method_of_the_sdk_is_in_the_table() -> None:
    """A method that a new version of the SDK brings is missing in the table until somebody looks at
    it; and a method that is said to be served is called by a test.
    """
    calls = Path(__file__).read_text()
    clients = {name for name in tinker.__all__ if name.endswith("Client")}
    assert documented().keys() == clients
    for client, (served, local, missing) in documented().items():
        kind = getattr(tinker, client)
        names = {name for name in dir(kind) if not name.startswith("_")}
        methods = {name for name in names if name.removesuffix("_async") not in names - {name}}
        assert sorted(methods) == sorted([*served, *local, *missing]), client
        for name in served:
            assert f".{name}(" in calls, f"{client}.{name}: no test calls it"


def test_methods_that_are_not_served_say_so(
    client: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is refused at once, in the SDK's own error, and never hangs or makes something up."""
    monkeypatch.setenv("TINKER_PROJECT_ID", "x")
    training = client.create_lora_training_client(BASE, rank=2).result()
    path, run = training.save_state("one").result().path, training.model_id
    rest, admin = (
        kind(base_url=url, **{"api_key": KEY}) for kind in (tinker.RestClient, tinker.AdminClient)
    )
    clients = {"ServiceClient": client, "TrainingClient": training}
    clients |= {"RestClient": rest, "AdminClient": admin}
    given: dict[str, Any] = {
        "assign_session_project": ("x", "y"),
        "copy_weights": (path,),
        "get_billing_usage": ("2026-01-01", "2026-02-01"),
        "get_external_weights_urls": (f"tinker://{run}/external_weights/one",),
        "save_weights_external": ("one",),
        "search_sessions": (types.SessionSearchRequest(owner=types.AccessibleSearchOwner()),),
        "set_checkpoint_ttl_from_tinker_path": (path, 3600),
        **dict.fromkeys(("get_session", "export_session_trace"), ("x",)),
        **dict.fromkeys(
            ("publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path"),
            (path,),
        ),
    }
    for name, (_, _, missing) in documented().items():
        for method in missing:
            # It wants a kind of key that is never asked for here.
            kind = RuntimeError if method == "whoami" else tinker.NotFoundError
            message = "requires JWT" if method == "whoami" else "is not served by dlora tinker"
            with pytest.raises(kind, match=message):
                getattr(clients[name], method)(*given.get(method, ())).result()


def test_a_traced_loss_is_run_by_the_sdk(client: Any) -> None:
    """A loss of `create_custom_loss`, which is not uploaded here, is what the function gives."""

    def nats(logprobs: Any, weights: Any) -> Any:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nats:sum": loss}

    handle = client.create_custom_loss(nats, {"logprobs": 1, "weights": 1}).result()
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    batch = [datum(one) for one in rows()]
    got = training.forward_backward_custom(batch, handle).result().metrics["custom/nats:sum"]
    want = training.forward(batch, "cross_entropy").result().metrics["loss:sum"]
    assert handle.loss_id is None and got == pytest.approx(want, rel=1e-5)


def frames(recording: Path) -> list[tuple[str, int]]:
    """Kind and size of every frame of a recorded micro-batch, both ways."""
    found = []
    for name, kind in (("0000.edge", pb.EdgeFrame), ("0000.cloud", pb.CloudFrame)):
        stream = io.BytesIO((recording / name).read_bytes())
        while (frame := parse_length_prefixed(kind, stream)) is not None:
            found.append((str(frame.WhichOneof("kind")), frame.ByteSize()))
    return found


def test_the_cloud_sees_an_ordinary_split_model(link: Any, tmp_path: Path) -> None:
    """A recorded pass has the frames of the same pass of an ordinary split model, in kind and in
    size, and can be read for an audit, with its loss.
    """
    service, plain = (
        build_service(settings(tmp_path, record=1), link),
        Recorder(tmp_path / "plain", 1),
    )
    service._create("a:train:0", types.LoraConfig(rank=4, seed=3), {})
    message = request_conv.forward_backward_request_to_proto(
        types.ForwardBackwardRequest(
            types.ForwardBackwardInput([datum(one) for one in rows()], "cross_entropy"),
            "a:train:0",
            1,
        )
    )
    service._forward_backward(message)

    config = service.run("a:train:0").adapter.model.peft_config["default"]
    model = make_split(plain.link(link), config, seed=3, head_positions="supervised")
    plain.watch(model)
    longest = max(map(len, rows()))
    ids, mask, labels = (torch.full((len(rows()), longest), fill) for fill in (0, 0, -100))
    for index, one in enumerate(rows()):
        ids[index, : len(one) - 1], mask[index, : len(one) - 1] = torch.tensor(one[:-1]), 1
        labels[index, 3 : len(one)] = torch.tensor(one[3:])
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    ours = tmp_path / "recording"
    assert frames(ours) == frames(tmp_path / "plain")
    (_, truth, _), (_, want, _) = (Recording(one).read(0) for one in (ours, tmp_path / "plain"))
    assert truth.loss == pytest.approx(want.loss) and torch.equal(truth.labels, want.labels)
    with pytest.raises(UsageError, match="holds a run already"):
        build_service(settings(tmp_path, record=1), link)


@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 2])
def test_tables_of_an_adapter_are_sampled_with(service: Service, tmp_path: Path, rows: int) -> None:
    """An adapter that came with an embedding and head of its own, of more rows or as many, is
    sampled with these, and one of the same configuration without them is not.
    """
    plain = make_split(service.models.link, lora(), num_tokens=rows)
    plain.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    for end in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        end.weight = torch.nn.Parameter(end.weight + 0.1, requires_grad=False)
    plain.save_pretrained(tmp_path / "own", save_embedding_layers=True)

    batch = {"input_ids": torch.tensor([[7, 8, 9]])}
    for folder in ("own", "plain", "own"):
        trained = service.models.load(tmp_path / folder).eval()
        sampled = service.models.sampling(weights_of(trained))
        with torch.no_grad():
            got, want = (model(**batch).logits for model in (sampled, trained))
        assert got.shape[-1] == (rows if folder == "own" else VOCAB)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.0.attn.c_attn", "attention"),
        ("transformer.h.0.self_attention.query_key_value", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "attention"),
        ("backbone.layers.0.mixer.in_proj", "attention"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("model.layers.0.block_sparse_moe.gate", "mlp"),
    ],
)
def test_modules_are_known_by_their_names(name: str, kind: str) -> None:
    """Attention and MLP are told apart in the names that architectures give them."""
    assert ("attention" if is_attention(name) else "mlp") == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70000}, "port: got 70000"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"api_key": "open sesame"}, "keys that begin with tml-"),
        ({"record": 2, "in_flight": 2}, "record keeps whole micro-batches"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Each is named, with what it was."""
    with pytest.raises(UsageError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.slow
def test_reinforcement_raises_the_reward(client: Any) -> None:
    """The loop of an RL program (sample, reward, advantages, a pass, a step) raises what is
    rewarded: here tokens from the first half of the vocabulary.
    """
    training = client.create_lora_training_client(BASE, rank=4, seed=3).result()
    prompt, rewards = rows()[0], []
    for step in range(4):
        sampling = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=4, seed=100 * step, stop=[])
        given = types.ModelInput.from_ints(prompt)
        found = sampling.sample(given, 32, params).result().sequences
        earned = torch.tensor([sum(t < VOCAB // 2 for t in one.tokens) / 4 for one in found])
        rewards.append(float(earned.mean()))
        batch = []
        for one, advantage in zip(found, (earned - earned.mean()).tolist(), strict=True):
            begin = [0.0] * (len(prompt) - 1)
            inputs = {
                "logprobs": [*begin, *one.logprobs],
                "advantages": [*begin, *[advantage] * len(one.tokens)],
            }
            batch.append(datum(prompt + one.tokens, **inputs))
        training.forward_backward(batch, "importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=0.01)).result()
    assert rewards[-1] > rewards[0] + 0.15
