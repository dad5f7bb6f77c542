"""SIGKILL of the server in every phase of a step: the run's adapter is that of the run without
faults.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_base

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.link import RetryPolicy
from dlora.edge.noise import Noise
from dlora.embedded import InProcessLink
from dlora.errors import PeerLost
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.proto import dlora_pb2 as pb


class Mortal:
    """A server process that can be killed and comes back on the same port."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            str(Path(__file__).with_name("mortal_server.py")),
            str(folder),
            str(self.port),
            *words,
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self.next_life()

    def next_life(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.pid = self.next_life()

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def mortal(model_folder: Path) -> Iterator[Mortal]:
    """The server of this file's tests."""
    server = Mortal(model_folder)
    yield server
    server.end()


class FaultyLink:
    """A real link that calls `fault` once in each micro-batch of `plan`.

    `plan` maps the number of a micro-batch to (operation, count): "open", "send" or "receive",
    and how many of those come first. `number` is set by who trains. `passed` tells which frames
    had gone by.
    """

    drops_arrived = False
    """A fault before a frame is read takes all that has come by then with it."""

    def __init__(
        self, link: Any, plan: dict[int, tuple[str, int]], fault: Callable[[], None]
    ) -> None:
        self.link, self.plan, self.fault = link, dict(plan), fault
        self.description, self.address = link.description, link.address
        self.number = 0
        self.passed: dict[int, str] = {}

    def edge_files(self) -> Path:
        return self.link.edge_files()

    def open(self) -> Any:
        where = self.plan.pop(self.number, None)
        if where == ("open", 0):
            self.passed[self.number] = ""
            self.fault()
        return _FaultyStream(self.link.open(), where, self)

    def close(self) -> None:
        self.link.close()


class _FaultyStream:
    def __init__(self, stream: Any, where: tuple[str, int] | None, owner: FaultyLink) -> None:
        self.stream, self.where, self.owner = stream, where, owner
        self.counts = {"send": 0, "receive": 0}
        self.kinds: list[str] = []

    def _step(self, operation: str) -> bool:
        """Whether the fault came."""
        is_here = self.where == (operation, self.counts[operation])
        if is_here:
            runs = ((kind, len(list(run))) for kind, run in groupby(self.kinds))
            told = " ".join(f"{count} {kind}" if count > 1 else kind for kind, count in runs)
            self.owner.passed[self.owner.number] = told
            self.owner.fault()
        self.counts[operation] += 1
        return is_here

    def send(self, frame: pb.EdgeFrame) -> None:
        self._step("send")
        self.stream.send(frame)
        self.kinds.append(str(frame.WhichOneof("kind")))

    def receive(self) -> pb.CloudFrame:
        is_here = self._step("receive")
        while is_here and self.owner.drops_arrived:  # until the stream says that it is lost
            self.stream.receive()
        frame = self.stream.receive()
        self.kinds.append(str(frame.WhichOneof("kind")))
        return frame

    def close(self) -> None:
        self.stream.close()


def run(
    link: Any, cache: Path, wire: Any = "plain", count: int = 6
) -> tuple[list[torch.Tensor], dlora.SplitModel]:
    """Train so many micro-batches with LoRA dropout; two make an optimizer step."""
    torch.manual_seed(1)
    retry = RetryPolicy(give_up_after_s=60.0, first_delay_s=0.02, longest_delay_s=0.2)
    options = {"wire": wire, "wire_dtype": "fp32", "upload_consent": wire == "hosted"}
    split = dlora.get_peft_model(link, lora(lora_dropout=0.3), retry=retry, **options)
    optimizer = torch.optim.AdamW(adapter(split).values(), lr=1e-2)
    torch.manual_seed(2)
    for number, batch in enumerate(batches(count)):
        if isinstance(link, FaultyLink):
            link.number = number
        split(**batch).loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in adapter(split).values()], split


