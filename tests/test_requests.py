"""Every check of a request by itself, without a model: what an edge may ask for, and what not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dlora.cloud.costs import MemoryCost
from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.limits import Limits
from dlora.cloud.requests import RequestCheck
from dlora.errors import AdapterMissing, UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.sites import Module, Site, output_sites
from dlora.protocol.wire import encode, pack_mask

CPU = torch.device("cpu")
# Layers 0 and 1 of three: q and k at a site of each. The provider does not allow layer 1's k.
SITES = tuple(
    Site(
        index=layer,
        in_features=4,
        modules=(
            Module(name=f"model.layers.{layer}.q", out_features=6),
            Module(name=f"model.layers.{layer}.k", out_features=2, allowed=layer == 0),
        ),
    )
    for layer in (0, 1)
)


@pytest.fixture(scope="module")
def check() -> RequestCheck:
    """What a small cloud serves: one edge layer at each end, frozen modules of 4 -> 6."""
    return RequestCheck(
        class_name="Tiny",
        model_id="example-org/tiny",
        fingerprint="print",
        limits=Limits(
            max_tokens=24, max_length=10, max_inflight_bytes=1100, edge_first=1, edge_last=1
        ),
        memory=MemoryCost(
            bytes_per_token=50.0,
            bytes_per_token_squared=1.0,
            cache_bytes_per_token=8,
            num_layers=2,
        ),
        sites=SITES,
        all_sites=(*SITES, *output_sites(SITES)),
        num_layers=3,
        takes_position_ids=True,
        deep_rollback=False,
        frozen_store=FrozenStore(1 << 20, CPU),
        device=CPU,
    )


def begin(**changes: Any) -> pb.Begin:
    """A training request of 2 x 5 tokens at both sites that is in order, but for the changes."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "fingerprint": "print",
        "wire_dtype": pb.FP32,
        "training": True,
        "batch": 2,
        "length": 5,
        "keep": [3, 9],
        "sites": [active(0, 0, 1), active(1, 0)],
        "embeddings": encode(torch.zeros(10, 4), pb.FP32),
    }
    return pb.Begin(**fields | changes)


def active(site: int, *modules: int) -> pb.ActiveSite:
    """Modules of a site."""
    return pb.ActiveSite(site=site, modules=modules)


def frozen(store: FrozenStore, a: tuple[int, int], b: tuple[int, int], owner: str) -> bytes:
    """Put a frozen module of these shapes; return its hash."""
    pair = {name: encode(torch.ones(shape), pb.FP32) for name, shape in (("a", a), ("b", b))}
    return store.put(pb.FrozenModule(**pair), owner)


