"""Text arrives as it was given, through every command that takes text, or is refused by name."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import openai
import pytest
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

import dlora
from dlora.cli.commands import COMMANDS
from dlora.cli.flags import flags_of
from dlora.cli.main import _any_character, main
from dlora.cli.parser import parse
from dlora.cli.use import _standard_input
from dlora.cli.values import convert, dump_yaml, members
from dlora.cloud.model import CloudModel
from dlora.edge.data import check_choices, load_rows, read_rows
from dlora.edge.grpc_link import Access
from dlora.embedded import InProcessLink
from dlora.errors import DataError, UsageError
from dlora.files import default_cache
from dlora.inference.answer import complete_file, load_for_inference
from dlora.inference.api import ApiServer, build_app
from dlora.inference.evaluate import evaluate
from dlora.inference.prompts import load_prompts
from dlora.inference.settings import EvalSettings
from dlora.training.run import train
from dlora.training.settings import TrainSettings
from dlora.training.trainer_settings import TrainerTexts, check_trainer

TEXTS = (
    *("null", "~", "---", "...", "# def f():", "[STOP]", "{a: b}", "yes", "off", "1e3", "0x10"),
    *("--x", "a: b", "@x", "%y", "&z", "*w", "!!t", "'quoted'", '"', "\\n", "<s>", "2001-1-1"),
    *(" with spaces around ", "tab\there", "form\x0cfeed", "vertical\x0btab", "file\x1cseparator"),
    *("next\x85line", "line\u2028separator", "paragraph\u2029separator", "no\ufeffbreak"),
    *("naïve", "漢字", "😀", "e\u0301", "right\u200fto left", "nul\x00byte"),
)
LONE = "hi \ud83d there"
SERVED = ["--server", "a:1"]


def rows_of(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of rows, in the form that its suffix says."""
    with file.open("w", encoding="utf-8", newline="") as out:
        if file.suffix.lower() == ".csv":
            writer = csv.DictWriter(out, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return file


# ----------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_that_takes_text_takes_any(name: str) -> None:
    """No flag reads text as YAML, as nothing, or as another text."""
    for flag in flags_of(COMMANDS[name]).values():
        if str in members(flag.kind) and get_origin(flag.kind) is not list:
            for text in TEXTS:
                assert convert(text, flag.kind, flag.inside) == text, (flag.name, text)
        if Path in members(flag.kind):
            for text in (text for text in TEXTS if text != "~"):
                assert convert(text, flag.kind) == Path(text), (flag.name, text)


def test_text_inside_of_a_dictionary() -> None:
    """A flag for one value of a dictionary takes any text where the value is one; words that are
    numbers, lists and switches elsewhere still are.
    """
    command = ["train", *SERVED, "--data", "d", "--output", "o"]
    for text in TEXTS:
        assert read("generate", *SERVED, f"--generation.stop_strings={text}").generation == {
            "stop_strings": text
        }
        for name in ("run_name", "eos_token", "dataset_text_field"):
            assert read(*command, f"--trainer.{name}", text).trainer == {name: text}
    several = read("generate", *SERVED, "--generation.stop_strings", '["a", "b"]')
    assert several.generation == {"stop_strings": ["a", "b"]}
    words = ["--trainer.save_strategy", "no", "--trainer.data_seed", "3", "--trainer.shuffle", "no"]
    assert read(*command, *words).trainer == {
        "save_strategy": "no",
        "data_seed": 3,
        "shuffle": False,
    }


def test_every_text_of_the_trainer_is_known() -> None:
    """No argument of trl that is text is read as YAML."""
    unknown = set()
    configs = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig}
    for task, config in configs.items():
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            kinds = members(hints[field.name])
            is_more = any({dict, bool} & {one, get_origin(one)} for one in kinds)
            if not is_more and {str, list[str]} & set(kinds):
                with suppress(UsageError):  # it cannot be given here
                    check_trainer({field.name: "x"}, task)
                    unknown.add(field.name)
    assert unknown == TrainerTexts.__annotations__.keys()


def test_text_behind_a_flag_and_in_a_settings_file(tmp_path: Path) -> None:
    """A text is the same behind a flag, behind its =, and in a file that --print_config wrote."""
    command = ["generate", *SERVED]
    for text in TEXTS:
        assert read(*command, f"--prompt={text}").prompt == text
    file = tmp_path / "settings.yaml"
    file.write_text(dump_yaml({"prompt": "~", "stop": list(TEXTS)}), encoding="utf-8")
    settings = read(*command, "--config", str(file))
    assert (settings.prompt, settings.stop) == ("~", list(TEXTS))
    assert read("chat", *SERVED, "--system=# def f():").system == "# def f():"


def read(*words: str) -> Any:
    """The settings that a command line makes."""
    request = parse(list(words), COMMANDS)
    assert not isinstance(request, str)
    return request[1]