# 3 sites: forward sends 1 + 3 frames and receives 3 + 1, backward sends 1 + 2 and receives 3 + 1.
PHASES = {
    0: ("open", 0),  # between two steps
    1: ("send", 2),  # in forward, with an answer under way
    2: ("receive", 3),  # before the last hidden states
    3: ("send", 4),  # after the loss, before backward
    4: ("receive", 5),  # in the middle of backward
    5: ("receive", 7),  # all gradients are there, the last word is not
}


# Where these are: the frames before the fault, which the server's answers are behind.
_FORWARD = "begin input deltas input deltas input deltas"
PASSED = [
    "",
    "begin input deltas input",
    _FORWARD,
    f"{_FORWARD} hidden",
    f"{_FORWARD} hidden hidden_grad delta_grads input_grad",
    f"{_FORWARD} hidden hidden_grad delta_grads input_grad delta_grads input_grad delta_grads",
]


# Hosted the adapter goes in eight frames behind the first, and gradients of it come in four before
# the last word, which has the rest. From the second step on the second micro-batch refers to an
# adapter that the server has kept, which a kill takes away.
_SENT = "begin 8 modules"
HOSTED_PHASES = {
    0: (("send", 1), "begin"),  # before the adapter's frames
    1: (("send", 5), "begin 4 modules"),  # between them
    2: (("receive", 0), _SENT),  # before the last hidden states
    3: (("open", 0), ""),  # between two micro-batches
    4: (("send", 9), f"{_SENT} hidden"),  # after the loss, before its gradient goes
    5: (("receive", 1), "begin hidden hidden_grad"),  # when it has gone, of a kept adapter
    6: (("receive", 5), f"{_SENT} hidden hidden_grad 4 module_grads"),  # before the last word
    7: (("receive", 5), "begin hidden hidden_grad 4 module_grads"),  # the same, of a kept adapter
}


@pytest.mark.parametrize(
    ("wire", "phases"),
    [
        ("plain", dict(enumerate(zip(PHASES.values(), PASSED, strict=True)))),
        ("hosted", HOSTED_PHASES),
    ],
)
def test_server_killed_in_every_phase(
    mortal: Mortal, tmp_path: Path, wire: str, phases: dict[int, tuple[tuple[str, int], str]]
) -> None:
    """A kill in each phase costs no step and changes no bit, dropout and accumulation included."""
    link = dlora.connect(f"127.0.0.1:{mortal.port}", cache=tmp_path)
    want, calm = run(link, tmp_path, wire, len(phases))
    faulty = FaultyLink(link, {number: where for number, (where, _) in phases.items()}, mortal.kill)
    faulty.drops_arrived = True
    got, shaken = run(faulty, tmp_path, wire, len(phases))
    link.close()
    assert faulty.passed == {number: passed for number, (_, passed) in phases.items()}
    assert calm.meter.retries == 0
    # Between two micro-batches nothing may be lost.
    assert shaken.meter.retries >= len(phases) - 1
    assert shaken.meter.micro_batches == calm.meter.micro_batches == len(phases)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


