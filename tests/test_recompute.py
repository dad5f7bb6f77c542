"""Layers that run again in backward: the same gradients and frames as without, in less memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base, make_local, make_split
from helpers import FlopCount, assert_same_grads
from test_faults import PHASES, FaultyLink, Mortal, run
from transformers import AutoModelForCausalLM, LlamaConfig

import dlora
from dlora.cloud.costs import answer_bytes
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.cloud.passes import Pass, current_pass
from dlora.cloud.quantize import quantize
from dlora.cloud.zero_edge import ZeroEdge, probe_request, sample_ids
from dlora.edge.bottleneck import BottleneckConfig
from dlora.embedded import InProcessLink
from dlora.errors import ModelError, PeerError, PeerLost
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import MIXES
from dlora.protocol.layers import find_layers

LIMITS = Limits(edge_first=1, edge_last=1)
ALL = {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def pair() -> Iterator[SimpleNamespace]:
    """The same tiny Llama without and with layers that run again."""
    clouds = [
        CloudModel(make_base("llama"), model_id="x/y", limits=limits)
        for limits in (LIMITS, dataclasses.replace(LIMITS, recompute=True))
    ]
    links = [InProcessLink(cloud) for cloud in clouds]
    yield SimpleNamespace(links=links, clouds=clouds)
    for link in links:
        link.close()


def two_steps(link: Any, config: Any, idle: str = "", **options: Any) -> dict[str, Any]:
    """Losses, gradients of two micro-batches with padding, probes and what travelled."""
    hosted = options.get("wire") == "hosted"
    split = make_split(link, config, upload_consent=hosted, **options)
    for name, parameter in adapter(split).items():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    if idle:
        split.set_active(split.adapted_modules[::3], idle)
        split.probe_modules = split.adapted_modules[1::4]
    torch.manual_seed(7)
    losses = []
    for batch in batches(2):
        loss = split(**batch).loss
        loss.backward()
        losses.append(loss.item())
    meter = split.meter
    return {
        "losses": losses,
        "grads": {name: p.grad for name, p in split.named_parameters() if p.grad is not None},
        "probes": {
            f"{n} {name}": x for n, one in enumerate(split.probe_norms) for name, x in one.items()
        },
        "traffic": (meter.sent_bytes, meter.round_trips, meter.retries),
    }


def bottleneck(kind: str) -> BottleneckConfig:
    """On the two linears that end a block."""
    options: dict[str, Any] = {"r": 6, "target_modules": ["o_proj", "down_proj"], "scale": 0.7}
    return BottleneckConfig(kind=kind, init_lora_weights=False, **options)


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
@pytest.mark.parametrize(
    "case",
    [
        {"config": lora(**ALL)},
        {"config": lora(lora_dropout=0.3), "wire_dtype": "int8"},
        {"config": bottleneck("series")},
        {"config": bottleneck("parallel")},
        {"config": lora(**ALL), "idle": "cloud"},
        {"config": lora(**ALL), "edge_layers": (1, 1)},
        {"config": lora(), "input_grad": "drop"},
        {"config": lora(), "in_flight": 2},
    ],
    ids=["all", "dropout", "series", "parallel", "frozen", "edge layers", "drop", "in flight"],
)
def test_gradients_and_frames_are_those_without(
    pair: SimpleNamespace, wire: str, case: dict[str, Any]
) -> None:
    """Over two accumulated micro-batches layers that run again give the same losses, gradients and
    probes to 1e-6 (dropout draws its masks again), and ask the edge nothing twice.
    """
    if wire == "hosted" and ({"input_grad", "in_flight"} & case.keys()):
        pytest.skip("is not of this wire")
    want, got = (two_steps(link, wire=wire, **case) for link in pair.links)
    assert got["losses"] == want["losses"]
    assert got["traffic"] == want["traffic"]
    assert got["probes"] == pytest.approx(want["probes"], rel=1e-6)
    assert got["grads"].keys() == want["grads"].keys() and got["grads"]
    for name, grad in want["grads"].items():
        assert (got["grads"][name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "opt", "bloom", "gpt2"])
def test_every_kind_of_layer_runs_again(family: str) -> None:
    """Gradients are local peft's on layers that give tuples or tensors, with windows, with biases
    in attention, with projections outside of them.
    """
    config = lora(family)
    link = dlora.in_process(make_base(family), model_id="x/y", limits=Limits(recompute=True))
    local, split = make_local(family, config), make_split(link, config)
    for model in (local, split):
        model(**batches()[0]).loss.backward()
    assert_same_grads(local, split)
    link.close()


def test_a_low_bit_base_runs_again() -> None:
    """Weights that are dequantised for each product are so in the second run as well."""
    grads = []
    for recompute in (False, True):
        base = make_base("llama")
        quantize(base, "int4")
        link = dlora.in_process(base, model_id="x/y", limits=Limits(recompute=recompute))
        grads.append(two_steps(link, lora())["grads"])
        link.close()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


# ----------------------------------------------------------------- memory


def deep() -> CloudModel:
    """Sixteen layers in the proportions of a Llama, with the widths of a tiny one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    return CloudModel(model, model_id="x/y", limits=Limits(recompute=True))


