"""What OpenAI's clients expect of the API beside an answer: stop strings, biases, lists, leaving,
and several requests at once.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import NO_DRAIN, lora, make_local, make_split
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.utils import Modality

import dlora
from dlora.inference.api import ApiServer, _OneModel, build_app
from dlora.inference.api_answers import Answers, _Pieces, cut
from dlora.inference.api_checks import _NUMBERS, _WHOLE, check_messages
from dlora.inference.api_requests import _NEUTRAL, Chat, Completion
from dlora.server.server import Server

PROMPTS = ["the desk", "the message of the desk", "message"]


@pytest.fixture(scope="module")
def split(
    cloud_models: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> Iterator[Any]:
    """A split model over a real socket, on the exact wire, that says letters and digits only."""
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path_factory.mktemp("cache"))
        model = make_split(link, lora()).eval()
        model.generation_config.suppress_tokens = [
            number for number in range(300) if not tokenizer.decode([number]).strip().isalnum()
        ]
        yield model
        link.close()


@pytest.fixture(scope="module")
def app(split: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The application."""
    return build_app(split, tokenizer, name="org/mine", max_new_tokens=8)


@pytest.fixture(scope="module")
def answers(app: Any) -> Answers:
    """What answers in it."""
    return app.state.answers


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client, pointed at it."""
    with (
        ApiServer(app, "127.0.0.1", 0).running() as url,
        openai.OpenAI(base_url=url, max_retries=0, api_key="-") as made,
    ):
        yield made


def complete(client: openai.OpenAI, prompt: Any = "the desk", **options: Any) -> Any:
    """A completion of up to 8 tokens at temperature 0."""
    defaults = {"model": "org/mine", "temperature": 0, "max_tokens": 8}
    return client.completions.create(prompt=prompt, **(defaults | options))


def chat(client: openai.OpenAI, messages: Any = None, **options: Any) -> Any:
    """A chat of up to 8 tokens at temperature 0."""
    defaults = {"model": "org/mine", "temperature": 0, "max_tokens": 8}
    messages = messages or [{"role": "user", "content": "the desk"}]
    return client.chat.completions.create(messages=messages, **(defaults | options))


def texts(stream: Any) -> tuple[str, str]:
    """The whole text of a stream, and why it ended."""
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    pieces = [
        (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
        for choice in choices
    ]
    return "".join(pieces), choices[-1].finish_reason


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, split: Any) -> None:
    """A stop string, and what follows, is in no answer, streamed or not, in chats and completions;
    no further pass is made, and the reason is "stop". Empty ones, and none, change nothing.
    """
    whole = complete(client).choices[0].text
    assert len(whole) >= 6
    stop = whole[3:5]
    want = cut(whole, [stop])
    passes = split.meter.passes
    answer = complete(client, stop=stop)
    assert split.meter.passes - passes < 8
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want, "stop")
    assert texts(complete(client, stop=["never", stop], stream=True)) == (want, "stop")

    whole_chat = chat(client).choices[0].message.content
    stop = whole_chat[2:4]
    want = cut(whole_chat, [stop])
    assert chat(client, stop=[stop]).choices[0].message.content == want
    assert texts(chat(client, stop=[stop], stream=True)) == (want, "stop")

    nothing: Any
    for nothing in ("", [], [""], None):
        assert complete(client, stop=nothing).choices[0].text == whole
        assert complete(client, stop=nothing).choices[0].finish_reason == "length"
    # The beginning of a stop string is held back, and given where it was none.
    assert texts(complete(client, stop=whole[-1] + "never", stream=True)) == (whole, "length")


def test_biases_act_in_both(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    """A token with a bias of 100 is all that is said, with -100 never; whole numbers will do."""
    token = tokenizer("q", add_special_tokens=False)["input_ids"][0]
    assert complete(client, logit_bias={str(token): 100}, max_tokens=3).choices[0].text == "qqq"
    answer = chat(client, logit_bias={str(token): 100}, max_tokens=3)
    assert answer.choices[0].message.content == "qqq"
    said = complete(client).choices[0].text
    first = tokenizer(said, add_special_tokens=False)["input_ids"][0]
    assert complete(client, logit_bias={str(first): -100.0}).choices[0].text != said


def test_penalties_are_those_of_the_api(
    client: openai.OpenAI, split: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Presence counts once for a token that was said, frequency as often as it was; the prompt
    does not count.
    """
    local = make_local("llama", lora()).eval()
    silent = split.generation_config.suppress_tokens
    ids, said = tokenizer("the desk", return_tensors="pt")["input_ids"], list[int]()
    for _ in range(8):
        with torch.no_grad():
            logits_V = local(ids).logits[0, -1]
        logits_V[silent] = -math.inf
        for token in set(said):
            logits_V[token] -= 1.5 + 0.5 * said.count(token)
        said.append(int(logits_V.argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    want = tokenizer.decode(said, skip_special_tokens=True)
    assert complete(client, **options).choices[0].text == want != complete(client).choices[0].text
    assert texts(complete(client, **options, stream=True))[0] == want


def test_a_list_of_prompts_is_one_batch(client: openai.OpenAI, split: Any) -> None:
    """Several prompts are answered in order, each as alone, and together in as many passes as one
    takes. Their usage is the sum.
    """
    alone = [complete(client, prompt) for prompt in PROMPTS]
    passes = split.meter.passes
    together = complete(client, PROMPTS)
    assert split.meter.passes - passes == 8
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
    assert together.usage.total_tokens == sum(one.usage.total_tokens for one in alone)
    assert complete(client, PROMPTS[:1]).choices[0].text == alone[0].choices[0].text


def test_requests_that_come_together_share_their_passes(
    client: openai.OpenAI, split: Any, answers: Answers
) -> None:
    """Chats and completions of several clients, streamed or not, with lengths and stop strings of
    their own, are one batch, and each gets what it would get alone. One that samples is not in it.
    """
    stop = complete(client, "message").choices[0].text[2:4]
    asked: list[Callable[[], Any]] = [
        lambda: complete(client, "the desk").choices[0].text,
        lambda: texts(complete(client, "message", stop=stop, stream=True)),
        lambda: chat(client, max_tokens=3).choices[0].message.content,
        lambda: chat(client, temperature=1.0, seed=3).choices[0].message.content,
    ]
    alone = [ask() for ask in asked]
    passes = split.meter.passes
    with ThreadPoolExecutor(len(asked)) as pool:
        with answers.held():
            coming = [pool.submit(ask) for ask in asked]
            wait_for(lambda: len(answers.waiting) == len(asked))
        assert [answer.result(60) for answer in coming] == alone
    assert split.meter.passes - passes == 8 + 8


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen within 30 s")


def leave(client: openai.OpenAI, split: Any, answers: Answers, *, waiting: bool) -> None:
    """Ask for a long answer without streaming, and go away: while it waits, or is made."""
    address = str(client.base_url).split("/")[2]
    connection = http.client.HTTPConnection(address, timeout=30)
    body = {"model": "org/mine", "prompt": "the desk", "temperature": 0, "max_tokens": 200}
    passes = split.meter.passes
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    wait_for(lambda: bool(answers.waiting) if waiting else split.meter.passes > passes + 2)
    connection.close()


def test_a_client_that_leaves_is_noticed(
    client: openai.OpenAI, split: Any, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes away without having streamed takes the answer along, whether it waited for its turn
    or was under way; the next request starts within one pass of it.
    """
    passes, noticed, cancel = split.meter.passes, list[int](), _Pieces.cancel

    def noted(pieces: _Pieces) -> None:
        noticed.append(split.meter.passes)
        cancel(pieces)

    monkeypatch.setattr(_Pieces, "cancel", noted)
    leave(client, split, answers, waiting=False)
    answer = complete(client, "message", max_tokens=2)
    assert answer.usage.completion_tokens == 2
    assert split.meter.passes - passes < 200, "the first answer was not made to its end"
    assert split.meter.passes - noticed[0] <= 1 + 2, "a pass under way, and the two of the next"

    passes = split.meter.passes
    with answers.held():
        leave(client, split, answers, waiting=True)
        wait_for(lambda: all(one.is_done for one in answers.waiting))
    assert complete(client, "message", max_tokens=2).usage.completion_tokens == 2
    assert split.meter.passes - passes == 2


def test_models_are_found_by_name(client: openai.OpenAI) -> None:
    """GET /v1/models/{id} gives the one model, with a slash in its name, and 404 for others."""
    assert client.models.retrieve("org/mine").id == "org/mine"
    with pytest.raises(openai.NotFoundError, match="the model is 'org/mine', got 'other'"):
        client.models.retrieve("other")


def test_messages_as_clients_send_them_back(client: openai.OpenAI) -> None:
    """Fields that are null, and text in parts, are what they would be without."""
    plain = [
        {"role": "user", "content": "the desk"},
        {"role": "assistant", "content": "of"},
        {"role": "user", "content": "the message"},
    ]
    sent: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "the desk"}]},
        {"role": "assistant", "content": "of", "tool_calls": None, "function_call": None},
        {"role": "user", "content": "the message", "tool_call_id": None},
    ]
    assert chat(client, sent).choices[0].message == chat(client, plain).choices[0].message


USER = {"role": "user", "content": "the desk"}
ANSWER = {"role": "assistant", "content": "of"}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ],
}
HALF = b'{"%s": "a\\ud83d b"}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": [3]}, "stop: want a text"),
        ({"stop": ["a"] * 17}, "stop: got 17 texts"),
        ({"logit_bias": {"a": 1}}, "logit_bias: want a map"),
        ({"logit_bias": {"1": 101}}, "logit_bias: want values"),
        ({"logit_bias": {"300": 1}}, "logit_bias: there is no token 300, want ids from 0 to 299"),
        ({"logit_bias": {"-1": 1}, "stream": True}, "logit_bias: there is no token -1"),
        ({"top_p": 5}, "top_p: got 5, want a value from 0 to 1"),
        ({"top_p": 5, "stream": True}, "top_p: got 5, want a value from 0 to 1"),
        ({"top_p": "0.5"}, "top_p: got '0.5', want a value"),
        ({"temperature": True}, "temperature: got True, want a value from 0 to 2"),
        ({"frequency_penalty": 2.5}, "frequency_penalty: got 2.5, want a value from -2 to 2"),
        ({"presence_penalty": -3}, "presence_penalty: got -3, want a value from -2 to 2"),
        ({"max_tokens": 2.5}, "max_tokens: got 2.5, want a whole number of at least 1"),
        ({"seed": 2**63}, "seed: got 9223372036854775808, want a whole number from"),
        ({"extra_body": {"stream": "yes"}}, "stream: got 'yes', want true or false"),
        ({"n": 0}, "n=0 is not supported"),
        ({"logprobs": 0}, "logprobs=0 is not supported"),
        ({"prompt": []}, "prompt: got 0 texts"),
        ({"prompt": ["a", ""]}, "prompt: it has no tokens"),
        ({"prompt": [1, 2]}, "prompt: want a text"),
        ({"prompt": ["a", "b"], "stream": True}, "a list of prompts is not streamed"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wants a text"),
        ({"messages": [{"role": "user", "content": 3}]}, "only text is read here"),
        ({"messages": [{"role": "user"}]}, "one of role user has no content"),
        ({"messages": [{"role": "user", "content": []}]}, "one of role user has no content"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": [{"role": 3, "content": "a"}]}, "want a list of"),
        ({"messages": [{**USER, "name": "alice"}]}, "template has no place for name"),
        ({"messages": [USER, CALLING]}, "template has no place for tool_calls"),
        ({"messages": [USER, CALLING], "stream": True}, "template has no place for tool_calls"),
        ({"messages": [USER, {**CALLING, "tool_calls": [{}]}]}, "tool_calls: want a list of"),
        (
            {"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]},
            "function_call is not supported",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    """Values of another kind are a 400 with the field's name, and never a 500."""
    ask = chat if "messages" in options else complete
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **options)


def test_no_field_is_ignored() -> None:
    """Every field that the API's schema knows is followed or refused, or changes no answer."""
    followed = "messages model prompt stream stop logit_bias tools chat_template_kwargs"
    changes_nothing = (
        "metadata parallel_tool_calls prompt_cache_key prompt_cache_options safety_identifier "
        "prompt_cache_retention service_tier store stream_options user"
    )
    known = {*followed.split(), *changes_nothing.split(), *_NEUTRAL, *_NUMBERS, *_WHOLE}
    for handler in (Chat, Completion):
        assert handler._valid_params_class.__mutable_keys__ - known == set()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "chat/completions", b"{", 400, "the body is not JSON: Expecting property name"),
        ("POST", "completions", b"[1]", 400, "the body: want a JSON object"),
        ("POST", "completions", b"", 400, "the body: want a JSON object"),
        ("POST", "completions", b"\xff", 400, "error parsing the body"),
        ("POST", "completions", HALF % b"prompt", 400, "prompt: it has half of a character"),
        ("POST", "completions", HALF % b"stop", 400, "stop: it has half of a character"),
        ("POST", "chat/completions", HALF % b"messages", 400, "messages: it has half of a"),
        ("POST", "chat/completions", HALF % b"n", 400, "n: it has half of a character"),
        ("POST", "nowhere", b"{}", 404, "Not Found"),
        ("GET", "completions", None, 405, "Method Not Allowed"),
    ],
)
def test_every_refusal_has_the_form_of_the_api(
    client: openai.OpenAI, method: str, path: str, body: bytes | None, status: int, message: str
) -> None:
    """What is no request at all is refused as a request is, so that clients show the reason."""
    connection = http.client.HTTPConnection(str(client.base_url).split("/")[2], timeout=30)
    connection.request(method, f"/v1/{path}", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == error["code"] == status
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_what_a_template_shows_is_passed_on(
    split: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Calls of tools, the text beside them, and names reach a chat template that has a place."""
    tokenizer.save_pretrained(tmp_path)
    showing = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    showing.chat_template = (
        "{% for m in messages %}{{ m.name }}:{{ m.content }}"
        "{% for call in m.tool_calls %}<{{ call.function.name }}>{% endfor %}{% endfor %}"
    )
    handler = Chat(_OneModel("m", split, showing), None)
    sent = [{**USER, "name": "alice"}, {**CALLING, "content": [{"type": "text", "text": "of"}]}]
    check_messages(sent)
    inputs = handler.get_processor_inputs_from_messages(sent, Modality.LLM)
    assert showing.apply_chat_template(inputs, tokenize=False) == "alice:the desk:of<f>"