@pytest.mark.parametrize("wire", ["plain", "factored"])
@pytest.mark.parametrize("policy", ["output", "gradient", "kr"])
def test_a_micro_batch_that_ran_twice_is_measured_once(
    cloud_models: Callable[[str], CloudModel], policy: Any, wire: Any
) -> None:
    """With a stream lost in each phase, the sums that Kill and Revive decides by are those of an
    unbroken run, bit for bit.
    """
    options = KillReviveConfig(policy=policy, warmup=0.9, revive="scored", interval=1, budget=0.5)

    def lose() -> None:
        raise PeerLost("the stream is gone")

    def measured(link: Any) -> tuple[dict[str, Any], int]:
        torch.manual_seed(1)
        retry = RetryPolicy(sleep=lambda _: None)
        split = dlora.get_peft_model(
            link, lora(lora_dropout=0.3), wire=wire, wire_dtype="fp32", retry=retry
        )
        reviver = KillAndRevive(split, options, total_steps=100)
        torch.manual_seed(2)
        for number, batch in enumerate(batches(6)):
            if isinstance(link, FaultyLink):
                link.number = number
            if number % 2 == 0:
                reviver.before_step(number // 2)
                split.probe_modules = split.adapted_modules
            split(**batch).loss.backward()
            if number % 2:
                reviver.before_update(None)
                split.zero_grad()
        return reviver.state_dict(), split.meter.retries

    link = InProcessLink(cloud_models("llama"))
    want, _ = measured(link)
    faulty = FaultyLink(link, PHASES, lose)
    got, retries = measured(faulty)
    link.close()
    assert not faulty.plan and retries == len(PHASES), "every fault must have happened"
    assert got == want
    assert bool(got["outputs"]) == (policy == "output")
    assert len(got["probes"]) == 2 and all(got["squares"].values())


# A pass sends 1 + 3 frames and receives 3 + 1; hosted one each, behind the adapter's eight.
IN_AN_ANSWER = {
    "plain": {0: ("receive", 2), 1: ("send", 4 * 5), 2: ("receive", 4 * 4 + 2)},
    "hosted": {0: ("send", 4), 1: ("send", 1 + 8 + 4), 2: ("receive", 4)},
}


@pytest.mark.parametrize(
    ("wire", "options"),
    [
        ("plain", {"do_sample": False}),
        ("plain", {"do_sample": True, "top_k": 50}),
        ("hosted", {"do_sample": True, "top_k": 50}),
    ],
)
def test_server_killed_in_an_answer(
    mortal: Mortal, tmp_path: Path, wire: Any, options: dict[str, Any]
) -> None:
    """Kills in prefill, between two tokens and within one leave the tokens of an unbroken run,
    sampled ones too.
    """
    link = dlora.connect(f"127.0.0.1:{mortal.port}", cache=tmp_path)
    retry = RetryPolicy(give_up_after_s=60.0, first_delay_s=0.02, longest_delay_s=0.2)
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def answer(link: Any) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(1)
        how: Any = {"wire": wire, "wire_dtype": "fp32", "upload_consent": wire == "hosted"}
        split = dlora.get_peft_model(link, lora(), retry=retry, **how).eval()
        torch.manual_seed(2)
        return split.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, **options
        ), split

    want, _ = answer(link)

    class Counting(FaultyLink):  # each new stream is the next "micro-batch"
        def open(self) -> Any:
            stream = super().open()
            self.number += 1
            return stream

    faulty = Counting(link, IN_AN_ANSWER[wire], mortal.kill)
    got, shaken = answer(faulty)
    link.close()
    assert not faulty.plan, "every fault must have happened"
    assert shaken.meter.retries >= 3
    assert torch.equal(got, want)


def test_server_that_stays_away_is_given_up(mortal: Mortal, tmp_path: Path) -> None:
    """After the patience is used up the edge says so, and how long it tried."""
    link = dlora.connect(f"127.0.0.1:{mortal.port}", cache=tmp_path)
    clock = iter(range(0, 1000, 7))
    retry = RetryPolicy(
        give_up_after_s=20.0, sleep=lambda _: None, clock=lambda: float(next(clock))
    )
    split = dlora.get_peft_model(link, lora(), wire_dtype="fp32", retry=retry)
    link.close()  # the channel is closed for good: every attempt fails

    class Gone:
        description, address = link.description, link.address

        def open(self) -> Any:
            raise PeerLost("nobody there")

    split.link = Gone()
    with pytest.raises(
        PeerLost, match=r"nobody there \(gave up after \d+ s; nothing saved so far is lost\)"
    ):
        split(**batches()[0])


