"""Embedding and LM head trained on the edge: whole (`modules_to_save`), or some rows of them
(`trainable_token_indices`), those of new tokens too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, adapter, lora, make_base, make_split
from helpers import assert_same_grads, same
from peft import PeftModel
from peft import get_peft_model as peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import dlora
from dlora.cli.merge import merge
from dlora.cli.settings import MergeSettings
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.load import load_base
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.inference.answer import share_ends
from dlora.training.run import train
from dlora.training.settings import TrainSettings

NEW = [VOCAB, VOCAB + 1]
BOTH = {"embed_tokens": [7, *NEW], "lm_head": [7, *NEW]}

# What is trained -> (family, wire, rows of the embedding, options of the adapter). gpt2 and gemma2
# have one table for both ends.
_KINDS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "both": ("llama", "plain", 0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": (
        "gemma2",
        "plain",
        0,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "head": ("llama", "hosted", 0, {"modules_to_save": ["lm_head"]}),
    "tokens": ("gemma2", "hosted", 0, {"trainable_token_indices": [5, 9]}),
    "new": ("llama", "factored", VOCAB + 2, {"trainable_token_indices": BOTH}),
    "new-in": ("llama", "plain", VOCAB + 2, {"trainable_token_indices": {"embed_tokens": NEW}}),
    "new-tied": ("gpt2", "plain", VOCAB + 2, {"trainable_token_indices": NEW}),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*vocabulary")


def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Right-padded rows of tokens among so many, with the trained ones in each."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(5, rows or VOCAB, (3, 9), generator=generator)
    ids_BT[:, 1], ids_BT[:, 2] = 7, (rows or 10) - 1
    mask_BT = (torch.arange(9)[None] < torch.tensor([[9], [5], [7]])).long()
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "labels": ids_BT.masked_fill(mask_BT == 0, -100),
    }


def local(family: str, rows: int, seed: int = 1) -> Any:
    """The local base, with so many rows."""
    base = make_base(family)
    torch.manual_seed(seed)
    if rows:
        base.resize_token_embeddings(rows)
    return base


_SLOW = ("head", "new-in")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind in _SLOW else kind for kind in _KINDS],
)
def test_three_steps_are_local_pefts(
    links: Callable[[str], GrpcLink], tmp_path: Path, kind: str
) -> None:
    """Loss, gradients and change in three steps equal local peft's, for rows of new tokens too; and
    what is saved gives the same logits on the local base, and on the split one.
    """
    family, wire, rows, options = _KINDS[kind]
    config = lora(family, **options)
    whole = peft_model(local(family, rows), config)
    consent = wire == "hosted"
    split = make_split(
        links(family), lora(family, **options), wire=wire, upload_consent=consent, num_tokens=rows
    )
    models = (whole, split)
    start = {name: parameter.detach().clone() for name, parameter in adapter(whole).items()}
    optimizers = [torch.optim.SGD(adapter(model).values(), lr=0.05) for model in models]
    for seed in range(3):
        want, got = (model(**batch(rows, seed)).loss for model in models)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        want.backward()
        got.backward()
        assert_same_grads(whole, split, tolerance=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    changed = [name for name, before in start.items() if (adapter(split)[name] - before).any()]
    assert changed == list(start) and any(".lora_" not in name for name in start)

    split.save_pretrained(tmp_path)
    other = local(family, rows, seed=9)  # rows that it does not share with anybody
    other.name_or_path = split.link.description.model_id
    plain = PeftModel.from_pretrained(other, str(tmp_path)).eval()
    again = dlora.load_adapter(split.link, tmp_path, is_trainable=False, wire_dtype="fp32")
    tokens_BT = batch(rows, 7)["attention_mask"].bool()
    with torch.no_grad():
        want, *others = (model(**batch(rows, 7)).logits for model in (split.eval(), plain, again))
    for logits in others:
        torch.testing.assert_close(logits[tokens_BT], want[tokens_BT], rtol=1e-4, atol=1e-4)
    answers = [
        model.generate(input_ids=torch.tensor([[7, 8]]), max_new_tokens=4, do_sample=False)
        for model in (plain, again)
    ]
    assert torch.equal(*answers)


def test_gradients_of_embedded_tokens_are_all_that_comes(link: InProcessLink) -> None:
    """A trained embedding costs the gradients of the embedded tokens, and of the lowest site; a
    trained head costs nothing on the wire, and its FLOPs are torch's.
    """
    cost, tokens = {}, int(batch(0, 0)["attention_mask"].sum())
    for name in ("", "embed_tokens", "lm_head"):
        split = make_split(link, lora(modules_to_save=[name] if name else None))
        split(**batch(0, 0)).loss.backward()
        cost[name] = split.meter
    plain, embedding, head = cost.values()
    for side in ("sent_bytes", "received_bytes"):
        more = getattr(embedding, side) - getattr(plain, side)
        assert more == pytest.approx(tokens * 64 * 4, rel=0.02)
        assert getattr(head, side) == getattr(plain, side)
    assert embedding.round_trips == plain.round_trips + 1

    states_ND = torch.randn(10, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        split.get_output_embeddings()(states_ND).sum().backward()
    assert head.head_flops / plain.head_flops == counter.get_total_flops() / (
        2 * 2 * 10 * 64 * VOCAB
    )


def test_what_is_not_here_is_refused(link: InProcessLink) -> None:
    """Modules of the decoder, names of none and tokens without a row are refused, with what is
    here; and tokens cannot be added once the embedding is trained.
    """
    for options, message in (
        ({"modules_to_save": ["o_proj"]}, "modules_to_save: model.layers.0.self_attn.o_proj is in"),
        ({"modules_to_save": ["head_lm"]}, "'head_lm' names no module. On the edge are lm_head, "),
        ({"trainable_token_indices": {"norm": [1]}}, "is in the cloud"),
        ({"trainable_token_indices": NEW}, "token 300 has no row among the 300"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "token -1 has no row"),
    ):
        with pytest.raises(UsageError, match=message):
            make_split(link, lora(**options))
    with pytest.raises(UsageError, match="bottleneck adapters are saved alone"):
        config = dlora.BottleneckConfig(target_modules=["o_proj"], modules_to_save=["lm_head"])
        dlora.get_peft_model(link, config)


def test_rows_that_were_added_later_are_saved(link: InProcessLink, tmp_path: Path) -> None:
    """`resize_token_embeddings` works on a split model, and its new rows are saved with the adapter
    as peft saves them.
    """
    split = make_split(link, lora())
    split.resize_token_embeddings(VOCAB + 2)
    with torch.no_grad():
        want = split.eval()(**batch(VOCAB + 2, 0)).logits
    assert want.shape[-1] == VOCAB + 2
    split.save_pretrained(tmp_path)
    again = dlora.load_adapter(link, tmp_path, is_trainable=False, wire_dtype="fp32")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch(VOCAB + 2, 0)).logits, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_table_that_came_with_an_adapter_is_its_own(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path, family: str
) -> None:
    """An embedding of the served size in an adapter folder is that of its own model alone: the
    cloud in this process and other models keep theirs, and it is saved with the adapter again.
    """
    whole = peft_model(make_base(family), lora(family))
    whole.get_input_embeddings().weight.data += 0.1
    whole.save_pretrained(tmp_path / "first", save_embedding_layers=True)
    want, cloud = whole.eval()(**batch(0, 0)).logits, cloud_models(family)
    served = {name: value.clone() for name, value in cloud.model.state_dict().items()}
    with closing(InProcessLink(cloud)) as link:
        options: dict[str, Any] = {"is_trainable": False, "wire_dtype": "fp32"}
        base, split = load_base(link), dlora.load_adapter(link, tmp_path / "first", **options)
        share_ends(base, split)
        split.save_pretrained(tmp_path / "second")
        again = dlora.load_adapter(link, tmp_path / "second", **options)
        tokens_BT = batch(0, 0)["attention_mask"].bool()
        for model in (split, again):
            with torch.no_grad():
                got = model(**batch(0, 0)).logits
            torch.testing.assert_close(got[tokens_BT], want[tokens_BT], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(served[name], now) for name, now in cloud.model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, marks=pytest.mark.slow),
        {"trainable_token_indices": {"embed_tokens": [40, 41], "lm_head": [40, 41]}},
    ],
)
def test_a_run_goes_on_bit_for_bit(link: InProcessLink, tmp_path: Path, changes: Any) -> None:
    """`dlora train` trains embedding and head, and a run that goes on from a checkpoint ends with
    the bits of one that was never stopped.
    """
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"parcel {n * 37 % 91}:", "completion": f" desk {n % 4}"} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    common: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "batch_size": 2,
        "epochs": 1.0,
        "lora_dropout": 0.2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_steps": 2,
        **changes,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(TrainSettings(output=whole, **common), link)
    train(TrainSettings(output=cut, **common), link)
    for done in (cut / "run.json", *(cut / "checkpoints").glob("checkpoint-4")):
        _remove(done)
    run = train(TrainSettings(output=cut, resume=True, **common), link)
    assert run["steps"] == 4
    assert same(whole, cut)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (0, {"modules_to_save": ["embed_tokens"]}),
        (VOCAB + 2, {"trainable_token_indices": [7, *NEW]}),
    ],
)
def test_trained_ends_are_merged(tmp_path: Path, rows: int, options: dict[str, Any]) -> None:
    """A merged model answers as the model with its adapter: where one of two tied ends was trained
    whole it has both, and rows of new tokens are its own.
    """
    make_base("gemma2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if rows:
        base.resize_token_embeddings(rows)
    model = peft_model(base, lora("gemma2", **options))
    for name, parameter in adapter(model).items():
        if ".lora_" not in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(
        MergeSettings(
            model=str(tmp_path / "base"), adapter=tmp_path / "adapter", output=tmp_path / "whole"
        )
    )
    whole, given = AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), batch(rows, 0)
    with torch.no_grad():
        got, want = (one(**given).logits for one in (whole, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()
