"""What crosses the wire is recorded and audited whatever trains the split model: trl's preference
trainers, and programs of the Tinker SDK.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import VOCAB, lora, make_split
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dlora.cli.tinker import build_service
from dlora.edge.kv_cache import CloudCache
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.privacy.audit import audit
from dlora.privacy.recording import Recorder, Recording
from dlora.privacy.settings import AuditSettings
from dlora.tinker.settings import TinkerSettings

_WORDS = "gate lift ward bed door lamp pump tray".split()
_PAIRS = [
    {
        "prompt": f"the {_WORDS[n % 8]} {n * 37 % 91}:",
        "chosen": f" {_WORDS[n % 5]}",
        "rejected": f" {_WORDS[n % 3]} {n}",
    }
    for n in range(16)
]
_COMPLETED = [
    {"prompt": row["prompt"], "completion": row[kind]}
    for row in _PAIRS
    for kind in ("chosen", "rejected")
]
_PROMPTS = [{"prompt": row["prompt"]} for row in _PAIRS]

# trainer -> (what its config takes, rows)
_TRAINERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "SFT": ({}, _COMPLETED),
    "DPO": ({"beta": 0.5}, _PAIRS),
    "GRPO": (
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "temperature": 1.0},
        _PROMPTS,
    ),
}


def train(name: str, model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Four micro-batches, each a step."""
    options, rows = _TRAINERS[name]
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rewards = {"reward_funcs": lambda completions, **_: [float(len(one)) for one in completions]}
    getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **(rewards if name == "GRPO" else {}),
    ).train()


