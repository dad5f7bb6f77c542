"""Parts of a micro-batch in flight: the same gradients, in the same bits whatever comes first, and
nothing left behind.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, lora, make_base, make_local, make_split
from helpers import assert_same_grads, same
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cli.values import convert
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.choose_parts import CHOICES, best_parts, choose_parts, on_one_machine, stations
from dlora.edge.in_flight import split
from dlora.edge.link import RetryPolicy
from dlora.edge.lora import delta
from dlora.edge.meter import Meter
from dlora.edge.noise import Noise
from dlora.edge.options import InFlight
from dlora.edge.passes import PassInput
from dlora.embedded import InProcessLink
from dlora.errors import PeerError, PeerLost, UsageError
from dlora.formulas import seconds_in_flight
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.proto import dlora_pb2 as pb
from dlora.server.server import Server, ServerOptions
from dlora.training.plan_settings import PlanSettings
from dlora.training.planner import check, plan
from dlora.training.run import train
from dlora.training.settings import TrainSettings

Links = Callable[[str], Any]


@pytest.fixture(scope="module")
def relays() -> ModuleType:
    """benchmarks/relay.py, which delays what passes."""
    file = Path(__file__).parents[1] / "benchmarks/relay.py"
    spec = importlib.util.spec_from_file_location("relay", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test no thread of a part goes on."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "dlora-part"]


def grads_of(model: Any, seed: int = 5, **changes: Any) -> list[torch.Tensor]:
    """Gradients of one batch, with this seed of whatever is drawn."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batches(rows=6)[0] | changes).loss.backward()
    return [parameter.grad.clone() for parameter in adapter(model).values()]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """All gradients together differ by at most 1e-5 of their norm."""
    one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (got, want))
    assert (one - other).norm() <= 1e-5 * other.norm()


# ----------------------------------------------------------------- the same results


@pytest.mark.parametrize(
    ("family", "wire", "in_flight"),
    [
        ("llama", "plain", 2),
        ("llama", "factored", 4),
        ("opt", "plain", 4),
        ("bloom", "factored", 2),
    ],
)
def test_gradients_match_local(links: Links, family: str, wire: str, in_flight: int) -> None:
    """Loss and every gradient equal local peft's, with padding and accumulation."""
    local = make_local(family, lora(family))
    split = make_split(links(family), lora(family), wire=wire, in_flight=in_flight)
    for batch in batches(2, rows=5):
        want, got = local(**batch).loss, split(**batch).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        got.backward()
    assert_same_grads(local, split)


def test_one_part_is_the_micro_batch_as_it_was(links: Links) -> None:
    """in_flight=1 gives the bits, and the masks of dropout, of a model that was never told."""
    config = lora(lora_dropout=0.3)
    told, untold = (
        make_split(links("llama"), config, in_flight=1),
        make_split(links("llama"), config),
    )
    assert all(map(torch.equal, grads_of(told), grads_of(untold)))


def test_autocast_reaches_every_part(links: Links) -> None:
    """Under autocast, which is of a thread, the adapters of all parts round as those of one do."""
    found = []
    for in_flight in (1, 3):
        model = make_split(links("llama"), lora(), in_flight=in_flight)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batches(rows=6)[0]).loss
        loss.backward()
        grads = [parameter.grad.flatten() for parameter in adapter(model).values()]
        found.append(torch.cat(grads))
    plain = torch.cat([grad.flatten() for grad in grads_of(make_split(links("llama"), lora()))])
    one, parts = found
    assert (parts - one).norm() < 0.5 * (plain - one).norm()


@pytest.mark.parametrize("split", [(1, 1), (2, 0)])
def test_edge_layers_match_local(split: tuple[int, int]) -> None:
    """Where adapters before the cloud are trained, the parts' input gradients come back in the
    order of the rows.
    """
    limits = Limits(edge_first=split[0], edge_last=split[1])
    link = dlora.in_process(make_base("llama"), model_id="llama", limits=limits)
    local = make_local("llama", lora())
    model = make_split(link, lora(), edge_layers=split, in_flight=3)
    assert_close(grads_of(model), grads_of(local))
    link.close()