class Waiting(ZeroEdge):
    """An edge with zero adapters that looks at what the cloud keeps when it waits for the loss."""

    kept_bytes = 0

    def hidden_grad(self, rows: int, width: int) -> torch.Tensor:
        running = current_pass()
        assert running is not None
        self.kept_bytes = sum(one.ByteSize() for one in running.exchange._kept.values())
        return torch.ones(rows, width)


def held_bytes(cloud: CloudModel, request: Any) -> tuple[int, int]:
    """(saved by autograd beside weights, answers that are kept) while a step waits for its loss."""
    tensors = (*cloud.model.parameters(), *cloud.model.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    edge = Waiting(request)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Pass(cloud.parts, request, edge).run()
    return sum(saved.values()), edge.kept_bytes


def test_a_waiting_stream_holds_a_quarter_and_what_is_charged_covers_it() -> None:
    """With the adapter of the paper (q, k, v) a stream that waits holds at most a quarter of what
    it held; the cost known beforehand covers that and one layer in full, and is under a third.
    """
    cloud = deep()
    ids = sample_ids(cloud.model, 4, 48)
    asked = probe_request(cloud.parts, cloud.sites, ids, training=True)
    qkv = tuple((site, modules) for site, modules in asked.active if len(modules) == 3)
    assert len(qkv) == 16
    asked = dataclasses.replace(asked, active=qkv)
    again = dataclasses.replace(asked, recompute=True)

    everything, none = held_bytes(cloud, asked)
    waiting, answers = held_bytes(cloud, again)
    charged = cloud.memory.of_pass(4, 48, training=True)
    charged += sum(answer_bytes(again, *active, 4 * 48) for active in qkv)
    assert none == 0 < answers < 1.02 * sum(answer_bytes(again, *one, 4 * 48) for one in qkv)
    assert waiting + answers <= everything / 4
    layer = everything / 16
    assert waiting + answers + 0.95 * layer <= charged <= waiting + answers + 1.1 * layer
    assert charged <= everything / 3


def test_what_layers_free_goes_back_to_the_system(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that keeps little asks the C library, after each layer and before each second run, to
    keep nothing either; a step that keeps everything does not.
    """
    calls: list[int] = []
    monkeypatch.setattr("dlora.cloud.passes.give_back", lambda: calls.append(1))
    two_steps(pair.links[1], lora())
    assert not calls, "it takes longer than so few tokens do"
    monkeypatch.setattr("dlora.cloud.passes._WORTH_BYTES", 1)
    two_steps(pair.links[0], lora())
    assert not calls
    two_steps(pair.links[1], lora())
    assert len(calls) == 2 * (3 + 3)


def test_admission_knows_what_is_kept(pair: SimpleNamespace) -> None:
    """A micro-batch is charged what its own wire, codec, modules and rank make the cloud keep."""

    def cost(config: Any, **options: Any) -> int:
        seen: list[int] = []
        cloud = pair.clouds[1]
        check = cloud.check

        def noted(*args: Any) -> Any:
            request = check(*args)
            if request.training:
                seen.append(request.cost_bytes)
            return request

        cloud.check = noted
        try:
            two_steps(pair.links[1], config, **options)
        finally:
            cloud.check = check
        return seen[0]

    plain = cost(lora(**ALL))
    coarse = cost(lora(**ALL), wire_dtype="int8")
    factored = cost(lora(**ALL), wire="factored")
    assert factored < coarse < plain
    assert cost(lora()) < plain
    assert factored < cost(lora(r=8, **ALL), wire="factored")
    sites = sum(module.out_features for site in pair.clouds[1].sites for module in site.modules)
    assert plain - pair.clouds[1].memory.of_pass(3, 11, training=True) == 3 * 11 * 4 * sites


def test_an_answer_larger_than_announced_is_refused(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edge cannot have more kept than was reserved, by deltas in another codec than it said."""
    monkeypatch.setattr("dlora.edge.micro_batch.codecs_of", lambda begin: MIXES["fp32"])
    split = make_split(pair.links[1], lora(), wire_dtype="int8")
    with pytest.raises(PeerError, match="the codec and rank of the request make"):
        split(**batches()[0]).loss.backward()


# ----------------------------------------------------------------- what else it must not change


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], "all-linear"])
def test_flops_count_the_second_run(wire: str, targets: Any) -> None:
    """What the cloud says that it computed is what torch counts, second runs included."""
    base = make_base("llama")
    base.set_attn_implementation("eager")
    link = dlora.in_process(base, model_id="x/y", limits=Limits(recompute=True))
    split = make_split(
        link, lora(target_modules=targets), wire=wire, upload_consent=wire == "hosted"
    )
    run_pass, counted = link.cloud.run, []

    def count(*args: Any) -> None:
        with FlopCount() as counter:
            run_pass(*args)
        counted.append(counter.total)

    link.cloud.run = count
    split(**batches()[0]).loss.backward()
    deadline = time.monotonic() + 20
    while not counted and time.monotonic() < deadline:
        time.sleep(0.01)
    link.close()
    assert split.meter.cloud_forward_flops + split.meter.cloud_backward_flops == counted[0]
    assert split.meter.cloud_backward_flops > 1.3 * split.meter.cloud_forward_flops


