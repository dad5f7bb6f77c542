"""`cache_prefix`: sequences that come again travel as names, and the frozen layers below every
adapter are not computed again; what is trained is what would be trained without.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    NO_DRAIN,
    adapter,
    batches,
    lora,
    make_base,
    make_local,
    make_split,
)
from helpers import assert_same_grads
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.cloud.prefixes import PrefixRequest
from dlora.cloud.zero_edge import ZeroEdge, probe_request, sample_ids
from dlora.embedded import InProcessLink
from dlora.errors import PeerError, PrefixMissing, UsageError, WireError
from dlora.formulas import step_traffic
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.prefixes import NAME_BYTES
from dlora.server.server import Server
from dlora.training.run import train
from dlora.training.settings import TrainSettings

Links = Callable[[str], Any]
UPPER: dict[str, Any] = {"layers_to_transform": [1, 2]}


class Watched:
    """A link that keeps the first frame of every stream."""

    def __init__(self, link: Any) -> None:
        self.link, self.description, self.address = link, link.description, link.address
        self.begins: list[pb.Begin] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        stream = self.link.open()
        send = stream.send

        def note(frame: pb.EdgeFrame) -> None:
            if frame.WhichOneof("kind") == "begin":
                self.begins.append(pb.Begin.FromString(frame.begin.SerializeToString()))
            send(frame)

        stream.send = note
        return stream

    def went(self) -> str:
        """How every micro-batch went since the last call: by Name, Kept, or without either."""
        found = [
            "-" if not begin.HasField("prefixes") else "K" if begin.HasField("embeddings") else "N"
            for begin in self.begins
        ]
        self.begins.clear()
        return "".join(found)


@pytest.fixture(scope="module")
def cloud() -> Iterator[InProcessLink]:
    """A cloud of this file's own."""
    with closing(dlora.in_process(make_base("llama"), model_id="x/y")) as link:
        yield link


@pytest.fixture
def own(cloud: InProcessLink) -> Watched:
    """A watched link to it, with nothing kept yet."""
    store_of(cloud).keep_owners(())
    return Watched(cloud)


def store_of(link: Any) -> FrozenStore:
    """Where the cloud keeps prefixes."""
    store = link.cloud.prefix_store
    assert store is not None
    return store


def cached(link: Any, **options: Any) -> dlora.SplitModel:
    """A split model with adapters in the upper two of three layers, that names its sequences."""
    config = lora(**UPPER | options.pop("lora", {}))
    return make_split(link, config, cache_prefix=True, **options)