def test_retry_delays_double_and_keep_to_the_hint() -> None:
    """Pauses grow with jitter up to the longest, and never undercut the cloud's own hint."""
    pauses: list[float] = []
    policy = RetryPolicy(
        first_delay_s=1.0, longest_delay_s=4.0, sleep=pauses.append, clock=lambda: 0.0
    )
    for number, wait in enumerate(policy.attempts()):
        if number == 5:
            break
        wait(PeerLost("busy", retry_after_s=9.0 if number == 4 else None))
    for pause, longest in zip(pauses[:4], (1, 2, 4, 4), strict=True):
        assert longest / 2 <= pause <= longest
    assert pauses[4] == 9.0


# ----------------------------------------------------------------- a server that stays away


def _lose() -> None:
    raise PeerLost("the stream is gone")


class AwayLink(FaultyLink):
    """A real link that is lost as planned, and at the next attempts too.

    The first of these fails at once, the second in the middle of forward, the third at once.
    """

    def __init__(self, link: Any, plan: dict[int, tuple[str, int]]) -> None:
        super().__init__(link, plan, self._go)
        self.put_adapter, self.layer_files = link.put_adapter, link.layer_files
        self.attempts: list[tuple[str, int]] = []
        self.lost = 0

    def _go(self) -> None:
        self.lost += 1
        if not self.attempts:
            self.attempts = [("open", 0), ("receive", 2), ("open", 0)]
        _lose()

    def open(self) -> Any:
        if not self.attempts:
            return super().open()
        where = self.attempts.pop(0)
        if where == ("open", 0):
            self.lost += 1
            _lose()
        stream = _FaultyStream(self.link.open(), where, self)
        self.fault = self._again
        return stream

    def _again(self) -> None:
        self.fault = self._go
        self.lost += 1
        _lose()


# What is random on the edge, or rounds otherwise than by default.
RANDOM: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA dropout": (lora(lora_dropout=0.3), {}),
    "LoRA dropout, factored": (lora(lora_dropout=0.3), {"wire": "factored"}),
    "LoRA dropout, hosted": (lora(lora_dropout=0.3), {"wire": "hosted", "upload_consent": True}),
    "bottleneck dropout": (
        BottleneckConfig(
            kind="series",
            r=4,
            target_modules=["down_proj"],  # a site of each of the three layers
            lora_dropout=0.3,
            init_lora_weights=False,
        ),
        {},
    ),
    "noise": (lora(lora_dropout=0.3), {"noise": Noise(entry=0.2, tail=0.5)}),
    "hidden lengths": (lora(lora_dropout=0.3), {"hide_lengths": True}),
    "edge layers": (lora(lora_dropout=0.3), {"edge_layers": (1, 1)}),
    "autocast": (lora(lora_dropout=0.3), {}),
}


