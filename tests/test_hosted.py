"""The hosted wire: active modules travel, the cloud computes them, and what comes out is
local peft's adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, adapter, batches, lora, make_base, make_local, make_split
from helpers import assert_same_grads
from peft import LoraConfig

import dlora
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.hosted_request import check_hosted
from dlora.cloud.model import CloudModel
from dlora.edge.bottleneck import BottleneckConfig, apply_bottleneck
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import encode

Links = Callable[[str], Any]


def hosted(link: Any, config: LoraConfig, **options: Any) -> dlora.SplitModel:
    """A split model on the hosted wire, the adapter as `make_local`'s."""
    return make_split(link, config, wire="hosted", upload_consent=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_local(links: Links, family: str) -> None:
    """Loss and every adapter gradient equal local peft's, with padding, unequal lengths and
    accumulation, in two round trips a micro-batch.
    """
    local = make_local(family, lora(family))
    split = hosted(links(family), lora(family))
    for batch in batches(3):
        want, got = local(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        got.backward()
    assert_same_grads(local, split)
    assert split.meter.round_trips == 2 * 3
    assert split.meter.adapter_flops == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_match_local(links: Links, family: str) -> None:
    """After 20 AdamW steps the change of the adapter differs by at most 1e-4 of its norm."""
    models = make_local(family, lora(family)), hosted(links(family), lora(family))
    changes = []
    for model in models:
        start = {name: parameter.detach().clone() for name, parameter in adapter(model).items()}
        optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-3)
        for batch in batches(20):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(
            torch.cat([(p.detach() - start[name]).flatten() for name, p in adapter(model).items()])
        )
    want, got = changes
    assert want.norm() > 0.01
    assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=lambda options: "-".join(options),
)
def test_lora_options_match_local(links: Links, options: dict[str, Any]) -> None:
    """What an option of LoraConfig means in peft it means where the cloud computes the modules."""
    local, split = make_local("llama", lora(**options)), hosted(links("llama"), lora(**options))
    batch = batches()[0]
    for model in (local, split):
        model(**batch).loss.backward()
    assert_same_grads(local, split)


def test_two_active_adapters_match_local(links: Links) -> None:
    """Two adapters that are active together add up, each with its own rank and scale, and each
    parameter gets its own gradient.
    """
    models = [make_local("llama", lora()), hosted(links("llama"), lora())]
    for model in models:
        torch.manual_seed(4)
        model.add_adapter("second", lora(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"]))
        model.base_model.set_adapter(["default", "second"])
        model(**batches()[0]).loss.backward()
    assert_same_grads(*models)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_bottlenecks_match_local(links: Links, kind: str, activation: str) -> None:
    """Bottleneck adapters, with biases, activation and scale, have the gradients of the same
    adapters on a local model.
    """
    config = BottleneckConfig(
        kind=kind, activation=activation, r=5, scale=0.7, target_modules=["o_proj", "down_proj"]
    )
    split = hosted(links("llama"), config)
    local = apply_bottleneck(make_base("llama"), config)
    generator = torch.Generator().manual_seed(8)
    for (name, parameter), other in zip(
        adapter(split).items(), adapter(local).values(), strict=True
    ):
        assert "lora" in name
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        other.data.copy_(parameter.data)
    for batch in batches(2):
        for model in (local, split):
            model(**batch).loss.backward()
    assert_same_grads(local, split)


def grads_of(model: dlora.SplitModel, seed: int = 5) -> list[torch.Tensor]:
    """Gradients of one batch, with this seed of dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    return [parameter.grad.clone() for parameter in adapter(model).values()]


def test_dropout_is_a_function_of_the_seed(links: Links) -> None:
    """The same random state draws the same masks on any stream, another one draws others, and
    outside training nothing is dropped.
    """
    split = hosted(links("llama"), lora(lora_dropout=0.3))
    first, again, other = grads_of(split), grads_of(split), grads_of(split, seed=6)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    kept, whole = (
        hosted(links("llama"), lora(lora_dropout=0.3)).eval(),
        hosted(links("llama"), lora()),
    )
    assert all(map(torch.equal, grads_of(kept), grads_of(whole)))


def test_masks_have_dropouts_distribution(cloud_models: Callable[[str], CloudModel]) -> None:
    """A share p of the inputs is dropped, the others grow by 1 / (1 - p), each module has masks of
    its own and each part of a module too.
    """
    site = next(site for site in cloud_models("llama").sites if len(site.modules) == 3)
    identity = torch.eye(site.in_features)
    parts = [pb.HostedDropout(rank=32, p=0.25), pb.HostedDropout(rank=32, p=0.5)]
    begin = pb.Begin(hosted=True, dropout_seed=7)
    for index, module in enumerate(site.modules):
        b = torch.eye(module.out_features, site.in_features)
        begin.modules.add(
            site=site.index,
            module=index,
            a=encode(identity, pb.FP32),
            b=encode(b, pb.FP32),
            dropouts=parts,
        )
    store = cloud_models("llama").frozen_store
    request = check_hosted(begin, [(site, (0, 1, 2))], store, "local", None)
    assert request is not None
    x = torch.ones(4, 500, site.in_features)
    deltas = HostedAdapter(request, store, training=False).deltas(site.index, x, past=0)
    q = deltas[0]
    for values, p in ((q[..., :32], 0.25), (q[..., 32:], 0.5)):
        assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert (values == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    k = deltas[1]
    assert not torch.equal(q[..., : k.shape[-1]] == 0, k == 0)
    later = HostedAdapter(request, store, training=False).deltas(site.index, x, past=3)
    assert not torch.equal(later[0], q)


def test_generation_gives_the_plain_wires_tokens(links: Links) -> None:
    """With a KV cache in the cloud the answer is the plain wire's, in one round trip a token."""
    new_tokens = 6
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(3))
    answers, trips = [], []
    for model in (make_split(links("llama"), lora()), hosted(links("llama"), lora())):
        model.eval()
        before = model.meter.round_trips
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
        )
        trips.append(model.meter.round_trips - before)
    assert torch.equal(*answers)
    assert trips[1] == new_tokens
    assert trips[0] == 4 * new_tokens


def test_a_cache_keeps_its_adapter(links: Links) -> None:
    """A stream that was begun with one adapter is not continued with another."""
    model = hosted(links("llama"), lora()).eval()
    ids = torch.randint(5, 300, (1, 5))
    cache = dlora.CloudCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        next(iter(adapter(model).values())).add_(1)
        with pytest.raises(UsageError, match="filled with other adapters"):
            model(input_ids=ids, past_key_values=cache)
    cache.close()


def test_consent_is_asked_for(links: Links) -> None:
    """Nobody sends the adapter by setting a wire alone; the words say what it shows."""
    with pytest.raises(UsageError, match="sees the adapter itself .* --upload_consent true"):
        make_split(links("llama"), lora(), wire="hosted")
    split = make_split(links("llama"), lora())
    with pytest.raises(UsageError, match="upload_consent"):
        split.set_options(wire="hosted")
    split.set_options(wire="hosted", upload_consent=True)
    with pytest.raises(UsageError, match="upload_consent"):
        split.set_options(upload_consent=False)