def recorded(
    name: str, link: InProcessLink, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """A run of this trainer, recorded from Python."""
    recorder = Recorder(folder / "recording", 4)
    model = make_split(recorder.link(link), lora())
    recorder.watch(model)
    train(name, model, tokenizer, folder / "trainer")


Found = dict[tuple[str, str | None], dict[str, Any]]


def audited(folder: Path, link: InProcessLink) -> Found:
    """What an audit finds, by attack and attacker; of several places the last."""
    public = folder / "public.jsonl"
    public.write_text("".join(json.dumps({"text": f"the {w} of desk {w}"}) + "\n" for w in _WORDS))
    settings = AuditSettings(
        run=folder, server="in-process", sites=2, match=1, public=str(public), rows=8
    )
    return {(one["attack"], one["attacker"]): one for one in audit(settings, link)["attacks"]}


@pytest.fixture(scope="module")
def sft(
    link: InProcessLink,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    """What an audit finds of a run of trl's SFTTrainer."""
    folder = tmp_path_factory.mktemp("sft")
    recorded("SFT", link, tokenizer, folder)
    return audited(folder, link)


@pytest.fixture(scope="module")
def runs(
    link: InProcessLink,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Recorded runs of trl's trainers of preferences and rewards."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("DPO", "GRPO")}
    for name, folder in folders.items():
        recorded(name, link, tokenizer, folder)
    return folders


def test_a_dpo_run_is_audited_like_any_other(
    link: InProcessLink, runs: dict[str, Path], sft: Found
) -> None:
    """Its audit has every kind of finding that one of SFT has: text, labels, lengths, adapter."""
    found = audited(runs["DPO"], link)
    assert found.keys() == sft.keys()
    assert found["look-up", None]["tokens"] == found["masks", None]["lengths"] == 1
    assert found["adapter", None]["known"] == 1


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_each_micro_batch_has_its_own_truth(
    link: InProcessLink, runs: dict[str, Path], name: str
) -> None:
    """The passes of a reference and of generation, before and in between, are none of a recording;
    ids, labels and adapter of a micro-batch are those of its frames.
    """
    recording = Recording(runs[name] / "recording")
    assert len(recording) == 4
    table = make_split(link, lora()).get_input_embeddings()
    for number in range(4):
        view, truth, _ = recording.read(number)
        ids_N = truth.input_ids.reshape(-1)[view.positions]
        assert torch.allclose(view.entry, table(ids_N), atol=1e-3)
        learned_K = truth.supervised.reshape(-1)[view.keep]
        graded_K = view.exit_grad.any(1)
        assert learned_K.any() and bool((learned_K | ~graded_K).all())
        one = truth.modules[-1]
        site = view.sites[one.site]
        want = site.x @ one.A.T @ one.B.T
        assert torch.allclose(site.deltas[site.modules.index(one.module)], want, atol=1e-3)


def test_dpo_labels_are_read_from_gradients(
    link: InProcessLink, runs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of a DPO run the labels are both completions, and the recording has their mean loss."""
    view, truth, _ = Recording(runs["DPO"] / "recording").read(0)
    texts = {
        tokenizer.decode(row[keep]).removesuffix("</s>")
        for row, keep in zip(truth.input_ids, truth.labels != -100, strict=True)
    }
    assert texts <= {row[kind] for row in _PAIRS for kind in ("chosen", "rejected")}
    assert len(truth.input_ids) == 8
    labels_K = truth.next_labels.reshape(-1)[view.keep]
    logits_KV = make_split(link, lora()).get_output_embeddings()(view.exit)
    loss = torch.nn.functional.cross_entropy(logits_KV, labels_K)
    assert truth.loss == pytest.approx(float(loss), rel=1e-3)


def test_passes_between_forward_and_backward_change_no_truth(
    link: InProcessLink, tmp_path: Path
) -> None:
    """Two micro-batches whose backward passes come in another order, with passes of other kinds in
    between, are recorded each with its own ids.
    """
    recorder = Recorder(tmp_path / "recording", 2)
    model = make_split(recorder.link(link), lora()).train()
    recorder.watch(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(5, VOCAB, (2, 6), generator=generator) for _ in range(3)]
    losses = [model(input_ids=ids, labels=ids).loss for ids in batches[:2]]
    with torch.no_grad():
        model(input_ids=batches[2], labels=batches[2])
        model(input_ids=batches[2], past_key_values=CloudCache(), use_cache=True)
    with model.disable_adapter():
        model(input_ids=batches[2], labels=batches[2])
    losses[1].backward()
    losses[0].backward()
    recording = Recording(tmp_path / "recording")
    for number, ids in enumerate((batches[1], batches[0])):
        _, truth, _ = recording.read(number)
        assert torch.equal(truth.input_ids, ids)
        assert truth.loss == pytest.approx(losses[1 - number].item())
    assert len(recording) == 2


def test_what_cannot_be_recorded_is_refused(link: InProcessLink, tmp_path: Path) -> None:
    """A model over another link, and one whose micro-batches go in parts, would record nothing or
    what cannot be read: both are refused before anything is written.
    """
    recorder = Recorder(tmp_path / "recording", 2)
    with pytest.raises(UsageError, match=r"over `recorder.link\(link\)`"):
        recorder.watch(make_split(link, lora()))
    with pytest.raises(UsageError, match="in_flight 1"):
        recorder.watch(make_split(recorder.link(link), lora(), in_flight=2))
    assert not list(tmp_path.iterdir())


def test_a_session_of_the_tinker_sdk_is_audited_like_any_other(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, sft: Found
) -> None:
    """`dlora tinker --record` keeps the first adapter's micro-batches, while another adapter is
    trained and both are sampled from, and its audit has every kind of finding that one of SFT has.
    """
    types = pytest.importorskip("tinker", reason="the extra `tinker` is not installed").types
    from tinker.proto import request_conv

    from dlora.tinker.adapter import StepSettings

    service = build_service(
        TinkerSettings(server="127.0.0.1:1", output=tmp_path, record=4, wire_dtype="fp32"), link
    )
    runs = ["a:train:0", "a:train:1"]
    for run in runs:
        service._create(run, types.LoraConfig(rank=4, seed=3), {})

    def passes(run: str, rows: list[list[int]], forward_only: bool) -> None:
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(ids[:-1]),
                loss_fn_inputs={
                    "target_tokens": ids[1:],
                    "weights": [0.0, 0.0] + [1.0] * (len(ids) - 3),
                },
            )
            for ids in rows
        ]
        message = request_conv.forward_backward_request_to_proto(
            types.ForwardBackwardRequest(types.ForwardBackwardInput(data, "cross_entropy"), run, 1)
        )
        message.forward_only = forward_only
        service._forward_backward(message)

    mine = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in _COMPLETED]
    others = [tokenizer(f"{row['completion']} is not mine")["input_ids"] for row in _COMPLETED]
    for start in range(0, 32, 8):
        passes(runs[1], others[start : start + 8], False)
        passes(runs[0], mine[start : start + 8], True)
        passes(runs[0], mine[start : start + 8], False)
        if not start:  # B is zero up to then
            service._step(runs[0], StepSettings(1e-2, (0.9, 0.95), 1e-12, 0.0, 0.0))

    recording = Recording(tmp_path / "recording")
    seen = [ids for n in range(4) for ids in recording.read(n)[1].input_ids.tolist()]
    assert [ids[: len(want) - 1] for ids, want in zip(seen, mine, strict=True)] == [
        ids[:-1] for ids in mine
    ]
    found = audited(tmp_path, link)
    assert found.keys() == sft.keys()
    assert found["look-up", None]["tokens"] == found["masks", None]["lengths"] == 1
    assert found["labels", None]["labels"] == found["adapter", None]["known"] == 1
