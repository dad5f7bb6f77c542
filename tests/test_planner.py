"""`dlora plan` against steps that were really run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, make_base
from peft import LoraConfig

import dlora
from dlora.cli.main import main
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.server.server import Server
from dlora.training.calibrate import HostedStep, calibrate
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_run import read_run, total_of
from dlora.training.planner import check, plan, planned_model, predict


def predicted_and_run(settings: PlanSettings, link: Any) -> tuple[Any, Any, float]:
    """Model, prediction and seconds of a step that was run, whose bytes and round trips are those
    predicted.
    """
    model, found = plan(settings, link)
    cost, seconds = check(settings, model)
    assert found.sent_bytes == pytest.approx(cost.sent_bytes, rel=0.01)
    assert found.received_bytes == pytest.approx(cost.received_bytes, rel=0.01)
    assert found.round_trips == cost.round_trips
    return model, found, seconds


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("sites", [None, 1, 5])
def test_bytes_and_round_trips_are_those_of_a_step(
    server: Server, tmp_path: Path, wire: Any, wire_dtype: Any, sites: int | None
) -> None:
    """Predicted bytes are within 1 % of a real step's in each direction, round trips equal."""
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(
        server=server.address,
        target_modules="all-linear",
        wire=wire,
        upload_consent=wire == "hosted",
        wire_dtype=wire_dtype,
        sites=sites,
        batch_size=8,
        length=40,
        supervised=6,
    )
    model, found, seconds = predicted_and_run(settings, link)
    assert found.active_sites == (sites or len(model.sites))
    assert found.seconds > 0 and seconds > 0
    link.close()


@pytest.mark.parametrize(
    ("wire", "wire_dtype", "input_grad"),
    [("plain", "fp16", "drop"), ("factored", "int4", "drop"), ("plain", "int8", "exact")],
)
@pytest.mark.parametrize("sites", [None, 1])
def test_codecs_and_dropped_gradients_are_planned(
    server: Server, tmp_path: Path, wire: Any, wire_dtype: Any, input_grad: Any, sites: int | None
) -> None:
    """Bytes of mixed codecs and of a one-way backward are within 1 %, round trips are equal."""
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(
        server=server.address,
        target_modules="all-linear",
        wire=wire,
        wire_dtype=wire_dtype,
        input_grad=input_grad,
        sites=sites,
        batch_size=8,
        length=40,
        supervised=6,
    )
    predicted_and_run(settings, link)
    link.close()


@pytest.mark.parametrize("wire", ["plain", "hosted"])
@pytest.mark.parametrize(
    ("first", "last", "layers"),
    [(1, 0, None), (0, 1, None), (1, 1, None), (1, 1, [0, 2]), (0, 1, [2])],
)
def test_held_layers_are_planned(
    tmp_path: Path, wire: Any, first: int, last: int, layers: list[int] | None
) -> None:
    """With layers on the edge too, predicted bytes are within 1 % of a real step's, round trips
    equal.
    """
    cloud = CloudModel(
        make_base("llama"), model_id="x", limits=Limits(edge_first=first, edge_last=last)
    )
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        targets = (
            "all-linear"
            if layers is None
            else rf".*layers\.({'|'.join(map(str, layers))})\..*q_proj"
        )
        settings = PlanSettings(
            server=server.address,
            target_modules=targets,
            wire=wire,
            upload_consent=wire == "hosted",
            edge_first=first,
            edge_last=last,
            batch_size=8,
            length=40,
            supervised=6,
        )
        predicted_and_run(settings, link)
        link.close()


@pytest.mark.parametrize("wire", ["factored", "hosted"])
def test_accumulated_micro_batches_are_planned(server: Server, tmp_path: Path, wire: Any) -> None:
    """An optimizer step of three micro-batches has the predicted bytes and round trips: a hosted
    adapter goes up with the first alone.
    """
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(
        server=server.address,
        target_modules="q_proj,v_proj",
        wire=wire,
        upload_consent=wire == "hosted",
        gradient_accumulation_steps=3,
        batch_size=4,
        length=40,
        supervised=6,
    )
    model, found = plan(settings, link)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 100, (4, 40))
    labels = ids.clone()
    labels[:, :-6] = -100

    model.train()
    for _ in range(3):  # the cloud keeps an adapter from the second step on
        before = model.meter.copy()
        for _ in range(3):
            mask = torch.ones_like(ids)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    cost = model.meter - before
    assert found.sent_bytes == pytest.approx(cost.sent_bytes, rel=0.01)
    assert found.received_bytes == pytest.approx(cost.received_bytes, rel=0.01)
    assert found.round_trips == cost.round_trips
    link.close()


@pytest.mark.parametrize("wire", ["plain", "hosted"])
def test_a_trained_embedding_is_planned(server: Server, tmp_path: Path, wire: Any) -> None:
    """A step that trains rows of the embedding has the predicted bytes: gradients of the embedded
    tokens come, too.
    """
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(
        server=server.address,
        target_modules="q_proj,v_proj",
        trainable_token_indices={"embed_tokens": [5, 6]},
        wire=wire,
        upload_consent=wire == "hosted",
        batch_size=8,
        length=40,
        supervised=6,
    )
    predicted_and_run(settings, link)
    link.close()


