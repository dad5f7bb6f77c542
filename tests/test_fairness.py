"""Compute is shared between tenants by weight, whatever a pass is like and whoever asks more."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, batches, lora, make_split
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dlora
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.model import SplitModel
from dlora.errors import DLoRAError
from dlora.server.server import Server
from dlora.server.slots import FairQueue

# ------------------------------------------------------------- the slots, simulated without threads


@dataclass(frozen=True)
class Load:
    """What a tenant's streams do: compute a piece, then think; `think_s` 0: always hungry."""

    weight: float
    streams: int
    piece_s: float
    """Mean compute between two exchanges."""
    operation_s: float
    """Longest time between two places where a stream may give way."""
    think_s: float = 0.0


@dataclass(eq=False)
class _Stream:
    tenant: str
    load: Load
    random: Random
    state: str = "thinking"
    left_s: float = 0.0
    """Of thinking, or of the piece."""
    operation_s: float = 0.0
    """Of that, until the next place where it may give way."""

    def begin_piece(self) -> None:
        self.state, self.left_s = "waiting", self.random.uniform(0.2, 1.8) * self.load.piece_s

    def begin_operation(self) -> None:
        longest = self.random.uniform(0.05, 1.0) * self.load.operation_s
        self.state, self.operation_s = "computing", min(self.left_s, longest)


@dataclass
class Simulation:
    """Streams on a machine with one core a slot: whoever computes beyond that slows all down."""

    loads: dict[str, Load]
    slots: int = 1
    seed: int = 0
    computed_s: Counter[str] = field(default_factory=Counter)
    now: float = 0.0

    def __post_init__(self) -> None:
        random = Random(self.seed)
        self.queue = FairQueue(self.slots)
        self.streams = [
            _Stream(name, load, random, left_s=random.uniform(0, load.think_s))
            for name, load in self.loads.items()
            for _ in range(load.streams)
        ]

    def run(self, seconds: float) -> None:
        """Step from event to event."""
        end = self.now + seconds
        while self.now < end:
            for ticket in self.queue.grant(self.now):
                assert isinstance(ticket, _Stream)
                ticket.begin_operation()
            computing = [one for one in self.streams if one.state == "computing"]
            assert len(computing) <= 2 * self.slots
            thinking = [one for one in self.streams if one.state == "thinking"]

            speed = min(1.0, self.slots / max(1, len(computing)))
            step_s = min(
                [
                    *(one.left_s for one in thinking),
                    *(one.operation_s / speed for one in computing),
                    self.queue.due(self.now)[1] + 1e-9,
                ]
            )
            self.now += step_s
            for one in computing:
                self.computed_s[one.tenant] += step_s * speed
                one.operation_s -= step_s * speed
                one.left_s -= step_s * speed
            for one in thinking:
                one.left_s -= step_s
            for one in (*computing, *thinking):
                self._turn(one)

    def _turn(self, stream: _Stream) -> None:
        """What a stream does at the end of an operation, of a piece, of thinking."""
        if stream.state == "thinking":
            if stream.left_s <= 1e-9:
                stream.begin_piece()
                self.queue.wait(stream.tenant, stream.load.weight, stream, self.now)
        elif stream.operation_s <= 1e-9:
            if stream.left_s <= 1e-9:
                self.queue.release(stream, self.now)
                stream.state, stream.left_s = "thinking", stream.load.think_s
                if not stream.load.think_s:
                    self._turn(stream)
            elif self.queue.computing[stream].asked_back:
                self.queue.release(stream, self.now)
                stream.state = "waiting"
                self.queue.wait(stream.tenant, stream.load.weight, stream, self.now)
            else:
                stream.begin_operation()


@st.composite
def hungry_loads(draw: st.DrawFn) -> tuple[int, dict[str, Load]]:
    """Slots, and tenants that always want more: pieces and operations of any length."""
    slots = draw(st.integers(1, 2))
    loads = {}
    for name in "abc"[: draw(st.integers(2, 3))]:
        # A tenant that is to get all slots needs as many streams.
        loads[name] = Load(
            weight=draw(st.sampled_from([1.0, 2.0, 7.0])),
            streams=draw(st.integers(slots, 5)),
            piece_s=draw(st.sampled_from([0.01, 0.05, 5.0])),
            operation_s=draw(st.sampled_from([0.01, 0.03, 0.1])),
        )
    return slots, loads


@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(hungry_loads(), st.integers(0, 1000))
def test_slots_are_shared_by_weight_whoever_asks_more(
    case: tuple[int, dict[str, Load]], seed: int
) -> None:
    """Every tenant that wants it gets its weight's share of the compute, within a tenth, however
    many streams it opens and however long its passes and their operations are."""
    slots, loads = case
    weights = sum(load.weight for load in loads.values())
    lightest = min(load.weight for load in loads.values())
    simulation = Simulation(loads, slots, seed)
    simulation.run(seconds := 2.0 * weights / lightest / slots)
    for name, load in loads.items():
        share = simulation.computed_s[name] / (seconds * slots)
        assert abs(share * weights / load.weight - 1) < 0.1, (name, share)


