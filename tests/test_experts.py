"""LoRA on fused weights of experts (peft's `target_parameters`): the cloud computes it on the
hosted wire, and what comes out is local peft's adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, make_split
from helpers import FlopCount, assert_same_grads
from peft import LoraConfig, PeftModel, get_peft_model
from test_hosted import Watched, train
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cloud import costs
from dlora.cloud.limits import Limits
from dlora.cloud.low_rank import LowRank
from dlora.cloud.model import CloudModel
from dlora.cloud.zero_edge import sample_ids
from dlora.edge.describe import describe_adapter, describe_server
from dlora.edge.description import read_description
from dlora.errors import DLoRAError, PeerError, UsageError
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.proto import dlora_pb2 as pb
from dlora.server.server import Server, ServerOptions
from dlora.training.plan_settings import PlanSettings
from dlora.training.planner import check, plan
from dlora.training.run import train as dlora_train
from dlora.training.settings import TrainSettings

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

Bases = Callable[[str], Any]
Links = Callable[[str], Any]


@pytest.fixture(scope="module")
def bases() -> Iterator[Bases]:
    """Tiny random mixtures; each call gives a copy."""
    sys.path.insert(0, str(BENCHMARKS))
    build, made = import_module("tiny_models").build, {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = build(family)
        return copy.deepcopy(made[family])

    yield get
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def mixtures(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    """A connection to a real server of each."""
    servers: list[Server] = []
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            model = CloudModel(bases(family), model_id=f"tiny/{family}")
            servers.append(Server(model, options=NO_DRAIN))
            servers[-1].start()
            cache = tmp_path_factory.mktemp("edge-cache")
            made[family] = dlora.connect(servers[-1].address, cache=cache)
        return made[family]

    yield get
    for link in made.values():
        link.close()
    for server in servers:
        server.stop()


@pytest.fixture
def own(bases: Bases) -> Iterator[Watched]:
    """A watched link to a cloud of its own."""
    link = dlora.in_process(bases("mixtral"), model_id="x/y")
    yield Watched(link)
    link.close()


def config(**options: Any) -> LoraConfig:
    """An adapter on attention and experts whose B is not zero."""
    values = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    return LoraConfig(**(values | targets | options))


def local(base: Any, lora: LoraConfig, seed: int = 1) -> PeftModel:
    """The reference: peft on the full model."""
    torch.manual_seed(seed)
    return get_peft_model(base, lora)


def hosted(link: Any, lora: LoraConfig, **options: Any) -> dlora.SplitModel:
    """The same adapter, computed by the cloud."""
    return make_split(link, lora, wire="hosted", upload_consent=True, **options)


def prompt() -> dict[str, torch.Tensor]:
    """Two prompts of unequal length."""
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ----------------------------------------------------------------- parity with local peft


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_match_local(bases: Bases, mixtures: Links, family: str) -> None:
    """Loss and gradients of A and B of every expert are local peft's, in two round trips."""
    whole, split = local(bases(family), config()), hosted(mixtures(family), config())
    for batch in batches(2):
        want, got = whole(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        got.backward()
    assert_same_grads(whole, split)
    assert split.meter.round_trips == 2 * 2
    assert sum("experts" in name for name in adapter(split)) == 3 * 2 * 2


@pytest.mark.parametrize("family", MIXTURES)
def test_three_steps_and_answers_match_local(bases: Bases, mixtures: Links, family: str) -> None:
    """After three AdamW steps the adapter is local peft's, and so are the tokens it then gives."""
    whole, split = local(bases(family), config()), hosted(mixtures(family), config())
    start = {name: one.detach().clone() for name, one in adapter(whole).items()}
    for model in (whole, split):
        optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-3)
        for batch in batches(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, want in adapter(whole).items():
        gap = (adapter(split)[name] - want).norm()
        assert gap <= 1e-3 * (want - start[name]).norm(), name

    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = split.meter.round_trips
    want, got = (model.eval().generate(**prompt(), **options) for model in (whole, split))
    assert torch.equal(want, got)
    assert split.meter.round_trips - before == 5


@pytest.mark.parametrize(
    ("family", "implementation"), [("mixtral", "batched_mm"), ("gpt_oss", "eager")]
)
def test_every_way_to_run_experts_matches_local(
    bases: Bases, family: str, implementation: str
) -> None:
    """One expert after the other, or a weight for each row: gradients are the same."""
    base = bases(family)
    base.set_experts_implementation(implementation)
    whole = local(copy.deepcopy(base), config())
    link = dlora.in_process(base, model_id="x/y")
    split = hosted(link, config())
    for model in (whole, split):
        model(**batches()[0]).loss.backward()
    assert_same_grads(whole, split)
    link.close()


@pytest.mark.filterwarnings("ignore:The following .*pattern keys:RuntimeWarning")  # peft's
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None},
        {
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 5},
            "alpha_pattern": {"q_proj": 3},
        },
    ],
    ids=["experts alone", "one layer", "names of before", "patterns"],
)
def test_options_match_local(bases: Bases, mixtures: Links, options: dict[str, Any]) -> None:
    """What an option of LoraConfig means for experts in peft it means here."""
    whole = local(bases("mixtral"), config(**options))
    split = hosted(mixtures("mixtral"), config(**options))
    for model in (whole, split):
        model(**batches()[0]).loss.backward()
    assert_same_grads(whole, split)


