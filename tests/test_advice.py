"""`dlora plan --link`: the table, its marks and its commands; what `dlora train` says of a link."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import NO_DRAIN, make_base

import dlora
from dlora.cli.commands import COMMANDS
from dlora.cli.main import main
from dlora.cli.parser import parse
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.meter import Meter
from dlora.errors import UsageError
from dlora.formulas import step_traffic
from dlora.protocol.codecs import mix
from dlora.server.server import Server
from dlora.training.advice import SEEN, Row, advise, command, mark
from dlora.training.link_speed import HERE, NAMED, LinkSpeed, link_speed
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_set import planned_sites
from dlora.training.planned_traffic import Traffic, hosted_transfer_s, staged_s
from dlora.training.planner import Prediction, planned_model
from dlora.training.settings import TrainSettings
from dlora.training.waiting import SayWaiting, faster


@pytest.fixture(scope="module")
def table(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Any]:
    """All ways to train q, k, v, o, gate and up of it over a home line; a model with its sites."""
    link = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    settings = PlanSettings(
        server=server.address, target_modules=targets, batch_size=4, length=64, supervised=8
    )
    found = advise(replace(settings, link="home"), link), planned_model(settings, link)
    link.close()
    return found


@pytest.fixture(scope="module")
def rows(table: tuple[list[Row], Any]) -> list[Row]:
    """The rows alone."""
    return table[0]


def test_every_sensible_choice_is_a_row(rows: list[Row]) -> None:
    """Every wire stands there with all sites and with Kill and Revive's few, alone and in flight or
    accumulated, with codecs that were measured: coarse ones on the factored wire, at all sites.
    """
    found = [(row.choice.wire, row.choice.kr, row.prediction.in_flight > 1) for row in rows]
    exchanged, both = ("plain", "factored"), ("off", "on")
    assert found[:8] == [(w, kr, p) for w in exchanged for kr in both for p in (False, True)]
    assert found[8:10] == [("factored", "off", False), ("factored", "off", True)]
    assert found[10:] == [("hosted", kr, False) for kr in ("off", "off", "on", "on", "off", "off")]
    for row in rows:
        assert (row.prediction.active_sites == 9) == (row.choice.kr == "off")
    assert [row.choice.gradient_accumulation_steps for row in rows[10:]] == [1, 4] * 3
    codecs = [(row.choice.wire_dtype, row.choice.input_grad) for row in rows]
    assert set(codecs[:8] + codecs[10:14]) == {("fp16", "exact")}
    assert codecs[8:10] == [("int4", "drop")] * 2 and codecs[14:] == [("int4", "exact")] * 2
    assert not any(row.as_local for row in rows[8:10] + rows[14:])


def test_an_adapter_without_few_sites_has_no_row_of_them(server: Server, tmp_path: Path) -> None:
    """What Kill and Revive refuses, rows of the embedding beside modules, is planned whole."""
    link = dlora.connect(server.address, cache=tmp_path)
    settings = PlanSettings(
        server=server.address,
        target_modules="q_proj,v_proj",
        trainable_token_indices={"embed_tokens": [5, 6]},
        length=20,
        link="home",
    )
    assert {row.choice.kr for row in advise(settings, link)} == {"off"}
    link.close()


def test_a_server_without_room_for_a_hosted_step_plans_the_rest(tmp_path: Path) -> None:
    """Where memory is enough for a step of the other wires alone, these are in the table."""
    room = CloudModel(make_base("llama"), model_id="x").memory.of_pass(1, 20, training=True)
    limits = Limits(max_length=20, max_inflight_bytes=room + room // 3)
    cloud = CloudModel(make_base("llama"), model_id="x", limits=limits)
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        settings = PlanSettings(server=server.address, target_modules="q_proj,v_proj", batch_size=1)
        rows = advise(replace(settings, length=20, supervised=4, link="home"), link)
        assert {row.choice.wire for row in rows} == {"plain", "factored"}
        link.close()


def test_bytes_of_every_row_are_the_formulas(table: tuple[list[Row], Any]) -> None:
    """Bytes up and down are those of `step_traffic` and a little framing; of four micro-batches the
    first alone carries a hosted adapter.
    """
    rows, model = table
    every = [
        (site.in_features, [(layer.out_features, 8) for layer in site.layers])
        for site in model.sites
    ]
    for row in rows:
        wire, several = row.choice.wire, row.choice.gradient_accumulation_steps
        few = planned_sites(row.choice, model)
        sites = every
        if row.choice.kr == "on":
            sites = [(one.in_features, [(m.out_features, 8) for m in one.layers]) for one in few]
        factored, hosted = wire == "factored", wire == "hosted"
        shape: Any = (4 * 64, 4 * 8, 64, 64)
        sent, received = step_traffic(
            *(*shape, sites, mix(row.choice.wire_dtype, wire)),
            factored=factored,
            hosted=hosted,
            drop_input_grads=row.choice.input_grad == "drop",
        )
        if factored:  # each part has its own B, and the gradient of it
            b = sum(2 * 8 * width for _, modules in sites for width, _ in modules)
            sent += (row.prediction.in_flight - 1) * b
            received += (row.prediction.in_flight - 1) * b
        ends = mix(row.choice.wire_dtype, wire)
        later = step_traffic(*shape, [], ends)[0] if hosted else sent

        framing = 4000 * several + 1500 * row.prediction.in_flight
        assert 0 < row.prediction.sent_bytes - sent - (several - 1) * later < framing
        assert 0 < row.prediction.received_bytes - received * several < framing


def test_the_marks_are_on_the_fastest(rows: list[Row]) -> None:
    """A star is on the fastest of those that train as local tuning does and show no more, a plus
    on the fastest of all, for every level.
    """
    for level in range(3):
        allowed = [row for row in rows if row.choice.wire in list(SEEN)[: level + 1]]
        best = min(allowed, key=lambda row: 1 / row.tokens_per_s)
        same = min((row for row in allowed if row.as_local), key=lambda row: row.seconds)
        assert same.mark == "*"
        assert best.mark == ("*" if best is same else "+")
    assert sum(row.mark == "*" for row in rows) <= 3


def row_of(wire: Any, seconds: float, **more: Any) -> Row:
    """A row of a table that takes so long."""
    as_local = more.pop("as_local", True)
    choice = PlanSettings(server="a:1", wire=wire, upload_consent=wire == "hosted", **more)
    numbers: Any = {one.name: 0 for one in fields(Prediction)}
    return Row(choice=choice, seconds=seconds, prediction=Prediction(**numbers), as_local=as_local)


def test_marks_go_by_tokens_and_by_what_is_seen() -> None:
    """Four micro-batches in three times the seconds are faster; what shows more and is slower has
    no mark.
    """
    rows = [
        row_of("plain", 3.0),
        row_of("plain", 2.0, in_flight=2),
        row_of("plain", 1.5, sites=1, as_local=False),
        row_of("factored", 2.5),
        row_of("hosted", 1.8),
        row_of("hosted", 5.6, gradient_accumulation_steps=4, as_local=False),
    ]
    assert [row.mark for row in mark(rows)] == ["", "*", "+", "", "*", "+"]


def test_the_commands_are_commands(rows: list[Row]) -> None:
    """What is printed is taken by the parser of `dlora train`, with the choice of the row."""
    for row in rows:
        words = command(row)
        assert words[0] == "dlora"
        parsed = parse(words[1:], COMMANDS)
        assert not isinstance(parsed, str)
        settings = parsed[1]
        assert isinstance(settings, TrainSettings)
        names = ("server", "wire", "wire_dtype", "input_grad", "in_flight", "batch_size", "r")
        for name in names:
            assert getattr(settings, name) == getattr(row.choice, name)
        assert settings.targets == row.choice.target_modules
        accumulated = row.choice.gradient_accumulation_steps
        assert settings.gradient_accumulation_steps == accumulated
        assert settings.kr == row.choice.kr


def test_settings_of_the_connection_are_in_the_command() -> None:
    """Files for TLS and a regular expression of modules reach `dlora train` as they were given."""
    row = row_of("plain", 1.0, tls_ca=Path("my ca.pem"), target_modules=r".*\.(1|2)\..*q_proj")
    parsed: Any = parse(command(row)[1:], COMMANDS)
    assert parsed[1].tls_ca == Path("my ca.pem")
    assert parsed[1].target_modules == r".*\.(1|2)\..*q_proj"


def test_link_words() -> None:
    """A link has a name, or three numbers: up, down, round trip."""
    assert link_speed("20/100/40") == NAMED["home"] == link_speed("home")
    assert link_speed("5.5/50/0") == LinkSpeed(up_mbit=5.5, down_mbit=50, rtt_ms=0)
    assert link_speed("here") == HERE


@pytest.mark.parametrize(
    "text",
    [
        *("", "dsl", "20/100", "20/100/40/1", "0/100/40", "20/-1/40", "20/100/-1", "a/b/c"),
        *("nan/100/40", "20/inf/40", "20/100/40 ms"),
    ],
)
def test_bad_links_are_refused(text: str) -> None:
    """What is no link is refused in one line that says what would be one."""
    with pytest.raises(
        UsageError, match=r"want lan, fibre, home, mobile, here, or UP/DOWN/RTT"
    ) as e:
        PlanSettings(server="a:1", link=text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changes",
    [{"wire": "factored"}, {"sites": 1}, {"rtt_ms": 3.0}, {"in_flight": 2}, {"check": True}],
)
def test_what_the_table_chooses_is_not_asked_for(changes: dict[str, Any]) -> None:
    """A column of the table that is also given as a setting is refused, not passed over."""
    with pytest.raises(UsageError, match=f"^{next(iter(changes))}: the table of --link"):
        PlanSettings(server="a:1", link="home", **changes)


def test_hosted_transfer_hides_behind_computing() -> None:
    """One frame is always waited for; of the others what takes longer than a stage."""
    # 8 frames of 0.1 s: stages of 0.25 s hide seven of them, stages of 0.05 s half of each.
    assert staged_s(0.8, 2.0, 8) == pytest.approx(0.1)
    assert staged_s(0.8, 0.4, 8) == pytest.approx(0.1 + 7 * 0.05)
    assert staged_s(0.8, 0.0, 8) == pytest.approx(0.8)
    assert staged_s(0.8, 2.0, 1) == pytest.approx(0.8)

    # 600 kB of ends and 1.3 MB of adapter up at 2.5 MB/s, 70 kB and 1.3 MB down at 12.5 MB/s.
    wire = Traffic(
        sent=1_900_000,
        received=1_370_000,
        round_trips=2,
        modules_sent=1_300_000,
        modules_received=1_300_000,
        module_frames=8,
    )
    seconds = hosted_transfer_s(wire, 0.4e-6, 0.08e-6, forward_s=0.8, backward_s=1.6)
    assert seconds == pytest.approx(0.24 + 0.0056 + 0.065 + 0.013)
    slower = hosted_transfer_s(wire, 0.4e-6, 0.08e-6, forward_s=0.4, backward_s=1.6)
    assert slower == pytest.approx(seconds + 7 * (0.065 - 0.05))
    slower = hosted_transfer_s(wire, 0.4e-6, 0.08e-6, forward_s=0.8, backward_s=0.04)
    assert slower == pytest.approx(seconds + 7 * (0.013 - 0.005))


def test_the_command_prints_the_table(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """`dlora plan --link` prints a row for each choice, what the cloud sees, and the command."""
    words = ["plan", "--server", server.address, "--link", "mobile", "--length", "20"]
    assert main([*words, "--batch_size", "2", "--target_modules", "q_proj"]) == 0
    text = capsys.readouterr().out
    assert "5 Mbit/s up, 20 down, 80 ms" in text and "the cloud sees" in text
    assert all(seen in text for seen in SEEN.values())
    assert f"dlora train --server {server.address} --data" in text
    assert main([*words[:3], "--link", "slow"]) == 2
    assert "--link: got 'slow', want lan" in capsys.readouterr().err


# ----------------------------------------------------------------- dlora train


def train_settings(**changes: Any) -> TrainSettings:
    """Settings of a run that is not started."""
    return TrainSettings(server="a:1", data="x.jsonl", output=Path("never"), **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ["--wire hosted --upload_consent", "--in_flight auto"]),
        ({"in_flight": 2}, ["--wire hosted --upload_consent"]),
        ({"batch_size": 1}, ["--wire hosted --upload_consent"]),
        ({"kr": "on", "kr_options": {"idle": "edge"}}, ["--in_flight auto"]),
        ({"wire": "hosted", "upload_consent": True}, ["--gradient_accumulation_steps 4"]),
    ],
)
def test_what_would_be_faster(changes: dict[str, Any], named: list[str]) -> None:
    """What is proposed works with the other settings, and the table is named in any case."""
    ways = ["--wire hosted --upload_consent", "--in_flight auto", "--gradient_accumulation_steps 4"]
    said = faster(train_settings(**changes))
    assert [way for way in ways if way in said] == named
    assert "`dlora plan --server a:1 --link here`" in said


@pytest.mark.parametrize(("waited_s", "said"), [(8.0, True), (1.0, False)])
def test_waiting_is_said_after_the_third_step(
    waited_s: float, said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, where the link and not the cloud takes more than half; the first step is none."""
    clock = [0.0]
    monkeypatch.setattr("dlora.training.waiting.time.perf_counter", lambda: clock[0])
    model: Any = SimpleNamespace(meter=Meter())
    callback = SayWaiting(train_settings(), model)
    monkeypatch.setattr(callback, "_say_link", lambda: None)

    for step in range(5):
        callback.on_step_begin(None, None, None)
        clock[0] += 10.0 if step else 100.0
        model.meter.wait_s += waited_s + 1.0 if step else 0.0
        model.meter.cloud_s += 1.0 if step else 0.0
        callback.on_step_end(None, None, None)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == said
    assert not said or lines[0].startswith(
        "80 % of a step is waiting for the link: 8.0 of 10.0 s. Faster: --wire hosted"
    )