@pytest.mark.parametrize("operation_s", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_a_tenant_with_short_exchanges_is_not_held_up(
    weight: float, streams: int, operation_s: float
) -> None:
    """Beside passes without an exchange, a tenant of equal weight that computes and thinks in
    turns keeps over half of what it computes alone, however long one operation takes; a heavier
    one nearly what a core shared with that operation leaves."""
    honest = Load(weight=weight, streams=1, piece_s=0.002, operation_s=1.0, think_s=0.002)
    greedy = Load(weight=1.0, streams=streams, piece_s=10.0, operation_s=operation_s)
    alone, beside = Simulation({"honest": honest}), Simulation({"honest": honest, "greedy": greedy})
    alone.run(2.0)
    beside.run(2.0)
    kept = beside.computed_s["honest"] / alone.computed_s["honest"]
    assert kept > (0.6 if weight > 1 else 0.5), kept


def test_a_pause_saves_nothing_up() -> None:
    """A tenant that comes back after a minute gets its half, not the minute that it had not asked
    for."""
    queue, first, second = FairQueue(1), object(), object()
    queue.wait("steady", 1.0, first, 0.0)
    assert queue.grant(0.0) == [first]
    queue.wait("back", 1.0, second, 60.0)
    assert queue.grant(60.0) == [second] and queue.computing[first].asked_back
    queue.release(first, 60.0)

    queue.wait("steady", 1.0, first, 60.0)
    assert queue.grant(60.04) == [] and queue.grant(60.06) == [first]
    assert queue.computing[second].asked_back


def test_streams_of_one_tenant_take_turns() -> None:
    """A long pass of a tenant does not keep the tenant's other streams waiting to its end; they
    begin when it has given way, not beside it."""
    queue, first, second = FairQueue(1), object(), object()
    queue.wait("one", 1.0, first, 0.0)
    queue.grant(0.0)
    queue.wait("one", 1.0, second, 0.0)
    assert queue.grant(0.001) == [] and not queue.computing[first].asked_back
    wait_s = queue.due(0.001)[1]
    assert queue.grant(0.001 + wait_s) == [] and queue.computing[first].asked_back
    queue.release(first, 0.03)
    queue.wait("one", 1.0, first, 0.03)
    assert queue.grant(0.03) == [second]


# ----------------------------------------------------------------------------- on a real server


class _Watch:
    """Counts linears as the cloud's workers run them, forward and backward, and may stop one."""

    def __init__(self, cloud: CloudModel) -> None:
        self.ran: list[str] = []  # the thread of each
        self.stop_at: Callable[[int], None] = lambda count: None
        self.hooks = [
            cloud.model.get_submodule(module.name).register_forward_hook(self._forward)
            for site in cloud.sites
            for module in site.modules
        ]

    def _forward(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self._count()
        if output.requires_grad:
            output.register_hook(lambda grad: self._count())

    def _count(self) -> None:
        self.ran.append(threading.current_thread().name)
        self.stop_at(len(self.ran))


@pytest.fixture
def watch(cloud_models: Callable[[str], CloudModel]) -> Iterator[_Watch]:
    """Counts on the tiny llama: 3 layers of 7 linears."""
    found = _Watch(cloud_models("llama"))
    yield found
    for hook in found.hooks:
        hook.remove()


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def _with_adapters_in(layer: int, link: GrpcLink) -> SplitModel:
    """A split model with one layer's adapters alone: the rest is one piece."""
    split = make_split(link, lora(layers_to_transform=[layer]))
    split.set_options(retry=dlora.RetryPolicy(give_up_after_s=0.0))
    return split


@pytest.mark.parametrize("at", [5, 25])
def test_nothing_is_computed_for_a_closed_stream(
    watch: _Watch, cloud_models: Callable[[str], CloudModel], tmp_path: Path, at: int
) -> None:
    """A pass whose edge hangs up, in its forward or its backward, stops within a few linears,
    although no exchange is due for many."""
    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = _with_adapters_in(0, link)
        service = server._service

        def hang_up(count: int) -> None:
            if count == at:
                (pipe,) = service.pipes
                link.close()
                _wait_for(lambda: pipe.closed)

        watch.ran.clear()
        watch.stop_at = hang_up
        with pytest.raises(DLoRAError):
            split(**batches()[0]).loss.backward()
        _wait_for(lambda: not service.pipes and service.slots.free == 1)
    # q, k and v read one tensor: they breathe together in backward.
    assert at <= len(watch.ran) <= at + 3


def test_a_long_pass_lets_others_compute(
    watch: _Watch, cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """A stream that is asked back gives way between two exchanges, and its result is the same
    bits as without."""
    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        links = [dlora.connect(server.address, cache=tmp_path) for _ in range(2)]
        long, short = _with_adapters_in(0, links[0]), _with_adapters_in(2, links[1])
        want = long(**batches()[0]).loss
        slots = server._service.slots

        threads = []

        def other(count: int) -> None:
            if count == 8:  # the long pass, in its second layer
                watch.stop_at = lambda count: None
                thread = threading.Thread(target=lambda: short(**batches()[0]).loss.backward())
                threads.append(thread)
                thread.start()
                _wait_for(lambda: slots._queue.computing and slots.queue_length)
                _wait_for(lambda: any(p.asked_back for p in slots._queue.computing.values()))

        watch.ran.clear()
        watch.stop_at = other
        assert torch.equal(long(**batches()[0]).loss, want)
        # Of the long pass 21 linears ran, and before its last one some of the other.
        first = watch.ran[0]
        places = [place for place, name in enumerate(watch.ran) if name == first][:21]
        assert len(places) == 21 and places[-1] > 20
        for thread in threads:
            thread.join(20)
        for link in links:
            link.close()