def test_two_active_adapters_match_local(bases: Bases, mixtures: Links) -> None:
    """Two adapters on the same experts add up, each with its own rank, scale and gradients."""
    models = [local(bases("mixtral"), config()), hosted(mixtures("mixtral"), config())]
    for model in models:
        torch.manual_seed(4)
        model.add_adapter("second", config(r=2, lora_alpha=5))
        model.base_model.set_adapter(["default", "second"])
        model(**batches()[0]).loss.backward()
    assert_same_grads(*models)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_adapters_are_pefts(
    bases: Bases, mixtures: Links, tmp_path: Path, family: str
) -> None:
    """What is saved here peft loads onto the whole model, what peft saved loads here, and both give
    the loss that they had.
    """
    batch, link = batches()[0], mixtures(family)
    split, whole = hosted(link, config(), seed=5).eval(), local(bases(family), config(), 6).eval()
    split.save_pretrained(tmp_path / "split")
    whole.save_pretrained(tmp_path / "whole")
    options: Any = {"wire": "hosted", "upload_consent": True, "wire_dtype": "fp32"}
    with torch.no_grad():
        there = PeftModel.from_pretrained(bases(family), str(tmp_path / "split"))
        assert there(**batch).loss.item() == pytest.approx(split(**batch).loss.item(), rel=1e-6)
        here = dlora.load_adapter(link, tmp_path / "whole", **options).eval()
        assert here(**batch).loss.item() == pytest.approx(whole(**batch).loss.item(), rel=1e-6)
    shown = dict(describe_adapter(tmp_path / "split", link.description))
    assert shown["fit"] == "yes"
    assert "mlp.experts.down_proj" in shown["modules"]
    assert "1 round trip, on the hosted wire" in shown["sites"]
    assert "mlp.experts.gate_up_proj" in (tmp_path / "split" / "README.md").read_text()


class _Meeting(torch.nn.Module):
    """An activation between two fused weights, where all threads wait for each other."""

    def __init__(self, own: torch.nn.Module, barrier: threading.Barrier) -> None:
        super().__init__()
        self.own, self.barrier, self.on = own, barrier, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.on:
            self.barrier.wait(timeout=60)
        return self.own(x)


def test_edges_at_once_get_what_each_gets_alone(bases: Bases, tmp_path: Path) -> None:
    """While all are in the middle of the same experts, streams see nothing of each other's adapter,
    nor does one without: losses and gradients are the same bits.
    """
    cloud = CloudModel(bases("mixtral"), model_id="x/y")
    barrier, meetings = threading.Barrier(3), []
    for module in cloud.model.modules():
        if hasattr(module, "gate_up_proj"):
            meetings.append(_Meeting(module.act_fn, barrier))
            module.act_fn = meetings[-1]

    def gradients(split: dlora.SplitModel) -> list[torch.Tensor]:
        found = []
        for batch in batches(2):
            split.zero_grad()
            loss = split(**batch).loss
            loss.backward()
            found += [loss.detach(), *(one.grad.clone() for one in adapter(split).values())]
        return found

    with Server(cloud, options=ServerOptions(compute_slots=3, drain_s=0)) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        models = [hosted(link, config(), seed=seed) for seed in (11, 12)]
        models.append(make_split(link, config(target_parameters=None)))
        alone = [gradients(model) for model in models]
        for meeting in meetings:
            meeting.on = True
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(gradients, models))
        link.close()
    for want, got in zip(alone, together, strict=True):
        assert all(map(torch.equal, want, got))


