"""What was asked for is done or refused: targets, patterns, penalties, steps, allowed modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora, make_base
from transformers import GenerationConfig, PreTrainedTokenizerFast

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.load import load_cloud
from dlora.cloud.model import CloudModel
from dlora.edge.link import Link
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.inference.answer import complete, load_for_inference
from dlora.inference.chat import Chat
from dlora.inference.evaluate import evaluate
from dlora.inference.settings import ChatSettings, EvalSettings, GenerateSettings
from dlora.training.settings import TrainSettings

PROMPT = "the desk of the message"


# ----------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "target_modules: 'query' matches no module"),
        ({"target_modules": ["q_proj", "proj"]}, "target_modules: 'proj' matches no module"),
        ({"rank_pattern": {"k_proj": 2, "kproj": 2}}, "rank_pattern: 'kproj' matches no module"),
        ({"alpha_pattern": {"layers.9.q_proj": 2}}, "alpha_pattern: 'layers.9.q_proj' matches no"),
        (
            {"exclude_modules": ["v_proj"], "target_modules": ["q_proj", "v_proj"]},
            "target_modules: 'v_proj' matches no module",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_targets_that_match_nothing_are_refused(
    links: Callable[[str], Link], options: dict[str, Any], message: str
) -> None:
    """A typing error beside a right name does not train less than was asked for."""
    with pytest.raises(UsageError, match=f"{message}.* This server allows: q_proj, k_proj"):
        dlora.get_peft_model(links("llama"), lora(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": "all-linear"},
        {"rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_targets_that_match_are_taken(
    links: Callable[[str], Link], options: dict[str, Any]
) -> None:
    """Full names, ends of names, patterns and peft's own words all name modules."""
    assert dlora.get_peft_model(links("llama"), lora(**options)).adapted_modules


def test_an_adapter_with_a_needless_target_still_loads(
    links: Callable[[str], Link], tmp_path: Path
) -> None:
    """What peft has trained and saved is whole, whatever its configuration names besides."""
    from peft import get_peft_model

    get_peft_model(make_base("llama"), lora(target_modules=["q_proj", "query"])).save_pretrained(
        tmp_path
    )
    assert dlora.load_adapter(links("llama"), tmp_path).adapted_modules


def test_a_server_whose_modules_nobody_may_adapt_is_refused(model_folder: Path) -> None:
    """`--allow_modules` that matches nothing is a typing error, and not a server."""
    with pytest.raises(UsageError, match=r"allow_modules: 'qproj' is in none .* end in q_proj, "):
        load_cloud(str(model_folder), allow_modules="qproj", limits=Limits())


@pytest.mark.parametrize("steps", [0, -2])
def test_no_steps_are_no_run(steps: int, tmp_path: Path) -> None:
    """`--max_steps 0` does not train a step and call it finished."""
    with pytest.raises(UsageError, match=f"max_steps: got {steps}, want at least 1, or -1"):
        TrainSettings(server="s", data="d", output=tmp_path / "run", max_steps=steps)


# ----------------------------------------------------------------- the provider's generation config


@pytest.fixture(scope="module")
def link(
    tokenizer: PreTrainedTokenizerFast,
) -> Iterator[InProcessLink]:
    """A model whose provider would have answers made in another way."""
    model = make_base("llama")
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        num_beams=3,
        suppress_tokens=list(range(5, 100)),
        max_new_tokens=3,
    )
    with closing(InProcessLink(CloudModel(model, model_id="example-org/own"), tokenizer)) as made:
        yield made


def likeliest(tokenizer: PreTrainedTokenizerFast, prompt: str, count: int) -> str:
    """What always taking the likeliest token answers, by the full model."""
    model, ids = make_base("llama"), tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 2:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_greedy_is_the_likeliest_token(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The documented defaults hold, whatever generation config is served: `generate`, `chat` and
    `eval --exact_match` take the likeliest token.
    """
    model = load_for_inference(link, None, wire_dtype="fp32")
    want = likeliest(tokenizer, PROMPT, 12)
    for given in ({}, {"repetition_penalty": 1.0}):
        settings = GenerateSettings(server="s", prompt=PROMPT, max_new_tokens=12, **given)
        assert complete(model, tokenizer, [PROMPT], **settings.options)[0] == [want]

    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "{PROMPT}", "completion": {want!r}}}'.replace("'", '"'))
    figures = evaluate(
        EvalSettings(server="s", data=str(file), exact_match=True, max_new_tokens=12),
        model,
        tokenizer,
    )
    assert figures["exact_match"] == 1.0

    talk = Chat(model, tokenizer, **ChatSettings(server="s", temperature=0.0).options)
    talk.options["max_new_tokens"] = 12
    said = talk.say("the desk", lambda _: None)
    assert said == likeliest(tokenizer, "[user] the desk\n[assistant] ", 12)
    talk.close()


def test_a_penalty_that_is_asked_for_is_applied(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What the settings say still counts."""
    model = load_for_inference(link, None, wire_dtype="fp32")
    settings = GenerateSettings(
        server="s", prompt=PROMPT, max_new_tokens=12, repetition_penalty=50.0
    )
    texts, _ = complete(model, tokenizer, [PROMPT], **settings.options)
    assert texts != [likeliest(tokenizer, PROMPT, 12)]
