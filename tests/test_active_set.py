"""A changing set of active modules, idle ones in three ways, and probes, against local peft with
the same set.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BY_FAMILY, FAMILIES, NO_DRAIN, adapter, batches, lora, make_local, make_split
from helpers import FlopCount
from peft.tuners.lora import LoraLayer

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import PeerError, UsageError
from dlora.formulas import step_traffic
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.wire import encode
from dlora.server.server import Server

Links = Callable[[str], Any]


def set_local(local: Any, active: set[str], idle: str) -> None:
    """The same on local peft: idle modules are frozen, and with "drop" they add nothing."""
    for name, layer in local.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            for modules in (layer.lora_A, layer.lora_B):
                modules.requires_grad_(name in active)
            if name not in active and idle == "drop":
                layer.lora_B["default"].weight.data.zero_()


def random_sets(names: list[str], count: int, seed: int = 0) -> Iterator[set[str]]:
    """Sets of a third of the modules; sites are cut through."""
    generator = random.Random(seed)
    for _ in range(count):
        yield set(generator.sample(names, max(1, len(names) // 3)))


@pytest.mark.parametrize("wire", ["plain", "factored"])
@pytest.mark.parametrize("idle", ["drop", "cloud", "edge"])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_any_set_gives_local_gradients(links: Links, family: str, idle: Any, wire: str) -> None:
    """Loss and gradients equal local peft's with the same set, which changes at every step of a
    training run.
    """
    config = lora(family, target_modules="all-linear")
    local, split = make_local(family, config), make_split(links(family), config, wire=wire)
    optimizers = [
        torch.optim.AdamW(list(adapter(model).values()), lr=1e-3, weight_decay=0.0)
        for model in (local, split)
    ]
    parameters = [dict(model.named_parameters()) for model in (local, split)]
    names = [name for name in parameters[0] if "lora_" in name]
    for active, batch in zip(random_sets(split.adapted_modules, 4), batches(4), strict=True):
        split.set_active(active, idle)
        set_local(local, active, idle)
        assert set(split.active_modules) == active
        losses = [model(**batch).loss for model in (local, split)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
        for loss in losses:
            loss.backward()
        for name in names:
            want, got = (those[name].grad for those in parameters)
            assert (want is None) == (got is None), name
            if want is not None:
                assert (got - want).abs().max() <= 2e-5 * want.abs().max() + 1e-9, name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("wire", ["plain", "factored"])
def test_idle_modules_cost_nothing(cloud_models: Callable[[str], CloudModel], wire: str) -> None:
    """Bytes and round trips are those of the active modules alone, down to the lowest active
    site.
    """
    link = InProcessLink(cloud_models("llama"))
    split = make_split(link, lora(r=8), wire_dtype="fp32", wire=wire)
    batch = batches(rows=16, length=48)[0]
    rows = int(batch["attention_mask"].sum())
    kept = int((batch["labels"][:, 1:] != -100).sum())
    for idle in ("drop", "cloud"):
        split.set_active(
            [name for name in split.adapted_modules if "layers.1.self_attn.v" in name], idle
        )
        split(**batch).loss.backward()  # with "cloud": uploads
        before = split.meter.copy()
        split(**batch).loss.backward()
        cost = split.meter - before
        sent, received = step_traffic(
            rows, kept, 64, 64, [(64, [(32, 8)])], "fp32", factored=wire == "factored"
        )
        assert cost.sent_bytes == pytest.approx(sent, rel=0.01)
        assert cost.received_bytes == pytest.approx(received, rel=0.01)
        assert cost.round_trips == 3
    link.close()


def test_dropped_modules_are_gone_from_the_adapter(links: Links, tmp_path: Path) -> None:
    """What is saved is the function that was trained: dropped modules add nothing, in peft as
    well.
    """
    split = make_split(links("llama"), lora()).eval()
    kept = split.adapted_modules[3:5]
    split.set_active(kept, "drop")
    split.save_pretrained(tmp_path)
    again = dlora.load_adapter(links("llama"), tmp_path, is_trainable=False, wire_dtype="fp32")
    batch = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(split(**batch).loss, again(**batch).loss, rtol=1e-6, atol=0)


def test_disable_adapter_leaves_idle_modules_idle(links: Links) -> None:
    """Inside `disable_adapter()` the base model answers; afterwards the same modules train as
    before.
    """
    split = make_split(links("llama"), lora())
    active = split.adapted_modules[4:6]
    split.set_active(active, "cloud")
    batch = batches()[0]
    with torch.no_grad():
        with split.disable_adapter():
            base = split(**batch).loss.item()
        assert split(**batch).loss.item() != base
        fresh = make_split(links("llama"), lora(init_lora_weights=True))
        assert base == pytest.approx(fresh(**batch).loss.item(), rel=1e-6)
    assert len(adapter(split)) == 2 * len(active)


def test_generation_applies_idle_modules(links: Links) -> None:
    """Modules that the cloud applies count in generation too."""
    local, split = make_local("llama", lora()).eval(), make_split(links("llama"), lora()).eval()
    split.set_active(split.adapted_modules[:1], "cloud")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(split.generate(ids, **options), local.generate(ids, **options))
    assert split.meter.round_trips - 8 * 2 in (
        0,
        1,
    )  # one to put the modules, if they were not there before


def test_unknown_names_are_refused(links: Links) -> None:
    """A set with a module that has no adapter is refused by name, and changes nothing."""
    split = make_split(links("llama"), lora())
    with pytest.raises(UsageError, match=r"model\.layers\.7\.x has no adapter"):
        split.set_active(["model.layers.7.x"])
    assert split.active_modules == split.adapted_modules


# ----------------------------------------------------------------- modules that the cloud holds


def test_forgotten_modules_are_put_again(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """A server that does not know a module says so and gets it; losses stay the same, over gRPC as
    well.
    """
    batch = batches()[0]
    cloud = cloud_models("llama")
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora())
        want = split(**batch).loss.item()
        split.set_active(split.adapted_modules[:1], "cloud")
        for _ in range(2):
            cloud.frozen_store._modules.clear()
            cloud.frozen_store._owned.clear()
            cloud.frozen_store.stored_bytes = 0
            assert split(**batch).loss.item() == pytest.approx(want, rel=1e-6)
        assert split.meter.retries == 0
        link.close()


def test_too_small_a_store_is_said(tmp_path: Path) -> None:
    """Where the cloud cannot hold all idle modules at once the edge stops with the reason."""
    from conftest import make_base

    from dlora.cloud.frozen_store import MODULE_BYTES

    one = MODULE_BYTES + 4 * 4 * (64 + 64)
    cloud = CloudModel(make_base("llama"), model_id="x/y", limits=Limits(max_adapter_bytes=2 * one))
    link = InProcessLink(cloud)
    split = make_split(link, lora())
    split.set_options(retry=dlora.RetryPolicy(sleep=lambda _: None))
    split.set_active([], "cloud")
    with torch.no_grad(), pytest.raises(PeerError, match="room for adapters too small"):
        split(**batches()[0])
    assert cloud.frozen_store.stored_bytes <= 2 * one
    tiny = CloudModel(make_base("llama"), model_id="x/y", limits=Limits(max_adapter_bytes=one - 1))
    with pytest.raises(UsageError, match="over this server's limit"):
        tiny.frozen_store.put(
            pb.FrozenModule(
                a=encode(torch.ones(4, 64), pb.FP32), b=encode(torch.ones(64, 4), pb.FP32)
            )
        )
    link.close()


def frozen(a: tuple[int, ...], b: tuple[int, ...], value: float = 1.0) -> pb.FrozenModule:
    """A frozen module of the given shapes."""
    return pb.FrozenModule(
        a=encode(torch.full(a, value), pb.FP32), b=encode(torch.full(b, value), pb.FP32)
    )


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (frozen((4, 64), (64, 3)), r"got shapes \[4, 64\] and \[64, 3\]"),
        (frozen((4,), (64, 4)), r"got shapes \[4\] and \[64, 4\]"),
        (frozen((4, 64), (64, 4), float("nan")), "frozen module: got values that are not finite"),
        (
            pb.FrozenModule(
                a=pb.Tensor(dtype=pb.FP32, shape=[1 << 30, 1 << 30]),
                b=pb.Tensor(shape=[1, 1 << 30]),
            ),
            "of a module that is served",
        ),
        (frozen((0, 64), (64, 0)), "of a module that is served"),
        (frozen((65, 64), (64, 65)), "of a module that is served"),
        (
            pb.FrozenModule(a=pb.Tensor(dtype=pb.FP32, shape=[4, 64]), b=pb.Tensor(shape=[64, 4])),
            "got 0 bytes, shape",
        ),
    ],
)
def test_hostile_modules_are_refused(links: Links, module: pb.FrozenModule, message: str) -> None:
    """Shapes, sizes and values of an upload are checked before anything is kept."""
    with pytest.raises(PeerError, match=message):
        links("llama").put_adapter([module])


@pytest.mark.parametrize(
    ("idle", "message"),
    [
        ([(0, 1, 0)], "ascending modules that are not active"),
        ([(1, 0, 0), (1, 0, 0)], r"idle: got \(1, 0\) after \(1, 0\), want ascending modules"),
        ([(99, 0, 0)], r"idle: got \(99, 0\) after .*, want ascending modules"),
        ([(0, 9, 0)], "site 0 has 3 modules"),
        ([(1, 0, 0), (2, 0, 0)], "has other widths"),
    ],
)
def test_hostile_references_are_refused(
    links: Links, idle: list[tuple[int, int, int]], message: str
) -> None:
    """A step may refer only to modules that fit where it puts them."""
    link = links("llama")
    module = frozen((4, 64), (64, 4))
    link.put_adapter([module])
    from dlora.protocol.wire import content_hash

    key = content_hash(module)
    begin = pb.Begin(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=link.description.fingerprint,
        wire_dtype=pb.FP32,
        batch=1,
        length=2,
        keep=[1],
        sites=[pb.ActiveSite(site=0, modules=[0, 1])],
        embeddings=encode(torch.zeros(2, 64), pb.FP32),
        idle=[pb.IdleModule(site=site, module=number, hash=key) for site, number, _ in idle],
    )
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin))
    with pytest.raises(PeerError, match=message):
        stream.receive()
    stream.close()


# ----------------------------------------------------------------- probes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [5, 120])
def test_probe_norms_equal_local(links: Links, family: str, length: int) -> None:
    """The norm of g^T x at every probed module is local peft's, below the lowest active site
    too.
    """
    config = lora(family)
    local, split = make_local(family, config), make_split(links(family), config)
    active = split.adapted_modules[-1:]
    split.set_active(active, "cloud")
    split.probe_modules = split.adapted_modules
    batch = batches(rows=2, length=length)[0]
    want: dict[str, torch.Tensor] = {}
    for name, layer in local.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):

            def note(module: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                output.register_hook(
                    lambda grad: want.__setitem__(
                        name, (grad.reshape(-1, grad.shape[-1]).T @ x).norm()
                    )
                )

            layer.register_forward_hook(note)
    local(**batch).loss.backward()
    split(**batch).loss.backward()
    (got,) = split.probe_norms
    assert got.keys() == want.keys()
    for name, norm in want.items():
        assert got[name] == pytest.approx(norm.item(), rel=1e-3), name


def test_cost_of_probes_and_idle_modules_is_counted(
    cloud_models: Callable[[str], CloudModel],
) -> None:
    """The cloud's FLOPs with probes and frozen modules are exactly those that torch counts."""
    from conftest import make_base

    base = make_base("llama")
    base.set_attn_implementation("eager")
    link = dlora.in_process(base, model_id="x/y")
    split = make_split(link, lora())
    split.set_active(split.adapted_modules[4:5], "cloud")
    split.probe_modules = split.adapted_modules
    run, counted = link.cloud.run, []

    def count(*args: Any) -> None:
        counter = FlopCount()
        try:
            with counter:
                run(*args)
        finally:
            counted.append(counter.total)

    link.cloud.run = count
    split(**batches()[0]).loss.backward()
    deadline = time.monotonic() + 20
    while (
        not counted and time.monotonic() < deadline
    ):  # `Done` is sent before the count is complete
        time.sleep(0.01)
    assert split.meter.cloud_forward_flops + split.meter.cloud_backward_flops == counted[-1]
    link.close()