@pytest.mark.parametrize("what", RANDOM)
def test_a_server_that_stays_away_changes_nothing_random(
    cloud_models: Callable[[str], CloudModel], what: str
) -> None:
    """A server that is lost in forward or backward, and several times more when it is tried again,
    leaves adapter, losses and all random states as in an unbroken run.
    """
    config, options = RANDOM[what]
    cloud = cloud_models("llama")
    if "edge_layers" in options:
        limits = Limits(edge_first=1, edge_last=1)
        cloud = CloudModel(make_base("llama"), model_id="example-org/llama", limits=limits)

    def trained(link: Any) -> tuple[list[torch.Tensor], Any]:
        torch.manual_seed(1)
        random.seed(1)
        retry = RetryPolicy(sleep=lambda _: None)
        split = dlora.get_peft_model(link, config, wire_dtype="fp32", retry=retry, **options)
        optimizer = torch.optim.AdamW(adapter(split).values(), lr=1e-2)
        torch.manual_seed(2)
        found = []
        for number, batch in enumerate(batches(4)):
            if isinstance(link, FaultyLink):
                link.number = number
            with torch.autocast("cpu", enabled=what == "autocast"):
                loss = split(**batch).loss
            loss.backward()
            found.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        python = torch.tensor([hash(random.getstate()) % 2**31])
        found += [parameter.detach() for parameter in adapter(split).values()]
        return [*found, torch.get_rng_state(), python], split.meter

    link = InProcessLink(cloud)
    want, _ = trained(link)
    sites = 1 if "edge_layers" in options else 3  # with as many frames each way, and two ends
    away = AwayLink(link, {0: ("receive", 1), 1: ("receive", sites + 2), 2: ("send", sites + 1)})
    got, meter = trained(away)
    link.close()
    assert not away.plan and meter.retries == away.lost >= 9, "every fault must have happened"
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_an_unbroken_micro_batch_leaves_the_generator_to_other_threads(
    cloud_models: Callable[[str], CloudModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a fault the state of the one generator is never set back, which would let another
    thread draw the same numbers twice.
    """
    link = InProcessLink(cloud_models("llama"))
    split = dlora.get_peft_model(link, lora(lora_dropout=0.3), wire_dtype="fp32")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: pytest.fail("set back"))
    split(**batches()[0]).loss.backward()
    split.eval().generate(input_ids=torch.arange(5, 12)[None], max_new_tokens=2)
    link.close()


def test_a_lost_prompt_draws_the_same_dropout(
    cloud_models: Callable[[str], CloudModel],
) -> None:
    """Where dropout is live in an answer, a stream that is lost in its prompt leaves the tokens
    that an unbroken one samples.
    """

    def answer(link: Any) -> torch.Tensor:
        torch.manual_seed(1)
        retry = RetryPolicy(sleep=lambda _: None)
        split = dlora.get_peft_model(link, lora(lora_dropout=0.3), wire_dtype="fp32", retry=retry)
        torch.manual_seed(2)
        ids = torch.arange(5, 15)[None]
        return split.train().generate(input_ids=ids, max_new_tokens=8, do_sample=True)

    link = InProcessLink(cloud_models("llama"))
    want = answer(link)
    away = AwayLink(link, {0: ("receive", 2)})
    got = answer(away)
    link.close()
    assert away.lost == 4
    assert torch.equal(got, want)


def test_a_server_that_restarts_often_gets_its_modules_each_time(
    cloud_models: Callable[[str], CloudModel],
) -> None:
    """A server that forgets uploaded modules with every restart is given them again as often as
    that happens, in training and in an answer.
    """
    cloud = cloud_models("llama")
    link, store = InProcessLink(cloud), cloud.frozen_store

    class Forgetful(FaultyLink):
        """Loses the next stream at its second reply, and all uploaded modules, `left` times."""

        put_adapter, left = staticmethod(link.put_adapter), 0

        def open(self) -> Any:
            return _FaultyStream(link.open(), ("receive", 1), self)

    def forget() -> None:
        if forgetful.left:
            forgetful.left -= 1
            store.keep_owners(())
            _lose()

    forgetful = Forgetful(link, {}, forget)
    retry = RetryPolicy(sleep=lambda _: None)
    split = dlora.get_peft_model(forgetful, lora(), wire_dtype="fp32", retry=retry)
    split.set_active(split.adapted_modules[:2], "cloud")

    forgetful.left = 6
    split(**batches()[0]).loss.backward()
    assert forgetful.left == 0
    split.eval()
    forgetful.left = 6
    assert split.generate(input_ids=torch.arange(5, 12)[None], max_new_tokens=4).shape[1] > 7
    assert forgetful.left == 0
    link.close()


def test_retry_pauses_leave_the_global_generator_alone() -> None:
    """The jitter of pauses draws nothing from the generator whose state checkpoints keep."""
    before = random.getstate()
    pauses: list[float] = []
    for number, wait in enumerate(RetryPolicy(sleep=pauses.append).attempts()):
        if number == 3:
            break
        wait(PeerLost("gone"))
    assert len(set(pauses)) == 3 and random.getstate() == before


# ----------------------------------------------------------------- faults on the way


def _benchmark(name: str) -> Any:
    """A file of `benchmarks/` as a module."""
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = spec_from_file_location(name, folder / f"{name}.py")
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize(
    "fault",
    [
        "delay of 10 ms with jitter up to 30 ms",
        "cut at a random byte, under TLS",
        "a corrupted byte, under TLS",
        pytest.param("half-open: bytes vanish, the connection stays", marks=pytest.mark.slow),
    ],
)
def test_faults_on_the_way_cost_no_step(fault: str) -> None:
    """Through a relay that injects faults the run ends with the adapter of a run without, bit for
    bit.
    """
    (found,) = _benchmark("faults").run([(fault, "LoRA with dropout", 5)])
    assert found["equal"] and found["injected"] >= 3 and found["micro_batches_lost"] == 0
    assert found["retries"] > 0 or fault.startswith("delay")


@pytest.mark.parametrize(
    ("numbers", "lines", "size"),
    [((60, 0, 0), 1, 1), ((20, 4, 8), 2, 100_000)],
    ids=["round trip", "bandwidth that two connections share"],
)
def test_bytes_take_their_time_on_a_link(
    numbers: tuple[float, float, float], lines: int, size: int
) -> None:
    """What goes through the relay comes unchanged in both directions, and no earlier than its round
    trip time and bandwidths allow.
    """
    there, back = (random.Random(seed).randbytes(size) for seed in (1, 2))
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(30)
        link = _benchmark("relay").link_to(f"127.0.0.1:{server.getsockname()[1]}", *numbers)
        host, _, port = stack.enter_context(link).rpartition(":")
        near, far = [], []
        for _ in range(lines):
            near.append(stack.enter_context(socket.create_connection((host, int(port)), 30)))
            far.append(stack.enter_context(server.accept()[0]))
            far[-1].settimeout(30)

        # All of it is in buffers, of which the relay's are empty: a thread is enough.
        start = time.monotonic()
        for ends, data in ((near, there), (far, back)):
            for end in ends:
                end.sendall(data)
            for end in far if ends is near else near:
                assert stack.enter_context(end.makefile("rb")).read(size) == data
        seconds = time.monotonic() - start

    rtt_ms, *mbits = numbers
    wanted_s = rtt_ms / 1000 + sum(8 * size * lines / (1e6 * mbit) for mbit in mbits if mbit)
    assert seconds > wanted_s - 0.001  # a timer may be early by its resolution


def test_faults_in_the_server_cost_no_step() -> None:
    """A server that is killed three times in a step, or away for several attempts, leaves Kill and
    Revive, its decisions included, and an answer as in a run without faults.
    """
    module = _benchmark("faults")
    revived, answers = "Kill and Revive, idle modules in the cloud", "sampled answers"
    found = module.run(
        [
            (module.AGAIN, answers, 1),
            (module.AGAIN, revived, 3),
            ("the server is away for 0.1 to 2 s", revived, 2),
        ]
    )
    assert all(one["equal"] and one["micro_batches_lost"] == 0 for one in found)
    assert all(one["injected"] for one in found)
    assert found[-1]["retries"] > 2  # away for longer than one attempt


def test_table_of_faults_is_that_of_the_result_file() -> None:
    """The document shows the committed result, and in it every fault left the result as it was."""
    module = _benchmark("faults")
    result = json.loads(module.RESULT.read_text())
    runs = result["runs"]
    assert module.table(result) in (Path(__file__).parents[1] / "docs/security.md").read_text()
    assert [(one["fault"], one["work"]) for one in runs] == [case[:2] for case in module.cases()]
    assert len({one["fault"] for one in runs}) >= 10
    assert sum(one["injected"] for one in runs) >= 300
    assert all(
        one["equal"] and one["injected"] > 0 and one["micro_batches_lost"] == 0 for one in runs
    )
