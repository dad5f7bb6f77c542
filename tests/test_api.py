"""The OpenAI-compatible server, through OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import NO_DRAIN, lora, make_local, make_split
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.errors import PeerLost
from dlora.inference.answer import load_for_inference, share_ends
from dlora.inference.api import ApiServer, build_app
from dlora.server.server import Server

QUESTION = [{"role": "system", "content": "the message"}, {"role": "user", "content": "the desk"}]


def key(text: str) -> dict[str, str]:
    """An API key as an argument, where no scanner takes it for a secret."""
    return {"api_key": text}


@pytest.fixture(scope="module")
def split(
    cloud_models: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Iterator[Any]:
    """A split model over a real socket, on the exact wire."""
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
        model = make_split(link, lora()).eval()
        model.generation_config.suppress_tokens = unreadable(tokenizer)
        yield model
        link.close()


def unreadable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that a random model should not say: pieces of UTF-8 characters show differently in
    pieces.
    """
    return [number for number in range(300) if not tokenizer.decode([number]).strip().isalnum()]


@pytest.fixture(scope="module")
def url(split: Any, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """The API over it."""
    app = build_app(split, tokenizer, name="mine", api_key="open sesame", max_new_tokens=8)
    with ApiServer(app, "127.0.0.1", 0).running() as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, pointed at it."""
    with openai.OpenAI(base_url=url, max_retries=0, **key("open sesame")) as made:
        yield made


def local_answer(tokenizer: PreTrainedTokenizerFast, prompt: Any, **options: Any) -> str:
    """Local peft's answer to messages or to a text."""
    text = prompt
    if not isinstance(prompt, str):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(text, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    local = make_local("llama", lora()).eval()
    torch.manual_seed(5)
    ids = local.generate(
        **inputs, **({"do_sample": False, "suppress_tokens": unreadable(tokenizer)} | options)
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_is_local_pefts(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat completion at temperature 0 is local peft's greedy answer, with usage and reason of
    its end.
    """
    answer = client.chat.completions.create(
        model="mine", messages=QUESTION, temperature=0, max_tokens=6
    )
    assert answer.choices[0].message.content == local_answer(tokenizer, QUESTION, max_new_tokens=6)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6


def test_streamed_chat_is_the_same(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A streamed chat comes in several pieces which together are the whole answer."""
    stream = client.chat.completions.create(
        model="mine",
        messages=QUESTION,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces) == local_answer(tokenizer, QUESTION, max_new_tokens=8)


def test_completions_and_models(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """Plain completions answer without template, streamed or not; the list of models has the one
    model.
    """
    want = local_answer(tokenizer, "the desk", max_new_tokens=6)
    answer = client.completions.create(model="mine", prompt="the desk", temperature=0, max_tokens=6)
    assert answer.choices[0].text == want
    stream = client.completions.create(
        model="mine", prompt="the desk", temperature=0, max_tokens=6, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == want
    assert [model.id for model in client.models.list()] == ["mine"]


def test_sampling_follows_the_request(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A seed makes samples repeat as local peft's would; without temperature the API samples at
    1.
    """
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 0}
    want = local_answer(tokenizer, QUESTION, **options, temperature=0.9, top_p=0.8)
    got = client.chat.completions.create(
        model="mine", messages=QUESTION, temperature=0.9, top_p=0.8, seed=5, max_completion_tokens=8
    )
    assert got.choices[0].message.content == want
    # At 2 the likeliest 50 tokens are not nearly all.
    want = local_answer(tokenizer, QUESTION, **options, temperature=2.0)
    got = client.chat.completions.create(model="mine", messages=QUESTION, temperature=2, seed=5)
    assert got.choices[0].message.content == want
    answers = {
        client.chat.completions.create(model="mine", messages=QUESTION, seed=seed)
        .choices[0]
        .message.content
        for seed in range(3)
    }
    assert len(answers) > 1


def test_next_turn_reads_only_what_is_new(client: openai.OpenAI, split: Any) -> None:
    """An app that sends its history again pays for the new turn alone."""
    client.chat.completions.create(model="mine", messages=QUESTION, temperature=0, max_tokens=2)
    tokens = split.meter.tokens
    client.chat.completions.create(model="mine", messages=QUESTION, temperature=0, max_tokens=2)
    assert (
        split.meter.tokens - tokens == 2
    )  # the last token of the prompt and the first of the answer


def test_drafts_stream_the_same(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """With prompt look-up several tokens may come at a time, and the text is the same."""
    app = build_app(split, tokenizer, name="mine", prompt_lookup=3)
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        options = {"model": "mine", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        whole = client.chat.completions.create(**options).choices[0].message.content
        pieces = client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole
    assert whole == local_answer(tokenizer, QUESTION, max_new_tokens=24)


def test_the_hosted_wire_answers_the_same(split: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the cloud computes the adapter, chats and completions, streamed, sampled, or several at
    once, are local peft's, and a token takes one round trip.
    """
    hosted = make_split(split.link, lora(), wire="hosted", upload_consent=True).eval()
    hosted.generation_config.suppress_tokens = unreadable(tokenizer)
    app = build_app(hosted, tokenizer, name="mine", max_new_tokens=6)
    greedy: dict[str, Any] = {"model": "mine", "temperature": 0}
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        chats, texts = client.chat.completions, client.completions
        want = local_answer(tokenizer, QUESTION, max_new_tokens=6)
        for _ in range(2):  # the second time from the cache of the first
            assert chats.create(messages=QUESTION, **greedy).choices[0].message.content == want
        stream = chats.create(messages=QUESTION, stream=True, **greedy)
        assert "".join(one.choices[0].delta.content or "" for one in stream if one.choices) == want

        prompts = ["the desk", "the message of the desk"]
        alone = [local_answer(tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
        before = hosted.meter.copy()
        assert [one.text for one in texts.create(prompt=prompts, **greedy).choices] == alone
        assert (hosted.meter - before).round_trips == 6

        options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8}
        got = chats.create(model="mine", messages=QUESTION, seed=5, **options)
    want = local_answer(tokenizer, QUESTION, max_new_tokens=6, do_sample=True, top_k=0, **options)
    assert got.choices[0].message.content == want


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model": "other"}, "pinned to 'mine'"),
    ({"n": 2}, "n=2 is not supported"),
    ({"logprobs": True}, "logprobs=True is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported"),
    ({"messages": []}, "messages: want a list"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, "sequences of up to 256"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "only text",
    ),
    ({"messages": [{"content": "no role"}]}, "want a list of"),
    ({"extra_body": {"surprise": 1}}, "Unexpected fields"),
    ({"extra_body": {"generation_config": "{}"}}, "generation_config='{}' is not supported"),
    ({"reasoning_effort": "low"}, "reasoning_effort='low' is not supported"),
    ({"max_tokens": 0}, "max_tokens: got 0"),
    ({"temperature": -1}, "temperature: got -1, want a value from 0 to 2"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_what_is_not_supported_is_refused(
    client: openai.OpenAI, change: dict[str, Any], message: str
) -> None:
    """Fields that would be ignored, and prompts that cannot be answered, are refused with a
    reason.
    """
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.chat.completions.create(
            **({"model": "mine", "messages": QUESTION, "max_tokens": 4} | change)
        )
    assert 400 <= refused.value.status_code < 500


def test_streamed_refusal_has_a_status(client: openai.OpenAI) -> None:
    """A stream that cannot begin is refused like any other request."""
    messages = [{"role": "user", "content": "word " * 400}]
    with pytest.raises(openai.BadRequestError, match="sequences of up to 256"):
        client.chat.completions.create(model="mine", messages=messages, stream=True)


def test_streamed_failure_says_why(
    split: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud that is lost for good in the middle of a stream ends it with the reason, quotes and
    all.
    """

    def nobody() -> Any:
        raise PeerLost('"nobody" there')

    split.set_options(retry=dlora.RetryPolicy(give_up_after_s=0.0))
    monkeypatch.setattr(split.link, "open", nobody)
    app = build_app(split, tokenizer, name="mine")
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="mine", messages=QUESTION, stream=True)
        with pytest.raises(openai.APIError, match="'nobody' there"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="'nobody' there"):
            client.chat.completions.create(model="mine", messages=QUESTION)


def test_a_lost_client_stops_the_answer(client: openai.OpenAI, split: Any) -> None:
    """When an app goes away in the middle of a stream, the next request is answered at once."""
    stream = client.chat.completions.create(
        model="mine", messages=QUESTION, max_tokens=200, stream=True
    )
    next(iter(stream))
    stream.close()
    before = split.meter.passes
    answer = client.chat.completions.create(
        model="mine", messages=QUESTION, temperature=0, max_tokens=2
    )
    assert answer.usage.completion_tokens == 2
    assert split.meter.passes - before < 150, "the first answer was not made to its end"


def test_empty_prompts_are_refused(client: openai.OpenAI) -> None:
    """A prompt without tokens has no answer."""
    with pytest.raises(openai.BadRequestError, match="prompt: it has no tokens"):
        client.completions.create(model="mine", prompt="", max_tokens=4)


def test_strangers_are_kept_out(url: str) -> None:
    """Without the key, or under a host name that is not loopback's, nothing answers."""
    with openai.OpenAI(base_url=url, max_retries=0, **key("wrong")) as client:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.models.list()
        with pytest.raises(openai.BadRequestError):
            client.with_options(**key("open sesame")).models.list(
                extra_headers={"Host": "evil.example"}
            )


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_refused_as_they_come(
    url: str, client: openai.OpenAI, announced: bool
) -> None:
    """A body over the limit is a 413, whether or not it says its size, and is never held whole;
    others are answered while it comes.
    """
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Authorization", "Bearer open sesame")
    connection.putheader("Content-Type", "application/json")
    size, piece = 200 * 2**20, b" " * 2**15
    name, value = ("Content-Length", str(size)) if announced else ("Transfer-Encoding", "chunked")
    connection.putheader(name, value)
    connection.endheaders()
    for _ in range(0 if announced else 8):
        connection.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert client.models.list().data[0].id == "mine"

    answer = connection.getresponse()
    assert answer.status == 413
    assert "the body is over" in json.loads(answer.read())["error"]["message"]
    connection.close()


def test_command_serves_until_it_is_told_to_stop(
    cloud_models: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`dlora api` prints its URL, answers OpenAI's client with a private adapter, and SIGTERM ends
    it with code 0.
    """
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        make_split(link, lora()).save_pretrained(tmp_path / "mine")
        link.close()
        command = [sys.executable, "-m", "dlora", "api", "--server", server.address, "--port", "0"]
        command += ["--adapter", str(tmp_path / "mine"), "--wire_dtype", "fp32"]
        environment = os.environ | {
            "DLORA_API_KEY": "from the environment",
            "DLORA_CACHE": str(tmp_path),
        }
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            timer = threading.Timer(90, process.kill)
            timer.start()
            url = next(line.split()[1] for line in process.stdout if line.startswith("ready"))
            with openai.OpenAI(
                base_url=url, max_retries=0, **key("from the environment")
            ) as client:
                answer = client.chat.completions.create(
                    model="mine", messages=QUESTION, temperature=0, max_tokens=4
                )
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
            timer.cancel()
    want = local_answer(tokenizer, QUESTION, max_new_tokens=4, suppress_tokens=None)
    assert answer.choices[0].message.content == want


# ----------------------------------------------------------------- several adapters


def test_a_table_of_its_own_stays_an_adapters_own(link: Any, tmp_path: Path) -> None:
    """An adapter whose folder brings an embedding answers with that, beside others too."""
    folder = tmp_path / "a"
    make_split(link, lora(), seed=0).save_pretrained(str(folder))
    one, other = (load_for_inference(link, folder) for _ in range(2))
    table = other.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight * 2, requires_grad=False)
    share_ends(one, other)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert one.get_output_embeddings().weight is other.get_output_embeddings().weight


def test_several_adapters_by_name(
    link: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`model` of a request picks an adapter: each answers as it does alone; without a name the
    first does, and another name is 404. Embedding and head are in memory once."""
    models: dict[str, Any] = {}
    for number, name in enumerate(("a", "org/b")):
        folder = tmp_path / str(number)
        make_split(link, lora(), seed=number).save_pretrained(str(folder))
        models[name] = load_for_inference(link, folder, wire_dtype="fp32")
    share_ends(*models.values())
    first, second = models.values()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        ends = [getattr(model, get)().weight for model in (first, second)]
        assert ends[0] is ends[1]

    app = build_app(first, tokenizer, name="a", others={"org/b": second}, max_new_tokens=6)
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, max_retries=0, **key("none")) as client,
    ):
        assert [model.id for model in client.models.list()] == ["a", "org/b"]
        assert client.models.retrieve("org/b").id == "org/b"
        answers = {}
        for name, model in models.items():
            ids = tokenizer("the desk", return_tensors="pt")
            told = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=6,
                do_sample=False,
            )
            wanted = tokenizer.decode(
                told[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
            )
            got = client.completions.create(model=name, prompt="the desk", temperature=0)
            assert got.choices[0].text == wanted and got.model == name
            chat = client.chat.completions.create(model=name, messages=QUESTION, temperature=0)
            answers[name] = (wanted, chat.choices[0].message.content)
        assert answers["a"] != answers["org/b"]

        with pytest.raises(openai.NotFoundError, match="the models are 'a', 'org/b', got 'c'"):
            client.completions.create(model="c", prompt="x")
        with pytest.raises(openai.NotFoundError, match="the models are"):
            client.chat.completions.create(model="c", messages=QUESTION)
