"""Data as people have it: whatever the file and the form, what is trained on is the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_DRAIN, lora
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cli.main import main
from dlora.cloud.model import CloudModel
from dlora.edge import data, data_files
from dlora.edge.data import Origins, load_rows
from dlora.embedded import InProcessLink
from dlora.errors import DataError, UsageError
from dlora.inference.answer import load_for_inference
from dlora.inference.evaluate import evaluate
from dlora.inference.settings import EvalSettings
from dlora.server.server import Server
from dlora.training.data_report import describe, histogram, readable_bytes, readable_time
from dlora.training.data_settings import DataSettings
from dlora.training.rows import rows_of
from dlora.training.run import train
from dlora.training.settings import TrainSettings
from dlora.training.trainer import build_trainer

Rows = list[dict[str, Any]]

PAIRS = [
    {"prompt": f"the {word}", "completion": f" goes {way}\n"}
    for word, way in zip(
        ["pump", 'bed, "two"', "NA", "042", "list\nof it", "line", "door"],
        ["north", "south", "null", "7", "east", "west\t", "up"],
        strict=True,
    )
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["completion"]},
        ]
    }
    for pair in PAIRS
]


def write_lines(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_array(file: Path, rows: Rows) -> Path:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def write_table(file: Path, rows: Rows) -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        writer = csv.DictWriter(out, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: Rows) -> Path:
    Dataset.from_list(rows).to_parquet(file)
    return file


def write_folder(folder: Path, rows: Rows) -> Path:
    """Several files of several kinds, with one between them that is no data."""
    (folder / "more").mkdir(parents=True)
    write_lines(folder / "a.jsonl", rows[:2])
    write_table(folder / "b.CSV", rows[2:4])
    write_array(folder / "more/c.json", rows[4:])
    (folder / "README.md").write_text("no data")
    (folder / ".hidden.jsonl").write_text("no data")
    return folder


def write_saved(folder: Path, rows: Rows) -> Path:
    Dataset.from_list(rows).save_to_disk(folder)
    return folder


def renamed_rows(rows: Rows, **names: str) -> Rows:
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


ALPACA = [
    {"instruction": "say where", "input": pair["prompt"], "output": pair["completion"]}
    for pair in PAIRS
]
SHAREGPT = [
    {
        "id": number,
        "conversations": [
            {"from": "human", "value": pair["prompt"]},
            {"from": "gpt", "value": pair["completion"]},
        ],
    }
    for number, pair in enumerate(PAIRS)
]
ALPACA_CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say where\n\n{pair['prompt']}"},
            {"role": "assistant", "content": pair["completion"]},
        ]
    }
    for pair in PAIRS
]
QUESTIONS = renamed_rows(PAIRS, prompt="question", completion="the answer")
COLUMNS = {"prompt": "question", "completion": "the answer"}

FORMS: dict[str, tuple[Callable[[Path, Rows], Path], str, Rows, dict[str, str], Rows]] = {
    "array": (write_array, "a.json", PAIRS, {}, PAIRS),
    "array in jsonl": (write_array, "a.jsonl", PAIRS, {}, PAIRS),
    "lines in json": (write_lines, "a.JSON", PAIRS, {}, PAIRS),
    "lines in txt": (write_lines, "a.txt", PAIRS, {}, PAIRS),
    "csv": (write_table, "a.Csv", PAIRS, {}, PAIRS),
    "tsv": (write_table, "a.TSV", PAIRS, {}, PAIRS),
    "parquet": (write_parquet, "a.PARQUET", PAIRS, {}, PAIRS),
    "parquet of chats": (write_parquet, "a.parquet", CHATS, {}, CHATS),
    "folder": (write_folder, "folder", PAIRS, {}, PAIRS),
    "saved by datasets": (write_saved, "saved", PAIRS, {}, PAIRS),
    "columns": (write_lines, "a.jsonl", QUESTIONS, COLUMNS, PAIRS),
    "columns of a table": (write_table, "a.csv", QUESTIONS, COLUMNS, PAIRS),
    "alpaca": (write_lines, "a.jsonl", ALPACA, {}, ALPACA_CHATS),
    "alpaca in parquet": (write_parquet, "a.parquet", ALPACA, {}, ALPACA_CHATS),
    "sharegpt": (write_array, "a.json", SHAREGPT, {}, CHATS),
    "sharegpt with roles": (
        write_lines,
        "a.jsonl",
        renamed_rows(CHATS, messages="conversations"),
        {},
        CHATS,
    ),
    "mapped chats": (
        write_lines,
        "a.jsonl",
        renamed_rows(CHATS, messages="dialog"),
        {"messages": "dialog"},
        CHATS,
    ),
}


def settings(source: Path | str, output: Path, **changes: Any) -> TrainSettings:
    """A run of two steps."""
    values: dict[str, Any] = {
        **{"server": "in-process", "data": str(source), "output": output, "max_steps": 2},
        **{"batch_size": 2, "report_to": [], "wire_dtype": "fp32", "keep_best": False},
    }
    return TrainSettings(**(values | changes))


def tokens(link: InProcessLink, chosen: TrainSettings) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the rows that a run would train on."""
    model = dlora.get_peft_model(link, lora())
    rows = build_trainer(chosen, model, dlora.load_tokenizer(link)).train_dataset
    return [(row["input_ids"], row["labels"]) for row in rows]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_rows(name: str, tmp_path: Path) -> None:
    """A file of any kind and form gives trl the very rows that our own form gives it, also where
    they do not stay in memory."""
    write, file, rows, columns, own = FORMS[name]
    wanted = list(load_rows(str(write_lines(tmp_path / "own.jsonl", own)))[0])
    source = write(tmp_path / file, rows)
    assert list(load_rows(str(source), columns)[0]) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MOST_IN_MEMORY", 0)
        mapped = load_rows(str(source), columns)[0]
    assert mapped.cache_files and list(mapped) == wanted


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "parquet", "columns"])
def test_every_form_is_the_same_tokens(name: str, link: InProcessLink, tmp_path: Path) -> None:
    """Tokenised rows and labels are those of our own form."""
    write, file, rows, columns, own = FORMS[name]
    wanted = tokens(link, settings(write_lines(tmp_path / "own.jsonl", own), tmp_path / "a"))
    source = write(tmp_path / file, rows)
    assert tokens(link, settings(source, tmp_path / "b", columns=columns)) == wanted