class Leaving(ZeroEdge):
    """An edge whose stream is cut in the middle of a layer's second run."""

    breaths = 0

    def breathe(self) -> float:
        running = current_pass()
        if running is not None and running._is_again:
            self.breaths += 1
            if self.breaths == 5:
                raise PeerLost("the edge is gone")
        return 0.0


def test_a_second_run_breathes_and_ends_with_its_stream(pair: SimpleNamespace) -> None:
    """A layer that runs again lets others compute at its linears, and stops where its edge has
    left; the next pass is none the worse.
    """
    cloud = pair.clouds[1]
    request = probe_request(cloud.parts, cloud.sites, sample_ids(cloud.model, 2, 8), training=True)
    request = dataclasses.replace(request, recompute=True)
    edge = Leaving(request)
    with pytest.raises(PeerLost, match="the edge is gone"):
        cloud.run(request, edge)
    assert edge.breaths == 5 and current_pass() is None
    cloud.run(request, ZeroEdge(request))


@pytest.mark.slow
def test_a_killed_server_costs_no_bit(
    mortal: Mortal, pair: SimpleNamespace, tmp_path: Path
) -> None:
    """A server that is killed in every phase of a step, second runs among them, leaves the adapter
    of a run without faults, and without second runs.
    """
    link = dlora.connect(f"127.0.0.1:{mortal.port}", cache=tmp_path)
    faulty = FaultyLink(link, PHASES, mortal.kill)
    got, shaken = run(faulty, tmp_path)
    link.close()
    want, _ = run(pair.links[0], tmp_path)
    assert not faulty.plan and shaken.meter.retries >= 4
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    """A server whose layers run again."""
    folder = tmp_path_factory.mktemp("recompute") / "model"
    make_base("llama").save_pretrained(folder)
    server = Mortal(folder, "recompute")
    yield server
    server.end()


# ----------------------------------------------------------------- models that cannot


def test_layers_that_do_not_repeat_themselves_are_refused() -> None:
    """A model whose second run differs from its first is found at load."""
    base, calls = make_base("llama"), [0]
    layer = find_layers(base.get_decoder(), base.get_input_embeddings(), 3)[1].mlp
    own = layer.forward

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls[0] += torch.is_grad_enabled()
        return own(x) * (1 + 0.01 * calls[0])

    layer.forward = drifting
    with pytest.raises(ModelError, match="gradients of LlamaForCausalLM differ by"):
        CloudModel(base, model_id="x/y", limits=Limits(recompute=True))


def test_a_model_without_one_list_of_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers cannot be told apart the flag is refused, in one line."""
    monkeypatch.setattr("dlora.cloud.layers.find_layers", lambda *_: None)
    with pytest.raises(ModelError, match="found no list of 3 layers in LlamaForCausalLM"):
        CloudModel(make_base("llama"), model_id="x/y", limits=Limits(recompute=True))


def test_a_rank_over_the_announced_one_is_refused(pair: SimpleNamespace) -> None:
    """On the factored wire the rank of `Begin` bounds what is kept."""
    split = make_split(pair.links[1], lora(r=8), wire="factored")
    open_stream = pair.links[1].open

    def smaller() -> Any:
        stream = open_stream()
        send = stream.send

        def sent(frame: pb.EdgeFrame) -> None:
            if frame.WhichOneof("kind") == "begin":
                frame.begin.rank = 4
            send(frame)

        stream.send = sent
        return stream

    pair.links[1].open = smaller
    try:
        with pytest.raises(PeerError, match="the codec and rank of the request make"):
            split(**batches()[0]).loss.backward()
    finally:
        del pair.links[1].open


def test_too_large_a_micro_batch_says_what_it_needs() -> None:
    """What is kept counts against the server's memory before anything is computed."""
    limits = Limits(recompute=True, max_inflight_bytes=200_000)
    link = dlora.in_process(make_base("llama"), model_id="x/y", limits=limits)
    split = make_split(link, lora(**ALL))
    with pytest.raises(PeerError, match="MiB of activations"):
        split(**batches(rows=16, length=40)[0])
    link.close()
