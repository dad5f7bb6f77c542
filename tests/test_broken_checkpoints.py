"""What is served is the model: broken checkpoints and tokenizers, and the one line that each gets.

The functions are those that `serve`, `merge` and `load_adapter` call.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import VOCAB, make_base
from helpers import cli
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

import dlora
from dlora.cli.main import main
from dlora.cli.merge import merge
from dlora.cli.settings import MergeSettings
from dlora.cloud import checkpoint
from dlora.cloud.limits import Limits
from dlora.cloud.load import load_cloud, load_model
from dlora.edge.link import Link
from dlora.edge.load import load_adapter, load_base
from dlora.embedded import InProcessLink
from dlora.errors import DLoRAError, UsageError

ADAPTER = "adapter_model.safetensors"
CONFIG_FILE = "config.json"
CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 13479\n"
PROJECTION = "model.layers.1.self_attn.q_proj.weight"


# ----------------------------------------------------------------- ways to break a folder


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return broken


def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))

    return broken


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return broken


def quantised(**values: Any) -> Callable[[Path], None]:
    return edit_json("config.json", quantization_config=values)


def bare_decoder(folder: Path) -> None:
    """As `LlamaModel.save_pretrained` leaves it, for a config with a head of its own."""
    decoder = LlamaModel.from_pretrained(folder)
    decoder.config.tie_word_embeddings = False
    decoder.config.architectures = ["LlamaForCausalLM"]
    decoder.save_pretrained(folder)


def add_adapter(folder: Path) -> None:
    adapted = get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)


def only_adapter(folder: Path) -> None:
    add_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()


def edit_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return broken


def many_words(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), VOCAB + 9)}


def no_words(values: dict[str, Any]) -> None:
    values |= {"added_tokens": [], "pre_tokenizer": None}
    values["model"] |= {"vocab": {}, "merges": []}


POINTER = " is a Git LFS pointer and not the file: run `git lfs pull`"
CUT = "cannot load model '{folder}': "
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a lost tensor": (
        edit_weights(lambda weights: weights.pop(PROJECTION)),
        f"{{folder}} lacks {PROJECTION} of LlamaForCausalLM",
    ),
    "many lost tensors": (
        edit_weights(lambda w: [w.pop(key) for key in list(w) if ".layers.2." in key]),
        "and 6 more of LlamaForCausalLM",
    ),
    "a lost head": (
        edit_weights(lambda weights: weights.pop("lm_head.weight")),
        "{folder} lacks lm_head.weight",
    ),
    "a decoder without head": (bare_decoder, "{folder} lacks lm_head.weight"),
    "another shape": (
        edit_weights(lambda w: w.update({PROJECTION: torch.zeros(32, 64)})),
        f"{{folder}}: {PROJECTION} has shape [32, 64], its configuration wants [64, 64]",
    ),
    "the configuration of a wider model": (
        edit_json("config.json", intermediate_size=128),
        "has shape [64, 96], its configuration wants [64, 128] and 8 more",
    ),
    "fewer rows than the vocabulary": (
        edit_json("config.json", vocab_size=VOCAB + 20),
        "has shape [300, 64], its configuration wants [320, 64]",
    ),
    "the configuration of a shallower model": (
        edit_json("config.json", num_hidden_layers=2),
        "has no place for that",
    ),
    "biases without a place": (
        edit_weights(lambda w: w.update({PROJECTION.replace("weight", "bias"): torch.ones(64)})),
        "{folder} has model.layers.1.self_attn.q_proj.bias, and LlamaForCausalLM",
    ),
    "biases without a place, and without the decoder's name": (
        edit_weights(lambda w: w.update({"layers.1.self_attn.q_proj.bias": torch.ones(64)})),
        "has layers.1.self_attn.q_proj.bias, and LlamaForCausalLM",
    ),
    "the configuration of a deeper model": (
        edit_json("config.json", num_hidden_layers=4),
        "{folder} lacks model.layers.3.input_layernorm.weight",
    ),
    "weights that are cut": (cut(WEIGHTS, 0.6), CUT),
    "weights that are cut in their header": (cut(WEIGHTS, 0.001), CUT),
    "empty weights": (write(WEIGHTS, ""), "{folder}/model.safetensors is empty"),
    "weights that are a pointer": (write(WEIGHTS, LFS), "{folder}/model.safetensors" + POINTER),
    "weights that are no file": (lambda folder: (folder / WEIGHTS).unlink(), CUT),
    "a shard that is not there": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors"),
            (folder / f"{WEIGHTS}.index.json").write_text(
                json.dumps(
                    {
                        "metadata": {"total_size": 1},
                        "weight_map": {
                            "lm_head.weight": "model-00001-of-00002.safetensors",
                            "model.norm.weight": "model-00002-of-00002.safetensors",
                        },
                    }
                )
            ),
        ),
        CUT,
    ),
    "an empty configuration": (write("config.json", ""), "{folder}/config.json is empty"),
    "a configuration that is a pointer": (
        write("config.json", LFS),
        f"{{folder}}/config.json{POINTER}",
    ),
    "an unknown architecture": (edit_json("config.json", model_type="zebra"), CUT),
    "code of its own": (
        edit_json(
            "config.json", model_type="zebra", auto_map={"AutoModelForCausalLM": "zebra.Zebra"}
        ),
        CUT,
    ),
    "a configuration of nonsense": (
        edit_json("config.json", num_attention_heads=0),
        CUT,
    ),
    "GPTQ without its library": (quantised(quant_method="gptq", bits=4), CUT),
    "AWQ without its library": (quantised(quant_method="awq", bits=4), CUT),
    "HQQ without its library": (
        quantised(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 4}}),
        CUT,
    ),
    "weights with scales of an unknown quantisation": (
        edit_weights(lambda w: w.update({f"{PROJECTION}_scale": torch.ones(64)})),
        "{folder} has model.layers.1.self_attn.q_proj.weight_scale, and LlamaForCausalLM",
    ),
    "bitsandbytes in 4 bits": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "{folder} is quantised in bitsandbytes' 4 bits",
    ),
    "bitsandbytes in 4 bits, which is not named": (
        quantised(load_in_4bit=True),
        "{folder} is quantised in bitsandbytes' 4 bits",
    ),
    "an adapter inside": (add_adapter, "{folder} holds an adapter (adapter_config.json)"),
    "an adapter alone": (only_adapter, "{folder} holds an adapter (adapter_config.json)"),
    "an empty tokenizer": (
        write("tokenizer.json", ""),
        "{folder}/tokenizer.json is empty",
    ),
    "a tokenizer that is a pointer": (
        write("tokenizer.json", LFS),
        "{folder}/tokenizer.json" + POINTER,
    ),
    "a tokenizer that is cut": (
        cut("tokenizer.json", 0.5),
        "the tokenizer of {folder} cannot be read: ",
    ),
    "a chat template that is a pointer": (
        write("chat_template.jinja", LFS),
        "{folder}/chat_template.jinja" + POINTER,
    ),
    "an empty chat template": (write("chat_template.jinja", ""), "chat_template.jinja is empty"),
    "a chat template that is cut": (
        cut("chat_template.jinja", 0.5),
        "{folder} cannot be served: its chat template is broken in line 1 (",
    ),
    "merges that are a pointer": (write("merges.txt", LFS), "{folder}/merges.txt" + POINTER),
    "an empty vocabulary": (write("vocab.txt", ""), "{folder}/vocab.txt is empty"),
    "more tokens than rows": (
        edit_tokenizer(many_words),
        "behind the embedding's 300 rows",
    ),
    "a tokenizer without tokens": (
        edit_tokenizer(no_words),
        "its tokenizer makes no tokens of a text",
    ),
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A whole model folder that a test may break."""
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def line_of(action: Callable[[], Any]) -> str:
    """The one line that a command prints for what the action raises."""
    with pytest.raises(DLoRAError) as raised:
        action()
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_not_served(name: str, folder: Path) -> None:
    """Nothing random, cut or foreign is served or merged: each gets its one line."""
    broken, want = BROKEN[name]
    broken(folder)
    assert want.format(folder=folder) in line_of(lambda: load_model(str(folder)))


