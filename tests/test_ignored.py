"""What was asked for is done or refused: targets, patterns, penalties, steps, allowed modules."""

from __future__ import annotations

import math
import re
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
from dlora.training.trainer_config import trainer_arguments
from dlora.training.trainer_settings import check_trainer

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
        (
            {"layers_to_transform": [0, 99]},
            "layers_to_transform: 99 matches no module with an adapter",
        ),
        (
            {"layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
            "layers_pattern: 'blocks' matches no module",
        ),
        ({"exclude_modules": ["v_prj"]}, "exclude_modules: 'v_prj' names no module"),
        ({"exclude_modules": ["layers.0"]}, "exclude_modules: 'layers.0' names no module"),
        ({"exclude_modules": r".*\.vv_proj"}, "exclude_modules: .*vv_proj' names no module"),
    ],
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
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
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head", "k_proj"], "target_modules": ["q_proj"]},
        {"exclude_modules": r".*\.0\.self_attn\.q_proj"},
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


TWICE = "is a setting of its own: give"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps: got 0, want at least 1, or -1"),
        ({"max_steps": -2}, "max_steps: got -2, want at least 1, or -1"),
        ({"epochs": 0.0}, "epochs: got 0.0, want more than 0"),
        ({"epochs": math.inf}, "epochs: got inf, want more than 0"),
        ({"trainer": {"max_steps": 0}}, f"trainer: max_steps {TWICE} max_steps"),
        ({"trainer": {"num_train_epochs": 0}}, f"trainer: num_train_epochs {TWICE} epochs"),
        ({"learning_rate": math.inf}, "learning_rate: got inf, want a positive number"),
        ({"warmup_steps": -1.0}, "warmup_steps: got -1.0, want 0 or more"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0, want 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, want 0 or more"),
        ({"save_total_limit": 0}, "save_total_limit: got 0, want at least 1"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, with which the adapter does nothing"),
        ({"scale": 0.0}, "scale: got 0, with which the adapter does nothing"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: q_proj: got 0"),
    ],
)
def test_what_trains_nothing_is_no_run(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """`--max_steps 0`, wherever it is given, does not train a step and call it finished; nor does
    anything else by which nothing could be learnt, or that would count for nothing.
    """
    with pytest.raises(UsageError, match=re.escape(message)):
        TrainSettings(server="s", data="d", output=tmp_path / "run", **changes)


def test_nothing_is_given_in_two_places(tmp_path: Path) -> None:
    """What is a setting cannot be given among `trainer` and `generation` as well, unchecked."""
    given = trainer_arguments(TrainSettings(server="s", data="d", output=tmp_path))
    free = "eval_strategy save_strategy metric_for_best_model prediction_loss_only disable_tqdm "
    free += "logging_nan_inf_filter dataloader_pin_memory router_aux_loss_coef"
    for name in given.keys() - set(free.split()):
        with pytest.raises(UsageError, match=f"trainer: {name} (cannot be set|{TWICE})"):
            check_trainer({name: given[name]})

    options = GenerateSettings(server="s", temperature=1.0, prompt_lookup=2, stop="a").options
    for name in options:
        with pytest.raises(UsageError, match=f"generation: (give stop|{name} {TWICE})"):
            GenerateSettings(server="s", stop="b", generation={name: 1})


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