def steps(split: torch.nn.Module, epochs: int = 2, count: int = 3) -> list[torch.Tensor]:
    """The losses of some epochs of SGD over the same micro-batches."""
    torch.manual_seed(3)
    optimizer, losses = torch.optim.SGD(adapter(split).values(), lr=1e-2), []
    for _ in range(epochs):
        for batch in batches(count):
            losses.append(split(**batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    return [loss.detach() for loss in losses]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the very same adapter."""
    return all(map(torch.equal, adapter(one).values(), adapter(other).values()))


# ----------------------------------------------------------------- the same training


@pytest.mark.parametrize(
    ("options", "drop"),
    [
        ({"wire": "plain", "wire_dtype": "int8"}, 0.0),
        ({"wire": "plain", "in_flight": 2}, 0.2),
        ({"wire": "factored", "input_grad": "drop", "wire_dtype": "fp16"}, 0.2),
        ({"wire": "hosted", "upload_consent": True}, 0.0),
        ({"wire": "hosted", "upload_consent": True, "wire_dtype": "int4"}, 0.2),
    ],
    ids=str,
)
def test_a_second_epoch_by_name_is_one_in_full(
    own: Watched, options: dict[str, Any], drop: float
) -> None:
    """Where the same micro-batches come again losses and adapter are bit for bit those without the
    cache, on every wire, with dropout, in parts; no embedding travels again.
    """
    without = make_split(own, lora(**UPPER, lora_dropout=drop), **options)
    want = steps(without, count=2)
    own.begins.clear()
    split = cached(own, lora={"lora_dropout": drop}, **options)
    got, parts = steps(split, count=2), options.get("in_flight", 1)
    assert all(map(torch.equal, got, want)) and same(split, without)
    assert own.went() == "K" * 2 * parts + "N" * 2 * parts
    assert split.meter.tokens == without.meter.tokens
    assert split.meter.round_trips == without.meter.round_trips and split.meter.retries == 0
    assert split.meter.sent_bytes < without.meter.sent_bytes
    assert split.meter.cloud_forward_flops < without.meter.cloud_forward_flops
    assert split.meter.cloud_backward_flops == without.meter.cloud_backward_flops


@pytest.mark.parametrize(
    ("family", "side"),
    [*((family, "right") for family in FAMILIES), ("llama", "left"), ("bloom", "left")],
)
def test_gradients_match_local(links: Links, family: str, side: str) -> None:
    """In every family, with padding on either side, loss and gradients by name equal local peft's,
    where sequences come together in another micro-batch than before.
    """
    config = lora(family, layers_to_transform=[2])
    local = make_local(family, config)
    link = Watched(links(family))
    split = make_split(link, config, cache_prefix=True)
    first, second = batches(2, rows=4)
    if side == "left":
        first, second = ({name: one.flip(1) for name, one in b.items()} for b in (first, second))
    for batch in (first, second):
        # Nobody predicts a first token: the position before it may be padding.
        batch["labels"][batch["attention_mask"].cumsum(dim=1) == 1] = -100
        split(**batch)
    mixed = {name: torch.cat([second[name][2:], first[name][:2]]) for name in first}
    want, got = local(**mixed).loss, split(**mixed).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    want.backward()
    got.backward()
    assert_same_grads(local, split)
    assert link.went() == "KKN"


def test_shorter_padding_finds_the_same_names(own: Watched) -> None:
    """A name is the sequence's, not the micro-batch's: with less padding around it, it is found."""
    split, (batch,) = cached(own), batches(rows=4, length=20)
    split(**batch).loss.backward()
    length = int(batch["attention_mask"][:2].sum(dim=1).max())
    split(**{name: one[:2, :length] for name, one in batch.items()}).loss.backward()
    split(**{name: one[:, 1:] for name, one in batch.items()}).loss.backward()
    assert own.went() == "KNK"


def test_edge_layers_and_all_layers_active(own: Watched) -> None:
    """With a layer on the edge that is not trained hidden states are named; where the lowest layer
    has an adapter what is saved is the embedding; adapters in the edge's layers name nothing.
    """
    cloud = CloudModel(make_base("llama"), model_id="x/y", limits=Limits(edge_first=1))
    with closing(InProcessLink(cloud)) as link:
        for layers, edge_layers, went in (
            ([2], (1, 0), "KNN"),
            ([0, 2], (0, 0), "KNN"),
            ([0, 2], (1, 0), "---"),
        ):
            watched, models = Watched(link), []
            for cache_prefix in (False, True):
                watched.begins.clear()
                models.append(
                    make_split(
                        watched,
                        lora(layers_to_transform=layers),
                        edge_layers=edge_layers,
                        cache_prefix=cache_prefix,
                    )
                )
                steps(models[-1], epochs=3, count=1)
            assert same(*models) and watched.went() == went, (layers, edge_layers)


@pytest.mark.parametrize("idle", ["drop", "cloud"])
def test_another_active_set_is_another_prefix(own: Watched, idle: Any) -> None:
    """With Kill and Revive what is below the lowest active site changes, frozen modules of the
    cloud among it: only what is still the same is named, and training is as without the cache.
    """
    models = []
    for cache_prefix in (False, True):
        own.begins.clear()
        split = make_split(own, lora(), cache_prefix=cache_prefix)
        for layer in ("0", "2", "1", "2", "2"):
            names = [name for name in split.adapted_modules if f".{layer}." in name]
            split.set_active(names, idle)
            steps(split, epochs=1, count=2)
        models.append(split)
    assert same(*models)
    # The lowest layer comes again; with a module below it that was trained meanwhile it is another.
    went = own.went()
    assert went.endswith("NN") and went.count("N") == (4 if idle == "drop" else 2)


def test_probes_and_answers_are_not_named(own: Watched) -> None:
    """What asks for gradients further down, is not trained, or has a KV cache goes as ever."""
    split, (batch,) = cached(own), batches()
    split.probe_modules = split.adapted_modules[:1]
    split(**batch).loss.backward()
    split.probe_modules = ()
    with torch.no_grad():
        split(**batch)
    split.eval()
    split.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=2, pad_token_id=0)
    assert set(own.went()) == {"-"}


# ----------------------------------------------------------------- a cloud that has lost them


def test_a_server_that_comes_back_empty(tmp_path: Path) -> None:
    """A restarted server has nothing: one micro-batch is refused, all go in full once more, no step
    is lost, and the adapter is bit for bit that of a run without the cache.
    """
    cloud = CloudModel(make_base("llama"), model_id="x/y")
    with Server(cloud, options=NO_DRAIN) as server:
        link = Watched(dlora.connect(server.address, cache=tmp_path))
        without, split = make_split(link, lora(**UPPER)), cached(link)
        steps(without, epochs=3)
        link.begins.clear()
        steps(split)
        assert cloud.prefix_store is not None and link.went() == "KKKNNN"
        assert server.kept_bytes == {"local": cloud.prefix_store.stored_bytes}
        cloud.prefix_store.keep_owners(())
        steps(split, epochs=1)
        assert link.went() == "NKKK"
        assert same(split, without) and split.meter.retries == 0
        link.close()


def test_lost_in_the_middle(own: Watched) -> None:
    """A stream that is lost after it went by name runs again, in full where the next server has
    nothing, with the same masks of dropout.
    """
    options: dict[str, Any] = {"lora": {"lora_dropout": 0.3}}
    want, split = cached(own, **options), cached(own, **options)
    steps(want)
    store, open_stream = store_of(own), own.open
    broken = iter([False] * 4 + [True] + [False] * 9)

    def lossy() -> Any:
        stream = open_stream()
        if next(broken):
            receive = stream.receive

            def receive_once() -> Any:
                frame = receive()
                if frame.WhichOneof("kind") == "delta_grads":
                    store.keep_owners(())
                    raise dlora.PeerLost("cut")
                return frame

            stream.receive = receive_once
        return stream

    own.begins.clear()
    own.open = lossy  # type: ignore[method-assign]
    split.set_options(retry=dlora.RetryPolicy(sleep=lambda _: None))
    steps(split)
    assert own.went() == "KKKNNNKK" and split.meter.retries == 1
    assert same(split, want)


def test_no_room_for_all(own: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is too small stays within its limit, drops what was unused longest, and training
    goes on, with one refusal an epoch.
    """
    store = store_of(own)
    without = make_split(own, lora(**UPPER))
    steps(without, epochs=3)
    own.begins.clear()
    monkeypatch.setattr(store, "max_bytes", 30_000)  # of three micro-batches about two
    split = cached(own)
    steps(split, epochs=3)
    assert 15_000 < store.stored_bytes <= 30_000
    assert own.went() == "KKKNKKKNKKK"
    assert same(split, without)


def test_a_cloud_that_never_has_what_it_is_sent(
    own: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that asks for sequences which travelled is given up, and not answered for ever."""
    split, check = cached(own), own.link.cloud.check

    def refuse(*args: Any) -> Any:
        check(*args)
        raise PrefixMissing("not here")

    monkeypatch.setattr(own.link.cloud, "check", refuse)
    with pytest.raises(PeerError, match="not here"):
        split(**batches()[0])
    assert len(own.begins) < 6


# ----------------------------------------------------------------- names


def test_names_say_nothing_without_the_key(own: Watched) -> None:
    """Two runs call the same sequence differently, in 16 bytes; one run calls it the same."""
    (batch,) = batches()
    for split in (cached(own), cached(own)):
        for _ in range(2):
            split(**batch).loss.backward()
    names = [begin.prefixes.names for begin in own.begins]
    assert [len(name) for name in names] == [NAME_BYTES * 3] * 4
    assert names[0] == names[1] != names[2] == names[3]
    assert own.went() == "KNKN"


@pytest.mark.parametrize(
    "change",
    ["input_ids", "position_ids", "wire_dtype", "layer"],
)
def test_what_a_name_stands_for(own: Watched, change: str) -> None:
    """Other tokens, positions, codecs or layers make other names: nothing else is ever taken."""
    split, (batch,) = cached(own), batches()
    split(**batch).loss.backward()
    match change:
        case "input_ids":
            batch["input_ids"][:, 0] += 1
        case "position_ids":
            batch["position_ids"] = torch.arange(11)[None].expand(3, -1) + 1
        case "wire_dtype":
            split.set_options(wire_dtype="fp16")
        case _:
            split.set_active([name for name in split.adapted_modules if ".2." in name])
    split(**batch).loss.backward()
    assert own.went() == "KK"


def test_names_are_their_owners_alone(own: Watched) -> None:
    """What one tenant has kept is not found by another, by the right name."""
    cached(own)(**batches()[0]).loss.backward()
    begin = own.begins[0]
    begin.ClearField("embeddings")
    check = own.link.cloud.check
    assert check(begin).prefixes.kept is not None
    with pytest.raises(PrefixMissing, match="send the micro-batch whole"):
        check(begin, "mallory")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"names": b"x" * 47}, "got 47 bytes of names, want 16 for each of 3"),
        ({"layer": 2}, "got layer 2, want one of the cloud's, up to .* 1"),
        ({"training": False}, "want a training step"),
        ({"wants_input_grad": True}, "want a training step"),
        ({"probe": [pb.ActiveSite(site=4, modules=[0])]}, "want a training step"),
        ({"attention_mask": b"\1" * 33}, "of other lengths"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_prefixes_that_do_not_fit_are_refused(
    own: Watched, changes: dict[str, Any], error: str
) -> None:
    """Names of another length, a layer above an adapter, a request that needs what is below, or
    lengths that are not those of what was kept end the stream before anything is computed.
    """
    cached(own)(**batches()[0]).loss.backward()
    begin = own.begins[0]
    begin.ClearField("embeddings")
    for name, value in changes.items():
        if name == "probe":
            begin.probe.extend(value)
        else:
            setattr(begin.prefixes if name in ("names", "layer") else begin, name, value)
    with pytest.raises(WireError, match=error):
        own.link.cloud.check(begin)


# ----------------------------------------------------------------- what cannot be


def test_what_would_never_be_found_again_is_refused(own: Watched, tmp_path: Path) -> None:
    """Noise and filled padding change what enters each time, and a recording would lack it."""
    for options in ({"noise": dlora.Noise(entry=0.1)}, {"hide_lengths": True}):
        with pytest.raises(UsageError, match="leave one of the two out"):
            cached(own, **options)
    common: dict[str, Any] = {"server": "x", "data": "d", "output": tmp_path / "run"}
    for options in ({"noise_entry": 0.1}, {"pad_to": 8}, {"record": 1}):
        with pytest.raises(UsageError, match="cache_prefix"):
            TrainSettings(**common, cache_prefix=True, **options)


@pytest.mark.parametrize("why", ["no room", "layers"])
def test_a_server_that_keeps_nothing_says_so(why: str) -> None:
    """Where the provider keeps no prefixes, or layers share more than hidden states, the option is
    refused by name, and all else is served.
    """
    base = make_base("llama")
    if why == "layers":
        seen: list[torch.Tensor] = []
        layers = base.model.layers
        layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        layers[2].register_forward_pre_hook(lambda module, args: (args[0] + seen[-1],))
    limits = Limits(max_prefix_bytes=0 if why == "no room" else 1 << 20)
    with closing(InProcessLink(CloudModel(base, model_id="x/y", limits=limits))) as link:
        with pytest.raises(UsageError, match="cache_prefix: in process keeps no prefixes"):
            cached(link)
        split = make_split(link, lora())
        with pytest.raises(UsageError, match="cache_prefix"):
            split.set_options(cache_prefix=True)
        split(**batches()[0]).loss.backward()


# ----------------------------------------------------------------- costs


@pytest.mark.parametrize("wire", ["plain", "hosted"])
def test_bytes_are_those_of_the_formula(own: Watched, wire: Any) -> None:
    """A micro-batch by name sends what the formula says without its entry, to 2 %."""
    split = cached(own, wire=wire, upload_consent=True)
    (batch,) = batches(rows=16, length=48)
    split(**batch).loss.backward()
    before = split.meter.copy()
    split(**batch).loss.backward()
    kept = int((batch["labels"][:, 1:] != -100).sum())
    sites = [
        (site.in_features, [(one.out_features, 4) for one in site.layers]) for site in split.sites
    ]
    sent, received = step_traffic(
        int(batch["attention_mask"].sum()),
        *(kept, 64, 64, sites, "fp32"),
        hosted=wire == "hosted",
        by_name=True,
    )
    cost = split.meter - before
    beside = batch["input_ids"].numel() + 2 * kept  # mask and positions
    assert cost.sent_bytes == pytest.approx(sent + beside, rel=0.02)
    assert cost.received_bytes == pytest.approx(received, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cloud_flops_equal_torchs_count(family: str) -> None:
    """FLOPs of a pass by name are exactly those that torch counts: nothing below is computed."""
    base = make_base(family)
    base.set_attn_implementation("eager")  # torch does not count its fused CPU attention
    cloud = CloudModel(base, model_id="x/y")
    request = probe_request(cloud.parts, cloud.sites, sample_ids(base, 2, 9), training=True)
    active = tuple(
        (site, modules) for site, modules in request.active if site.modules[0].layer >= 1
    )
    prefixes = PrefixRequest(
        layer=1,
        names=(b"a", b"b"),
        lengths=(9, 9),
        kept=(torch.randn(9, 64), torch.randn(9, 64)),
        store=None,
        owner="local",
    )
    request = dataclasses.replace(request, active=active, prefixes=prefixes)
    with FlopCounterMode(display=False) as counter:
        cloud.run(request, ZeroEdge(request))
    assert sum(cloud.flops(request)) == counter.get_total_flops()


def test_a_run_with_the_cache(
    cloud_models: Callable[[str], CloudModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`dlora train --cache_prefix true` over shuffled rows ends with the adapter of a run without,
    to rounding, and sends less from the second epoch on.
    """
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"parcel {n * 37 % 91}:", "completion": f" {'ab'[n % 2]}"} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    adapters, runs = [], []
    with closing(InProcessLink(cloud_models("llama"), tokenizer)) as link:
        for cache_prefix in (False, True):
            output = tmp_path / str(cache_prefix)
            settings = TrainSettings(
                server="here",
                data=str(data),
                output=output,
                target_modules=r".*\.[12]\..*(q|v)_proj",
                wire_dtype="fp32",
                cache_prefix=cache_prefix,
                epochs=2,
                batch_size=4,
                report_to=[],
            )
            runs.append(train(settings, link))
            adapters.append(dlora.load_adapter(link, output))
    for one, other in zip(*(adapter(model).values() for model in adapters), strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm().clamp(min=1e-3)
    sent = [run["cost"]["sent_bytes"] for run in runs]
    assert sent[1] < 0.97 * sent[0]