# ----------------------------------------------------------------- with what else there is


def test_with_accumulation_experts_travel_once_a_step(own: Watched) -> None:
    """From the second step on the cloud keeps A and B of experts, and the others are hashes."""
    split = hosted(own, config())
    train(split, steps=2, accumulation=2)
    assert own.how_modules_went() == ["whole", "whole", "keep", "hash"]
    sizes = [message.ByteSize() for message in own.modules]
    assert own.begins[-1].module_frames == 0 and sizes


def test_layers_that_run_again_give_the_same_gradients(bases: Bases, mixtures: Links) -> None:
    """With recompute experts run twice, and their gradients are counted once."""
    again = dlora.in_process(bases("mixtral"), model_id="x/y", limits=Limits(recompute=True))
    found = [hosted(link, config()) for link in (mixtures("mixtral"), again)]
    for split in found:
        split(**batches()[0]).loss.backward()
    again.close()
    assert_same_grads(*found, tolerance=1e-6)


def test_cloud_counts_what_it_computes_for_experts(own: Watched) -> None:
    """FLOPs of an adapter on experts, forward and backward, are those of the rows that they see, as
    torch counts them: twice the rank is as much again.
    """
    run, counted, told = own.link.cloud.run, [], []

    def count(*args: Any) -> None:
        with FlopCount() as counter:
            run(*args)
        counted.append(counter.total)

    own.link.cloud.run = count
    for rank in (3, 6):
        split = hosted(own, config(r=rank, target_modules=[]))
        split(**batches()[0]).loss.backward()
        told.append(split.meter.cloud_forward_flops + split.meter.cloud_backward_flops)
    deadline = time.monotonic() + 20
    while len(counted) < 2 and time.monotonic() < deadline:  # `Done` is sent before
        time.sleep(0.01)
    assert told[1] - told[0] == counted[1] - counted[0] > 0


def test_flops_of_experts_are_of_a_plain_forward(own: Watched) -> None:
    """What experts compute is counted without the factors that are tried on them at load."""
    cloud = own.link.cloud
    ids_BT = sample_ids(cloud.model, 2, 8)
    with costs.FlopCount() as count:
        cloud.parts.hidden(ids_BT)
    layers = len(cloud.layers_with_sites)
    want = costs.other_flops(count.total, 2, 8, cloud.sites, layers, cloud.model.config)
    assert cloud.other_flops == want > 0


