"""What commands show a person, as text at 80 columns: real commands on a tiny model."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import batches, lora, make_base, make_split

from dlora.cli import console
from dlora.cli.commands import COMMANDS
from dlora.cli.console import Console
from dlora.cli.lines import pair_lines, shell, table_lines
from dlora.cli.main import main
from dlora.cli.serve_screen import reached, served
from dlora.cli.status_screen import Look, status_lines
from dlora.cli.train_screen import ending
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import GrpcLink
from dlora.edge.link import Outage, RetryPolicy
from dlora.errors import PeerLost
from dlora.privacy.verdict import verdict
from dlora.server import keys
from dlora.server.metrics import ServerStatus, serve_metrics
from dlora.server.server import Server
from dlora.server.settings import ServeSettings
from dlora.training.settings import TrainSettings


class Terminal(io.StringIO):
    """A terminal of 80 columns: what was written, and what a person sees of it."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """The rows, as returns, line feeds and steps upwards leave them."""
        rows, x, y = [""], 0, 0
        for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.|\n", self.getvalue(), re.DOTALL):
            if part == "\r":
                x = 0
            elif part == "\n":
                x, y = 0, y + 1
            elif part == "\x1b[A":
                y = max(0, y - 1)
            elif not part.startswith("\x1b"):
                rows[y] = rows[y][:x].ljust(x) + part + rows[y][x + 1 :]
                x += 1
            rows += [""] * (y + 1 - len(rows))
        return [row.rstrip() for row in rows]


def fits(text: str) -> None:
    """No line is over 80 columns wide, but words that cannot be broken, such as paths."""
    for line in text.splitlines():
        assert len(line) <= 80 or "/" in line, line
        assert all(unicodedata.category(char) != "Cc" for char in line), repr(line)


def flat(text: str) -> str:
    """The same with wrapped texts, and commands, on one line each."""
    return re.sub(r"( \\)?\n {7,}(?=\S)", " ", text)


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 of them."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on and rows to evaluate."""
    folder = tmp_path_factory.mktemp("place")
    for name, number in (("train", 24), ("held", 6)):
        rows = [
            {"prompt": f"parcel {n * 37 % 91}{'!' * (n * 5 % 24)}", "completion": f" desk {n % 4}"}
            for n in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def train_words(server: Server, place: Path, output: str) -> list[str]:
    """`dlora train` on these rows, with evaluations."""
    return [
        *("train", "--server", server.address, "--data", str(place / "train.jsonl")),
        *("--eval_data", str(place / "held.jsonl"), "--output", str(place / output)),
        *("--epochs", "2", "--batch_size", "4", "--report_to", "none"),
    ]


@pytest.fixture(scope="module")
def run(server: Server, place: Path) -> tuple[Path, str, Terminal]:
    """A run on a terminal: its folder, standard output, and the terminal."""
    out, terminal = io.StringIO(), Terminal()
    handler = Console(terminal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", terminal)
        logging.getLogger("dlora").addHandler(handler)
        try:
            assert main([*train_words(server, place, "run"), "--record", "4"]) == 0
        finally:
            logging.getLogger("dlora").removeHandler(handler)
    return place / "run", out.getvalue(), terminal


# ----------------------------------------------------------------- train


def test_train_says_what_begins_and_what_came_of_it(run: tuple[Path, str, Terminal]) -> None:
    """Before the first step: model, rows, adapter, steps, bytes. After the last: the best, the
    costs, and commands that use the adapter."""
    output, out, _ = run
    fits(out)
    for pattern in (
        r"^model +example-org/llama \(3 layers, float32\) at 127\.0\.0\.1:\d+$",
        r"^data +\S+train\.jsonl: 24 rows of \d+ to \d+ tokens, median \d+, \d+ learned",
        r"held\.jsonl: 6 rows of",
        r"^adapter +LoRA of rank 8 on q_proj, v_proj: 5,376 parameters, 6 modules at 3 sites$",
        r"^run +12 steps of 4 rows, 6 an epoch; learning rate 0\.001, linear$",
        r"^a step +[\d.]+ kB up, [\d.]+ kB down, 7 round trips \(plain wire, fp16\)$",
        r"^in all +about [\d.]+ [kM]B, without evaluations$",
        r"^finished +after 12 steps and \S+ s: loss \d\.\d{4}$",
        r"^best +eval loss \d\.\d{4} after step \d+: that adapter is kept",
        r"^traffic +[\d.]+ [kM]B up, [\d.]+ [kM]B down, \d+ round trips, 0 retries$",
        rf"^next +dlora generate --server \S+ --adapter {output} --prompt \.\.\.",
        rf" dlora audit {output} ",
    ):
        assert re.search(pattern, flat(out), re.MULTILINE), (pattern, out)


def test_a_spectral_start_is_said(
    server: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that begins with one says so beside its adapter, with what it costs."""
    assert main([*train_words(server, place, "turned"), "--spectral_start", "true"]) == 0
    assert "at 3 sites; a spectral start costs a micro-batch more" in flat(capsys.readouterr().out)


def test_bytes_are_said_before_they_are_sent(run: tuple[Path, str, Terminal]) -> None:
    """The step that is announced is, on average, the step that was run: within 3 % up and down."""
    output, out, _ = run
    said = re.search(r"^a step +([\d.]+) kB up, ([\d.]+) kB down", out, re.MULTILINE)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for number, name in enumerate(("sent_mb", "received_mb"), 1):
        mean = sum(line[name] for line in steps) / len(steps)
        assert said is not None
        assert float(said[number]) / 1e3 == pytest.approx(mean, rel=0.03), name


def test_the_bar_fits_and_is_glued_to_nothing(run: tuple[Path, str, Terminal]) -> None:
    """On 80 columns every state of the bar is one line, log lines are lines of their own, and the
    last bar stays with the loss behind it."""
    _, _, terminal = run
    states = re.findall(r"\r(step [^\r\n]*)", terminal.getvalue())
    assert len(states) > 1 and max(map(len, states)) < 80
    seen = [line for line in terminal.lines if line]
    assert re.fullmatch(
        r"step 12 of 12 \|\S+\| 00:00 left, loss \d\.\d+, \S+ kB/step, .*", seen[-1]
    )
    assert sum(line.startswith("step ") for line in seen) == 1
    told = [line for line in seen if "eval loss" in line]
    assert re.fullmatch(r"\S+ step 6: eval loss \d\.\d{4}, the best so far", told[0])
    trips = r"\S+ a round trip takes .* 7 of them, .* s, and for its bytes"
    assert any(re.fullmatch(trips, line) for line in seen)
    assert not [line for line in seen if "evaluating" in line]


def test_without_a_terminal_there_are_plain_lines(
    server: Server,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a file progress is a line now and then, with the first and the last step; nothing is
    rewritten. --quiet shows the end alone."""
    words = [*train_words(server, place, "plain"), "--max_steps", "2"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "step 0" not in captured.err and "left" not in captured.err
    told = [text for text in caplog.messages if text.startswith("step ")]
    assert re.fullmatch(r"step 1 of 2: loss \d\.\d+, \S+ kB/step, \d+ tok/s, .* left", told[0])
    assert told[1].startswith("step 2 of 2: ") and told[2].startswith("step 2: eval loss")

    caplog.clear()
    quiet = [word.replace("/plain", "/quiet") for word in words]
    assert main([*quiet, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("finished ")
    assert all(record.levelno >= logging.WARNING for record in caplog.records)


def test_few_modules_and_several_micro_batches_are_told(
    server: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Kill and Revive the total is that of the set which is chosen, also where it is over the
    budget, and a step of several micro-batches says so; rows that are held out of the data are told
    as such."""
    words = train_words(server, place, "few")
    words[3:7] = ["--data", str(place / "train.jsonl"), "--val_size", "4"]
    more = ["--gradient_accumulation_steps", "2", "--kr", "on", "--max_steps", "1"]
    assert main([*words, *more]) == 0
    out = flat(capsys.readouterr().out)
    assert "held out of it: 4 rows of" in out
    assert "run        1 step of 8 rows (2 micro-batches), 3 an epoch; learning rate" in out
    assert "14 round trips (plain wire, fp16, with all modules)" in out
    shares = [
        re.search(pattern, out, re.MULTILINE)
        for pattern in (
            r"^in all +about \S+ kB, ([\d.]+%) of what training all modules takes$",
            r"^active +1 unit at the end; on average ([\d.]+%) of FT's cost$",
        )
    ]
    assert shares[0] and shares[1] and shares[0][1] == shares[1][1] and shares[0][1] != "12.5%"


COST = {"sent_bytes": 5_000_000, "received_bytes": 7_000, "round_trips": 1, "retries": 2}
ENDED: dict[str, Any] = {
    "status": "finished",
    "steps": 1,
    "seconds": 125.0,
    "train_loss": 1.5,
    "eval_loss": None,
    "best_eval_loss": None,
    "cost": COST,
}
ENDINGS: list[tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = [
    (
        {},
        {"token_file": Path("my token"), "tls": True},
        [
            "finished   after 1 step and 2.1 min: loss 1.5000",
            "traffic    5 MB up, 7 kB down, 1 round trip, 2 retries",
            "dlora eval --server a:1 --token_file 'my token' --tls --adapter runs/a --data ...",
        ],
        ["best", "audit", "continue"],
    ),
    (
        {"status": "interrupted", "train_loss": None},
        {},
        ["interrupted after 1 step and 2.1 min: no loss yet", "continue   the same command with"],
        ["next", "dlora generate"],
    ),
    (
        {"eval_loss": 2.0, "best_eval_loss": 1.25, "best_checkpoint": "x/checkpoint-4"},
        {"eval_data": "held", "record": 2},
        [
            "best       eval loss 1.2500 after step 4: that adapter is kept; the last one has 2.0",
            "--data held",
            "dlora audit runs/a --server a:1",
        ],
        [],
    ),
    (
        {"eval_loss": 2.0, "best_eval_loss": 1.25},
        {"eval_data": "held", "keep_best": False},
        ["eval loss  2.0000 at the end"],
        ["kept"],
    ),
]


@pytest.mark.parametrize(("values", "settings", "there", "missing"), ENDINGS)
def test_how_a_run_ended(
    values: dict[str, Any], settings: dict[str, Any], there: list[str], missing: list[str]
) -> None:
    """What is said depends on how it ended, what was evaluated, and how the server is reached."""
    asked = TrainSettings(server="a:1", data="d", output=Path("runs/a"), **settings)
    lines = [line for pair in ending(ENDED | values, asked) for line in pair_lines(*pair)]
    text = "\n".join(lines)
    fits(text)
    for part in there:
        assert part in flat(text), text
    for part in missing:
        assert part not in text


# ----------------------------------------------------------------- a lost server


def record(outage: Outage) -> logging.LogRecord:
    """What the log gets of an outage."""
    made = logging.LogRecord("dlora.edge.link", logging.WARNING, "f", 1, "waiting", (), None)
    made.outage = outage
    return made


def test_a_lost_server_is_one_line_that_is_rewritten(
    links: Callable[[str], GrpcLink], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Through a real edge: attempts leave one line on a terminal with the time that is left, which
    is gone when the server is back, and a word says so."""
    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr(console, "_NOTICED_S", 0.0)
    handler = Console(terminal)
    link = links("llama")
    open_stream, failures = link.open, [5]

    def flaky() -> Any:
        if failures[0]:
            failures[0] -= 1
            raise PeerLost("127.0.0.1:5: failed to connect: Connection refused")
        return open_stream()

    seen: list[list[str]] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds + 10
        seen.append([line for line in terminal.lines if line])

    policy = RetryPolicy(give_up_after_s=600, sleep=sleep, clock=lambda: now[0])
    model = make_split(link, lora(), retry=policy)
    monkeypatch.setattr(link, "open", flaky)
    logging.getLogger("dlora").addHandler(handler)
    try:
        model(**batches()[0]).loss.backward()
    finally:
        logging.getLogger("dlora").removeHandler(handler)

    assert [len(lines) for lines in seen] == [1] * 5
    assert all(len(line) < 80 for (line,) in seen)
    pattern = r"no answer for 0:\d\d, giving up in \d+:\d\d; trying again \(Connection refused\)"
    assert all(re.fullmatch(pattern, line) for (line,) in seen)
    lasted = [re.findall(r"\d+:\d\d", line) for (line,) in seen]
    assert lasted[0] == ["0:00", "10:00"] and lasted[4][0].startswith("0:4")
    assert lasted[4][1].startswith("9:1")
    (left,) = [line for line in terminal.lines if line]
    assert re.fullmatch(r"\S+ the server is back after \d+ s", left)


def test_an_outage_in_a_file_is_a_line_a_minute() -> None:
    """Where nothing can be rewritten an outage is said after a second, then once a minute, and
    when it is over; one that nobody noticed is not said."""
    file = io.StringIO()
    handler = Console(file)
    for lasted_s in (0.0, 0.4, 2.0, 12.0, 50.0, 63.0, 70.0):
        handler.emit(record(Outage(reason="gone", lasted_s=lasted_s, left_s=600 - lasted_s)))
    assert file.getvalue().count("waiting\n") == 2
    handler.emit(record(Outage(reason="", lasted_s=71.0)))
    handler.emit(record(Outage(reason="gone", lasted_s=0.0, left_s=600.0)))
    handler.emit(record(Outage(reason="", lasted_s=0.2)))
    assert file.getvalue().count("\n") == 3 and "\r" not in file.getvalue()


def test_giving_up_takes_the_line_away() -> None:
    """After a command that gave up no line of an outage is left on the terminal."""
    terminal = Terminal()
    handler = Console(terminal)
    handler.emit(record(Outage(reason="a: gone", lasted_s=5.0, left_s=5.0)))
    assert terminal.lines[0].startswith("no answer for 0:05, giving up in 0:05")
    handler.settle()
    assert not any(terminal.lines)


def test_an_answer_that_has_come_half_way_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where words stream to the same terminal an outage has a line of its own below them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    handler = Console(terminal)
    terminal.write("The answer is")
    handler.emit(record(Outage(reason="a: gone", lasted_s=5.0, left_s=5.0)))
    handler.settle()
    assert terminal.lines[0] == "The answer is"


# ----------------------------------------------------------------- plan


def test_plan_reads_the_files_of_train(
    server: Server,
    place: Path,
    run: tuple[Path, str, Terminal],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a run's own YAML the plan has its rows, its steps, its evaluations and the first
    download; what costs nothing is passed over, and totals are those that the run then had."""
    assert main([*train_words(server, place, "planned"), "--print_config", "--lr", "0.01"]) == 0
    file = place / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["plan", "--config", str(file), "--no-such", "1"]) == 2
    assert "unknown flag --no-such" in capsys.readouterr().err
    assert main(["plan", "--config", str(file), "--output", "x", "--lora_alpha", "4"]) == 0
    out = capsys.readouterr().out
    fits(out)
    for pattern in (
        r"^model +example-org/llama, 3 active sites, plain wire, 1 in flight$",
        r"^data +\S+train\.jsonl:\s+24\s+rows\s+of",
        r"^first +[\d.]+ [kM]B of edge files",
        r"^evaluated +2 times: [\d.]+ kB and .* in all$",
        r"^the run +12 steps: [\d.]+ [kM]B up, [\d.]+ [kM]B down, about .*$",
    ):
        assert re.search(pattern, out, re.MULTILINE), (pattern, out)

    # What the run of the fixture sent, evaluations included; the download is one way.
    cost = json.loads((run[0] / "run.json").read_text())["cost"]
    up = re.search(r"12 steps: ([\d.]+) ([kM])B up", out)
    assert up is not None
    scale = {"k": 1e3, "M": 1e6}[up[2]]
    assert float(up[1]) * scale == pytest.approx(cost["sent_bytes"], rel=0.03)


PLANS: list[tuple[list[str], list[str]]] = [
    ([], [r"1,000 steps: [\d.]+ [MG]B up", r"a step +8 x 20 tokens$"]),
    (["--max_steps", "7"], [r"^the run +7 steps: "]),
    (["--steps", "5"], [r"^the run +5 steps: "]),
    (
        ["--kr", "on"],
        [r"1 active site,", r"with \d of \d+ modules at a time, [\d.]+% of what training"],
    ),
    (["--link", "home"], [r"^ +wire +codec +parts", r"^\* +hosted", r"--upload_consent"]),
]


@pytest.mark.parametrize(("flags", "patterns"), PLANS, ids=[" ".join(f) for f, _ in PLANS])
def test_plans_fit(
    flags: list[str], patterns: list[str], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans without data, of other lengths, of Kill and Revive, and over a link."""
    words = ["plan", "--server", server.address, "--length", "20", *flags]
    assert main(words) == 0
    out = capsys.readouterr().out
    fits(out)
    for pattern in patterns:
        assert re.search(pattern, out, re.MULTILINE), (pattern, out)


def test_a_plan_over_a_link_is_of_the_users_data(
    server: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the table have the data that was given, a run's own choices are among the
    rows, and a row that trains as local tuning does says how long the run takes."""
    words = train_words(server, place, "x")[1:]
    assert main(["plan", *words, "--wire", "factored", "--link", "mobile"]) == 0
    out = capsys.readouterr().out
    fits(out)
    assert f"--data {place / 'train.jsonl'}" in flat(out)
    assert re.search(r"^\*  the cloud sees .*; 12 steps\s+take\s+about", out, re.MULTILINE)


# ----------------------------------------------------------------- serve and status


def test_serve_says_who_may_call_and_what_an_edge_types(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """Tenants, what ends soon and what makes it new, the metrics' address, the edge's command."""
    folder = tmp_path / "keys"
    keys.make_authority(folder, ["127.0.0.1"], 30)
    settings = ServeSettings(model="m", keys=folder, host="0.0.0.0")
    nobody = dict(reached(settings, "0.0.0.0:7", None))
    assert nobody["tenants"] == "0" and "nobody may call yet" in nobody[""]

    keys.add_token(folder, "alice", 90)
    name, _ = keys.add_token(folder, "bob", 3)
    text = "\n".join(
        line for pair in reached(settings, "0.0.0.0:7", 9464) for line in pair_lines(*pair)
    )
    fits(text)
    end = datetime.now(UTC) + timedelta(days=3)
    assert re.search(r"^tenants +2: alice, bob$", text, re.MULTILINE)
    assert f"expires    token {name} of bob ends in 2 days ({end:%Y-%m-%d})" in text
    assert f"keys token --folder {folder} --tenant bob" in flat(text)
    assert "metrics    http://127.0.0.1:9464/metrics (and /readyz)" in text
    assert "dlora status --metrics_port 9464" in text
    joined = re.sub(r" \\\n +", " ", text)
    assert (
        "edge       dlora train --server HOST:7 --tls_ca ca.pem --token_file NAME.token" in joined
    )

    alone = ServeSettings(model="m")
    loaded = SimpleNamespace(model=make_base("llama"), model_id="org/tiny")
    what = dict(served(alone, cloud_models("llama"), loaded))
    assert re.fullmatch(r"org/tiny, fp32 on cpu, fingerprint [0-9a-f]{12}", what["model"])
    assert what["adapters"] == "21 modules at 12 sites may be adapted"
    assert re.fullmatch(r"\S+ kB of weights, \S+ kB of activations a training .*", what["memory"])
    plain = dict(reached(alone, "127.0.0.1:7", None))
    assert plain["access"].startswith("plaintext, everybody")
    assert re.sub(r" \\\n +", " ", plain["edge"]) == (
        "dlora train --server 127.0.0.1:7 --data private.jsonl --output runs/mine"
    )


def test_status_has_rates_since_the_last_look(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first look has totals, the next one rates as well, also as JSON; a table of many and
    long names fits, and no columns run together."""
    monkeypatch.setenv("DLORA_CACHE", str(tmp_path))
    with serve_metrics(server, 0) as port:
        words = ["status", "--metrics_port", str(port)]
        assert main(words) == 0
        first = capsys.readouterr().out
        assert "they come with the next" in first and " - " in first
        assert main(words) == 0
        out = capsys.readouterr().out
        fits(first + out)
        assert re.search(r"^ready, 0 waiting .*; rates of the last .* s$", out, re.MULTILINE)
        assert "they come" not in out
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["state"] == "ready" and found["seconds_since_last_look"] > 0
    for tenant in found["tenants"].values():
        assert tenant["per_second"]["dlora_tokens_total"] == 0

    (tmp_path / f"status-{port}.json").write_text("[")
    many = {
        f"tenant-{'x' * 40}{number}": {
            "dlora_received_bytes_total": 123e9,
            "dlora_sent_bytes_total": 999.6e6,
            "dlora_tokens_total": 12_345_678.0,
            "dlora_inflight_bytes": 987e6,
            "dlora_compute_seconds_total": 5000.0,
        }
        for number in range(3)
    }
    status = ServerStatus(state="ready", queue_length=2, tenants=many)
    none: dict[str, Any] = {name: {} for name in many}
    lines = list(status_lines(status, Look(1000.0, many), Look(0.0, none)))
    assert all(len(line) <= 80 for line in lines)
    assert {len(line.split()) for line in lines[1:]} == {12}
    assert "123MB" in lines[2] and "123GB" in lines[2] and "12.3M" not in lines[2]
    assert list(status_lines(status, Look(9.0, none), Look(0.0, many)))[-1].startswith("tok/s")


def test_a_table_never_runs_together() -> None:
    """Cells as wide as their column still have a space between them."""
    lines = list(table_lines(["a", "b"], [["name" * 30, "1" * 60], ["n", "2"]]))
    assert all(len(line) == len(lines[0]) for line in lines)
    name, number = lines[1].split()
    assert name.startswith("name") and name.endswith("..") and number == "1" * 60


# ----------------------------------------------------------------- eval, audit, report, help


def test_eval_writes_predictions(
    server: Server, place: Path, run: tuple[Path, str, Terminal], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for every row in the data's order: prompt, what was wanted, what the model says, and
    whether it is right, as often as the figure says; rows without a completion are refused."""
    output = place / "out" / "said.jsonl"
    words = ["eval", "--server", server.address, "--adapter", str(run[0]), "--max_new_tokens", "3"]
    data = place / "held.jsonl"
    assert main([*words, "--data", str(data), "--predictions", str(output)]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    want = [json.loads(line) for line in data.read_text().splitlines()]
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        (row["prompt"], row["completion"]) for row in want
    ]
    share = sum(row["right"] for row in rows) / len(rows)
    assert f"exact_match        {share:.4f}" in out and str(output) in out
    assert all(isinstance(row["prediction"], str) for row in rows)

    choices = place / "choices.jsonl"
    choices.write_text(json.dumps({"prompt": "to", "choices": [" a", " bb"], "answer": 1}) + "\n")
    assert main([*words, "--data", str(choices), "--predictions", str(output)]) == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["right"] == (row["prediction"] == 1) and len(row["log_likelihoods"]) == 2

    (place / "text.txt").write_text("a text\n")
    text = [*words, "--data", str(place / "text.txt"), "--predictions", str(output)]
    assert main(text) == 2
    assert "predictions: needs rows with prompt and completion" in capsys.readouterr().err


def test_audit_begins_with_a_verdict(
    server: Server, place: Path, run: tuple[Path, str, Terminal], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line says how much of the text a recording cloud reads, the next ones which flags
    change that; the page has the same, and stacks its table on a narrow screen."""
    output = place / "audit"
    words = ["audit", str(run[0]), "--server", server.address, "--output", str(output)]
    public = ["--public", str(place / "held.jsonl"), "--sites", "2"]
    assert main([*words, *public]) == 0
    out = capsys.readouterr().out
    fits(out)
    text = " ".join(out.split())
    assert text.startswith("verdict With these settings a recording cloud reads 100% of the text")
    assert "What changes it" in text and re.search(r"--edge_first \d about \d+% of the text", text)
    found = json.loads((output / "audit.json").read_text())["verdict"]
    page = (output / "audit.html").read_text()
    assert found["says"] in page and all(way["flags"] in page for way in found["ways"])
    assert 'name="viewport"' in page and "@media (max-width: 40rem)" in page
    assert 'class="attacks"' in page and 'data-name="own tokens"' in page


def finding(attack: str, **numbers: Any) -> dict[str, Any]:
    """One entry of an audit."""
    return {"attack": attack, "where": "entry", "attacker": None, "says": "", **numbers}


VERDICTS: list[tuple[list[dict[str, Any]], dict[str, Any], str, list[str]]] = [
    (
        [
            finding("look-up", tokens=1.0, rows_exact=1.0),
            finding(
                "inverter", tokens=0.5, rows_exact=0.0, attacker="in-domain", where="layer 2: q"
            ),
            finding("labels", labels=1.0),
            finding("masks", lengths=1.0),
            finding("adapter", known=1.0),
        ],
        {"wire": "plain", "wire_dtype": "fp16"},
        "reads 100% of the text (100% of the rows word for word). It computes 100% of the labels. "
        "It knows the adapter at 100% of the attacked sites.",
        [
            *("--edge_first 2", "--noise_entry 1", "--edge_last 2", "--pad_to 64 --noise_tail 1"),
            "--wire_dtype int8",
        ],
    ),
    (
        [
            finding("inverter", tokens=0.74, rows_exact=0.01, attacker="in-domain"),
            finding("inverter", tokens=0.35, rows_exact=0.0, attacker="out-of-domain"),
            finding("masks", lengths=0.0),
        ],
        {"edge_first": 8, "noise_entry": 1.0, "pad_to": 64},
        "reads 74% of the text, and 35% if it knows nothing like it (1% of the rows",
        [],
    ),
    (
        [finding("adapter", known=1.0), finding("inverter", tokens=0.1, rows_exact=0.0)],
        {"wire": "hosted"},
        "reads 10% of the text. It knows the adapter at 100%",
        ["--wire plain"],
    ),
    ([], {}, "Nothing of the text was attacked.", []),
]


@pytest.mark.parametrize(("attacks", "setting", "says", "flags"), VERDICTS)
def test_verdicts(
    attacks: list[dict[str, Any]], setting: dict[str, Any], says: str, flags: list[str]
) -> None:
    """The best attack counts, and only flags are named that are not set and would change it."""
    found = verdict(attacks, setting)
    assert says in found["says"]
    assert [way["flags"] for way in found["ways"]] == flags


def test_report_says_what_the_run_was(
    place: Path, run: tuple[Path, str, Terminal], capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has date, data, rows, batch, learning rate and the time of the whole run."""
    assert main(["report", str(run[0]), "--output", str(place / "report")]) == 0
    page = (place / "report" / "report.html").read_text()
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)
    found = dict(cells)
    today = datetime.now(UTC)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d to \d\d:\d\d", found["date"])
    assert found["date"][:4] == str(today.year)
    assert found["data"] == "train.jsonl: 24 rows"
    assert found["evaluated on"] == "held.jsonl: 6 rows"
    assert found["batch"] == "4 rows" and found["learning rate"] == "0.001, linear"
    assert found["wire"] == "plain fp16"
    assert re.fullmatch(r"\d+ s", found["time of the whole run"])


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_in_groups_and_fits(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Every help has headlines, each with something under it, and fits 80 columns; that of `dlora`
    alone has every command under one of them."""
    assert main(["--help"] if name is None else [name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fits("\n".join(lines))
    heads = [n for n, line in enumerate(lines) if line.endswith(":") and not line.startswith(" ")]
    assert len(heads) >= 2
    assert all(lines[number + 1].startswith("  ") for number in heads)
    if name is None:
        listed = [line.split()[0] for line in lines if re.match(r"  [a-z]", line)]
        assert listed == list(COMMANDS)
        assert len({command.group for command in COMMANDS.values()}) == 4


# ----------------------------------------------------------------- lines


def test_commands_are_broken_so_that_a_shell_takes_them() -> None:
    """A long command goes on behind a backslash, in front of a flag, and stays what it was."""
    words = ["dlora", "train", "--server", "a" * 40 + ":1", "--data", "my file", "--output", "x"]
    text = shell(words)
    assert all(len(line) <= 69 for line in text.split("\n"))
    assert (
        text.replace(" \\\n   ", "")
        == f"dlora train --server {'a' * 40}:1 --data 'my file' --output x"
    )
