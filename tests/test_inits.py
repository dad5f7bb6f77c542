"""How LoRA may begin: peft's ways that need no base weights are peft's, the others are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base, make_local, make_split
from helpers import assert_same_grads
from peft import EvaConfig, LoftQConfig, LoraConfig, initialize_lora_eva_weights

import dlora
from dlora.embedded import InProcessLink
from dlora.errors import UsageError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eva initialization used with", "ignore:.*_config` is not specified"
)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_beginnings_without_base_weights_are_local_pefts(link: InProcessLink, init: Any) -> None:
    """At the same seed A and B begin with local peft's values."""
    local, split = (
        make(*given, lora(init_lora_weights=init))
        for make, given in ((make_local, ("llama",)), (make_split, (link,)))
    )
    for name, parameter in adapter(local).items():
        assert torch.equal(adapter(split)[name], parameter), name


@pytest.mark.parametrize(
    ("rho", "wire"), [pytest.param(1.0, "plain", marks=pytest.mark.slow), (2.0, "factored")]
)
def test_eva_is_local_pefts(link: InProcessLink, rho: float, wire: Any) -> None:
    """EVA, from padded batches with labels, gives each module the directions and the rank that it
    gives it where the model is local; and such an adapter trains as there.
    """

    def config() -> LoraConfig:
        return lora(init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.9))

    data = batches(2, rows=8)
    local, split = make_local("llama", config()), make_split(link, config(), wire=wire)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, on names of modules in rank_pattern
        initialize_lora_eva_weights(local, data, show_progress_bar=False)
        dlora.initialize_eva(split, data)
    want, got = adapter(local), adapter(split)
    assert want.keys() == got.keys()
    for name, parameter in want.items():
        assert got[name].shape == parameter.shape, name
        if ".lora_A." in name:
            torch.testing.assert_close(got[name], parameter, rtol=1e-3, atol=1e-3)
    ranks = {len(parameter) for name, parameter in got.items() if ".lora_A." in name}
    assert (len(ranks) > 1) == (rho > 1)

    for model in (local, split):
        for name, parameter in adapter(model).items():
            if ".lora_B." in name:
                parameter.data.fill_(0.01)
    local.load_state_dict(
        {name: value for name, value in split.state_dict().items() if ".lora_A." in name},
        strict=False,
    )
    batch = batches(1, seed=5)[0]
    for model in (local, split):
        model(**batch).loss.backward()
    assert_same_grads(local, split, tolerance=1e-4)


def test_what_eva_cannot_read_is_refused(link: InProcessLink) -> None:
    """EVA on the hosted wire, without data, and of another adapter is refused by name."""
    eva = lora(init_lora_weights="eva")
    with pytest.raises(UsageError, match="hosted wire never comes here"):
        dlora.initialize_eva(make_split(link, eva, wire="hosted", upload_consent=True), batches())
    with pytest.raises(UsageError, match="one batch at least"):
        dlora.initialize_eva(make_split(link, eva), [])
    with pytest.raises(UsageError, match="init_lora_weights"):
        dlora.initialize_eva(make_split(link, lora()), batches())


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("pissa_niter_4", "principal part"),
        ("olora", "QR decomposition"),
        ("corda", "by what modules read"),
        ("loftq", "rounding"),
        ("mica", "smallest directions"),
    ],
)
def test_beginnings_with_base_weights_are_refused(link: InProcessLink, init: Any, why: str) -> None:
    """Ways to begin that need base weights are refused with the reason and what to use."""
    with pytest.raises(UsageError, match=f"{why}.*They stay in the cloud: use 'eva'"):
        config = LoftQConfig() if init == "loftq" else {}
        dlora.get_peft_model(link, lora(init_lora_weights=init, loftq_config=config))


def test_spectral_start_follows_the_weights_gradient(link: InProcessLink) -> None:
    """A's rows become the first right singular vectors of the gradient that a local model has for
    the weight, as long as they were; loss, gradients and random numbers to come stay as they were,
    whatever the dropout.
    """
    batch, split = (
        batches(1, rows=4)[0],
        make_split(link, lora(lora_dropout=0.5, init_lora_weights=True)),
    )
    lengths = {name: p.norm(dim=1) for name, p in adapter(split).items() if ".lora_A." in name}
    before, state = split.eval()(**batch).loss, torch.get_rng_state()
    dlora.initialize_spectral(split, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert not split.training and all(p.grad is None for p in split.parameters())
    torch.testing.assert_close(split(**batch).loss, before)

    base = make_base("llama")
    base(**batch).loss.backward()
    for name, length in lengths.items():
        a = adapter(split)[name]
        weight = base.get_submodule(
            name.partition(".lora_A")[0].removeprefix("base_model.model.")
        ).weight
        torch.testing.assert_close(a.norm(dim=1), length)
        reached = (weight.grad @ torch.nn.functional.normalize(a).T).norm(dim=0)
        want = torch.linalg.svdvals(weight.grad)[: len(a)]
        torch.testing.assert_close(reached, want, rtol=1e-3, atol=1e-6)


def test_spectral_start_leaves_idle_modules_alone(link: InProcessLink) -> None:
    """Only modules that exchange anything are turned: others have no gradient here."""
    split = make_split(link, lora(target_modules=["q_proj"], init_lora_weights=True))
    sides = {name: p for name, p in adapter(split).items() if ".lora_A." in name}
    before = {name: p.clone() for name, p in sides.items()}
    split.set_active(split.adapted_modules[:1])
    dlora.initialize_spectral(split, batches(1)[0])
    changed = [name for name, p in sides.items() if not torch.equal(p, before[name])]
    assert changed == list(sides)[:1]


def test_what_a_spectral_start_cannot_read_is_refused(link: InProcessLink) -> None:
    """Off the plain wire, without labels, of an adapter that adds something, and of bottlenecks."""
    batch = batches(1)[0]

    with pytest.raises(UsageError, match="wire=factored does not bring here.*wire=plain"):
        dlora.initialize_spectral(make_split(link, lora(), wire="factored"), batch)
    split = make_split(link, lora(init_lora_weights=True))
    with pytest.raises(UsageError, match="give it with labels"):
        dlora.initialize_spectral(split, {"input_ids": batch["input_ids"]})
    next(p for name, p in adapter(split).items() if ".lora_B." in name).data[0] = 1
    with pytest.raises(UsageError, match="fresh adapter: B of this one is not zero"):
        dlora.initialize_spectral(split, batch)
    bottleneck = dlora.BottleneckConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="this model has none"):
        dlora.initialize_spectral(make_split(link, bottleneck), batch)
