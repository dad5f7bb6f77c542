"""What a cloud makes of a model: sites, refusals, loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base, make_split
from transformers import AutoModelForSeq2SeqLM, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

import dlora
from dlora.cloud.load import load_model
from dlora.cloud.model import CloudModel
from dlora.errors import ModelError, UsageError


def names(cloud: CloudModel, layer: int) -> list[list[str]]:
    """The last parts of the module names at each site of a layer."""
    sites = [
        [module.name for module in site.modules if module.layer == layer] for site in cloud.sites
    ]
    return [[name.rpartition(".")[2] for name in site] for site in sites if site]


@pytest.mark.parametrize(
    ("family", "want"),
    [
        (
            "llama",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("bloom", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
    ],
)
def test_modules_that_read_the_same_tensor_share_a_site(family: str, want: list[list[str]]) -> None:
    """Tracing alone finds the sites, in calling order, without a table of model names."""
    found = names(CloudModel(make_base(family), model_id="x/y"), layer=1)
    # OPT calls v before k; the order within a site is the calling order.
    assert [sorted(site) for site in found] == [sorted(site) for site in want]


class _ReadsIds(LlamaForCausalLM):
    """A class of somebody's own, whose head looks at token ids."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[..., None]
        return output


def test_class_that_edges_cannot_build_is_refused() -> None:
    """Edges build the class that transformers has for the configuration: any other class is refused
    by name.
    """
    with pytest.raises(ModelError, match="_ReadsIds cannot be split: edges build LlamaForCausalLM"):
        CloudModel(_ReadsIds(make_base("llama").config), model_id="x/y")


def test_model_whose_split_is_wrong_is_refused() -> None:
    """Traceable is not correct: a decoder that treats ids and embeddings differently is refused
    with the difference.
    """
    odd = make_base("llama")
    inner = odd.model.forward

    def forward(input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        embeddings = (
            2 * odd.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )
        return inner(inputs_embeds=embeddings + 0.1, **kwargs)

    odd.model.forward = forward
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be served: .*loss off by"):
        dlora.in_process(odd, model_id="x/y")


def test_encoder_decoder_is_refused() -> None:
    """A model that is no decoder-only causal LM is refused by class name."""
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    )
    with pytest.raises(
        ModelError, match="T5ForConditionalGeneration cannot be split: edges build nothing"
    ):
        CloudModel(model, model_id="x/y")


def test_module_that_runs_twice_is_not_offered() -> None:
    """Layers that share their weights run twice; adapting them is refused with the reason, the rest
    still works.
    """
    base = make_base("llama")
    base.model.layers[1].mlp = base.model.layers[0].mlp
    cloud = CloudModel(base, model_id="x/y")
    assert "runs 2 times" in cloud.unusable["model.layers.0.mlp.up_proj"]
    assert not any("layers.0.mlp" in module.name for site in cloud.sites for module in site.modules)


def test_gradient_checkpointing_is_refused() -> None:
    """It would run every exchange twice."""
    base = make_base("llama")
    base.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing would run every exchange twice"):
        CloudModel(base, model_id="x/y")


def test_fingerprint_is_that_of_the_weights() -> None:
    """Equal models have equal fingerprints; one changed weight changes it, and no path is part of
    it.
    """
    one, same, other = (make_base("llama") for _ in range(3))
    same.config._name_or_path = "/somewhere/else"
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-3
    prints = [CloudModel(model, model_id="x/y").fingerprint for model in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_half_precision_cloud_trains() -> None:
    """A bf16 cloud serves an fp32 adapter: the loss is near the fp32 cloud's, and gradients
    arrive.
    """
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        link = dlora.in_process(make_base("llama").to(dtype), model_id="x/y")
        split = make_split(link, lora())
        loss = split(**batches()[0]).loss
        loss.backward()
        losses.append(loss.item())
        assert all(
            parameter.grad.any() and parameter.dtype == torch.float32
            for parameter in adapter(split).values()
        )
        link.close()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_second_adapter_on_other_modules_counts() -> None:
    """An adapter added later, on modules that the first does not touch, changes the output."""
    link = dlora.in_process(make_base("llama"), model_id="x/y")
    split = make_split(link, lora(target_modules=["q_proj"])).eval()
    ids = batches()[0]["input_ids"]
    split.add_adapter("second", lora(target_modules=["down_proj"]))
    split.set_adapter("second")
    with torch.no_grad(), split.disable_adapter():
        base = split(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(split(input_ids=ids).logits, base, atol=1e-3)
    link.close()


def test_loss_without_backward_does_not_keep_the_process(model_folder: Path) -> None:
    """A program that ends between forward and backward ends, in process too."""
    code = f"""
import dlora, peft, torch
from transformers import AutoModelForCausalLM
link = dlora.in_process(AutoModelForCausalLM.from_pretrained({str(model_folder)!r}))
model = dlora.get_peft_model(link, peft.LoraConfig(r=2, target_modules=["q_proj"]))
ids = torch.ones(1, 4, dtype=torch.long)
loss = model(input_ids=ids, labels=ids).loss
"""
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode
        == 0
    )


def test_folder_is_loaded_with_its_tokenizer(model_folder: Path) -> None:
    """A local folder is served under its own name, or the public name that is given."""
    loaded = load_model(str(model_folder))
    assert loaded.model_id == "tiny-llama"
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)
    assert load_model(str(model_folder), model_id="org/public").model_id == "org/public"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./nowhere", {}, "no such folder"),
        ("nowhere.gguf", {}, "no such file"),
        ("no-org/no-model", {}, "cannot load model 'no-org/no-model'"),
        ("tiny", {"dtype": "int3"}, "dtype: got 'int3'"),
        ("FOLDER", {"device": "toaster"}, "device: got 'toaster'"),
        ("FOLDER", {"device": "auto"}, "device_map takes .auto."),
    ],
)
def test_models_that_cannot_be_loaded(
    model_folder: Path, name: str, options: dict[str, Any], message: str
) -> None:
    """A wrong name, file, dtype or device is one clear line."""
    with pytest.raises((UsageError, ModelError), match=message):
        load_model(name.replace("FOLDER", str(model_folder)), **options)


def test_broken_gguf_is_a_clear_error(tmp_path: Path) -> None:
    """A file that is no GGUF is refused by name, and nothing is left in the cache."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\x00" * 50)
    with pytest.raises(ModelError, match=r"cannot read .*x\.gguf"):
        load_model(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