def test_the_link_is_in_the_seconds(server: Server, tmp_path: Path) -> None:
    """Round trip time counts once a round trip, a bandwidth by bytes in its own direction and in
    place of what is.
    """
    link = dlora.connect(server.address, cache=tmp_path)
    common: dict[str, Any] = {
        "server": server.address,
        "target_modules": "q_proj,v_proj",
        "length": 20,
    }
    near = plan(PlanSettings(**common, rtt_ms=0), link)[1]
    far = plan(PlanSettings(**common, rtt_ms=5000), link)[1]
    assert 0 <= near.link_s < 1
    assert far.link_s == pytest.approx(5 * far.round_trips, rel=0.1)
    slow = plan(PlanSettings(**common, rtt_ms=0, up_mbit=0.01, down_mbit=0.02), link)[1]
    assert slow.link_s == pytest.approx(slow.sent_bytes * 8e-4 + slow.received_bytes * 4e-4)
    link.close()


def test_a_spectral_start_is_one_micro_batch_more(server: Server, tmp_path: Path) -> None:
    """A planned run of two steps of two micro-batches has five with it, and not four."""
    link = dlora.connect(server.address, cache=tmp_path)
    plain = PlanSettings(
        server=server.address,
        target_modules="q_proj",
        max_steps=2,
        gradient_accumulation_steps=2,
        length=20,
    )
    model = planned_model(plain, link)
    measured, (planned, run) = calibrate(plain, model), read_run(plain, link, model)
    step, _, whole = total_of(planned, model, measured, run)
    *_, turned = total_of(replace(planned, spectral_start=True), model, measured, run)
    assert whole.sent_bytes == 2 * step.sent_bytes
    assert turned.sent_bytes == 2.5 * step.sent_bytes
    link.close()


def test_hosted_sites_cost_what_a_hosted_step_showed(server: Server, tmp_path: Path) -> None:
    """The cloud's seconds of a hosted plan are those of the hosted step that was measured; of a
    third of its sites a third of what it took beyond a step without them. A plan's own bytes are
    coded in its own codec, in place of those of the step.
    """
    link = dlora.connect(server.address, cache=tmp_path)
    base = PlanSettings(server=server.address, target_modules="q_proj,v_proj", length=20)
    model = planned_model(base, link)
    hosted = HostedStep(3, forward_s=4.0, backward_s=9.0, edge_s=5.0, bytes=0, wire_dtype="fp16")
    measured = replace(
        calibrate(base, model, ["fp16", "int4"]),
        **{"lowest": 0, "lowest_forward_s": 1.0, "lowest_s": 4.0, "head_s": 2.0},
        hosted=hosted,
    )
    wanted = replace(base, wire="hosted", upload_consent=True)
    size = predict(wanted, model, measured)
    hosted = replace(hosted, bytes=size.sent_bytes + size.received_bytes)
    measured = replace(measured, hosted=hosted, per_byte_s={"fp16": 1e-6, "int4": 9e-6})
    whole = predict(wanted, model, measured)
    assert (whole.active_sites, whole.cloud_s) == (3, 4.0 + 9.0)
    assert whole.edge_s + whole.wire_s == pytest.approx(5.0)
    coarse = predict(replace(wanted, wire_dtype="int4"), model, measured)
    its_bytes = coarse.sent_bytes + coarse.received_bytes
    without = 5.0 - 1e-6 * hosted.bytes
    assert coarse.edge_s + coarse.wire_s == pytest.approx(without + 9e-6 * its_bytes)
    third = predict(replace(wanted, sites=1), model, measured)
    depth = third.cloud_s - (1.0 + 3.0 / 3)  # backward to the lowest site, of which one is in it
    assert third.edge_s + third.wire_s == pytest.approx(2.0 + 3.0 / 3, abs=0.1)
    assert depth == pytest.approx(3.0 * 2 / 3 + 6.0 / 3)  # of three layers two are above the middle
    link.close()


def test_a_plan_sends_nothing_of_a_users_adapter(server: Server, tmp_path: Path) -> None:
    """What a plan measures with are random weights in the adapter's shapes, and not the adapter
    that it would start from.
    """
    link = dlora.connect(server.address, cache=tmp_path)
    own = dlora.get_peft_model(link, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    own.save_pretrained(tmp_path / "own")
    model = planned_model(
        PlanSettings(server=server.address, adapter=tmp_path / "own", length=20), link
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [p.shape for p in trained] == [p.shape for p in own.parameters() if p.requires_grad]
    assert all(0 < parameter.abs().max() < 1 for parameter in trained)
    link.close()


def test_a_plan_that_is_stopped_leaves_the_model_as_it_was(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while one site alone is measured gives the other sites back."""
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(server=server.address, target_modules="q_proj,v_proj", length=20)
    model, _ = plan(settings, link)
    whole = model.active_modules
    set_active = type(model).set_active

    def stopped(self: Any, modules: Any, *args: Any) -> None:
        set_active(self, modules, *args)
        if len(self.active_modules) < len(whole):
            raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "set_active", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings, model)
    assert model.active_modules == whole
    link.close()


def test_plan_command(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """`dlora plan` prints bytes, round trips and seconds; --check says how far off they are."""
    words = ["plan", "--server", server.address, "--length", "20", "--batch_size", "2"]
    assert main([*words, "--sites", "1", "--check"]) == 0
    text = capsys.readouterr().out
    assert "1 active site," in text and "3 round trips" in text
    checked = (
        r"checked +bytes off by [+-]\d\.\d\d%, round trips 3, seconds \d+\.\d\d, off by [+-]\d+%"
    )
    assert re.search(checked, text)
    assert main([*words, "--sites", "9"]) == 2
    assert main([*words, "--supervised", "20"]) == 2
    assert main([*words, "--up-mbit", "0"]) == 2
    error = capsys.readouterr().err
    assert "this adapter has 3" in error and "want 0 to 19" in error and "want more than 0" in error