def test_passes_without_gradient_match_one_part(links: Links) -> None:
    """Evaluation goes in parts too, left padding and whole logits included, with the values of a
    micro-batch that goes as one.
    """
    models = [make_split(links("llama"), lora(), in_flight=n).eval() for n in (1, 3)]
    batch = batches(rows=5)[0]
    left = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    left["labels"] = batch["input_ids"].masked_fill(left["attention_mask"] == 0, -100)
    with torch.no_grad():
        for one in (batch, left):
            want, got = (model(**one) for model in models)
            assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
            seen = one["attention_mask"].bool()
            torch.testing.assert_close(got.logits[seen], want.logits[seen], rtol=1e-5, atol=1e-5)
    assert models[1].meter.micro_batches == 2


def test_left_padding_with_labels_there_matches_one_part(links: Links) -> None:
    """Where a kept position is padding every row travels, in each part."""
    batch = batches(rows=6)[0]
    mask = batch["attention_mask"].flip(1)
    changes = {"attention_mask": mask, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}
    one, parts = (make_split(links("llama"), lora(), in_flight=n) for n in (1, 3))
    assert_close(grads_of(parts, **changes), grads_of(one, **changes))


@pytest.mark.parametrize("options", [{"noise": Noise(entry=0.1, tail=0.3)}, {"hide_lengths": True}])
def test_noise_and_hidden_lengths_are_of_the_whole(links: Links, options: dict[str, Any]) -> None:
    """Noise follows the median of the micro-batch, and padding is filled from all of its rows: the
    same numbers come out in parts.
    """
    one, parts = (make_split(links("llama"), lora(), in_flight=n, **options) for n in (1, 3))
    assert_close(grads_of(parts), grads_of(one))


def test_counters_are_those_of_one_part(links: Links) -> None:
    """Tokens, micro-batches and FLOPs are counted once, bytes differ by frames, round trips are
    each part's, and no second is waited for twice.
    """
    one, parts = (make_split(links("llama"), lora(), in_flight=n) for n in (1, 3))
    grads_of(one)
    start = time.perf_counter()
    grads_of(parts)
    seconds = time.perf_counter() - start
    want, got = one.meter, parts.meter
    for name in ("tokens", "micro_batches", "adapter_flops", "head_flops", "retries"):
        assert getattr(got, name) == getattr(want, name), name
    assert got.round_trips == 3 * want.round_trips
    assert got.sent_bytes == pytest.approx(want.sent_bytes, rel=0.1)
    assert 0 <= got.cloud_s <= got.wait_s < seconds
    assert len(parts.waits) == len(one.waits)


# ----------------------------------------------------------------- the same bits


def test_dropout_repeats_under_any_delay(
    cloud_models: Callable[[str], CloudModel], relays: ModuleType, tmp_path: Path
) -> None:
    """The same seed gives the same bits whichever part comes first; another seed, or another number
    of parts, draws other masks.
    """
    config = lora(lora_dropout=0.3)
    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        relay = relays.Relay(("127.0.0.1", server.port), jitter_s=0.01)
        near = dlora.connect(server.address, cache=tmp_path)
        far = dlora.connect(relay.address, cache=tmp_path)
        first = grads_of(make_split(near, config, in_flight=4))
        again = grads_of(make_split(far, config, in_flight=4))
        assert all(map(torch.equal, first, again))
        assert not any(map(torch.equal, first, grads_of(make_split(near, config, in_flight=4), 6)))
        assert not any(map(torch.equal, first, grads_of(make_split(near, config, in_flight=2))))
        for link in (near, far):
            link.close()
        relay.close()


