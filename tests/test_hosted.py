"""The hosted wire: active modules travel, the cloud computes them, and what comes out is
local peft's adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, adapter, batches, lora, make_base, make_local, make_split
from helpers import assert_same_after_twenty_steps, assert_same_grads
from peft import LoraConfig

import dlora
import dlora.edge.load
import dlora.embedded
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.hosted_request import check_hosted
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.bottleneck import BottleneckConfig, apply_bottleneck
from dlora.errors import DLoRAError, PeerError, UsageError
from dlora.inference.settings import ApiSettings, ChatSettings, EvalSettings, GenerateSettings
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.units import costs_of
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import encode
from dlora.training.plan_settings import PlanSettings
from dlora.training.settings import TrainSettings

Links = Callable[[str], Any]


def hosted(link: Any, config: LoraConfig, **options: Any) -> dlora.SplitModel:
    """A split model on the hosted wire, the adapter as `make_local`'s."""
    return make_split(link, config, wire="hosted", upload_consent=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_local(links: Links, family: str) -> None:
    """Loss and every adapter gradient equal local peft's, with padding, unequal lengths and
    accumulation, in two round trips a micro-batch.
    """
    local = make_local(family, lora(family))
    split = hosted(links(family), lora(family))
    for batch in batches(3):
        want, got = local(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        got.backward()
    assert_same_grads(local, split)
    assert split.meter.round_trips == 2 * 3
    assert split.meter.adapter_flops == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_match_local(links: Links, family: str) -> None:
    """After 20 AdamW steps the change of the adapter differs by at most 1e-4 of its norm."""
    assert_same_after_twenty_steps(
        make_local(family, lora(family)), hosted(links(family), lora(family))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=lambda options: "-".join(options),
)
def test_lora_options_match_local(links: Links, options: dict[str, Any]) -> None:
    """What an option of LoraConfig means in peft it means where the cloud computes the modules."""
    local, split = make_local("llama", lora(**options)), hosted(links("llama"), lora(**options))
    batch = batches()[0]
    for model in (local, split):
        model(**batch).loss.backward()
    assert_same_grads(local, split)


def test_two_active_adapters_match_local(links: Links) -> None:
    """Two adapters that are active together add up, each with its own rank and scale, and each
    parameter gets its own gradient.
    """
    models = [make_local("llama", lora()), hosted(links("llama"), lora())]
    for model in models:
        torch.manual_seed(4)
        model.add_adapter("second", lora(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"]))
        model.base_model.set_adapter(["default", "second"])
        model(**batches()[0]).loss.backward()
    assert_same_grads(*models)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_bottlenecks_match_local(links: Links, kind: str, activation: str) -> None:
    """Bottleneck adapters, with biases, activation and scale, have the gradients of the same
    adapters on a local model.
    """
    config = BottleneckConfig(
        kind=kind, activation=activation, r=5, scale=0.7, target_modules=["o_proj", "down_proj"]
    )
    split = hosted(links("llama"), config)
    local = apply_bottleneck(make_base("llama"), config)
    generator = torch.Generator().manual_seed(8)
    for (name, parameter), other in zip(
        adapter(split).items(), adapter(local).values(), strict=True
    ):
        assert "lora" in name
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        other.data.copy_(parameter.data)
    for batch in batches(2):
        for model in (local, split):
            model(**batch).loss.backward()
    assert_same_grads(local, split)


def grads_of(model: dlora.SplitModel, seed: int = 5) -> list[torch.Tensor]:
    """Gradients of one batch, with this seed of dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    return [parameter.grad.clone() for parameter in adapter(model).values()]


def test_dropout_is_a_function_of_the_seed(links: Links) -> None:
    """The same random state draws the same masks on any stream, another one draws others, and
    outside training nothing is dropped.
    """
    split = hosted(links("llama"), lora(lora_dropout=0.3))
    first, again, other = grads_of(split), grads_of(split), grads_of(split, seed=6)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    kept, whole = (
        hosted(links("llama"), lora(lora_dropout=0.3)).eval(),
        hosted(links("llama"), lora()),
    )
    assert all(map(torch.equal, grads_of(kept), grads_of(whole)))


def test_masks_have_dropouts_distribution(cloud_models: Callable[[str], CloudModel]) -> None:
    """A share p of the inputs is dropped, the others grow by 1 / (1 - p), each module has masks of
    its own and each part of a module too.
    """
    site = next(site for site in cloud_models("llama").sites if len(site.modules) == 3)
    identity = torch.eye(site.in_features)
    parts = [pb.HostedDropout(rank=32, p=0.25), pb.HostedDropout(rank=32, p=0.5)]
    begin = pb.Begin(hosted=True, dropout_seed=7, module_frames=1)
    tensors = pb.HostedTensors()
    for index, module in enumerate(site.modules):
        b = torch.eye(site.in_features, module.out_features)  # turned
        begin.modules.add(site=site.index, module=index, rank=site.in_features, dropouts=parts)
        tensors.modules.add(a=encode(identity, pb.FP32), b=encode(b, pb.FP32))
    store = cloud_models("llama").frozen_store
    request = check_hosted(begin, [(site, (0, 1, 2))], store, "local", None, {})
    assert request is not None
    x = torch.ones(4, 500, site.in_features)
    adapter = HostedAdapter(request, store, training=False)
    adapter.take(tensors)
    deltas = adapter.deltas(site.index, x, past=0)
    q = deltas[0]
    for values, p in ((q[..., :32], 0.25), (q[..., 32:], 0.5)):
        assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert (values == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    k = deltas[1]
    assert not torch.equal(q[..., : k.shape[-1]] == 0, k == 0)
    later = adapter.deltas(site.index, x, past=3)
    assert not torch.equal(later[0], q)


def test_generation_gives_the_plain_wires_tokens(links: Links) -> None:
    """With a KV cache in the cloud the answer is the plain wire's, in one round trip a token."""
    new_tokens = 6
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(3))
    answers, trips = [], []
    for model in (make_split(links("llama"), lora()), hosted(links("llama"), lora())):
        model.eval()
        before = model.meter.round_trips
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
        )
        trips.append(model.meter.round_trips - before)
    assert torch.equal(*answers)
    assert trips[1] == new_tokens
    assert trips[0] == 4 * new_tokens


def test_a_cache_keeps_its_adapter(links: Links) -> None:
    """A stream that was begun with one adapter is not continued with another."""
    model = hosted(links("llama"), lora()).eval()
    ids = torch.randint(5, 300, (1, 5))
    cache = dlora.CloudCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        next(iter(adapter(model).values())).add_(1)
        with pytest.raises(UsageError, match="filled with other adapters"):
            model(input_ids=ids, past_key_values=cache)
    cache.close()


def test_consent_is_asked_for(links: Links) -> None:
    """Nobody sends the adapter by setting a wire alone; the words say what it shows."""
    with pytest.raises(UsageError, match=r"sees the adapter itself .*--upload_consent true"):
        make_split(links("llama"), lora(), wire="hosted")
    split = make_split(links("llama"), lora())
    with pytest.raises(UsageError, match="upload_consent"):
        split.set_options(wire="hosted")
    split.set_options(wire="hosted", upload_consent=True)
    with pytest.raises(UsageError, match="upload_consent"):
        split.set_options(upload_consent=False)


def test_two_edges_at_once_get_what_each_gets_alone(links: Links) -> None:
    """Streams share the model and nothing of each other's adapter: gradients are the same bits."""

    def gradients(split: dlora.SplitModel, seed: int) -> list[list[torch.Tensor]]:
        found = []
        for number, batch in enumerate(batches(6, seed=seed)):
            split.zero_grad()
            with lock:
                torch.manual_seed(number)
                loss = split(**batch).loss
            loss.backward()
            found.append([parameter.grad.clone() for parameter in adapter(split).values()])
        return found

    lock = threading.Lock()  # torch's generator is one for all threads of the edge
    seeds = (11, 12)
    models = [hosted(links("llama"), lora(lora_dropout=0.2), seed=seed) for seed in seeds]
    alone = [gradients(*pair) for pair in zip(models, seeds, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(gradients, models, seeds))
    for want, got in zip(alone, together, strict=True):
        for one, other in zip(want, got, strict=True):
            assert all(map(torch.equal, one, other))


# ----------------------------------------------------------------- gradient accumulation


class Watched:
    """A link that keeps the first frame of every stream, and what goes of its adapter."""

    def __init__(self, link: Any) -> None:
        self.link, self.description, self.address = link, link.description, link.address
        self.begins: list[pb.Begin] = []
        self.modules: list[pb.HostedTensors] = []
        self.grads: list[pb.HostedTensors] = []
        self.done: list[pb.Done] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        stream = self.link.open()
        send, receive = stream.send, stream.receive

        def note(frame: pb.EdgeFrame) -> None:
            if frame.WhichOneof("kind") == "begin":
                self.begins.append(pb.Begin.FromString(frame.begin.SerializeToString()))
            if frame.WhichOneof("kind") == "modules":
                self.modules.append(frame.modules)
            send(frame)

        def note_answer() -> pb.CloudFrame:
            frame = receive()
            if frame.WhichOneof("kind") == "module_grads":
                self.grads.append(frame.module_grads)
            if frame.WhichOneof("kind") == "done":
                self.done.append(frame.done)
            return frame

        stream.send, stream.receive = note, note_answer
        return stream

    def how_modules_went(self) -> list[str]:
        """Of every stream."""
        return [
            "hash" if first.hash else "keep" if first.keep else "whole"
            for first in (begin.modules[0] for begin in self.begins)
        ]


def train(split: dlora.SplitModel, steps: int, accumulation: int) -> None:
    """Plain SGD."""
    optimizer = torch.optim.SGD(adapter(split).values(), lr=1e-2)
    for _ in range(steps):
        for batch in batches(accumulation):
            split(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def own(links: Links) -> Iterator[Watched]:
    """A watched link to a cloud of its own."""
    link = dlora.in_process(make_base("llama"), model_id="x/y")
    yield Watched(link)
    link.close()


def test_with_accumulation_the_adapter_travels_once_a_step(own: Watched) -> None:
    """From the second optimizer step on the first micro-batch lets the cloud keep the adapter, the
    others refer to it, and the gradients are those of a run that always sends it.
    """
    split, other = hosted(own, lora()), hosted(own, lora())
    other._kept.versions._misses = 99  # it believes that nothing is ever kept
    train(split, steps=3, accumulation=3)
    assert own.how_modules_went() == ["whole"] * 3 + ["keep", "hash", "hash"] * 2
    train(other, steps=3, accumulation=3)
    assert own.how_modules_went()[9:] == ["whole"] * 9
    assert all(map(torch.equal, adapter(split).values(), adapter(other).values()))
    values = sum(parameter.numel() for parameter in adapter(split).values())
    assert other.meter.sent_bytes - split.meter.sent_bytes > 0.9 * 4 * 4 * values


def test_a_server_that_forgot_gets_it_again(own: Watched) -> None:
    """What another replica never had, or this one dropped, is sent whole; the gradients stay."""
    split, other = hosted(own, lora()), hosted(own, lora())
    train(other, steps=3, accumulation=3)
    own.begins.clear()
    store = own.link.cloud.frozen_store
    find, asked = store._find, []

    def forget(key: Any) -> Any:
        asked.append(key)
        return None if len(asked) == 1 else find(key)

    store._find = forget
    train(split, steps=3, accumulation=3)
    assert own.how_modules_went()[3:] == ["keep", "hash", "keep", "hash", "keep", "hash", "hash"]
    assert all(map(torch.equal, adapter(split).values(), adapter(other).values()))
    assert split.meter.retries == 0


def test_a_server_without_room_is_not_asked_for_ever(own: Watched) -> None:
    """Where nothing can be kept the edge stops to try after a few times, and trains on."""
    own.link.cloud.frozen_store.max_bytes = 0
    train(hosted(own, lora()), steps=6, accumulation=3)
    assert own.how_modules_went().count("hash") == 3
    assert own.link.cloud.frozen_store.stored_bytes == 0


def test_without_accumulation_nothing_stays(own: Watched) -> None:
    """After a run of one micro-batch a step, with evaluations in between, the cloud has kept
    nothing.
    """
    split = hosted(own, lora())
    train(split, steps=2, accumulation=1)
    with torch.no_grad():
        for batch in batches(3):
            split(**batch)
    train(split, steps=2, accumulation=1)
    assert own.how_modules_went() == ["whole"] * 7
    assert own.link.cloud.frozen_store.stored_bytes == 0


# ----------------------------------------------------------------- with what else there is


@pytest.mark.parametrize("idle", ["drop", "cloud"])
def test_idle_modules_are_as_ever(links: Links, idle: Any) -> None:
    """Only active modules travel and are trained; with idle ones frozen in the cloud loss and
    gradients are the plain wire's, with norms of g^T x too.
    """
    models = make_split(links("llama"), lora()), hosted(links("llama"), lora())
    found = []
    for split in models:
        split.set_active(split.adapted_modules[2:5], idle)
        split.probe_modules = split.adapted_modules
        loss = split(**batches()[0]).loss
        loss.backward()
        assert len(adapter(split)) == 6
        found.append((loss.item(), split.probe_norms[-1]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert_same_grads(*models)


def test_what_the_edge_would_have_to_compute_is_refused(links: Links) -> None:
    """Idle modules on the edge, and a policy that measures deltas, are refused by name."""
    split = hosted(links("llama"), lora())
    with pytest.raises(UsageError, match="idle=edge: on the hosted wire"):
        split.set_active(split.adapted_modules[:1], "edge")
    split.output_squares = {}
    with pytest.raises(UsageError, match="policy=output measures deltas"):
        split(**batches()[0])


def test_edge_layers_keep_their_adapters(own: Watched) -> None:
    """With layers on the edge gradients are local peft's, and of the adapters in these layers
    nothing travels.
    """
    link = dlora.in_process(
        make_base("llama"), model_id="x/y", limits=Limits(edge_first=1, edge_last=1)
    )
    watched = Watched(link)
    local = make_local("llama", lora())
    split = hosted(watched, lora(), edge_layers=(1, 1))
    for model in (local, split):
        model(**batches()[0]).loss.backward()
    assert_same_grads(local, split)
    sent = {(one.site, one.module) for one in watched.begins[0].modules}
    assert len(sent) == 3 and watched.begins[0].wants_input_grad
    assert split.meter.round_trips == 2
    link.close()


@pytest.mark.parametrize(("wire_dtype", "factors"), [("int8", pb.FP16), ("int4", pb.ROTATED_INT4)])
def test_coarse_wires_round_the_adapter_with_int4_alone(
    own: Watched, wire_dtype: str, factors: pb.DType
) -> None:
    """Where rows travel in eight bits A and B keep sixteen; in four they are rounded as well."""
    split = hosted(own, lora(), wire_dtype=wire_dtype)
    split(**batches()[0]).loss.backward()
    (begin,) = own.begins
    assert begin.embeddings.dtype not in (pb.FP32, pb.FP16)
    dtypes = [(one.a.dtype, one.b.dtype) for frame in own.modules for one in frame.modules]
    assert set(dtypes) == {(factors, factors)}


# ----------------------------------------------------------------- what a server refuses


def double(begin: pb.Begin) -> None:
    begin.modules.insert(1, begin.modules[0])
    del begin.modules[2]


REFUSED: dict[str, tuple[Callable[[pb.Begin], Any], str]] = {
    "no modules": (lambda begin: begin.ClearField("modules"), "got 0, want 9"),
    "one missing": (lambda begin: begin.modules.pop(), "got 8, want 9"),
    "one twice": (double, r"got \(0, 0\), want \(0, 1\)"),
    "not hosted": (lambda begin: setattr(begin, "hosted", False), "that is not hosted"),
    "factored too": (lambda begin: setattr(begin, "factored", True), "factored or hosted"),
    "rank 0": (lambda begin: setattr(begin.modules[0], "rank", 0), "got rank 0, want 1 to 64"),
    "huge rank": (
        lambda begin: setattr(begin.modules[0], "rank", 2**31),
        "got rank 2147483648, want 1 to 64",
    ),
    "no frames": (lambda begin: setattr(begin, "module_frames", 0), "got 0 frames for 9 modules"),
    "too many frames": (lambda begin: setattr(begin, "module_frames", 10), "got 10 frames for 9"),
    "unknown activation": (
        lambda begin: setattr(begin.modules[0], "activation", 9),
        "activation number 9",
    ),
    "dropout of half the rank": (
        lambda begin: begin.modules[0].dropouts.add(rank=2, p=0.1),
        "another rank than 4",
    ),
    "dropout of everything": (
        lambda begin: begin.modules[0].dropouts.add(rank=4, p=1.0),
        "got dropout 1.0",
    ),
    "dropout that is no number": (
        lambda begin: begin.modules[0].dropouts.add(rank=4, p=float("nan")),
        "got dropout nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_the_server_lives(links: Links, name: str) -> None:
    """Adapters that are not exactly the active modules, in shapes that fit, end the stream with the
    reason, and the next honest edge is served.
    """
    change, reason = REFUSED[name]
    link = links("llama")
    watched = Watched(link)
    split = hosted(watched, lora())
    with torch.no_grad():
        want = split(**batches()[0]).loss
    (begin,) = watched.begins
    change(begin)
    with pytest.raises(DLoRAError, match=reason):
        ask(link, begin)
    with torch.no_grad():
        assert torch.equal(split(**batches()[0]).loss, want)


def ask(link: Any, *frames: Any) -> None:
    """Send a `Begin`, and frames behind it; raise what the server says, if it is an error."""
    stream = link.open()
    try:
        for frame in frames:
            stream.send(pb.EdgeFrame(begin=frame) if isinstance(frame, pb.Begin) else frame)
        stream.receive()
    finally:
        stream.close()


def part(first: int, *modules: pb.ModuleTensors) -> pb.EdgeFrame:
    """A frame of modules."""
    return pb.EdgeFrame(modules=pb.HostedTensors(first=first, modules=modules))


UNFIT: dict[str, tuple[Callable[[list[pb.ModuleTensors]], list[pb.EdgeFrame]], str]] = {
    "other width": (
        lambda all: [part(0, pb.ModuleTensors(a=encode(torch.ones(4, 63), pb.FP32), b=all[0].b))],
        r"a of .*q_proj.*\[4, 63\]",
    ),
    "other rank": (
        lambda all: [part(0, pb.ModuleTensors(a=all[0].a, b=encode(torch.ones(3, 64), pb.FP32)))],
        r"b of .*q_proj.*\[3, 64\]",
    ),
    "no A": (lambda all: [part(0, pb.ModuleTensors(b=all[0].b))], "a is missing"),
    "a bias": (
        lambda all: [part(0, pb.ModuleTensors(a=all[0].a, b=all[0].b, b_bias=all[0].a))],
        "b_bias is missing, or was not announced",
    ),
    "too few bytes": (
        lambda all: [
            part(0, pb.ModuleTensors(a=pb.Tensor(dtype=1, shape=[4, 64], data=b"x"), b=all[0].b))
        ],
        "a of .*: got 1 bytes",
    ),
    "from the middle": (lambda all: [part(3, *all[3:])], "got modules 3 to 9, want those from 0"),
    "none": (lambda all: [part(0)], "got modules 0 to 0"),
    "all in the first of two frames": (lambda all: [part(0, *all)], "got 9 of 9 .* 1 frames are"),
    "too many": (lambda all: [part(0, *all, all[0])], "got modules 0 to 10, .* of 9"),
    "the end missing": (
        lambda all: [part(0, *all[:8]), *[pb.EdgeFrame(deltas=pb.SiteDeltas())]],
        "got frame 'deltas', want 'modules'",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_were_not_announced_end_the_stream(links: Links, name: str) -> None:
    """Tensors that come behind a request in other shapes, places or numbers than it says end the
    stream with the reason.
    """
    change, reason = UNFIT[name]
    link = links("llama")
    watched = Watched(link)
    split = hosted(watched, lora())
    with torch.no_grad():
        split(**batches()[0])
    (begin,), frames = watched.begins, watched.modules
    begin.module_frames = 2
    with pytest.raises(DLoRAError, match=reason):
        ask(link, begin, *change([one for frame in frames for one in frame.modules]))


def test_the_cloud_begins_before_all_is_there(links: Links) -> None:
    """A micro-batch whose last tensors do not come gets as far as their site, and gradients of the
    upper modules are on their way before backward has ended.
    """
    link = links("llama")
    watched = Watched(link)
    split = hosted(watched, lora())
    split(**batches()[0]).loss.backward()
    assert len(watched.modules) == watched.begins[0].module_frames == 8
    assert [grads.first for grads in watched.grads] == [8, 6, 4, 2]
    assert [grads.first for grads in watched.done[0].module_grads] == [0]


def test_values_without_sense_harm_their_own_stream_alone(links: Links) -> None:
    """An adapter that is not finite gives its own edge an error, and no other edge anything."""
    split, other = hosted(links("llama"), lora()), hosted(links("llama"), lora())
    next(iter(adapter(split).values())).data.fill_(float("nan"))
    with pytest.raises(PeerError, match="not finite"):
        split(**batches()[0])
    assert other(**batches()[0]).loss.isfinite()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_memory_is_known_before_it_is_taken(
    cloud_models: Callable[[str], CloudModel], dropout: float
) -> None:
    """What autograd saves because of the adapter is no more than the request was said to cost
    above one without, and not a fraction of it either.
    """
    cloud = cloud_models("llama")
    link = dlora.embedded.InProcessLink(cloud)
    watched = Watched(link)
    split = hosted(watched, lora(target_modules="all-linear", lora_dropout=dropout))
    split(**batches(rows=4, length=64)[0]).loss.backward()
    request = cloud.check(watched.begins[0])
    assert request.hosted is not None
    site_of = {site.index: site for site in cloud.sites}
    module_bytes, seen = 0, set()
    work = HostedAdapter(request.hosted, cloud.frozen_store, training=True)
    for frame in watched.modules:
        work.take(frame)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal module_bytes
        storage = tensor.untyped_storage()
        # Not the adapter's own tensors, which are counted apart.
        if storage.data_ptr() not in seen and not (tensor.is_leaf and tensor.requires_grad):
            seen.add(storage.data_ptr())
            module_bytes += storage.nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for index in sorted({module.site for module in request.hosted.modules}):
            x = torch.randn(4, 64, site_of[index].in_features, requires_grad=True) * 1
            kept.append(work.deltas(index, x, past=0))
    said = request.hosted.pass_bytes(4 * 64, training=True)
    assert 0.5 * said < module_bytes <= said
    without = cloud.memory.of_pass(4, 64, training=True)
    assert request.cost_bytes == without + said + request.hosted.adapter_bytes(training=True)
    link.close()


# ----------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "settings",
    [
        partial(TrainSettings, data="rows.jsonl", output=Path("out")),
        PlanSettings,
        GenerateSettings,
        ChatSettings,
        partial(EvalSettings, data="rows.jsonl"),
        ApiSettings,
    ],
)
def test_every_command_asks_for_consent(settings: Any) -> None:
    """No command that reaches a server sends an adapter without being told so."""
    with pytest.raises(UsageError, match=r"--upload_consent true"):
        settings(server="localhost:1", wire="hosted")
    assert settings(server="localhost:1", wire="hosted", upload_consent=True).wire == "hosted"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"idle": "edge"}, "idle=edge: on the hosted"), ({"policy": "output"}, "measures deltas")],
)
def test_kill_and_revive_that_cannot_work_is_refused_early(
    options: dict[str, Any], reason: str
) -> None:
    """Settings of Kill and Revive that need deltas on the edge are refused before a run begins."""
    with pytest.raises(UsageError, match=reason):
        TrainSettings(
            server="localhost:1",
            data="rows.jsonl",
            output=Path("out"),
            wire="hosted",
            upload_consent=True,
            kr="on",
            kr_options=options,
        )


def test_kill_and_revive_trains(links: Links) -> None:
    """A run whose active set changes ends with the plain wire's adapter, and its costs count the
    adapter's own bytes.
    """
    options = KillReviveConfig(
        budget=0.5, cost="modules", warmup=0.2, interval=1, revive="scored", idle="cloud"
    )
    found, shares = [], []
    for make in (make_split, hosted):
        torch.manual_seed(0)
        split = make(links("llama"), lora())
        reviver = KillAndRevive(split, options, total_steps=6)
        optimizer = torch.optim.SGD(split.parameters(), lr=1e-2)
        for step, batch in enumerate(batches(6)):
            reviver.before_step(step)
            split(**batch).loss.backward()
            reviver.before_update(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.detach().clone() for parameter in split.parameters()])
        shares.append(costs_of(split).share(set(split.adapted_modules[:1])))
    for one, other in zip(*found, strict=True):
        if one.device.type != "meta":
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert shares[1] != shares[0]


def test_the_base_model_alone_has_nothing_to_send(own: Watched) -> None:
    """Without an active adapter the hosted wire sends no module, and the answer is the base's."""
    split = dlora.edge.load.load_base(own, wire="hosted", upload_consent=True, wire_dtype="fp32")
    plain = dlora.edge.load.load_base(own, wire_dtype="fp32")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(split(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not own.begins[0].modules


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_bottlenecks_answer_with_a_cache(links: Links, kind: str) -> None:
    """Bottlenecks in the cloud give the plain wire's tokens, one round trip each."""
    config = BottleneckConfig(
        kind=kind, r=5, target_modules=["o_proj", "down_proj"], init_lora_weights=False
    )
    ids, answers = torch.tensor([[5, 6, 7, 8]]), []
    for model in (make_split(links("llama"), config), hosted(links("llama"), config)):
        model.eval()
        answers.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False))
    assert torch.equal(*answers)
    assert model.meter.round_trips == model.meter.passes
