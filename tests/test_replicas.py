"""Servers that Ray places and supervises, behind one address."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import adapter, batches, lora, make_split

import dlora
from dlora.errors import PeerError, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.server.replica import Replica, ReplicaSettings
from dlora.server.replicas import Front, _Known
from dlora.server.scaling import Scaling, scale
from dlora.server.settings import ServerOptions, ServeSettings


def settings(folder: Path, **changes: Any) -> ReplicaSettings:
    """A tiny model on loopback."""
    values: dict[str, Any] = {
        "load": {"name": str(folder), "model_id": "example-org/llama", "allow_modules": ".*"},
        "limits": {},
        "options": ServerOptions(drain_s=5.0),
        "host": "127.0.0.1",
        "threads": 1,
        "num_cpus": 0.1,
    }
    return ReplicaSettings(**(values | changes))


@pytest.fixture(scope="module")
def front(model_folder: Path) -> Iterator[Front]:
    """Two replicas."""
    with Front(settings(model_folder), Scaling(least=2, most=2)) as running:
        yield running


def kill(front: Front, address: str) -> None:
    """End the process of the replica at an address at once, as a crash does."""
    import ray

    ray.kill(next(one.actor for one in front.replicas if one.address == address), no_restart=False)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
def test_a_killed_replica_costs_nothing(front: Front, links: Any, tmp_path: Path) -> None:
    """An edge knows one address, talks to a replica directly, goes on with another when that is
    killed, with the result of an unbroken run, and Ray brings the killed one back."""
    link = dlora.connect(front.address, cache=tmp_path)
    first = link.address
    assert first in {one.address for one in front.replicas} and first != front.address
    split, want = make_split(link, lora()), make_split(links("llama"), lora())
    for number, batch in enumerate(batches(4)):
        loss = split(**batch).loss  # a stream is open
        if number == 1:
            kill(front, link.address)
            time.sleep(0.5)
        loss.backward()
        want(**batch).loss.backward()
    assert link.address != first and split.meter.retries >= 1
    for one, other in zip(adapter(split).values(), adapter(want).values(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(
        one.address not in ("", first) for one in front.replicas
    ):
        time.sleep(0.2)
    again = dlora.connect(front.address, cache=tmp_path)
    assert len(again.description.replicas) == 2 and first not in again.description.replicas
    link.close()
    again.close()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
def test_rolling_update_loses_no_run(front: Front, tmp_path: Path) -> None:
    """While every replica is replaced an edge goes on, and finds the new ones through the front."""
    link = dlora.connect(front.address, cache=tmp_path)
    old = set(link.description.replicas)
    split = make_split(link, lora())
    split(**batches()[0]).loss.backward()
    front.replace()
    split(**batches()[0]).loss.backward()
    assert link.address not in old
    link.close()


def test_scaling_follows_the_queue() -> None:
    """More replicas while streams wait for long, fewer after a long quiet, within the bounds."""
    scaling = Scaling(least=1, most=3, queue=1.0, patience_s=10.0)
    assert scale(scaling, 1, queued=5, streams=6, busy_s=5, idle_s=0) == 1
    assert scale(scaling, 1, queued=5, streams=6, busy_s=11, idle_s=0) == 2
    assert scale(scaling, 3, queued=9, streams=9, busy_s=99, idle_s=0) == 3
    assert scale(scaling, 2, queued=0, streams=1, busy_s=0, idle_s=30) == 2
    assert scale(scaling, 2, queued=0, streams=1, busy_s=0, idle_s=61) == 1
    assert scale(scaling, 1, queued=0, streams=0, busy_s=0, idle_s=999) == 1
    with pytest.raises(UsageError, match="the least first"):
        Scaling(least=2, most=1)


def test_a_replica_serves_without_ray(model_folder: Path, tmp_path: Path) -> None:
    """What Ray runs is a plain object: it serves the model at the address it gives, and drains."""
    replica = Replica(settings(model_folder))
    address, message = replica.describe()
    link = dlora.connect(address, cache=tmp_path)
    assert pb.Description.FromString(message).fingerprint == link.description.fingerprint
    assert replica.load() == (address, 0, 0)
    link.close()
    replica.drain()
    assert not replica.server.is_ready


def test_supervision_outlives_what_fails(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica that does not answer, and one that cannot be started, end neither the front's
    supervision nor its other replicas.
    """
    pytest.importorskip("ray")
    monkeypatch.setattr("dlora.server.replicas._POLL_S", 0.01)
    front = Front(settings(model_folder), Scaling(least=1, most=2, queue=1.0, patience_s=0.0))

    class Broken:
        """Ray whose every answer is an error without words."""

        def __init__(self) -> None:
            self.asked = 0

        def get(self, *_: Any, **__: Any) -> Any:
            self.asked += 1
            raise RuntimeError

        def remote(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no room on any node")

    front.ray = Broken()
    busy = _Known(MagicMock(), "127.0.0.1:1", streams=9, queued=9)
    front.replicas = [busy]
    front._supervising.start()
    deadline = time.monotonic() + 10
    while front.ray.asked < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert front._supervising.is_alive() and front.ray.asked >= 3
    front._stop.set()
    front._supervising.join()
    front._loop.close()
    assert front.replicas == [busy] and busy.address == ""
    assert "scaling failed: no room on any node" in caplog.text


def test_settings_of_replicas_are_checked() -> None:
    """Numbers that do not fit together are refused before anything is loaded."""
    for options, message in (
        (
            {"replicas": 2, "max_replicas": 1},
            "replicas: got 2, max_replicas 1; want 0 or more, and no",
        ),
        ({"replicas": -1}, "replicas: got -1, max_replicas None; want 0 or more"),
        ({"replica_ports": "9-8"}, "replica_ports: got '9-8', want FIRST-LAST"),
        ({"replica_ports": "x"}, "replica_ports: got 'x', want FIRST-LAST"),
        ({"replicas": 1, "metrics_port": 1}, "metrics_port is of a single server"),
    ):
        with pytest.raises(UsageError, match=message):
            ServeSettings(model="m", **options)
    assert ServeSettings(model="m", replica_ports="50100-50199").ports == (50100, 50199)


def test_a_front_that_names_no_address_is_refused(links: Any, tmp_path: Path) -> None:
    """A hostile front cannot send an edge to something that is no address."""
    link = links("llama")
    with pytest.raises(PeerError, match="which is no address"):
        link._use_replicas(["file:///etc/passwd"])
