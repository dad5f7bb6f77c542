"""Requests to the API, before they are answered: sizes, fields, messages, settings.

Chat templates and the JSON of answers are transformers' own serving code. Here is what it leaves
open: what would be ignored is refused, and what OpenAI's clients send is taken as they mean it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from dlora.inference.answer import check_room
from dlora.inference.api_answers import CLIENT_LEFT
from dlora.inference.api_checks import check_numbers, check_places

__all__ = [
    "BodyLimit",
    "Chat",
    "Completion",
    "largest_body",
    "prompts_of",
    "refused",
]

# Fields that the schema accepts and transformers' handlers ignore, each with its values that ask
# for nothing. Any other value is refused.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "audio": (None,),
    "functions": (None, []),
    "prediction": (None,),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "moderation": (None,),
    "function_call": (None, "none", "auto"),
    "web_search_options": (None,),
    "generation_config": (None,),
    "suffix": (None, ""),
}
_MOST_STOPS: Final = 16
_MOST_PROMPTS: Final = 64

_MAX_BODY_BYTES: Final = 8 * 2**20
"""Of one request, whatever the model."""
_PLAIN_BODY_BYTES: Final = 128 * 2**10
_BYTES_PER_TOKEN: Final = 100
"""More than a token stands for: longer texts fit no context, and would only be tokenised."""
_MAX_BODY_S: Final = 60.0
"""A request has to have come in whole by then."""


def largest_body(context: int) -> int:
    """Bytes of a request to a model that reads so many tokens."""
    return min(_MAX_BODY_BYTES, _PLAIN_BODY_BYTES + _BYTES_PER_TOKEN * context)


class BodyLimit:
    """Takes bodies in pieces, up to a limit; whoever sends more, or dawdles, is refused.

    Frameworks join a body of any size before anybody may look at it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 413 or 408, or hand the request on with its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_MAX_BODY_S):
                body = await _body_of(scope, receive, self.most)
        except (ValueError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            reason = f"the body did not come within {_MAX_BODY_S:.0f} s" if late else str(error)
            await refused(408 if late else 413, reason)(scope, receive, send)
            return

        # Somebody has to listen for the client's leaving: an answer that nobody waits for is ended.
        given, left = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async def again() -> Any:
            if given:
                return given.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        CLIENT_LEFT.set(left)
        listener = asyncio.create_task(listen())
        try:
            await self.app(scope, again, send)
        finally:
            listener.cancel()


async def _body_of(scope: Any, receive: Any, most: int) -> bytes:
    """All of a request's body. Raises ValueError for more than `most` bytes, before it is read."""
    announced = dict(scope["headers"]).get(b"content-length", b"")
    large = f"the body is over {most >> 10} KiB"
    if len(announced) > 12 or (announced.isdigit() and int(announced) > most):
        raise ValueError(large)

    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            raise ValueError(large)
        more = message["type"] == "http.request" and message.get("more_body", False)
    return bytes(body)


class Strict:
    """Refuses what would be ignored; samples if, and only if, the temperature is over 0.

    Goes before a handler of transformers in the order of classes, and adds to its methods.
    """

    max_new_tokens: int
    prompt_lookup: int
    model_manager: Any

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)  # type: ignore[misc]

        for name, neutral in _NEUTRAL.items():
            given = body.get(name)
            # 0 and False are equal, and 0 log-probabilities are not none.
            if not any(given == one and type(given) is type(one) for one in neutral):
                raise HTTPException(400, f"{name}={given!r} is not supported")
        check_numbers(body)
        if body.get("tools"):
            raise HTTPException(400, "tools are not supported")

        stops_of(body)
        biases_of(body, self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        """Tokens that a logit is made for."""
        base = self.model_manager.model.get_base_model()
        return int(base.get_output_embeddings().weight.shape[0])

    def _streaming(
        self,
        request_id: str,
        model: Any,
        processor: Any,
        model_id: str,
        inputs: Any,
        *rest: Any,
        **options: Any,
    ) -> Any:
        # Refused here, while the answer can still have a status: later it is a stream.
        check_room(model, inputs["input_ids"].shape[1], 1)
        whole = (request_id, model, processor, model_id, inputs, *rest)
        response = super()._streaming(*whole, **options)  # type: ignore[misc]
        response.body_iterator = _finished(response.body_iterator)
        return response

    def _build_generation_config(
        self, body: dict[str, Any], model_config: GenerationConfig, **options: Any
    ) -> Any:
        # Seeded when its turn comes, not now: another answer may be under way.
        # Stop strings and penalties are ours: transformers leaves the ones in the text, and takes
        # the others for something else.
        ours = ("seed", "stop", "logit_bias", "frequency_penalty", "presence_penalty")
        theirs = {name: value for name, value in body.items() if name not in ours}
        config = super()._build_generation_config(  # type: ignore[misc]
            theirs, copy.deepcopy(model_config), **options
        )
        config.request_seed, config.request_stops = body.get("seed"), stops_of(body)
        names = ("presence_penalty", "frequency_penalty")
        config.request_penalties = tuple(float(body.get(name) or 0) for name in names)
        if biases := biases_of(body, self._vocabulary):
            config.sequence_bias = biases
        given = body.get("max_completion_tokens") or body.get("max_tokens") or self.max_new_tokens
        config.max_new_tokens = int(given)

        # The API's defaults: temperature 1, and any token.
        temperature = body.get("temperature")
        config.do_sample = temperature is None or float(temperature) > 0
        if temperature is None:
            config.temperature = 1.0
        config.top_k = 0  # a limit that the API does not have
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None

        if self.prompt_lookup:
            config.prompt_lookup_num_tokens = self.prompt_lookup
        return config


class Chat(Strict, ChatCompletionHandler):
    """/v1/chat/completions."""

    def get_processor_inputs_from_messages(  # there it is static
        self, messages: list[dict[str, Any]], modality: Any
    ) -> list[dict[str, Any]]:
        """Messages as the chat template gets them. HTTPException for what it would not show."""
        inputs = super().get_processor_inputs_from_messages(messages, modality)
        # Names, and text beside calls, are left out there.
        for message, given in zip(inputs, messages, strict=True):
            if "name" in given:
                message["name"] = given["name"]
            if "tool_calls" in given and (content := given.get("content")):
                parts = [content] if isinstance(content, str) else [one["text"] for one in content]
                message["content"] = " ".join(parts)
        check_places(self.model_manager.tokenizer, inputs)
        return list(inputs)


class Completion(Strict, CompletionHandler):
    """/v1/completions."""


def stops_of(body: dict[str, Any]) -> list[str]:
    """The stop strings of a request. Raises HTTPException for what is none."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise HTTPException(400, "stop: want a text, or a list of texts")
    if len(stops) > _MOST_STOPS:
        raise HTTPException(400, f"stop: got {len(stops)} texts, want at most {_MOST_STOPS}")
    return [text for text in stops if text]


def biases_of(body: dict[str, Any], vocabulary: int) -> dict[tuple[int, ...], float]:
    """What is added to the logits of single tokens. Raises HTTPException for what is none."""
    given = body.get("logit_bias") or {}
    try:
        biases: dict[tuple[int, ...], float] = {
            (int(token),): float(value) for token, value in given.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise HTTPException(400, "logit_bias: want a map of token ids to numbers") from None
    if not all(-100 <= value <= 100 for value in biases.values()):
        raise HTTPException(400, "logit_bias: want values from -100 to 100")
    if unknown := [token for (token,) in biases if not 0 <= token < vocabulary]:
        raise HTTPException(
            400, f"logit_bias: there is no token {unknown[0]}, want ids from 0 to {vocabulary - 1}"
        )
    return biases


def prompts_of(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts of a completion. Raises HTTPException for those that cannot be answered."""
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise HTTPException(400, "prompt: want a text, or a list of texts")
    if not 0 < len(prompts) <= _MOST_PROMPTS:
        raise HTTPException(400, f"prompt: got {len(prompts)} texts, want 1 to {_MOST_PROMPTS}")
    if not all(tokenizer(text)["input_ids"] for text in prompts):
        raise HTTPException(400, "prompt: it has no tokens")
    return prompts


async def _finished(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The stream of a handler, with errors and its end as OpenAI's clients want them."""
    start, end = 'data: {"error": "', '"}'
    async for event in events:
        text, is_error, message = event.partition(start)
        if is_error:
            message = message.rstrip().removesuffix(end)
            with contextlib.suppress(ValueError):
                message = json.loads(f'"{message}"')
            error = {"error": {"message": message, "type": "server_error"}}
            event = f"{text}data: {json.dumps(error)}\n\n"
        yield event
    yield "data: [DONE]\n\n"


def refused(status: int, message: str) -> JSONResponse:
    """An error in the API's own form, which its clients show."""
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "code": status}}, status
    )
