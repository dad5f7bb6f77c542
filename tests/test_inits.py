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
from dlora.edge.model import SplitModel
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


def fresh(link: InProcessLink, **options: Any) -> SplitModel:
    """A split model whose adapter adds nothing yet."""
    return make_split(link, lora(init_lora_weights=True, **options))


def read_sides(model: SplitModel) -> dict[str, torch.Tensor]:
    """A of every module, as it is now."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("parts", [1, 2])
def test_spectral_start_follows_the_weights_gradient(link: InProcessLink, parts: int) -> None:
    """A's rows become the first right singular vectors of the gradient that a local model has for
    the weight, as long as they were, whatever the dropout and the parts in flight.
    """
    batch, split = batches(1, rows=4)[0], fresh(link, lora_dropout=0.5)
    split.set_options(in_flight=parts)
    before, loss = read_sides(split), split.eval()(**batch).loss
    dlora.initialize_spectral(split, batch)
    torch.testing.assert_close(split(**batch).loss, loss)

    base = make_base("llama")
    base(**batch).loss.backward()
    for name, a in read_sides(split).items():
        path = name.partition(".lora_A")[0].removeprefix("base_model.model.")
        weight = base.get_submodule(path).weight
        torch.testing.assert_close(a.norm(dim=1), before[name].norm(dim=1))
        reached = (weight.grad @ torch.nn.functional.normalize(a).T).norm(dim=0)
        want = torch.linalg.svdvals(weight.grad)[: len(a)]
        torch.testing.assert_close(reached, want, rtol=1e-3, atol=1e-6)


def test_spectral_start_leaves_no_other_trace(link: InProcessLink) -> None:
    """Gradients that were there, modes, parts, probes, hooks and random numbers to come are as they
    were; and it needs no gradients to be on around it.
    """
    split = fresh(link, lora_dropout=0.5, target_modules=["q_proj", "lm_head"])
    split.set_options(in_flight=2)
    split.train()(**batches(1, seed=3)[0]).loss.backward()
    split.get_submodule("base_model.model.lm_head").eval()
    split.probe_modules = split.adapted_modules[:1]
    split.probe_norms.clear()

    def trace() -> list[Any]:
        """Everything that it might touch, in one list."""
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in split.modules()]
        modes = [module.training for module in split.modules()]
        probes = [*split.probe_modules, len(split.probe_norms)]
        return [hooks, modes, probes, split.part_count.number, torch.get_rng_state().tolist()]

    before = trace()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in adapter(split).items()}
    assert any(grad is not None and grad.any() for grad in grads.values())
    with torch.inference_mode():
        dlora.initialize_spectral(split, batches(1)[0])
    assert trace() == before
    for name, p in adapter(split).items():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name]), name


@pytest.mark.parametrize("idle", ["drop", "cloud", "edge"])
def test_spectral_start_leaves_idle_modules_alone(link: InProcessLink, idle: Any) -> None:
    """Only modules that are trained are turned, wherever idle ones are applied."""
    split = fresh(link)
    before = read_sides(split)
    split.set_active(split.adapted_modules[:2], idle)
    dlora.initialize_spectral(split, batches(1)[0])
    after = read_sides(split)
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed == list(before)[:2]


def test_rows_beyond_the_gradients_rank_stay_as_drawn(link: InProcessLink) -> None:
    """Three tokens give a gradient of rank three at most: no other row of A is made up."""
    ids = torch.tensor([[5, 6, 7]])
    split = fresh(link, target_modules=["v_proj"], r=8)
    before = read_sides(split)
    dlora.initialize_spectral(split, {"input_ids": ids, "labels": ids})
    for name, a in read_sides(split).items():
        assert not torch.equal(a[0], before[name][0])
        assert torch.equal(a[3:], before[name][3:])


def test_what_a_spectral_start_cannot_read_is_refused(link: InProcessLink) -> None:
    """Off the plain wire, without labels, where nothing is trained, of an adapter that adds
    something, of bottlenecks, and where no LoRA is in the cloud.
    """
    batch = batches(1)[0]

    with pytest.raises(UsageError, match="wire=factored does not bring here.*wire=plain"):
        dlora.initialize_spectral(make_split(link, lora(), wire="factored"), batch)
    split = fresh(link)
    unlabelled = batch["input_ids"].new_full(batch["input_ids"].shape, -100)
    for labels in ({}, {"labels": unlabelled}):
        with pytest.raises(UsageError, match="give it with labels"):
            dlora.initialize_spectral(split, {"input_ids": batch["input_ids"], **labels})
    with split.disable_adapter(), pytest.raises(UsageError, match="trained: none is active"):
        dlora.initialize_spectral(split, batch)
    next(p for name, p in adapter(split).items() if ".lora_B." in name).data[0] = 1
    with pytest.raises(UsageError, match="fresh adapter: B of this one is not zero"):
        dlora.initialize_spectral(split, batch)
    bottleneck = dlora.BottleneckConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    for config in (bottleneck, lora(target_modules=["lm_head"])):
        with pytest.raises(UsageError, match="modules in the cloud: there is none"):
            dlora.initialize_spectral(make_split(link, config), batch)