def test_a_whole_checkpoint_is_served_and_merged(folder: Path, tmp_path: Path) -> None:
    """What the table breaks is fine before: none of its lines is about the whole folder."""
    assert load_model(str(folder)).tokenizer is not None
    add_adapter(tmp_path / "adapter")
    merge(MergeSettings(model=str(folder), adapter=tmp_path / "adapter", output=tmp_path / "whole"))
    assert load_model(str(tmp_path / "whole")).tokenizer is not None


def test_what_is_outside_of_the_decoder_may_be_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of other tasks, layers that draft tokens and old constants keep no model from being
    served; a warning names what is left out.
    """
    edit_json(CONFIG_FILE, num_nextn_predict_layers=1)(folder)
    extra = {
        "score.weight": torch.ones(2, 64),
        "model.layers.3.self_attn.q_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    edit_weights(lambda weights: weights.update(extra))(folder)
    load_model(str(folder))
    assert "q_proj.weight, score.weight are outside of the decoder, and not served" in caplog.text


def test_the_commands_say_it_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost tensor ends `serve` and `merge` with exit code 1 and no traceback."""
    BROKEN["a lost tensor"][0](folder)
    add_adapter(tmp_path / "adapter")
    done = cli("serve", "--model", str(folder), "--port", "0")
    words = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    merged = main(["merge", "--model", str(folder), *words])
    for code, said in ((done.returncode, done.stderr), (merged, capsys.readouterr().err)):
        assert code == 1
        assert re.search(r"^dlora: .* lacks model\.layers\.1\.self_attn\.q_proj", said, re.M)
        assert "Traceback" not in said
    assert not (tmp_path / "merged").exists()


