"""Tiny random models of every family, real servers on free ports, and a tokenizer made here.

Nothing of the wire is ever mocked: a test talks to a real gRPC server or to the in-process
transport, which runs the same two halves.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; two test processes share two cores

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import dlora
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.model import SplitModel
from dlora.embedded import InProcessLink
from dlora.server.server import Server, ServerOptions

VOCAB = 300
NO_DRAIN = ServerOptions(drain_s=0.0)  # a server of a test does not wait for open streams
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_QKV = ["q_proj", "k_proj", "v_proj"]

# Files that take longest, which begin first: at the end two processes have short ones to share.
_LONG = (
    *("test_training", "test_audit", "test_faults", "test_inference", "test_walks"),
    *("test_examples", "test_preferences", "test_endings", "test_paper"),
    *("test_api", "test_tinker", "test_fuzz", "test_cloud", "test_broken_checkpoints"),
)

# family -> (config, target modules). Dropout of the base is 0: in the cloud it is always off.
FAMILIES: dict[str, tuple[PreTrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**_LLAMA_LIKE), _QKV),
    "qwen2": (Qwen2Config(**_LLAMA_LIKE), _QKV),
    "qwen3": (Qwen3Config(**_LLAMA_LIKE, head_dim=16), _QKV),
    "mistral": (MistralConfig(**_LLAMA_LIKE), _QKV),
    "gemma2": (Gemma2Config(**_LLAMA_LIKE, head_dim=16), [*_QKV, "o_proj"]),
    "gemma3": (Gemma3TextConfig(**_LLAMA_LIKE, head_dim=16), [*_QKV, "down_proj"]),
    "opt": (
        OPTConfig(
            **_COMMON,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
            dropout=0.0,
        ),
        [*_QKV, "out_proj", "fc2"],
    ),
    "bloom": (
        BloomConfig(**_COMMON, hidden_size=64, n_layer=3, n_head=4),
        ["query_key_value", "dense"],
    ),
    "gpt2": (
        GPT2Config(
            **_COMMON,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        ["c_attn", "c_fc"],
    ),
}


def make_base(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model, its weights large enough that every path matters to the loss."""
    torch.manual_seed(seed)
    config, _ = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def lora(family: str = "llama", **options: Any) -> LoraConfig:
    """A LoRA whose B is not zero, on the family's usual modules."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": FAMILIES[family][1],
        "init_lora_weights": False,
    }
    return LoraConfig(**(defaults | {"task_type": "CAUSAL_LM"} | options))


def make_local(family: str, config: LoraConfig, seed: int = 1) -> PeftModel:
    """The reference: peft on the full model."""
    base = make_base(family)
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def make_split(
    link: Any,
    config: LoraConfig,
    seed: int = 1,
    wire_dtype: str = "fp32",
    wire: Any = "plain",
    **options: Any,
) -> SplitModel:
    """The same adapter on the split model."""
    torch.manual_seed(seed)
    return dlora.get_peft_model(link, config, wire=wire, wire_dtype=wire_dtype, **options)


def adapter(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def batches(
    count: int = 1, seed: int = 2, rows: int = 3, length: int = 11
) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of unequal lengths, the first tokens of each row without a label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
        lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length)[None] < lengths).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


# For tests of many cases: `make slow` has the families that are built like another one here.
BY_FAMILY = [
    pytest.param(family, marks=pytest.mark.slow)
    if family in ("mistral", "qwen2", "gemma3")
    else family
    for family in FAMILIES
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def cloud_models() -> Callable[[str], CloudModel]:
    """A frozen cloud model of a family, made once a session."""
    made: dict[str, CloudModel] = {}
    lock = threading.Lock()

    def get(family: str) -> CloudModel:
        with lock:
            if family not in made:
                made[family] = CloudModel(make_base(family), model_id=f"example-org/{family}")
        return made[family]

    return get


@pytest.fixture(scope="session")
def links(
    cloud_models: Callable[[str], CloudModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], GrpcLink]]:
    """A connection to a real server of a family, both made once a session."""
    servers: list[Server] = []
    made: dict[str, GrpcLink] = {}
    cache = tmp_path_factory.mktemp("edge-cache")

    def get(family: str) -> GrpcLink:
        if family not in made:
            server = Server(cloud_models(family), options=NO_DRAIN)
            server.start()
            servers.append(server)
            made[family] = dlora.connect(server.address, cache=cache)
        return made[family]

    yield get
    for link in made.values():
        link.close()
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of under 300 tokens with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(
        ["the desk of the message"] * 3,
        trainers.BpeTrainer(
            vocab_size=VOCAB - 10,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] "
        "}}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


@pytest.fixture(scope="module")
def link(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast
) -> Iterator[InProcessLink]:
    """A tiny Llama with a tokenizer, in this process; modules that want another make their own."""
    made = InProcessLink(cloud_models("llama"), tokenizer)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Server]:
    """The same behind gRPC; modules that want another make their own."""
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as running:
        yield running


@pytest.fixture(scope="session")
def model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Llama with tokenizer, as a transformers folder: what `dlora serve --model` takes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_base("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