def test_no_weight_is_made_for_a_stream(own: Watched) -> None:
    """A training step keeps nothing as large as a fused weight: what it keeps more with experts is
    within what was reserved for it.
    """
    cloud, run = own.link.cloud, own.link.cloud.run
    known = {one.untyped_storage().data_ptr() for one in cloud.model.parameters()}
    kept: list[int] = []
    reserved: list[int] = []

    def watched(request: Any, pipe: Any) -> None:
        saved = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        hosted_request = request.hosted
        reserved.append(
            hosted_request.adapter_bytes(training=False)
            + hosted_request.pass_bytes(tokens, training=True)
            - hosted_request.pass_bytes(tokens, training=False)
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(request, pipe)
        kept.append(sum(size for size, _ in saved.values()))

    rows, length = 2, 24
    tokens = rows * length
    (batch,) = batches(rows=rows, length=length)
    cloud.run = watched
    for parameters in (None, EXPERTS):
        split = hosted(own, config(target_modules=["q_proj"], target_parameters=parameters))
        split(**batch).loss.backward()
    deadline = time.monotonic() + 20
    while len(kept) < 2 and time.monotonic() < deadline:  # `Done` is sent before
        time.sleep(0.01)
    more, room = kept[1] - kept[0], reserved[1] - reserved[0]
    assert 0 < more <= room


def test_a_rank_that_takes_too_much_memory_is_refused(own: Watched) -> None:
    """A and B of all experts, and their gradients, count in what a stream may take."""
    cloud, batch = own.link.cloud, batches()[0]
    limits = dataclasses.replace(cloud.limits, max_inflight_bytes=5 * 2**20)
    cloud.requests = dataclasses.replace(cloud.requests, limits=limits)
    hosted(own, config())(**batch)
    with pytest.raises(DLoRAError, match=r"over this server's limits .*needs \d+ MiB"):
        hosted(own, config(r=90, target_modules=[]))(**batch)


def test_idle_experts_are_dropped_or_refused(mixtures: Links) -> None:
    """Experts can be left out of a step, and come back; the cloud keeps none frozen, and Kill and
    Revive, which measures linear modules, says so.
    """
    split = hosted(mixtures("mixtral"), config())
    linear = [name for name in split.adapted_modules if "experts" not in name]
    with pytest.raises(UsageError, match="idle=cloud: the cloud keeps no frozen experts"):
        split.set_active(linear, "cloud")
    with pytest.raises(UsageError, match="Kill and Revive measures linear modules"):
        KillAndRevive(split, KillReviveConfig(), 10)
    split.set_active(linear)
    split(**batches()[0]).loss.backward()
    assert not any("experts" in name for name in adapter(split))
    split.set_active(split.adapted_modules)
    split(**batches()[0]).loss.backward()
    assert all(one.grad is not None for one in adapter(split).values())


def test_a_run_trains_experts(
    bases: Bases, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`dlora train` takes their names; run.json, the card and the report have them, and peft loads
    what comes out. Its bytes and round trips are those that `dlora plan` says.
    """
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"parcel {n}:", "completion": " north"} for n in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    link = dlora.in_process(bases("gpt_oss"), tokenizer, model_id="x/y")
    common: dict[str, Any] = {
        **{"server": "in-process", "wire": "hosted", "upload_consent": True},
        **{"target_modules": [], "target_parameters": EXPERTS},
    }
    settings = TrainSettings(
        data=str(data), output=tmp_path / "run", max_steps=1, batch_size=2, report_to=[], **common
    )
    run = dlora_train(settings, link)
    assert run["status"] == "finished" and run["settings"]["target_parameters"] == EXPERTS
    assert "mlp.experts.gate_up_proj" in (tmp_path / "run" / "README.md").read_text()
    PeftModel.from_pretrained(bases("gpt_oss"), str(tmp_path / "run"))

    planned = PlanSettings(batch_size=2, length=12, supervised=3, **common)
    model, found = plan(planned, link)
    cost, _ = check(planned, model)
    assert found.sent_bytes == pytest.approx(cost.sent_bytes, rel=0.01)
    assert found.received_bytes == pytest.approx(cost.received_bytes, rel=0.01)
    assert found.round_trips == cost.round_trips
    link.close()


# ----------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "mlp.experts.gate_up_proj is a fused weight of experts.*wire=plain"),
        ({"wire": "hosted", "upload_consent": True, "kr": "on"}, "Revive measures linear modules"),
        (
            {"wire": "hosted", "upload_consent": True, "kind": "series", "target_modules": ["x"]},
            "target_parameters is of LoRA",
        ),
    ],
)
def test_settings_with_experts_that_cannot_work_are_refused(
    words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Another wire, Kill and Revive and bottlenecks are refused before a server is asked."""
    values: dict[str, Any] = {"server": "a:1", "data": "x", "output": tmp_path / "o"}
    with pytest.raises(UsageError, match=message):
        TrainSettings(**values, target_parameters=EXPERTS, **words)


@pytest.mark.parametrize("wire", ["plain", "factored"])
def test_other_wires_refuse_experts_with_what_to_do(mixtures: Links, wire: Any) -> None:
    """Where the edge computes there are no experts, at the start and later; the words say which
    weight and which wire.
    """
    advice = (
        rf"mlp.experts.gate_up_proj is a fused weight .*wire={wire} .*--wire hosted "
        "--upload_consent true"
    )
    link = mixtures("mixtral")
    with pytest.raises(UsageError, match=advice):
        make_split(link, config(), wire=wire)
    split = hosted(link, config())
    with pytest.raises(UsageError, match=advice):
        split.set_options(wire=wire)
    assert split.options.wire == "hosted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.up"]}, "'experts.up' names no parameter .*gate_up_proj"),
        ({"target_parameters": ["mlp.gate.weight"]}, "gate.weight is no fused weight of experts"),
        ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight is no fused weight of experts"),
        ({"lora_dropout": 0.1}, "lora_dropout: got 0.1, peft has none for fused weights"),
        ({"use_dora": True}, "use_dora=True is not supported"),
    ],
)
def test_what_peft_or_the_server_has_not_is_refused(
    mixtures: Links, options: dict[str, Any], message: str
) -> None:
    """A parameter that is none of experts, and what peft cannot do to one, are refused by name."""
    with pytest.raises(UsageError, match=message):
        hosted(mixtures("mixtral"), config(**options))