CACHED: dict[str, Any] = {"training": False, "cache_length": 8}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, UsageError, "speaks protocol"),
        ({"fingerprint": "other"}, UsageError, "expects the model 'other'"),
        ({"cache_length": 8}, WireError, "not for training"),
        (CACHED | {"factored": True}, WireError, "on the plain or hosted wire"),
        (CACHED | {"cache_length": 11}, UsageError, "KV cache of 11 tokens is over .* of 10"),
        ({"wire_dtype": 77}, WireError, "wire dtype number 77"),
        ({"wire_dtype": 0}, WireError, "wire dtype number 0"),
        *(
            ({"codecs": pb.Codecs(**{kind: 77})}, WireError, "wire dtype number 77")
            for kind in pb.Codecs.DESCRIPTOR.fields_by_name
        ),
        ({"drop_input_grads": True, "training": False}, WireError, "drop_input_grads: wants"),
        ({"drop_input_grads": True, "hosted": True}, WireError, "drop_input_grads: .* factored"),
        ({"edge_first": 2}, UsageError, "hold the first 1 and the last 1 layers, got 2 and 0"),
        ({"edge_last": 2}, UsageError, "got 0 and 2"),
        ({"sites": [active(1, 0), active(0, 0)]}, WireError, "got 0 after 1, want ascending"),
        ({"sites": [active(0, 0), active(0, 1)]}, WireError, "got 0 after 0"),
        ({"sites": [active(6, 0)]}, WireError, "under 6"),
        ({"sites": [active(0)]}, WireError, "want ascending, 1 to 2"),
        ({"sites": [active(0, 1, 0)]}, WireError, "want ascending, 1 to 2"),
        ({"sites": [active(0, 0, 0)]}, WireError, "want ascending, 1 to 2"),
        ({"sites": [active(0, 2)]}, WireError, "want ascending, 1 to 2"),
        ({"edge_first": 1}, WireError, "site 0 is in a layer that the edge holds"),
        ({"sites": [active(1, 1)]}, UsageError, r"not allow adapters on model\.layers\.1\.k"),
        ({"sites": [active(5, 0)]}, UsageError, r"not allow adapters on model\.layers\.1\.k"),
        ({"probe": [active(0, 0)], "training": False}, WireError, "probe: wants a training step"),
        ({"probe": [active(0, 0)], "sites": []}, WireError, "probe: wants .* an active site"),
        ({"probe": [active(9, 0)]}, WireError, "sites: got 9"),
        ({"wants_input_grad": True, "training": False}, WireError, "wants_input_grad"),
        ({"batch": 0}, WireError, "empty micro-batch: 0 x 5"),
        ({"length": 0}, WireError, "empty micro-batch: 2 x 0"),
        ({"length": 11}, UsageError, "sequence of 11 tokens is over this server's limit of 10"),
        ({"batch": 5, "training": False}, UsageError, "over this server's limits .24 tokens"),
        ({"length": 10, "sites": []}, UsageError, "activations, .* raise the accumulation"),
        (CACHED | {"cache_length": 4}, WireError, "5 tokens do not fit a KV cache of 4"),
        ({"keep": range(11)}, WireError, "keep: got 11 positions of 10 tokens"),
        ({"keep": [3, 10]}, WireError, "keep: want ascending positions under 10"),
        ({"keep": [3, 3]}, WireError, "keep: want ascending"),
        ({"keep": [4, 3]}, WireError, "keep: want ascending"),
        ({"attention_mask": b"\1" * 9}, WireError, "attention mask: got 9 bytes"),
        ({"attention_mask": b"\2" * 10}, WireError, "attention mask: got a value 2"),
        ({"position_ids": range(9)}, WireError, "position_ids: want 10 values under 10"),
        ({"position_ids": [10] * 10}, WireError, "position_ids: want 10 values under 10"),
    ],
)
def test_every_field_of_a_begin_is_checked(
    check: RequestCheck, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Were any of these checks missing, the request with that one fault would be accepted."""
    assert check.begin(begin(), "alice").num_rows == 10
    with pytest.raises(error, match=message):
        check.begin(begin(**changes), "alice")


@pytest.mark.parametrize(
    ("served", "changes", "message"),
    [
        ({"takes_position_ids": False}, {"position_ids": [0] * 10}, "Tiny takes no position_ids"),
        ({"cache_bytes_per_token": 0}, CACHED, "Tiny is served without KV cache"),
        ({"cache_bytes_per_token": 100}, CACHED, "MiB of activations and KV cache"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    check: RequestCheck, served: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """Were a model's own limits not looked at, it would fail or overflow within a pass."""
    if "cache_bytes_per_token" in served:
        served = {"memory": dataclasses.replace(check.memory, **served)}
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(check, **served).begin(begin(**changes), "alice")


@pytest.mark.parametrize(
    ("entries", "changes", "error", "message"),
    [
        ([(1, 0), (0, 0)], {}, WireError, "want ascending modules"),
        ([(0, 0), (0, 0)], {}, WireError, "want ascending modules"),
        ([(0, 0)], {"sites": [active(0, 0)]}, WireError, "modules that are not active"),
        ([(2, 0)], {}, WireError, "idle: got .2, 0."),
        ([(0, 2)], {}, WireError, "site 0 has 2 modules, got 2"),
        ([(1, 1)], {}, UsageError, r"not allow adapters on model\.layers\.1\.k"),
        ([(0, 0)], {"edge_first": 1}, UsageError, r"not allow adapters on model\.layers\.0\.q"),
        ([(0, 1)], {}, WireError, "has other widths"),
    ],
)
def test_every_reference_to_a_frozen_module_is_checked(
    check: RequestCheck,
    entries: list[tuple[int, int]],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """Were any of these checks missing, a module would be applied where it must not be."""
    key = frozen(check.frozen_store, (3, 4), (6, 3), "alice")
    plain = {"sites": [], "training": False}
    good = begin(**plain, idle=[pb.IdleModule(site=0, module=0, hash=key)])
    assert list(check.begin(good, "alice").idle) == [(0, 0)]
    idle = [pb.IdleModule(site=site, module=module, hash=key) for site, module in entries]
    with pytest.raises(error, match=message):
        check.begin(begin(**plain | changes, idle=idle), "alice")


def test_a_frozen_module_is_its_owners(check: RequestCheck) -> None:
    """Were hashes not looked up for their owner, one tenant could apply what another has put."""
    key = frozen(check.frozen_store, (3, 4), (6, 3), "alice")
    message = begin(sites=[], training=False, idle=[pb.IdleModule(site=0, module=0, hash=key)])
    with pytest.raises(AdapterMissing, match="put it and try again"):
        check.begin(message, "bob")


def extend(**changes: Any) -> pb.Extend:
    """One token more for each of two sequences."""
    fields: dict[str, Any] = {
        "length": 1,
        "keep": [0, 1],
        "embeddings": encode(torch.zeros(2, 4), pb.FP32),
    }
    return pb.Extend(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"drop": 1, "rollback": False}, WireError, "was not asked to roll back"),
        ({"drop": 7}, WireError, "drop: got 7 tokens, the KV cache holds 6"),
        ({"drop": 2}, WireError, "attention over a window gives back the last 1"),
        ({"length": 3}, WireError, "9 tokens do not fit a KV cache of 8"),
        ({"length": 5}, UsageError, "sequence of 11 tokens"),
        ({"length": 0}, WireError, "empty micro-batch: 2 x 0"),
        ({"order": [0] * 25}, UsageError, "a micro-batch of 25 x 1 tokens is over"),
        ({"order": [0, 2]}, WireError, "order: got 2 rows up to 2, want rows under 2"),
        ({"keep": [2]}, WireError, "keep: want ascending positions under 2"),
        ({"attention_mask": b"\1"}, WireError, "attention mask: got 1 bytes"),
        ({"position_ids": [7]}, WireError, "position_ids: want 2 values"),
    ],
)
def test_every_field_of_an_extend_is_checked(
    check: RequestCheck, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Were any of these checks missing, a stream's cache could become other than agreed."""
    rollback = changes.get("rollback", True)
    first = check.begin(begin(**CACHED, sites=[], rollback=rollback), "alice")
    before = check.extend(first, extend())
    assert (before.past, before.length) == (5, 1)
    with pytest.raises(error, match=message):
        check.extend(before, extend(**{k: v for k, v in changes.items() if k != "rollback"}))


def test_masks_of_cached_and_new_tokens_are_joined(check: RequestCheck) -> None:
    """Were a mask cut, reordered or joined wrongly, tokens would attend to other padding."""
    left = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = pack_mask(left)
    first = check.begin(begin(**CACHED, sites=[], rollback=True, attention_mask=mask), "alice")
    assert first.rows_N is not None and first.rows_N.tolist() == [1, *range(2, 10)]
    later = check.extend(first, extend(order=[1, 0], drop=1))
    assert later.mask_BT is not None and later.mask_BT.tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    assert (later.past, later.drop, later.rows_N) == (4, 1, None)