def test_masks_of_a_part_have_dropouts_distribution(links: Links) -> None:
    """A share p of the inputs is dropped, the others grow by 1 / (1 - p); the process's own
    generator is left alone, and outside training nothing is dropped.
    """
    model = make_split(links("llama"), lora(lora_dropout=0.25))
    layer = model.sites[0].layers[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(4, 64))
        layer.lora_B["default"].weight.copy_(torch.eye(64, 4) / layer.scaling["default"])
    before, x = torch.get_rng_state(), torch.ones(5000, 64)
    values = delta(layer, x, torch.Generator().manual_seed(1))[:, :4]
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (values == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    assert delta(layer, x, torch.Generator())[:, :4].unique().tolist() == [1.0]


class Losing:
    """A link that loses one stream, by its number, at its `count`-th frame up or down."""

    def __init__(self, link: Any, number: int, operation: str, count: int) -> None:
        self.link, self.number = link, number
        self.operation, self.left = operation, count
        self.description, self.address = link.description, link.address
        self.opened = 0
        self.lock = threading.Lock()

    def edge_files(self) -> Path:
        return self.link.edge_files()

    def put_adapter(self, modules: Any) -> None:
        self.link.put_adapter(modules)

    def open(self) -> Any:
        with self.lock:
            self.opened += 1
            return _LosingStream(self.link.open(), self, self.opened == self.number)


class _LosingStream:
    def __init__(self, stream: Any, owner: Losing, loses: bool) -> None:
        self.stream, self.owner, self.loses = stream, owner, loses

    def _step(self, operation: str) -> None:
        if self.loses and operation == self.owner.operation:
            self.owner.left -= 1
            if self.owner.left < 0:
                self.loses = False
                self.stream.close()
                raise self.lost()

    def lost(self) -> Exception:
        return PeerLost("the stream is gone")

    def send(self, frame: pb.EdgeFrame) -> None:
        self._step("send")
        self.stream.send(frame)

    def receive(self) -> pb.CloudFrame:
        self._step("receive")
        return self.stream.receive()

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize(
    ("operation", "count"), [("send", 0), ("receive", 1), ("receive", 3), ("send", 4), ("send", 5)]
)
def test_a_lost_part_runs_again_alone(
    cloud_models: Callable[[str], CloudModel], operation: str, count: int
) -> None:
    """A part that is lost in any phase draws its own masks again and costs one stream more; sums of
    squares count it once.
    """
    link = InProcessLink(cloud_models("llama"))
    retry = RetryPolicy(sleep=lambda _: None)

    def run(link: Any) -> tuple[list[torch.Tensor], Any]:
        model = make_split(link, lora(lora_dropout=0.3), in_flight=3, retry=retry)
        model.output_squares = {}
        return grads_of(model), model

    want, calm = run(link)
    losing = Losing(link, 2, operation, count)
    got, shaken = run(losing)
    assert all(map(torch.equal, got, want))
    assert (losing.opened, shaken.meter.retries, calm.meter.retries) == (4, 1, 0)
    assert shaken.meter.micro_batches == calm.meter.micro_batches == 1
    assert shaken.output_squares == calm.output_squares != {}
    link.close()


def test_a_connection_that_breaks_loses_no_bit(
    cloud_models: Callable[[str], CloudModel], relays: ModuleType, tmp_path: Path
) -> None:
    """Where all parts are lost together, half-way through forward or backward, all run again."""
    retry = RetryPolicy(first_delay_s=0.02, longest_delay_s=0.1)
    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        relay = relays.Relay(("127.0.0.1", server.port))
        link = dlora.connect(relay.address, cache=tmp_path)
        model = make_split(link, lora(lora_dropout=0.3), in_flight=3, retry=retry)
        want = grads_of(model)
        for after in (20_000, 70_000):
            relay.arm("cut", after, "up")
            assert all(map(torch.equal, grads_of(model), want))
        assert relay.injected == 2 and model.meter.retries >= 2
        link.close()
        relay.close()


# ----------------------------------------------------------------- what goes wrong


class _Refusing(_LosingStream):
    def lost(self) -> Exception:
        return PeerError("no, and never")


@pytest.mark.parametrize("count", [1, 5])
def test_an_error_of_one_part_ends_all(
    links: Links, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """What one part raises is raised, in forward and in backward; the others are stopped, without
    being counted as lost, and their streams are over.
    """
    monkeypatch.setattr(sys.modules[__name__], "_LosingStream", _Refusing)
    losing = Losing(links("llama"), 2, "receive", count)
    model = make_split(losing, lora(), in_flight=3)
    with pytest.raises(PeerError, match="no, and never"):
        grads_of(model)
    assert model.meter.retries == 0 and model.meter.micro_batches == 0
    assert all(parameter.grad is None for parameter in adapter(model).values())


def test_a_server_with_one_stream_lowers_the_number(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts that find no place do not wait for each other: there are fewer from then on, said once,
    and the step is not lost.
    """
    retry = RetryPolicy(sleep=lambda _: time.sleep(0.05))
    options = ServerOptions(max_streams=1, drain_s=0.0)
    with Server(cloud_models("llama"), options=options) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        model = make_split(link, lora(), in_flight=4, retry=retry)
        changed = []
        model.part_count.changed = lambda: changed.append(model.part_count.number)
        with caplog.at_level(logging.WARNING, "dlora.edge.in_flight"):
            got = [grads_of(model) for _ in range(2)]
        link.close()
    local = make_local("llama", lora())
    assert_close(got[0], grads_of(local))
    assert_close(got[1], got[0])
    told = [one for one in caplog.records if one.name == "dlora.edge.in_flight"]
    assert changed == [1] and len(told) == 1
    assert "lowered from 4 to 1" in caplog.text
    assert model.part_count.why.startswith("lowered from 4: ")
    assert model.meter.micro_batches == 2


def test_numbers_that_cannot_be_are_refused(links: Links) -> None:
    """No number under 1, no other word, and no parts on the hosted wire, which has few waits."""
    for in_flight in (0, -2, "many"):
        with pytest.raises(UsageError, match="in_flight"):
            make_split(links("llama"), lora(), in_flight=in_flight)
    with pytest.raises(UsageError, match="in_flight: got 2 with wire=hosted"):
        make_split(links("llama"), lora(), wire="hosted", upload_consent=True, in_flight=2)
    with pytest.raises(UsageError, match="record keeps whole micro-batches"):
        TrainSettings(server="a:1", data="x", output=Path("x"), record=1, in_flight=2)


# ----------------------------------------------------------------- Kill and Revive


def test_idle_modules_are_put_once(cloud_models: Callable[[str], CloudModel]) -> None:
    """Frozen modules that no part finds in the cloud travel once, and results are those of one
    part.
    """
    link = dlora.in_process(make_base("llama"), model_id="llama")
    put: list[int] = []
    original = link.put_adapter

    def slowly(modules: Any) -> None:
        put.append(len(modules))
        time.sleep(0.2)  # meanwhile the other parts miss them too
        original(modules)

    link.put_adapter = slowly
    found = []
    for in_flight in (3, 1):
        model = make_split(link, lora(), in_flight=in_flight)
        model.set_active(model.sites[0].names, idle="cloud")
        found.append(grads_of_active(model))
    assert_close(*found)
    assert len(put) == 1
    link.close()


def grads_of_active(model: Any) -> list[torch.Tensor]:
    """Gradients of the modules that are trained."""
    model(**batches(rows=6)[0]).loss.backward()
    return [p.grad for p in adapter(model).values() if p.grad is not None]


def test_measures_are_those_of_one_part(links: Links) -> None:
    """Probe norms are of sums over all rows, so what is probed goes as one; sums of squared deltas
    add up over parts.
    """
    models = [make_split(links("llama"), lora(), in_flight=n) for n in (1, 3)]
    for model in models:
        model.output_squares = {}
        grads_of(model)
        model.probe_modules = model.adapted_modules
        grads_of(model)
    one, parts = models
    assert parts.probe_norms == one.probe_norms != []
    assert parts.output_squares == pytest.approx(one.output_squares, rel=1e-5)


@pytest.mark.parametrize("idle", ["drop", "cloud"])
def test_kill_and_revive_decides_the_same(links: Links, idle: Any) -> None:
    """A run whose modules change has the same active set in parts, and a finite loss."""
    config = KillReviveConfig(interval=1, budget=0.5, idle=idle, warmup=0.2)
    active = []
    for in_flight in (1, 2):
        model = make_split(links("llama"), lora(), in_flight=in_flight)
        optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-3)
        reviver = KillAndRevive(model, config, total_steps=5)
        for step, batch in enumerate(batches(5, rows=4)):
            reviver.before_step(step)
            model(**batch).loss.backward()
            reviver.before_update(None)
            optimizer.step()
            optimizer.zero_grad()
        active.append(sorted(reviver.active))
    assert active[0] == active[1] != []


# ----------------------------------------------------------------- how many


def test_rows_are_split_by_their_tokens() -> None:
    """Parts keep the order, have a row each at least, about the same number of tokens, and no
    padding beyond their own longest row.
    """
    lengths = torch.tensor([9, 1, 1, 1, 6, 2, 2, 2])
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    entry, keep = torch.arange(8 * 12).view(8, 12, 1), torch.zeros(8, 12, dtype=torch.bool)
    keep[:, 0] = True
    whole = PassInput(entry, mask, None, keep)
    parts = split(whole, 2)
    assert [(part.batch, part.length) for part in parts] == [(4, 9), (4, 6)]
    assert torch.equal(torch.cat([part.entry_ND for part in parts]), whole.entry_ND)
    assert [part.batch for part in split(whole, 20)] == [1] * 8
    for count in range(1, 9):
        assert sum(part.batch for part in split(whole, count)) == 8

    keep[3, 11] = True  # padding that is asked for: every row travels
    dense = split(PassInput(entry, mask, None, keep), 3)
    assert all(part.dense and part.length == 12 for part in dense)


def test_prediction_follows_waits_and_work() -> None:
    """One part takes the sum; a second helps where most of the time is waiting, and costs a little
    where none is. Bytes of one direction pass those of the other.
    """
    assert seconds_in_flight(1, 4.0, (2.0, 1.0)) == 7.0
    assert seconds_in_flight(2, 4.0, (2.0, 1.0)) < 6.0
    assert 3.0 < seconds_in_flight(2, 0.0, (3.0,)) < 3.3
    one_line, both_ways = (1.0, 1.0, 8.0), stations(1.0, 1.0, 4.0, 4.0, together=False)
    assert seconds_in_flight(1, 1.0, both_ways) == seconds_in_flight(1, 1.0, one_line)
    assert seconds_in_flight(4, 1.0, both_ways) < 0.8 * seconds_in_flight(4, 1.0, one_line)
    assert best_parts(16, 0.01, (3.0,))[0] == 1
    assert best_parts(16, 5.0, (4.8,))[0] > 1
    assert best_parts(1, 5.0, (4.8,))[0] == 1
    assert best_parts(3, 5.0, (4.8,))[0] == 2


class Far:
    """A link whose round trips take long."""

    address = "cloud.example:50051"

    def ping(self) -> None:
        time.sleep(0.02)


def test_auto_follows_the_link() -> None:
    """Far from the server, where waits are as long as work, there are several parts; with little to
    wait for, or on one machine, there is one.
    """

    def chosen(link: Any, round_trips: int, cloud_s: float) -> int:
        cost = Meter(wait_s=cloud_s, cloud_s=cloud_s, round_trips=round_trips // 2 + 1)
        return choose_parts(link, 16, round_trips, lambda: (cost, 1.5 * cloud_s))[0]

    assert chosen(Far(), 61, 0.4) > 1
    assert chosen(Far(), 3, 10.0) in (2, 4)  # the halves themselves can overlap
    near = Far()
    near.ping = lambda: None  # type: ignore[method-assign]
    near.address = "127.0.0.1:50051"
    assert chosen(near, 61, 0.4) == 1
    assert not on_one_machine(Far(), 0.0001) and not on_one_machine(near, 0.02)  # a tunnel


def test_auto_draws_nothing_and_picks_once(links: Links) -> None:
    """What is measured first leaves random numbers as they were: results are those of the number
    that was picked. Hosted there is nothing to pick.
    """
    config = lora(lora_dropout=0.3)
    model = make_split(links("llama"), config, in_flight="auto")
    with torch.no_grad():
        model(**batches()[0])
    assert model.part_count.number == 0
    got, number = grads_of(model), model.part_count.number
    assert number in CHOICES and "round trip" in model.part_count.why
    assert all(
        map(torch.equal, got, grads_of(make_split(links("llama"), config, in_flight=number)))
    )
    hosted = make_split(
        links("llama"), config, wire="hosted", upload_consent=True, in_flight="auto"
    )
    grads_of(hosted)
    assert hosted.part_count.number == 1


# ----------------------------------------------------------------- commands


def settings(tmp_path: Path, **changes: Any) -> TrainSettings:
    """Six steps with dropout, a checkpoint after every other."""
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"parcel {n * 37 % 91}:", "completion": f" {n % 4}"} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": tmp_path / "run",
        "batch_size": 4,
        "epochs": 1.0,
        "lora_dropout": 0.2,
        "report_to": [],
        "save_steps": 2,
    }
    return TrainSettings(**(values | changes))


@pytest.mark.parametrize("has_run_file", [True, False])
def test_a_resumed_run_takes_the_number_of_the_run(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_run_file: bool,
) -> None:
    """What auto has picked stands in run.json, and in checkpoints where that is gone; a run that is
    resumed picks nothing anew, and ends with the bits of one that was never stopped.
    """
    link = InProcessLink(cloud_models("llama"), tokenizer)
    picked = iter([(2, "as it was"), (4, "another day")])
    monkeypatch.setattr("dlora.edge.cloud_layers.choose_parts", lambda *_: next(picked))
    whole = settings(tmp_path, in_flight="auto")
    assert train(whole, link)["in_flight"] == {"parts": 2, "why": "as it was"}

    # The same run, as if it had been killed after its fourth step.
    stopped = tmp_path / "stopped"
    (tmp_path / "run").rename(stopped)
    run = json.loads((stopped / "run.json").read_text()) | {"status": "running"}
    run["settings"]["output"] = str(stopped)
    (stopped / "run.json").write_text(json.dumps(run))
    if not has_run_file:
        (stopped / "run.json").unlink()
    for file in (stopped / "checkpoints" / "checkpoint-6").glob("*"):
        file.unlink()
    (stopped / "adapter_model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    again = train(settings(tmp_path, output=stopped, in_flight="auto", resume=True), link)
    assert again["in_flight"]["parts"] == 2
    assert same(tmp_path, stopped)
    link.close()


def test_the_flag_takes_a_number_or_auto() -> None:
    """A word of the command line, or a value of YAML, is a number or the one word; the error says
    both.
    """
    assert [convert(value, InFlight) for value in ("auto", "4", 4)] == ["auto", 4, 4]
    with pytest.raises(ValueError, match="got 'some', want a whole number or auto"):
        convert("some", InFlight)


@pytest.mark.parametrize("wire", ["plain", "factored"])
def test_plan_knows_the_bytes_of_parts(links: Links, wire: Any) -> None:
    """Predicted bytes are within 1 % of a real step's in each direction, round trips equal."""
    values = {"wire": wire, "batch_size": 8, "length": 48, "supervised": 7}
    planned = PlanSettings(server="a:1", target_modules="all-linear", in_flight=3, **values)
    model, found = plan(planned, links("llama"))
    cost, _ = check(planned, model)
    assert found.in_flight == 3
    assert found.sent_bytes == pytest.approx(cost.sent_bytes, rel=0.01)
    assert found.received_bytes == pytest.approx(cost.received_bytes, rel=0.01)
    assert found.round_trips == cost.round_trips


def test_what_is_let_go_of_ends_its_streams(cloud_models: Any) -> None:
    """A forward whose loss is thrown away leaves no stream behind, also where nobody collects
    cycles.
    """
    link = InProcessLink(cloud_models("llama"))
    closed: list[int] = []
    opened = link.open

    def watched() -> Any:
        stream = opened()
        close = stream.close
        stream.close = lambda: (closed.append(1), close())[1]
        return stream

    link.open = watched
    model = make_split(link, lora(), in_flight=2)
    gc.collect()
    gc.disable()
    try:
        model(**batches(rows=4)[0])
        assert len(closed) >= 2
    finally:
        gc.enable()
    link.close()