def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """What a shell hands over as a broken character is named, and not answered."""
    for text in (LONE, "caf\udce9"):
        assert main(["generate", *SERVED, "--prompt", text]) == 2
        assert "want UTF-8 text" in capsys.readouterr().err


def test_standard_input_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt on standard input is what was written, in every locale; other bytes are refused."""
    for text in (*TEXTS, "one\r\ntwo\rthree\n"):
        stream = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1")
        monkeypatch.setattr(sys, "stdin", stream)
        assert _standard_input() == text.removeprefix("\ufeff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="latin-1"))
    with pytest.raises(DataError, match="standard input: not UTF-8"):
        _standard_input()


def test_standard_output_takes_any_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that goes to a file or a pipe is UTF-8 in every locale."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with _any_character():
        print("漢字 \ud83d", flush=True)
    assert raw.getvalue() == "漢字 ".encode() + rb"\ud83d" + b"\n"
    assert (stream.encoding, stream.errors) == ("ascii", "strict")


def test_a_home_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in a path means the home wherever the path is read: a run and its checkpoints meet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    rows_of(tmp_path / "d.jsonl", [{"text": "a"}])
    (tmp_path / "run.yaml").write_text("server: a:1\ndata: ~/d.jsonl\noutput: ~/run\n")
    settings = read("train", "--config", "~/run.yaml")
    assert settings.output == tmp_path / "run"
    assert load_rows(settings.data)[0]["text"] == ["a"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_home_is_one_place_from_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path of every settings class is expanded when the settings are made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given: dict[str, Any] = {}
    for flag in flags_of(COMMANDS[name]).values():
        if Path in members(flag.kind):
            given[flag.name] = Path("~", flag.name)
        elif flag.kind == list[Path]:
            given[flag.name] = [Path("~", flag.name)]
        elif flag.is_required:
            given[flag.name] = "a:1"
    given |= {"keys": {"action": "token", "tenant": "t"}, "eval": {"tasks": ["a"]}}.get(name, {})
    settings = COMMANDS[name].settings(**given)
    for one, path in given.items():
        if isinstance(path, Path) or (isinstance(path, list) and isinstance(path[0], Path)):
            want = tmp_path / one
            assert getattr(settings, one) == (want if isinstance(path, Path) else [want])


def test_a_home_is_one_place_in_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are the folder of a cache, and files that say who this is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DLORA_CACHE", "~/cache")
    assert default_cache() == tmp_path / "cache"
    assert Access(ca=Path("~/ca.pem")).ca == tmp_path / "ca.pem"
    with pytest.raises(
        UsageError, match="output: got '~no-such-user/x', want a path: no such home"
    ):
        TrainSettings(server="a:1", data="d", output=Path("~no-such-user/x"))


# ----------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json", ".csv", ".CSV"])
def test_rows_arrive_as_written(suffix: str, tmp_path: Path) -> None:
    """Prompts and completions of a data file are the very texts in it, however it is spelled."""
    pairs = [{"prompt": text, "completion": text[::-1]} for text in TEXTS]
    file = rows_of(tmp_path / f"rows{suffix}", pairs)
    assert list(load_rows(str(file))[0]) == pairs
    assert load_prompts(file) == list(TEXTS)
    texts = rows_of(tmp_path / f"texts{suffix}", [{"text": text} for text in TEXTS])
    assert load_rows(str(texts))[0]["text"] == list(TEXTS)


def test_messages_and_choices_arrive_as_written(tmp_path: Path) -> None:
    """The same for chats, in training and as prompts, and for questions with choices."""
    for text in TEXTS:
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        file = rows_of(tmp_path / "chat.jsonl", [{"messages": chat}])
        assert load_rows(str(file))[0][0] == {"prompt": chat[:1], "completion": chat[1:]}
        assert load_prompts(file) == [chat]
        asked = {"prompt": text, "choices": [text, "other"], "answer": 0}
        file = rows_of(tmp_path / "choices.jsonl", [asked])
        assert check_choices(read_rows(str(file)))[0].choices == (text, "other")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_prompt_a_line_is_split_at_newlines_alone(end: str, tmp_path: Path) -> None:
    """Form feeds and Unicode's separators stand inside of prompts, as they were written."""
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{end.join(TEXTS)}{end}{end}".encode())
    assert load_prompts(tmp_path / "prompts.txt") == list(TEXTS)


