"""Seconds that are measured, noted and predicted, against delays that the test puts in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, batches, lora, make_base, make_split
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cloud.model import Limits
from dlora.edge.meter import Meter
from dlora.embedded import InProcessLink
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode, encode
from dlora.training.plan_settings import PlanSettings
from dlora.training.planner import plan
from dlora.training.run import train
from dlora.training.settings import TrainSettings

CLOUD_S = 0.08  # of every forward pass in the cloud, behind the last site
LINK_S = 0.03  # of everything that is waited for
EDGE_S = 0.005  # of every LoRA module of rank RANK, on the edge
HEAD_S = 0.02  # of the LM head
LAYER_S = 0.04  # of the first decoder layer, which the edge may run
RANK = 7


class SlowLink:
    """A link to a cloud in this process, over which everything takes LINK_S longer."""

    def __init__(self, link: InProcessLink) -> None:
        self.link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def ping(self) -> None:
        time.sleep(LINK_S)

    def open(self) -> Any:
        stream = self.link.open()
        receive = stream.receive

        def late() -> pb.CloudFrame:
            frame = receive()
            time.sleep(LINK_S)
            return frame

        stream.receive = late  # type: ignore[method-assign]
        return stream


@pytest.fixture(scope="module")
def link(tokenizer: PreTrainedTokenizerFast) -> Iterator[SlowLink]:
    """A slow link to a cloud that takes CLOUD_S for a forward pass."""
    base = make_base("llama")
    made = dlora.in_process(
        base, tokenizer, model_id="example-org/llama", limits=Limits(edge_first=1)
    )
    base.model.norm.register_forward_hook(lambda *_: time.sleep(CLOUD_S))
    yield SlowLink(made)
    made.close()


@pytest.fixture
def slow_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA modules, the LM head and the first decoder layer take their time on the edge."""
    edge, forward = threading.current_thread(), torch.nn.Linear.forward
    delays = {RANK: EDGE_S, VOCAB: HEAD_S, 96: LAYER_S / 2}  # 96: two linears of an MLP

    def slow(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is edge:
            time.sleep(delays.get(self.out_features, 0.0))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", slow)


def test_a_meter_knows_what_was_waited_for_and_what_the_cloud_computed(link: SlowLink) -> None:
    """Seconds of waiting are those of cloud and link together, seconds of the cloud those that it
    computed, in training, in a forward pass alone, and with a KV cache.
    """
    split = make_split(link, lora())
    (batch,) = batches()
    ids = batch["input_ids"][:1, :4]

    def step() -> None:
        split(**batch).loss.backward()

    def look() -> None:
        with torch.no_grad():
            split(**batch)

    def answer() -> None:
        split.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)

    # What is done, passes of the cloud, and round trips: the end of a stream is waited for as well.
    for action, passes, trips in ((step, 1, 7), (look, 1, 4), (answer, 2, 8)):
        before, start = split.meter.copy(), time.perf_counter()
        action()
        seconds, cost = time.perf_counter() - start, split.meter - before
        assert cost.round_trips == trips
        assert passes * CLOUD_S <= cost.cloud_s < cost.wait_s - trips * LINK_S / 2
        assert cost.wait_s <= seconds


def test_a_runs_time_line(link: SlowLink, slow_edge: None, tmp_path: Path) -> None:
    """`micro_batch` of run.json is one gapless line in which edge, link and cloud take turns, each
    for as long as it took, and its sums are those of `cost`.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "the desk", "completion": " of the message"}) + "\n")
    common: dict[str, Any] = {"r": RANK, "batch_size": 1, "max_steps": 1, "report_to": []}
    settings = TrainSettings(server="x", data=str(file), output=tmp_path / "run", **common)
    train(settings, link)
    run = json.loads((tmp_path / "run/run.json").read_text())
    line, cost = run["micro_batch"], run["cost"]

    # Three sites: their inputs and the hidden states come down, then gradients, then the end.
    waits = 3 + 1 + 3 + 1
    names = [name for name, _, _ in line]
    assert names == ["link", "cloud", "link", *["edge", "link", "cloud", "link"] * (waits - 1)]
    starts, ends = ([one[i] for one in line] for i in (1, 2))
    assert starts[0] == 0 and starts[1:] == ends[:-1]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    assert min(lengths) >= 0

    took = {
        who: [s for name, s in zip(names, lengths, strict=True) if name == who]
        for who in ("edge", "cloud", "link")
    }
    near = 1e-6 * len(line)  # every number is rounded
    assert sum(took["cloud"]) == pytest.approx(cost["cloud_s"], abs=near)
    assert sum(took["link"]) == pytest.approx(cost["wait_s"] - cost["cloud_s"], abs=near)
    assert sum(map(sum, took.values())) == pytest.approx(ends[-1], abs=near)

    # Where the delays are: the cloud's behind the third site, the edge's in answers of q and v.
    assert took["cloud"][3] >= CLOUD_S
    assert min(took["link"]) >= LINK_S / 4
    there, back = took["link"][::2], took["link"][1::2]
    assert there == pytest.approx(back, abs=1e-5)
    assert min(took["edge"][:3]) >= 2 * EDGE_S


def a_step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, Meter]:
    """Seconds and cost of the fastest of three steps."""
    found = []
    for _ in range(3):
        before, start = model.meter.copy(), time.perf_counter()
        model(**batch).loss.backward()
        found.append((time.perf_counter() - start, model.meter - before))
    return min(found, key=lambda one: one[0])


@pytest.mark.parametrize("edge_first", [0, 1])
def test_planned_seconds_are_those_of_a_step(
    link: SlowLink, slow_edge: None, edge_first: int
) -> None:
    """Each part of a plan is, to a factor of ten, what that part of a real step took, and no less
    than the delays in it.
    """
    settings = PlanSettings(
        server="x",
        target_modules="q_proj,k_proj,v_proj",
        r=RANK,
        batch_size=4,
        length=60,
        supervised=16,
        wire_dtype="fp32",
        edge_first=edge_first,
    )
    model, planned = plan(settings, link)
    ids = torch.randint(0, VOCAB, (4, 60))
    labels = ids.clone()
    labels[:, :44] = -100
    seconds, cost = a_step(model, {"input_ids": ids, "labels": labels})

    def near(got: float, want: float) -> bool:
        return want / 10 < got < want * 10

    assert near(planned.cloud_s, cost.cloud_s) and planned.cloud_s >= CLOUD_S
    assert near(planned.link_s, cost.wait_s - cost.cloud_s)
    assert planned.link_s >= cost.round_trips * LINK_S
    assert near(planned.edge_s, seconds - cost.wait_s)
    in_sites = 9 - 3 * edge_first  # those of an edge layer are in that layer's time
    assert planned.edge_s >= in_sites * EDGE_S + HEAD_S + 2 * edge_first * LAYER_S
    assert near(planned.seconds, seconds)
    parts = (planned.cloud_s, planned.edge_s, planned.wire_s, planned.link_s)
    assert planned.seconds == pytest.approx(sum(parts))

    x, best = torch.randn(4 * 60, 64), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data = encode(x, pb.FP32).SerializeToString()
        decode(pb.Tensor.FromString(data), x.shape, "rows")
        best = min(best, time.perf_counter() - start)
    assert near(planned.wire_s, best / len(data) * (planned.sent_bytes + planned.received_bytes))
