"""The low-bit base: the plain model with dequantised weights, in less memory, split as any
other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base, make_split
from helpers import assert_same_grads
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

import dlora
from dlora.cli.demo import data_file, serving
from dlora.cloud.limits import Limits
from dlora.cloud.load import DEMO_MODEL, DEMO_MODEL_ID, load_model
from dlora.cloud.model import CloudModel
from dlora.cloud.quantize import KINDS, QuantizedLinear, quantization, quantize, weight_bytes
from dlora.edge.describe import describe_server
from dlora.embedded import InProcessLink
from dlora.errors import ModelError, UsageError

Links = Callable[[str, str], InProcessLink]
FAMILIES = ("llama", "opt", "bloom")
# Loss and gradients against local peft are those of tests/test_parity.py: the quantised base is a
# fixed function, and both sides compute it with the same dequantised weights in fp32, so that only
# the order of sums differs.
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-6, 1e-5
# Largest relative error of a normally distributed weight, with room: int8 measures 0.007, the 4-bit
# kinds 0.09.
ERROR = {"int8": 0.01, "int4": 0.1, "nf4": 0.1}
BITS = {
    "int8": 8.6,
    "int4": 4.5,
    "nf4": 4.5,
}  # a scale for each row of 64 or more, for 32 weights, for 64


def make_quantised(family: str, kind: str) -> PreTrainedModel:
    """The family's random model, its decoder's linears in `kind`."""
    base = make_base(family)
    quantize(base, kind)
    return base


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with plain nn.Linear modules, which autograd differentiates by itself."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.weight
            if module.bias is not None:
                plain.bias.data = module.bias
            model.set_submodule(name, plain)
    return model


@pytest.fixture(scope="module")
def quantised_links() -> Iterator[Links]:
    """A cloud with a low-bit base, made once for each family and kind."""
    made: dict[tuple[str, str], InProcessLink] = {}

    def get(family: str, kind: str) -> InProcessLink:
        if (family, kind) not in made:
            cloud = CloudModel(make_quantised(family, kind), model_id=f"example-org/{family}")
            made[family, kind] = InProcessLink(cloud)
        return made[family, kind]

    yield get
    for link in made.values():
        link.close()


@pytest.mark.parametrize("reference", ["quantised", "dequantised"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_matches_local(
    quantised_links: Links, family: str, kind: str, reference: str
) -> None:
    """Split training on a low-bit base is local peft on the same base, and on plain linears of its
    values.
    """
    base = make_quantised(family, kind)
    base = base if reference == "quantised" else dequantised(base)
    torch.manual_seed(1)
    local = get_peft_model(base, lora(family))
    split = make_split(quantised_links(family, kind), lora(family))
    for batch in batches(3):
        want, got = local(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=LOSS_TOLERANCE)
        want.backward()
        got.backward()
    assert_same_grads(local, split, GRAD_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_near_and_small(kind: str) -> None:
    """Dequantised weights are within the kind's error of the full ones, at the kind's bits a
    weight.
    """
    full, low = make_base("llama"), make_quantised("llama", kind)
    for name, module in full.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            found = low.model.layers.get_submodule(name)
            assert isinstance(found, QuantizedLinear)
            error = (found.weight - module.weight).norm() / module.weight.norm()
            assert 0 < error < ERROR[kind]
            assert (
                8 * (found.codes.nbytes + found.scales.nbytes) <= BITS[kind] * module.weight.numel()
            )
    assert weight_bytes(low) < weight_bytes(full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (7, 96), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_dtype(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Groups that do not fill a weight, rows of zeros and every compute dtype keep values and
    dtype.
    """
    plain = nn.Linear(shape[1], shape[0], dtype=dtype)
    plain.weight.data[1] = 0
    low = QuantizedLinear(plain, kind)
    assert low.weight.shape == shape and low.weight.dtype == dtype
    assert torch.equal(low.weight[1], torch.zeros(shape[1], dtype=dtype))
    assert (low.weight.float() - plain.weight.float()).norm() < 0.15 * plain.weight.float().norm()
    x = torch.randn(2, shape[1], dtype=dtype, requires_grad=True)
    low(x).sum().backward()
    torch.testing.assert_close(x.grad, low.weight.sum(0).expand(2, -1), rtol=1e-2, atol=1e-2)