def test_long_fields_are_read(tmp_path: Path) -> None:
    """A field of a CSV file may be as long as the file."""
    long = "word " * 60_000
    file = rows_of(tmp_path / "a.csv", [{"prompt": long, "completion": "a"}])
    assert load_rows(str(file))[0][0]["prompt"] == long


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": LONE, "completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": LONE}, "completion"),
        ({"text": LONE}, "text"),
        (
            {
                "messages": [
                    {"role": "user", "content": LONE},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages",
        ),
    ],
)
def test_half_a_character_is_named(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    """A lone surrogate, which JSON can hold and no tokenizer takes, is one line with its place."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    for read in (load_rows, lambda source: load_prompts(Path(source))):
        if read is load_rows or name in ("prompt", "messages"):
            with pytest.raises(
                DataError, match=rf"rows\.jsonl:1: `{name}` has half of a character"
            ):
                read(str(file))


def test_every_text_file_has_its_encoding_named() -> None:
    """No file of the package is read or written in the locale's encoding."""
    unnamed = []
    for file in sorted(Path(dlora.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {one.arg for one in node.keywords}
            modes = [one.value for one in node.args if isinstance(one, ast.Constant)]
            is_text = called in ("read_text", "write_text") or (
                called == "open" and any(mode in ("r", "w", "a", "x", "r+") for mode in modes)
            )
            if is_text and "encoding" not in words:
                unnamed.append(f"{file.name}:{node.lineno}")
    assert [place for place in unnamed if not place.startswith("tokenizer_trial.py")] == []


# ----------------------------------------------------------------- roles and tools


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": "", "tool_calls": [CALL]}, "`tool_calls` of a message is not supported"),
        ({"content": None, "tool_calls": [CALL]}, "`tool_calls` of a message is not supported"),
        ({"content": "x", "function_call": CALL}, "`function_call` of a message is not supported"),
        ({"content": ""}, "the last message is empty"),
        ({"content": None}, r"`messages` must be a list of \{role, content\}"),
    ],
)
def test_an_empty_answer_is_not_taught(
    answer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """What would be left out of a message, and an answer without text, have file and line."""
    chat = [{"role": "user", "content": "weather?"}, {"role": "assistant", **answer}]
    file = rows_of(tmp_path / "chat.jsonl", [{"messages": chat}])
    with pytest.raises(DataError, match=rf"chat\.jsonl:1: {message}"):
        load_rows(str(file))


def test_calls_without_content_fall_where_they_stand(tmp_path: Path) -> None:
    """Also in the middle of a chat, and with tools beside it; nothing empty is no fault."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = {"messages": [*chat, {**chat[0], "tool_calls": []}, chat[1]], "tools": None}
    assert load_rows(str(rows_of(tmp_path / "a.jsonl", [plain])))[0]
    for wrong in (
        {"messages": [chat[0], {**chat[1], "tool_calls": [CALL]}, *chat]},
        {"messages": chat, "tools": [CALL]},
    ):
        file = rows_of(tmp_path / "b.jsonl", [plain, wrong])
        with pytest.raises(DataError, match=r"b\.jsonl:2: `tool(s|_calls)`"):
            load_rows(str(file))


@pytest.fixture(scope="module")
def refusing(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[InProcessLink]:
    """A model whose template takes no system prompts, as those of Gemma and Mistral."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    strict = PreTrainedTokenizerFast.from_pretrained(folder)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    with closing(InProcessLink(cloud_models("llama"), strict)) as link:
        yield link


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = [{"role": "system", "content": "be kind"}, *CHAT]


def test_a_refused_role_has_file_and_line(refusing: InProcessLink, tmp_path: Path) -> None:
    """`train`, `eval` and a file of prompts name the row whose roles the template refuses."""
    file = rows_of(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": SYSTEM}])
    said = "the model's chat template refused these messages: System role not supported"
    fine = rows_of(tmp_path / "fine.jsonl", [{"messages": CHAT}])
    for options in ({"data": str(file)}, {"data": str(fine), "eval_data": str(file)}):
        settings = TrainSettings(server="s", output=tmp_path / "run", report_to=[], **options)
        with pytest.raises(DataError, match=rf"chat\.jsonl:2: {said}"):
            train(settings, refusing)

    model, tokenizer = load_for_inference(refusing, None), dlora.load_tokenizer(refusing)
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: {said}"):
        evaluate(EvalSettings(server="s", data=str(file)), model, tokenizer)
    with pytest.raises(UsageError, match=rf"prompt 2 of 2: {said}"):
        next(complete_file(model, tokenizer, load_prompts(file), batch_size=1, chat=False))


def test_a_refused_role_is_a_bad_request(refusing: InProcessLink) -> None:
    """The API's client is told what was wrong, not that the server is broken."""
    model, tokenizer = load_for_inference(refusing, None), dlora.load_tokenizer(refusing)
    app = build_app(model, tokenizer, name="m")
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, max_retries=0, api_key="none") as client,
        pytest.raises(openai.BadRequestError, match="System role not supported"),
    ):
        client.chat.completions.create(model="m", messages=SYSTEM[:2], max_tokens=2)