def test_a_provider_may_keep_experts_to_itself(bases: Bases) -> None:
    """What allow_modules leaves out gets no adapter, and is not offered; so do layers that the edge
    holds.
    """
    cloud = CloudModel(
        bases("mixtral"),
        model_id="x/y",
        allowed=lambda name: "down_proj" not in name,
        limits=Limits(edge_first=1),
    )
    link = dlora.embedded.InProcessLink(cloud)
    with pytest.raises(UsageError, match=r"does not allow adapters on .*experts.down_proj"):
        hosted(link, config())
    only = config(target_parameters=EXPERTS[:1])
    with pytest.raises(UsageError, match=r"layers.0.mlp.experts.gate_up_proj is in a layer that"):
        hosted(link, only, edge_layers=(1, 0))
    assert "experts.gate_up_proj" in dict(describe_server("x:1", link.description))["experts"]
    link.close()


def test_a_server_without_experts_says_so(links: Links) -> None:
    """On a dense model no parameter is a fused weight."""
    with pytest.raises(UsageError, match="This server lets edges adapt: none"):
        hosted(links("llama"), config())


def _wider(begin: pb.Begin) -> None:
    for entry in begin.modules:
        entry.rank += 1


def _with_dropout(begin: pb.Begin) -> None:
    begin.modules[-1].dropouts.add(rank=begin.modules[-1].rank, p=0.5)


def _huge(begin: pb.Begin) -> None:
    begin.modules[-1].rank = 10**6


def _plain(begin: pb.Begin) -> None:
    del begin.modules[:]
    begin.hosted, begin.module_frames = False, 0


def _probed(begin: pb.Begin) -> None:
    begin.probe.add(site=begin.sites[-1].site, modules=[0])


def test_a_bad_edge_is_refused(own: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, ranks and fields that no adapter on experts has end the stream with the reason, and
    the next one is served.
    """
    split, opened = hosted(own, config(target_modules=[])), own.link.open
    for change, message in (
        (_wider, r"a of .*gate_up_proj: got"),
        (_with_dropout, "a fused weight has no biases, activation or dropout"),
        (_huge, "got rank 1000000, want 1 to"),
        (_plain, "use wire=hosted"),
        (_probed, "no norm of g"),
    ):

        def open_(change: Callable[[pb.Begin], None] = change) -> Any:
            stream = opened()
            send = stream.send

            def spoil(frame: pb.EdgeFrame) -> None:
                if frame.WhichOneof("kind") == "begin":
                    change(frame.begin)
                send(frame)

            stream.send = spoil
            return stream

        with monkeypatch.context() as spoiled:
            spoiled.setattr(own.link, "open", open_)
            with pytest.raises(DLoRAError, match=message):
                split(**batches()[0])
        assert split(**batches()[0]).loss.isfinite()


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": 2**31},
        {"experts": 0},
        {"in_features": 2**30},
        {"experts": 2**13, "in_features": 2**19},
        {"name": "a b"},
        {"site": 99},
        {"rows": float("nan")},
    ],
    ids=str,
)
def test_descriptions_of_experts_are_bounded(mixtures: Links, changes: dict[str, Any]) -> None:
    """Sizes that no mixture has are refused before anything is made of them."""
    description = pb.Description()
    description.CopyFrom(mixtures("mixtral").description)
    for name, value in changes.items():
        setattr(description.experts[1], name, value)
    with pytest.raises(PeerError, match="describes itself wrongly"):
        read_description(description.SerializeToString(), "x:1")


def test_other_sizes_than_the_models_are_refused(own: Watched) -> None:
    """A description of other experts than the configuration makes is found before peft makes A."""
    own.description.experts[0].experts = 5
    with pytest.raises(PeerError, match=r"describes .*gate_up_proj as \[5, "):
        hosted(own, config())


def test_unknown_uses_of_a_weight_are_refused() -> None:
    """What nobody has checked is computed with a fused weight by no guess."""
    weight = LowRank(torch.zeros(2, 3, 4), torch.ones(2, 3, 1), torch.ones(2, 1, 4), print)
    with pytest.raises(DLoRAError, match="used by einsum"):
        torch.einsum("eij->eij", weight)
