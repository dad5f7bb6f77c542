"""What a forward leaves on the served model's modules is of its pass: no edge computes with what
another has left there.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, VOCAB, lora, make_split
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Phi3Config,
    PreTrainedModel,
)

import dlora
from dlora.cloud.model import CloudModel
from dlora.errors import ModelError, PeerError
from dlora.server.server import Server

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(config: Any) -> PreTrainedModel:
    """A random model, its weights large enough that positions matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def some_ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def test_rope_that_depends_on_length_is_the_same_behind_a_long_sequence(tmp_path: Path) -> None:
    """On a server with dynamic NTK one edge's longest sequence changes no bit of another's, and
    none longer than the model's own length, at which its frequencies would change, is taken.
    """
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    server = Server(CloudModel(random_model(config), model_id="x/y"), options=NO_DRAIN)
    server.start()
    one, other = (dlora.connect(server.address, cache=tmp_path) for _ in range(2))
    try:
        split, long = (make_split(link, lora()).eval() for link in (one, other))
        with torch.no_grad():
            want = split(input_ids=some_ids(12)).logits
            long(input_ids=some_ids(16))
            positions = torch.tensor([[0, 5, 15]])
            long(input_ids=some_ids(3), position_ids=positions)
            with pytest.raises(PeerError, match="17 tokens is over .* limit of 16"):
                long(input_ids=some_ids(17))
            assert torch.equal(split(input_ids=some_ids(12)).logits, want)
    finally:
        one.close()
        other.close()
        server.stop()


def test_frequencies_of_a_long_sequence_do_not_stay() -> None:
    """With longrope the factors of a long sequence are gone when its pass ends, and short ones are
    computed as before.
    """
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        **factors,
    }
    lengths = {"original_max_position_embeddings": 8, "max_position_embeddings": 64}
    config = Phi3Config(**SIZES, **lengths, rope_parameters=rope)
    base = random_model(config)
    before = base.model.rotary_emb.inv_freq.clone()
    link = dlora.in_process(base, model_id="x/y")
    split = make_split(link, lora(target_modules=["o_proj"])).eval()
    with torch.no_grad():
        want = split(input_ids=some_ids(6)).logits
        split(input_ids=some_ids(20))
        assert torch.equal(base.model.rotary_emb.inv_freq, before)
        assert torch.equal(split(input_ids=some_ids(6)).logits, want)
    link.close()


class _InBetween(LogitsProcessor):
    """Lets another edge answer before each token."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.other.generate(some_ids(9), max_new_tokens=2, do_sample=False)
        return scores


def test_recurrent_state_that_modules_keep_is_no_other_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that keeps recurrent states in its modules, and not in a cache, answers an edge as if
    no other were there.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    base = import_module("tiny_models").build("recurrent_gemma")
    link = dlora.in_process(base, model_id="x/y")
    one, other = (make_split(link, lora(target_modules=["gate_proj"])).eval() for _ in range(2))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    want = one.generate(some_ids(7), **options)
    got = one.generate(
        some_ids(7), logits_processor=LogitsProcessorList([_InBetween(other)]), **options
    )
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    link.close()


class _Remembers(torch.nn.Module):
    """Around a module that waits for an edge: adds what went in before."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.inner(x) + self.last
        self.last = x.detach().mean()
        return output


def test_buffer_that_passes_share_is_refused() -> None:
    """A module that waits for edges, and keeps a buffer of one pass for the next, is refused."""
    base = random_model(LlamaConfig(**SIZES, max_position_embeddings=64))
    base.model.layers[0].mlp = _Remembers(base.model.layers[0].mlp)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp keeps last of one pass for the next"):
        dlora.in_process(base, model_id="x/y")