def test_a_run_on_held_out_rows_is_the_run_on_two_files(
    link: InProcessLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped columns of a Parquet file, with `val_size`, from rows that are not in memory: the same
    losses as the same rows in two files of our own form."""
    source = write_parquet(tmp_path / "a.parquet", QUESTIONS)
    chosen = settings(source, tmp_path / "run", columns=COLUMNS, val_size=0.3)
    parts = rows_of(chosen, dlora.load_tokenizer(link))
    files = [
        write_lines(tmp_path / f"{number}.jsonl", list(rows or []))
        for number, (rows, _) in enumerate(parts)
    ]
    assert [len(rows or []) for rows, _ in parts] == [5, 2]

    monkeypatch.setattr(data, "MOST_IN_MEMORY", 0)
    run = train(chosen, link)
    own = train(settings(files[0], tmp_path / "own", eval_data=str(files[1])), link)
    assert run["train_loss"] == own["train_loss"] and run["eval_loss"] == own["eval_loss"]
    assert run["rows"] == own["rows"] and run["eval_loss"] is not None


def test_several_files_are_one(tmp_path: Path) -> None:
    """Files with commas between them are read in that order; a name with a comma is one file."""
    first = write_lines(tmp_path / "a,b.jsonl", PAIRS[:2])
    second = write_table(tmp_path / "c.csv", PAIRS[2:])
    assert list(load_rows(str(first))[0]) == PAIRS[:2]
    plain = write_lines(tmp_path / "a.jsonl", PAIRS[:2])
    rows, origins = load_rows(f"{plain}, {second}")
    assert list(rows) == PAIRS
    assert origins[0] == f"{plain}:1" and origins[2] == f"{second}:3" == origins[2 - len(rows)]


def test_held_out_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A share or a number of rows is held out, by the seed; every row is in one part alone."""
    source = write_lines(tmp_path / "a.jsonl", PAIRS)

    def parts(**changes: Any) -> tuple[list[Any], list[Any], Any, Any]:
        (rows, where), (held, held_where) = rows_of(
            settings(source, tmp_path, **changes), tokenizer
        )
        return list(rows), list(held or []), where, held_where

    rows, held, where, held_where = parts(val_size=2)
    assert len(held) == 2 and sorted(map(str, rows + held)) == sorted(map(str, PAIRS))
    for one, place in zip(rows + held, [*where, *held_where], strict=True):
        assert PAIRS[int(place.rpartition(":")[2]) - 1] == one
    assert parts(val_size=2) == parts(val_size=2 / 7)
    assert parts(val_size=2)[1] != parts(val_size=2, seed=1)[1]
    assert len(parts(val_size=0.01)[1]) == 1 and parts()[1] == []
    with pytest.raises(DataError, match="val_size 7 holds out 7 of 7 rows: nothing is left"):
        parts(val_size=7)


def test_lines_of_text(tmp_path: Path) -> None:
    """Each line of a text file that is not blank is a row."""
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\n  two \x0c half\n{three\n".encode())
    rows, origins = load_rows(str(file))
    assert rows["text"] == ["one", "  two \x0c half", "{three"]
    assert list(origins) == [f"{file}:{number}" for number in (1, 3, 4)]


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_arrays_are_read_in_pieces(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an array, and the lines where they begin, are the same however little is read."""
    monkeypatch.setattr(data_files, "_PIECE", piece)
    file = tmp_path / "a.json"
    text = json.dumps(PAIRS, indent=2)
    file.write_text(f"\ufeff \n{text}\n", encoding="utf-8")
    rows, origins = load_rows(str(file))
    assert list(rows) == PAIRS
    assert list(origins) == [f"{file}:{3 + 4 * number}" for number in range(len(PAIRS))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"},\n{"text": }]', r"a\.json:2: not JSON \(Expecting value\)"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a\.json:2: not JSON \(want , or \]"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}', r"a\.json:2: not JSON \(want , or \]"),
        ("a.json", '[{"text": "a"},\n3]', r"a\.json:2: got a number, want objects in the array"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.json", '{"text": 3}', r"a\.json:1: `text` is a number, want text"),
        ("a.tsv", "text\tb\nx", r"a\.tsv:2: the row has not as many fields as the header"),
        ("a.parquet", "text", r"a\.parquet: not Parquet, behind row 0"),
        ("a.arrow", "text", r"a\.arrow: not Arrow, behind row 0"),
        ("a.jsonl", '{"question": "a"}', r"a\.jsonl:1: got columns question; want columns"),
        (
            "a.jsonl",
            '{"conversations": [{"from": "tool", "value": "a"}]}',
            r"a\.jsonl:1: `conversations` has a turn from 'tool', want human, gpt or system",
        ),
        ("a.jsonl", '{"conversations": "a"}', r"a\.jsonl:1: `conversations` must be a list of"),
        (
            "a.jsonl",
            '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
            r"a\.jsonl:1: the last of at least two messages must have role assistant",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": ""}',
            r"a\.jsonl:1: `output` is missing or empty",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "input": 3}',
            r"a\.jsonl:1: `input` is a number, want text",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "history": ["c"]}',
            r"a\.jsonl:1: `history` must be a list of pairs",
        ),
    ],
)
def test_wrong_data_has_file_and_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    """Whatever is wrong with a file is one line with its place, also where rows go to a file."""
    (tmp_path / name).write_text(content)
    for most in (0, 2**20):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=message):
            patch.setattr(data, "MOST_IN_MEMORY", most)
            load_rows(str(tmp_path / name))


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A mapping to a column that the data lacks says which there are."""
    file = write_lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"a\.jsonl:1: columns: no column 'q'; there are prompt, c"):
        load_rows(str(file), {"prompt": "q"})


def test_alpaca_without_a_chat_template(tmp_path: Path) -> None:
    """Where the model has no chat template the prompt is that of Stanford's Alpaca, with an input
    and without."""
    rows = [*ALPACA[:1], {"instruction": "say {it}", "input": "", "output": "it"}]
    first, second = load_rows(str(write_lines(tmp_path / "a.jsonl", rows)), chat=False)[0]
    assert first["completion"] == PAIRS[0]["completion"]
    assert first["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nsay where\n\n### Input:\nthe pump\n\n### Response:"
    )
    assert second["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nsay {it}\n\n### Response:"
    )


def test_earlier_turns_and_system_prompts(tmp_path: Path) -> None:
    """`system` and `history` of Alpaca, and `system` of ShareGPT, are messages of their own."""
    system = {"role": "system", "content": "be kind"}
    alpaca = {"instruction": "c", "output": "d", "system": "be kind", "history": [["a", "b"]]}
    turns = [
        {"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, "abcd", strict=True)
    ]
    own = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    for row in (alpaca, {"conversations": turns, "system": "be kind"}):
        (got,) = load_rows(str(write_lines(tmp_path / "a.jsonl", [row])))[0]
        assert got == {"prompt": [system, *own[:-1]], "completion": own[-1:]}


def test_evaluation_takes_the_same_forms(link: InProcessLink, tmp_path: Path) -> None:
    """`dlora eval` measures the same loss on other columns, and on Alpaca's, as on our own rows."""
    model, tokenizer = load_for_inference(link, None), dlora.load_tokenizer(link)

    def loss(rows: Rows, **options: Any) -> float:
        file = write_lines(tmp_path / "a.jsonl", rows)
        chosen = EvalSettings(server="s", data=str(file), limit=3, **options)
        return float(evaluate(chosen, model, tokenizer)["loss"])

    assert loss(QUESTIONS, columns=COLUMNS) == loss(PAIRS)
    assert loss(ALPACA) == loss(ALPACA_CHATS)


def test_origins_are_a_sequence() -> None:
    """Where rows stand: by index from both ends, in slices, over several files."""
    origins = Origins()
    wanted = [("a", 1), ("a", 3), ("b", 2), ("a", 9)]
    for name, number in wanted:
        origins.add(name, number)
    texts = [f"{name}:{number}" for name, number in wanted]
    assert list(origins) == texts and origins[-1] == "a:9" and origins[1:3] == texts[1:3]
    with pytest.raises(IndexError):
        origins[4]


# ----------------------------------------------------------------- dlora data


def test_data_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Form, lengths in characters, refused rows and the first texts; nothing steers a terminal."""
    rows = [*PAIRS, {"prompt": "x", "completion": ""}, {"prompt": "\x1b[2J", "completion": "y"}]
    file = write_lines(tmp_path / "a.jsonl", [rows[-1], *rows[:-1]])
    assert main(["data", str(file), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 9 rows" in out and "form         prompt, completion\n" in out
    assert "refused      1 rows; the first is" in out and "`completion` is missing" in out
    assert "  prompt     \\x1b[2J\n  completion y\n" in out
    assert "lengths      5 to " in out and "characters, median" in out and "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80


def test_data_with_a_server(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tokens with what is learned, rows that are too long or without a label, an epoch's price."""
    monkeypatch.setenv("DLORA_CACHE", str(tmp_path / "cache"))
    long = {"prompt": "a", "completion": " b" * 60}
    file = write_lines(tmp_path / "a.jsonl", [*PAIRS, long])
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        words = ["data", str(file), "--server", server.address, "--max_length", "40"]
        assert main([*words, "--batch_size", "4", "--show", "1", "--link", "home"]) == 0
    out = capsys.readouterr().out
    assert f"too long     1 rows (the first is {file}:8) over max_length 40" in out
    assert "no label     no row without a token to learn" in out
    assert " tokens, median" in out and "  read       " in out and "  learned    " in out
    assert "an epoch     2 steps of 4 rows, " in out and " round trips, on the plain wire" in out
    assert "takes        about " in out and "over 20 Mbit/s up, 100 down, 40 ms" in out


def test_a_histogram_counts_every_row() -> None:
    """Each row is in one of at most eight ranges, which cover all lengths."""
    for lengths in ([5], [1, 1000], list(range(1, 100)), [7] * 9):
        lines = list(histogram(lengths))
        assert 1 <= len(lines) <= 8 and max(map(len, lines)) <= 80
        assert sum(int(line.split()[-1]) for line in lines) == len(lengths)


def test_figures_have_units_that_a_person_reads() -> None:
    """Bytes and seconds are in the unit that leaves few digits."""
    assert [readable_bytes(count) for count in (0, 999, 1.2e6, 3.456e9, 5e13)] == [
        *("0 B", "999 B", "1.2 MB", "3.46 GB", "50 TB")
    ]
    assert [readable_time(seconds) for seconds in (0.12, 45, 90, 7200, 400_000)] == [
        *("0.12 s", "45 s", "1.5 min", "2 h", "5 days")
    ]


def test_all_rows_refused_is_one_error(tmp_path: Path) -> None:
    """Where no row can be trained on, the first reason is the error."""
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "x", "completion": ""}] * 2)
    for most in (0, 2**20):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match=":1: `compl"):
            patch.setattr(data, "MOST_IN_MEMORY", most)
            list(describe(DataSettings(data=str(file))))