def test_nf4_is_bitsandbytes_nf4() -> None:
    """A weight in nf4 is, bit for bit, what bitsandbytes' own 4-bit linear computes with."""
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(64, 96)
    theirs = Linear4bit(
        64, 96, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.requires_grad_(False).to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    torch.testing.assert_close(QuantizedLinear(plain, "nf4")(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_edges_fetch_is_not_quantised(family: str) -> None:
    """Embedding and LM head stay as they are, bit for bit; nothing but the decoder's linears
    changes.
    """
    full, low = make_base(family), make_quantised(family, "nf4")
    assert torch.equal(low.get_input_embeddings().weight, full.get_input_embeddings().weight)
    assert torch.equal(low.get_output_embeddings().weight, full.get_output_embeddings().weight)
    assert not isinstance(low.get_output_embeddings(), QuantizedLinear)
    changed = {
        name.rpartition(".")[0] for name in full.state_dict().keys() - low.state_dict().keys()
    }
    linears = {
        name for name, module in full.get_decoder().named_modules() if isinstance(module, nn.Linear)
    }
    assert {any(name.endswith(linear) for linear in linears) for name in changed} == {True}
    assert len(changed) == len(linears)


def test_training_keeps_no_dequantised_weight() -> None:
    """What autograd holds between forward and backward is no larger than with a full-precision
    base.
    """
    full = CloudModel(make_base("llama"), model_id="x")
    low = CloudModel(make_quantised("llama", "nf4"), model_id="x")
    assert low.memory.bytes_per_token <= full.memory.bytes_per_token
    assert [site.modules for site in low.sites] == [site.modules for site in full.sites]


def test_description_tells_the_quantisation(quantised_links: Links) -> None:
    """Each kind has a fingerprint of its own under the same public id, and `dlora info` names the
    kind.
    """
    found = {kind: quantised_links("llama", kind).description for kind in KINDS}
    full = CloudModel(make_base("llama"), model_id="example-org/llama").describe()
    assert len({one.fingerprint for one in found.values()} | {full.fingerprint}) == len(KINDS) + 1
    assert {one.model_id for one in found.values()} == {full.model_id}
    assert {one.config_json for one in found.values()} == {full.config_json}
    for kind, one in found.items():
        assert dict(describe_server("x", one))["model"].endswith(f"float32, {kind} weights")


def test_adapter_of_a_low_bit_base_is_standard(quantised_links: Links, tmp_path: Path) -> None:
    """A saved adapter names the public base, and peft loads it on that base in full precision."""
    make_split(quantised_links("llama", "int8"), lora()).save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "example-org/llama"
    )
    loaded = dlora.load_adapter(quantised_links("llama", "nf4"), tmp_path)
    assert adapter(loaded)


def test_generation_matches_local(quantised_links: Links) -> None:
    """Greedy tokens with a KV cache in the cloud are those of local peft on the same low-bit
    base.
    """
    base = make_quantised("llama", "nf4")
    torch.manual_seed(1)
    local = get_peft_model(base, lora()).eval()
    split = make_split(quantised_links("llama", "nf4"), lora()).eval()
    ids = batches()[0]["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(split.generate(ids, **options), local.generate(ids, **options))


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D models, models that are quantised already, unknown kinds and a missing package are
    clear errors.
    """
    with pytest.raises(ModelError, match="GPT2LMHeadModel has Conv1D"):
        quantize(make_base("gpt2"), "int8")
    with pytest.raises(UsageError, match="got 'int3', want none or one of int8, int4, nf4"):
        quantize(make_base("llama"), "int3")
    base = make_base("llama")
    base.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantised already"):
        quantize(base, "int8")
    base = make_base("llama")
    base.model.experts = nn.ParameterList(nn.Parameter(torch.zeros(8, 96, 64)) for _ in range(4))
    with pytest.raises(ModelError, match="outside of linear modules"):
        quantize(base, "int8")
    from dlora.cloud.quantize import _bitsandbytes

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    _bitsandbytes.cache_clear()
    with pytest.raises(UsageError, match=r"needs bitsandbytes: .*install .*bitsandbytes>="):
        quantize(make_base("llama"), "nf4")
    _bitsandbytes.cache_clear()


@pytest.mark.slow
def test_serve_command(model_folder: Path, tmp_path: Path) -> None:
    """`dlora serve --quantize` serves a low-bit base over a socket, trains an edge, and says what
    it is.
    """
    with serving(str(model_folder), "--quantize", "int4") as address:
        link = dlora.connect(address, cache=tmp_path)
        split = make_split(link, lora())
        assert split(**batches()[0]).loss.isfinite()
        assert dict(describe_server(address, link.description))["model"].endswith(
            "float32, int4 weights"
        )
        link.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_real_model_matches_local(kind: str) -> None:
    """Loss to 1e-6 and gradients to 1e-5 of local peft's also hold with 30 layers of trained
    weights in low bits.
    """
    loaded = load_model(DEMO_MODEL, quantize=kind)
    assert quantization(loaded.model) == kind
    link = dlora.in_process(loaded.model, loaded.tokenizer, model_id=DEMO_MODEL_ID)
    config = lora(r=8, lora_alpha=16)
    base = dequantised(load_model(DEMO_MODEL, quantize=kind).model)
    torch.manual_seed(0)
    local = get_peft_model(base, config)
    torch.manual_seed(0)
    split = dlora.get_peft_model(link, config, wire_dtype="fp32")
    for model in (local, split):
        for name, parameter in adapter(model).items():
            if "lora_B" in name:
                nn.init.normal_(
                    parameter, std=0.01, generator=torch.Generator().manual_seed(len(name))
                )
    rows = [json.loads(line) for line in data_file("train.jsonl").read_text().splitlines()[:3]]
    tokenizer = dlora.load_tokenizer(link)
    batch = tokenizer(
        [row["prompt"] + row["completion"] for row in rows], return_tensors="pt", padding=True
    )
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    want, got = local(**batch, labels=labels).loss, split(**batch, labels=labels).loss
    assert got.item() == pytest.approx(want.item(), rel=LOSS_TOLERANCE)
    want.backward()
    got.backward()
    assert_same_grads(local, split, GRAD_TOLERANCE)
    link.close()


def test_edge_layers_of_a_low_bit_base_are_refused() -> None:
    """Layer files hold full weights: an edge would run other layers than the cloud quantised."""
    base = make_base("llama")
    quantize(base, "int8")
    with pytest.raises(UsageError, match="edge layers of a low-bit base are not supported"):
        CloudModel(base, model_id="x", limits=Limits(edge_first=1))
