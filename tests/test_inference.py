"""generate, chat, eval, info and lm-eval with a private adapter, against local peft where there is
a reference.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, lora, make_local, make_split
from helpers import dlora_command
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cli.main import main
from dlora.edge.data import ChoiceRow, check_choices
from dlora.errors import DataError, UsageError
from dlora.inference.answer import Continuing, complete, load_for_inference
from dlora.inference.chat import Chat
from dlora.inference.evaluate import choice_scores, evaluate, wilson
from dlora.inference.settings import EvalSettings
from dlora.server.server import Server

Links = Callable[[str], Any]


@pytest.fixture(scope="module")
def link(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A connection to it."""
    made = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(link: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose effect on the answers is large."""
    path = tmp_path_factory.mktemp("adapters") / "mine"
    make_split(link, lora()).save_pretrained(path)
    return path


@pytest.fixture
def wire() -> str:
    """Where the adapter is computed; the same answers on another, says `on_each_wire`."""
    return "plain"


on_each_wire = pytest.mark.parametrize("wire", ["plain", "hosted"])


@pytest.fixture
def split(link: Any, folder: Path, wire: Any) -> Any:
    """The split model with it, on the exact wire."""
    return load_for_inference(
        link, folder, wire=wire, wire_dtype="fp32", upload_consent=wire == "hosted"
    )


@pytest.fixture
def words(server: Server, folder: Path, wire: str) -> list[str]:
    """The flags that every command needs."""
    flags = ["--server", server.address, "--adapter", str(folder), "--wire_dtype", "fp32"]
    return [*flags, "--wire", wire, "--upload_consent", str(wire == "hosted").lower()]


def local_answer(
    tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int = 6, special: bool = True
) -> str:
    """Local peft's greedy answer."""
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    ids = (
        make_local("llama", lora())
        .eval()
        .generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    )
    return tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


# ----------------------------------------------------------------- generate


@on_each_wire
def test_generate_answers_a_prompt_and_standard_input(
    words: list[str],
    wire: str,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer on standard output is local peft's, and what it cost is on standard error."""
    want = local_answer(tokenizer, "the desk")
    assert main(["generate", *words, "--prompt", "the desk", "--max_new_tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == want + "\n"
    trips = {"plain": "4.0 round trips", "hosted": "1.0 round trips"}[wire]
    assert "6 tokens" in captured.err and trips in captured.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("the desk"))
    assert main(["generate", *words, "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == want + "\n"


@on_each_wire
def test_generate_continues_a_file(
    words: list[str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of prompts is answered in batches; answers that are there, even if cut off, are kept
    and continued.
    """
    prompts = [f"the desk of {'the message ' * number}" for number in range(5)]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [
        "generate",
        *words,
        "--prompts",
        str(file),
        "--output",
        str(output),
        "--max_new_tokens",
        "6",
    ]
    assert main([*command, "--batch-size", "2"]) == 0
    whole = output.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert rows == [
        {"prompt": prompt, "completion": local_answer(tokenizer, prompt)} for prompt in prompts
    ]
    output.write_text(
        whole[: whole.index("\n", whole.index("\n") + 1) + 20]
    )  # two rows and a piece of the third
    assert main([*command, "--batch-size", "2"]) == 0
    assert output.read_text() == whole
    for damage in ("no answers at all", whole.replace("completion", "answer"), "x" + whole):
        output.write_text(damage)
        assert main(command) == 2
        assert output.read_text() == damage, "nothing of somebody else's file is lost"
    output.write_text(whole)
    assert main([*command[:-4], "--output", str(file)]) == 2
    other = tmp_path / "other.txt"
    other.write_text("another prompt\n")
    assert main(["generate", *words, "--prompts", str(other), "--output", str(output)]) == 2
    assert "does not answer the prompt there" in capsys.readouterr().err
    assert output.read_text() == whole


@pytest.mark.parametrize("drafts", [[], ["--prompt-lookup", "3"]])
def test_generate_puts_messages_into_the_chat_template(
    words: list[str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    drafts: list[str],
) -> None:
    """Messages, and with --chat plain prompts, are read through the template; drafts do not change
    the answers.
    """
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "the desk"}]
    file.write_text(
        json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "the desk"}) + "\n"
    )
    assert (
        main(
            ["generate", *words, "--prompts", str(file), "--chat", "--max_new_tokens", "6", *drafts]
        )
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    want = local_answer(tokenizer, "[user] the desk\n[assistant] ", special=False)
    assert [row["completion"] for row in rows] == [want, want]


def test_generate_answers_with_beams_and_up_to_the_limit(
    words: list[str], tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beams are shown at their end; an answer ends where the server's longest sequence does."""
    assert (
        main(["generate", *words, "--prompt", "the desk", "--max_new_tokens", "6", "--stop", "zzz"])
        == 0
    )
    assert capsys.readouterr().out == local_answer(tokenizer, "the desk") + "\n"
    beams = ["--generation", '{"num_beams": 3}', "--max_new_tokens", "6"]
    assert main(["generate", *words, "--prompt", "the desk", *beams]) == 0
    assert len(capsys.readouterr().out) > 1
    prompt = "desk " * 220
    length = len(tokenizer(prompt)["input_ids"])
    assert 150 < length < 256
    assert main(["generate", *words, "--prompt", prompt, "--max_new_tokens", "256"]) == 0
    assert f"{256 - length} tokens" in capsys.readouterr().err


def test_generate_without_adapter_is_the_served_model(
    server: Server, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without adapter a token takes one round trip, and the answer is the base model's."""
    from conftest import make_base

    batch = tokenizer("the desk", return_tensors="pt")
    ids = (
        make_base("llama")
        .eval()
        .generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=6)
    )
    assert (
        main(
            [
                "generate",
                "--server",
                server.address,
                "--prompt",
                "the desk",
                "--max_new_tokens",
                "6",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert (
        captured.out
        == tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"
    )
    assert "1.0 round trips" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--prompts", "b.txt"], "give prompt or prompts, not both"),
        (["--prompt", "a", "--output", "b"], "output needs prompts"),
        (["--prompt", ""], "has no tokens"),
        (["--prompt", "word " * 400], "this server takes sequences of up to 256"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: got -1"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt: no such file"),
        (["--prompt", "a", "--adapter", "nowhere"], "--adapter: no such folder: nowhere"),
        (
            ["--prompt", "a", "--generation", '{"cache_implementation": "static"}'],
            "'static' is not supported",
        ),
        (
            ["--prompt", "a", "--generation", '{"foo": 1}'],
            "foo is not an option of transformers.GenerationConfig",
        ),
        (
            ["--prompt", "a", "--generation", '{"num_return_sequences": 2}'],
            "several answers to a prompt",
        ),
        (
            ["--prompt", "a", "--generation", '{"num_beams": 2, "num_beam_groups": 7}'],
            "transformers refused",
        ),
    ],
)
def test_generate_refuses_with_one_line(
    words: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be answered ends with one line that says why."""
    assert main(["generate", *words, *flags]) in (1, 2)
    error = capsys.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("dlora: "))
    assert message in line and error.endswith(f"{line}\n") and "Traceback" not in error


# ----------------------------------------------------------------- chat


@on_each_wire
def test_chat_reads_only_what_is_new(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each turn answers as local peft does on the whole history, and sends only the tokens since
    the last one.
    """
    chat = Chat(split, tokenizer, system="the message", max_new_tokens=6, do_sample=False)
    for turn, text in enumerate(("the desk", "of the desk", "the message of the desk")):
        said: list[str] = []
        tokens = split.meter.tokens
        whole = tokenizer.apply_chat_template(
            [*chat.messages, {"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=False,
        )
        got = chat.say(text, said.append)
        assert got == "".join(said) == local_answer(tokenizer, whole, special=False)
        if turn:
            assert split.meter.tokens - tokens < len(tokenizer(whole)["input_ids"])
    assert [one["role"] for one in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert split.meter.retries == 0
    chat.forget()
    assert len(chat.messages) == 1
    chat.close()


def test_stopped_answer_stays_in_the_history(
    split: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Ctrl-C ends the answer and keeps the chat: what was said is history, and the next turn reads
    it.
    """
    chat = Chat(split, tokenizer, max_new_tokens=30, do_sample=False)
    put = []

    def stop(text: str) -> None:
        put.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("the desk", stop)
    assert [one["role"] for one in chat.messages] == ["user", "assistant"]
    assert chat.messages[-1]["content"].startswith("".join(put[:1]))
    whole = tokenizer.apply_chat_template(
        [*chat.messages, {"role": "user", "content": "of"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat.say("of", lambda _: None) == local_answer(tokenizer, whole, 30, special=False)
    chat.close()


def test_failed_answer_can_be_asked_again(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A message that cannot be answered leaves the history as it was."""
    chat = Chat(split, tokenizer, max_new_tokens=6, do_sample=False)
    with pytest.raises(UsageError, match="sequences of up to 256"):
        chat.say("word " * 400, lambda _: None)
    assert chat.messages == []


def test_chat_command(words: list[str]) -> None:
    """`dlora chat` answers line by line, begins anew on /new, and leaves at the end of input."""
    command = [
        sys.executable,
        "-m",
        "dlora",
        "chat",
        *words,
        "--max-new-tokens",
        "4",
        "--temperature",
        "0",
    ]
    lines = "the desk\n" + "word " * 400 + "\n/new\nthe desk\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a new chat" in done.stdout
    first, second = done.stdout.split("a new chat")
    answer = first.split("\n> ")[1].strip()
    assert answer and answer in second
    assert done.stderr.count("round trips") == 2
    assert "sequences of up to 256" in done.stderr, "what cannot be answered does not end the chat"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(words: list[str]) -> None:
    """SIGINT during an answer of `dlora chat` ends that answer; the next line is answered, with its
    history.
    """
    with subprocess.Popen(
        dlora_command("chat", *words, "--max-new-tokens", "150", "--temperature", "0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
    ) as process:
        timer = threading.Timer(90, process.kill)
        timer.start()
        seen = ""
        while not seen.endswith("\n> "):
            said = process.stdout.read(1)
            assert said, "it ended before it asked for a message"
            seen += said
        process.stdin.write("the desk\n")
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate("the desk\n/quit\n")
        timer.cancel()
    assert process.returncode == 0
    assert text.count("[stopped]") == 1
    assert len(text.partition("[stopped]")[2].partition("\n> ")[2]) > 0, (
        "the next message is answered"
    )


@on_each_wire
def test_continuing_takes_up_any_other_sequence(split: Any) -> None:
    """The kept cache never shows: sequences that share all, some or nothing with it get a fresh
    one's answers.
    """
    turns, local = Continuing(split), make_local("llama", lora()).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    start = [7, 8, 9, 10, 11]
    first = turns.generate(torch.tensor([start]), **options)[0].tolist()
    for ids in ([*first, 12], first, start, [*start[:2], 40, 41], [50], [*first, 12], [*first, 12]):
        want = local.generate(input_ids=torch.tensor([ids]), **options)
        assert torch.equal(turns.generate(torch.tensor([ids]), **options), want)
        drafted = turns.generate(torch.tensor([ids]), prompt_lookup_num_tokens=2, **options)
        assert torch.equal(drafted, want)
    assert split.meter.retries == 0
    turns.close()


# ----------------------------------------------------------------- eval

QUESTIONS = [
    ("the desk of the message:", [" the desk", " message of the", " it"]),
    ("a much longer prompt about the desk and its message:", [" no", " the message of the desk"]),
    ("desk:", [" a", " b", " c", " d"]),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_choice_scores_equal_whole_sequences(
    links: Links, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    """Log-likelihoods over a shared prompt are those of local peft on every sequence by itself."""
    split, local = (
        make_split(links(family), lora(family)).eval(),
        make_local(family, lora(family)).eval(),
    )
    got = choice_scores(split, tokenizer, QUESTIONS)
    assert split.meter.passes == 2
    for (prompt, choices), scores in zip(QUESTIONS, got, strict=True):
        for choice, score in zip(choices, scores, strict=True):
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprobs = local(input_ids=ids).logits.float().log_softmax(-1)
            want = sum(logprobs[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
            assert score == pytest.approx(want, rel=1e-4)


def test_one_token_choices_take_one_pass(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where every choice has one token the prompts alone are read."""
    scores = choice_scores(split, tokenizer, [("desk:", ["a", "b"])])
    assert split.meter.passes == 1
    assert scores[0][0] != scores[0][1]


@on_each_wire
def test_eval_command_scores_choices(
    words: list[str],
    tmp_path: Path,
    split: Any,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Accuracy is the share of rows whose right choice scores highest, whatever the batches."""
    scores = choice_scores(split, tokenizer, QUESTIONS)
    best = [max(range(len(score)), key=score.__getitem__) for score in scores]
    rows = [
        {"prompt": QUESTIONS[0][0], "choices": QUESTIONS[0][1], "answer": best[0]},
        {"prompt": QUESTIONS[1][0], "choices": QUESTIONS[1][1], "answer": QUESTIONS[1][1][best[1]]},
        {"prompt": QUESTIONS[2][0], "choices": QUESTIONS[2][1], "answer": (best[2] + 1) % 4},
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for batch_size in ("1", "8"):
        output = tmp_path / f"result-{batch_size}.json"
        command = [
            "eval",
            *words,
            "--data",
            str(file),
            "--output",
            str(output),
            "--batch-size",
            batch_size,
        ]
        assert main(command) == 0
        found = json.loads(output.read_text())
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["rows"] == 3 and found["cost"]["round_trips"] > 0
    assert "accuracy" in capsys.readouterr().out


@on_each_wire
def test_eval_measures_loss_and_exact_match(
    words: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Loss is the mean over all supervised tokens, as local peft has it; exact match compares
    greedy answers.
    """
    prompts = ["the desk", "the message of the desk", "of"]
    rows = [{"prompt": prompt, "completion": local_answer(tokenizer, prompt)} for prompt in prompts]
    rows[1]["completion"] = " no"
    file, output = tmp_path / "rows.jsonl", tmp_path / "result.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", *words, "--data", str(file), "--output", str(output), "--batch-size", "2"]
    assert main([*command, "--exact-match", "--max-new-tokens", "6"]) == 0
    found = json.loads(output.read_text())
    local = make_local("llama", lora()).eval()
    total, count = 0.0, 0
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor(
            [[*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            logprobs = local(input_ids=ids).logits.log_softmax(-1)
        total -= sum(logprobs[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    assert found["supervised_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["exact_match"] == pytest.approx(2 / 3)
    low, high = found["exact_match_95"]
    assert low < 2 / 3 < high


def test_wilson_interval() -> None:
    """Known values (Newcombe 1998, table I: 81 of 263), and ends that stay within 0 and 1."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    assert 0.1 < wilson(0, 20)[1] < 0.2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "choices": ["a", "b"], "answer": 0}, "`prompt` is missing"),
        ({"prompt": "p", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"prompt": "p", "choices": "ab", "answer": 0}, "at least two texts"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "want one of the choices, or 0 to 1"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": "c"}, "want one of the choices"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "want one of the choices"),
    ],
)
def test_bad_choices_name_their_line(row: dict[str, Any], message: str) -> None:
    """A row that cannot be scored is refused with file and line."""
    with pytest.raises(DataError, match=f"file.jsonl:3: .*{message}"):
        check_choices([("file.jsonl:3", row)])
    assert check_choices([("x", {"prompt": "p", "choices": ["a", "b"], "answer": "b"})]) == [
        ChoiceRow("p", ("a", "b"), 1)
    ]


def test_exact_match_needs_completions(
    split: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rows of plain text have no answer to compare with, and rows with choices are scored
    otherwise.
    """
    for row, message in (
        ({"text": "the desk"}, "needs rows with prompt"),
        ({"choices": ["a"]}, "leave it out"),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UsageError, match=message):
            evaluate(EvalSettings(server="x", data=str(file), exact_match=True), split, tokenizer)


def test_lm_eval_gives_local_numbers(
    split: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval-harness on the split model and on local peft gives the same numbers, for choices and
    for answers.
    """
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"q": prompt, "choices": choices[:2], "gold": 1} for prompt, choices in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (tmp_path / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n" + common
    )
    (tmp_path / "answer.yaml").write_text(
        'task: answer\noutput_type: generate_until\ndoc_to_target: "{{choices[0]}}"\n'
        "generation_kwargs: {until: ['Q'], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n" + common
    )
    found = []
    for model in (make_local("llama", lora()).eval(), split):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=200, device="cpu")
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        result = simple_evaluate(
            lm,
            tasks=["choose", "answer"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        found.append(result)
    local, ours = found
    assert ours["results"]["choose"]["acc,none"] == local["results"]["choose"]["acc,none"]
    assert ours["results"]["choose"]["acc_norm,none"] == local["results"]["choose"]["acc_norm,none"]
    for one, other in zip(ours["samples"]["choose"], local["samples"]["choose"], strict=True):
        scores = [
            [float(score) for score, _ in sample["filtered_resps"]] for sample in (one, other)
        ]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    for one, other in zip(ours["samples"]["answer"], local["samples"]["answer"], strict=True):
        assert one["resps"] == other["resps"]
    assert split.meter.passes > 0, "answers use the KV cache"


# ----------------------------------------------------------------- info


def test_info_tells_server_adapter_and_fit(
    server: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dlora info` names model, limits, size and sites, and says whether an adapter fits a
    server.
    """
    assert main(["info", "--server", server.address, "--adapter", str(folder)]) == 0
    text = capsys.readouterr().out
    for part in (
        "example-org/llama",
        "21 of 21 modules at 12 sites",
        "3 active: 4 round trips",
        "rank 4",
        "fit",
    ):
        assert part in text, part
    assert text.split("fit")[-1].split("\n")[0].strip() == "yes"
    config = json.loads((folder / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "x/y"})
    )
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "r_proj"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, other / "adapter_model.safetensors")
    assert main(["info", "--server", server.address, "--adapter", str(other)]) == 0
    text = capsys.readouterr().out
    assert "made for x/y" in text and "no: this server has no" in text and "r_proj" in text
    wide = {
        name: tensor.repeat(1, 2) if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(wide, other / "adapter_model.safetensors")
    assert main(["info", "--server", server.address, "--adapter", str(other)]) == 0
    assert "has widths (128, 32), here (64, 32)" in capsys.readouterr().out
    (other / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert main(["info", "--adapter", str(other)]) == 2
    assert main(["info", "--adapter", str(tmp_path)]) == 2
    assert main(["info"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_complete_counts_tokens(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Padding behind a finished answer is not counted as new tokens."""
    prompts, options = ["the desk", "of"], {"max_new_tokens": 6, "do_sample": False}
    texts, num_tokens = complete(split, tokenizer, prompts, **options)
    assert len(texts) == 2 and num_tokens == 12
    # Let the first answer end with its second token, which the second answer does not have.
    end = tokenizer(texts[0], add_special_tokens=False)["input_ids"][1]
    assert end not in tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    cut, num_tokens = complete(split, tokenizer, prompts, eos_token_id=end, **options)
    assert cut[1] == texts[1] and texts[0].startswith(cut[0]) and num_tokens == 2 + 6