# ----------------------------------------------------------------- GGUF


def write_gguf(
    file: Path, without: str = " ", extra: tuple[str, ...] = (), scaling: bool = False
) -> None:
    """A tiny Llama as a GGUF file, without the tensors whose name begins so, and with others."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + number) for number in range(26)), "Ġ", "ab"]
    tokens += [f"t{number}" for number in range(40 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    shapes = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}_norm": (32,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.ffn_{name}": (48, 32) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (32, 48)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if not name.startswith(without):
            tensor = torch.randn(shape, generator=generator)
            writer.add_tensor(f"{name}.weight", tensor.numpy())
    for name in extra:
        writer.add_tensor(name, torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_LINES = {
    "model-00001-of-00002.gguf": "lacks model.layers.1.input_layernorm.weight, ",
    "header.gguf": "cannot read {file}: ",
    "cut.gguf": "cannot read {file}: ",
    "empty.gguf": "{file} is empty",
    "pointer.gguf": "{file}" + POINTER,
    "surplus.gguf": "{file} has blk.0.attn_q.bias, blk.2.attn_q.weight, rope_freqs.weight, and ",
    "scaled.gguf": "{file} has llama.rope.scaling.type = linear, and LlamaForCausalLM",
}
SURPLUS = ("blk.0.attn_q.bias", "blk.2.attn_q.weight", "rope_freqs.weight")


@pytest.mark.parametrize("name", GGUF_LINES)
def test_a_broken_gguf_is_refused_and_not_kept(name: str, tmp_path: Path) -> None:
    """A GGUF in parts, cut, of more than is read, or none at all gets one line, and nothing of it
    gets into the cache.
    """
    file, cache = tmp_path / name, tmp_path / "cache"
    write_gguf(
        file,
        without="blk.1." if "00001" in name else " ",
        extra=SURPLUS if name == "surplus.gguf" else (),
        scaling=name == "scaled.gguf",
    )
    whole = file.read_bytes()
    content = {
        "header.gguf": whole[:200],
        "cut.gguf": whole[:-5000],
        "empty.gguf": b"",
        "pointer.gguf": LFS.encode(),
    }
    file.write_bytes(content.get(name, whole))
    line = line_of(lambda: load_model(str(file), cache=cache))
    assert GGUF_LINES[name].format(file=file) in line
    assert ("llama-gguf-split --merge" in line) == ("00001" in name)
    assert not list(cache.rglob("*"))


def test_a_whole_gguf_is_served(tmp_path: Path) -> None:
    """The file that the table breaks is fine before, and what lies beside it is not of it."""
    add_adapter(tmp_path)
    write_gguf(tmp_path / "whole.gguf")
    loaded = load_model(str(tmp_path / "whole.gguf"), cache=tmp_path / "cache")
    assert loaded.model.config.num_hidden_layers == 2
    assert not any("lora" in name for name, _ in loaded.model.named_modules())


# ----------------------------------------------------------------- adapters


def adapter_of(folder: Path, layers: int = 3, width: int = 64, **options: Any) -> None:
    """What peft saves on a model of another depth or width."""
    config = copy.deepcopy(make_base("llama").config)
    config.num_hidden_layers, config.hidden_size = layers, width
    config.head_dim = 16
    base = LlamaForCausalLM(config)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4} | options
    get_peft_model(base, LoraConfig(**options)).save_pretrained(folder)


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of a deeper model": (
        lambda folder: adapter_of(folder, layers=5),
        "does not fit {model}: it has unknown base_model.model.model.layers.3.self_attn.q_proj",
    ),
    "of a shallower model": (
        lambda folder: adapter_of(folder, layers=2),
        "does not fit {model}: it lacks base_model.model.model.layers.2.self_attn.q_proj",
    ),
    "of a wider model": (lambda folder: adapter_of(folder, width=32), "has shape [4, 32], want"),
    "of another rank": (
        lambda folder: (adapter_of(folder), edit_json("adapter_config.json", r=8)(folder)),
        "has shape [4, 64], want [8, 64]",
    ),
    "of modules that are not there": (
        lambda folder: (
            adapter_of(folder),
            edit_json("adapter_config.json", target_modules=["query"])(folder),
        ),
        "query",
    ),
    "of another kind": (
        lambda folder: (
            adapter_of(folder),
            edit_json("adapter_config.json", peft_type="IA3")(folder),
        ),
        "",
    ),
    "of an unknown kind": (
        lambda folder: (adapter_of(folder), edit_json(CONFIG, peft_type="Z")(folder)),
        "adapter_config.json cannot be read: ",
    ),
    "with an empty configuration": (
        lambda folder: (adapter_of(folder), write("adapter_config.json", "")(folder)),
        "adapter_config.json cannot be read: ",
    ),
    "without weights": (
        lambda folder: (adapter_of(folder), (folder / ADAPTER).unlink()),
        "has no weights: adapter_model.safetensors is missing",
    ),
    "with weights that are cut": (
        lambda folder: (adapter_of(folder), cut(ADAPTER, 0.6)(folder)),
        "cannot be read: Error while deserializing header",
    ),
    "with weights that are a pointer": (
        lambda folder: (adapter_of(folder), write(ADAPTER, LFS)(folder)),
        "cannot be read: Error while deserializing header",
    ),
    "with empty weights": (
        lambda folder: (adapter_of(folder), write(ADAPTER, "")(folder)),
        "cannot be read: Error while deserializing header",
    ),
    "without tensors": (
        lambda folder: (adapter_of(folder), save_file({}, folder / ADAPTER)),
        "has no weights: its file is empty",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(
    name: str, model_folder: Path, tmp_path: Path, links: Callable[[str], Link]
) -> None:
    """`merge` and `load_adapter` refuse the same adapters, each in one line."""
    broken, want = ADAPTERS[name]
    folder, output = tmp_path / "adapter", tmp_path / "merged"
    broken(folder)
    settings = MergeSettings(model=str(model_folder), adapter=folder, output=output)
    link = links("llama")
    for action, model in (
        (lambda: merge(settings), str(model_folder)),
        (lambda: load_adapter(link, folder), link.description.model_id),
    ):
        assert want.format(model=model) in line_of(action)
    assert not output.exists()


@pytest.mark.parametrize(
    "name",
    ["without weights", "with weights that are cut", "with empty weights", "without tensors"],
)
def test_info_refuses_an_adapter_without_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `load_adapter` could not load is not described as an adapter either."""
    ADAPTERS[name][0](tmp_path)
    assert main(["info", "--adapter", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("dlora: ") and said.err.count("\n") == 1


# ----------------------------------------------------------------- low bits


def test_kernels_that_are_not_their_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low-bit linear is served only where outputs and gradients are those of its weight."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    # Not in evaluation: some CPUs then have a kernel without gradients, and others do not.
    model = torch.nn.Sequential(linear).to("cpu").train()
    checkpoint.check_foreign_kernels(model, "right")

    right = linear.forward
    differs, none = "results that differ by", r"no result with a gradient on this device \("
    for wrong, says in (
        (lambda x: right(x) * 1.1, differs),
        (lambda x: right(2 * x - x.detach()), differs),
        (lambda x: right(x.detach()), none),
    ):
        monkeypatch.setattr(linear, "forward", wrong)
        with pytest.raises(checkpoint.ModelError, match=f"wrong: 0 gives {says}"):
            checkpoint.check_foreign_kernels(model, "wrong")


# ----------------------------------------------------------------- tokenizers that need care


Serve = Callable[[PreTrainedTokenizerFast | None], Link]


@pytest.fixture
def served(folder: Path) -> Iterator[Serve]:
    """A link to the folder's model with a tokenizer, as `serve` would load both."""
    with ExitStack() as links:

        def serve(tokenizer: PreTrainedTokenizerFast | None) -> Link:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            cloud, loaded = load_cloud(str(folder), allow_modules="", limits=Limits())
            return links.enter_context(closing(InProcessLink(cloud, loaded.tokenizer)))

        yield serve


def altered(
    tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any
) -> PreTrainedTokenizerFast:
    """A copy that a test may change."""
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, **changes)


def test_an_end_that_a_tokenizer_appends_is_left_out(
    tokenizer: PreTrainedTokenizerFast, folder: Path, served: Serve
) -> None:
    """A text is followed by what answers it, and not by the end of a text."""
    appending = altered(tokenizer, folder)
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert appending("the desk")["input_ids"][-1] == 2

    ready = dlora.load_tokenizer(served(appending))
    assert ready("the desk")["input_ids"] == [1, *tokenizer("the desk")["input_ids"]]
    assert ready("")["input_ids"] == [1]
    assert ready(["the desk", "of"])["input_ids"][1] == [1, *tokenizer("of")["input_ids"]]


def test_token_types_are_left_out(
    tokenizer: PreTrainedTokenizerFast, folder: Path, served: Serve
) -> None:
    """What a tokenizer gives is what a decoder takes."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    typed = altered(tokenizer, folder, model_input_names=names)
    link = served(typed)
    assert "token_type_ids" in PreTrainedTokenizerFast.from_pretrained(folder)("the desk")
    ready = dlora.load_tokenizer(link)
    assert set(ready("the desk")) == {"input_ids", "attention_mask"}


def test_padding_without_a_row_is_the_end_token(
    tokenizer: PreTrainedTokenizerFast, folder: Path, served: Serve
) -> None:
    """A padding token that was added without a row of the embedding does not break a batch."""
    padded = altered(tokenizer, folder)
    padded.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(VOCAB)]})
    padded.add_special_tokens({"pad_token": f"<{VOCAB - 1}>"})
    assert padded.pad_token_id >= VOCAB
    link = served(padded)
    ready = dlora.load_tokenizer(link)
    assert ready.pad_token_id == ready.eos_token_id
    model = load_base(link)
    batch = ready(["the desk", "of"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=1).shape[0] == 2

    # A text may still name one of the others.
    ids = ready(f"<{VOCAB - 1}>", return_tensors="pt")
    with pytest.raises(UsageError, match=r"token 5\d\d has no row among the embedding's 300"):
        model(**ids)


def test_a_folder_without_tokenizer_is_served_without(
    folder: Path, served: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no fault: edges may bring their own."""
    for file in folder.glob("*token*"):
        file.unlink()
    link = served(None)
    assert "there is none beside it" in caplog.text
    with pytest.raises(UsageError, match="serves no tokenizer"):
        dlora.load_tokenizer(link)


# ----------------------------------------------------------------- the one place that loads


def test_weights_are_loaded_in_one_place() -> None:
    """No other file of the package lets transformers fill in what a checkpoint lacks."""
    loads = re.compile(r"^(AutoModel|Llama|PreTrainedModel|.*ForCausalLM)")
    places = []
    for file in sorted(Path(dlora.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "from_pretrained" and loads.match(ast.unparse(node.func.value)):
                words = {one.arg: ast.unparse(one.value) for one in node.keywords}
                places.append((file.name, words.get("output_loading_info")))
    assert places == [("checkpoint.py", "True")]
