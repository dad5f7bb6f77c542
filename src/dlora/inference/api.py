"""The OpenAI API on the edge's loopback, over a private adapter: apps change one URL.

Requests, chat templates, streaming and the JSON of answers are transformers' own serving
code; here is what puts the split model behind it, and what it leaves open: who may ask,
which fields are honoured, errors with reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hmac
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dlora.edge.model import SplitModel
from dlora.errors import DLoRAError, UsageError
from dlora.inference.answer import Continuing, check_room
from dlora.inference.prompts import pad_token
from dlora.protocol.address import LOOPBACK

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.utils import GenerationState, Modality
except ImportError as error:
    raise UsageError(
        f'the API server needs more packages: pip install "dlora[api]" ({error})'
    ) from error

__all__ = ["ApiServer", "build_app"]

# Fields that the schema accepts and transformers' handlers ignore, each with its values that ask
# for nothing. Any other value is refused.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0, 0.0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "audio": (None,),
    "functions": (None, []),
    "prediction": (None,),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
    "function_call": (None, "none", "auto"),
    "web_search_options": (None,),
    "generation_config": (None,),
    "suffix": (None, ""),
}


_MAX_BODY_BYTES: Final = 8 * 2**20
"""Of one request, whatever the model."""
_PLAIN_BODY_BYTES: Final = 128 * 2**10
_BYTES_PER_TOKEN: Final = 100
"""More than a token stands for: longer texts fit no context, and would only be tokenised."""
_MAX_BODY_S: Final = 60.0
"""A request has to have come in whole by then."""


class _BodyLimit:
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
            await _refused(408 if late else 413, reason)(scope, receive, send)
            return

        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        await self.app(scope, again, send)


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


class _Served:
    """The split model as transformers' handlers see it."""

    def __init__(self, model: SplitModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.turns = Continuing(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Answer over the KV cache of the request before, as far as the two begin alike."""
        if (seed := getattr(generation_config, "request_seed", None)) is not None:
            torch.manual_seed(seed)

        room = check_room(self.model, input_ids.shape[1], generation_config.max_new_tokens)
        generation_config.max_new_tokens = room
        if generation_config.pad_token_id is None:
            generation_config.pad_token_id = pad_token(self.tokenizer)

        if streamer is not None:
            put = streamer.put
            streamer.put = lambda value: put(value.flatten())  # drafts come as [1, n]
        try:
            with torch.no_grad():
                return self.turns.generate(
                    input_ids, generation_config=generation_config, streamer=streamer, **options
                )
        except DLoRAError as error:
            # Streams carry the message in JSON that is put together by hand.
            raise type(error)(json.dumps(str(error))[1:-1].replace('\\"', "'")) from error


class _OneModel:
    """What transformers' handlers ask of their model manager, for a model that is always there."""

    def __init__(self, name: str, served: _Served) -> None:
        self.force_model, self.served = name, served

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, PreTrainedTokenizerBase]:
        return self.served, self.served.tokenizer

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Any:
        return Modality.LLM


class _Strict:
    """Refuses what would be ignored; samples if, and only if, the temperature is over 0.

    Goes before a handler of transformers in the order of classes, and adds to its methods.
    """

    max_new_tokens: int
    prompt_lookup: int

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)  # type: ignore[misc]

        for name, neutral in _NEUTRAL.items():
            if name in body and body[name] not in neutral:
                raise HTTPException(400, f"{name}={body[name]!r} is not supported")
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is not None and int(body[name]) < 1:
                raise HTTPException(400, f"{name}: got {body[name]}, want at least 1")
        if body.get("tools"):
            raise HTTPException(400, "tools are not supported")

        temperature = body.get("temperature")
        if temperature is not None and not 0 <= float(temperature) <= 2:
            raise HTTPException(400, f"temperature: got {temperature}, want a value from 0 to 2")

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
        check_room(model.model, inputs["input_ids"].shape[1], 1)
        whole = (request_id, model, processor, model_id, inputs, *rest)
        response = super()._streaming(*whole, **options)  # type: ignore[misc]
        response.body_iterator = _finished(response.body_iterator)
        return response

    def _build_generation_config(
        self, body: dict[str, Any], model_config: GenerationConfig, **options: Any
    ) -> Any:
        # Seeded when its turn comes, not now: another answer may be under way.
        unseeded = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(  # type: ignore[misc]
            unseeded, copy.deepcopy(model_config), **options
        )
        config.request_seed = body.get("seed")
        given = body.get("max_completion_tokens") or body.get("max_tokens") or self.max_new_tokens
        config.max_new_tokens = int(given)

        # The API's default temperature is 1.
        temperature = body.get("temperature")
        config.do_sample = temperature is None or float(temperature) > 0
        if temperature is None:
            config.temperature = 1.0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None

        if self.prompt_lookup:
            config.prompt_lookup_num_tokens = self.prompt_lookup
        return config


class _Chat(_Strict, ChatCompletionHandler):
    """/v1/chat/completions."""


class _Completion(_Strict, CompletionHandler):
    """/v1/completions."""


def build_app(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    api_key: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    max_new_tokens: int = 1024,
    prompt_lookup: int = 0,
) -> FastAPI:
    """The application: chat completions, completions, models, health.

    Requests are answered one after another. `hosts` are the names under which it may be
    addressed, so that no web page can reach it under a name of its own.
    """
    app = FastAPI(title="dlora api", docs_url=None, redoc_url=None, openapi_url=None)
    context = int(model.link.description.limits.max_length)
    most = min(_MAX_BODY_BYTES, _PLAIN_BODY_BYTES + _BYTES_PER_TOKEN * context)
    app.add_middleware(_BodyLimit, most=most)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _require_key(app, api_key)
    _answer_errors(app)

    manager, state = _OneModel(name, _Served(model, tokenizer)), GenerationState()
    chat, completion = _Chat(manager, state), _Completion(manager, state)
    for handler in (chat, completion):
        handler.max_new_tokens, handler.prompt_lookup = max_new_tokens, prompt_lookup
    _serve_completions(app, chat, completion, tokenizer)
    _serve_names(app, name)
    return app


def _require_key(app: FastAPI, api_key: str | None) -> None:
    """Every request must bring the key, if there is one."""

    @app.middleware("http")
    async def check_key(request: Request, answer: Callable[[Request], Awaitable[Any]]) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            return _refused(401, "the API key is missing or wrong")
        return await answer(request)


def _answer_errors(app: FastAPI) -> None:
    """Errors become answers in the API's own form, with their reason."""

    @app.exception_handler(DLoRAError)
    async def on_error(_: Request, error: DLoRAError) -> JSONResponse:
        return _refused(400 if isinstance(error, UsageError) else 502, str(error))

    @app.exception_handler(HTTPException)
    async def on_refusal(_: Request, error: HTTPException) -> JSONResponse:
        return _refused(error.status_code, str(error.detail))

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    @app.exception_handler(TemplateError)  # of a chat template, which may refuse roles
    async def on_bad_value(_: Request, error: Exception) -> JSONResponse:
        return _refused(400, str(error))

    @app.exception_handler(Exception)
    async def on_fault(_: Request, error: Exception) -> JSONResponse:
        return _refused(500, f"{type(error).__name__}: {error}")


def _serve_completions(
    app: FastAPI, chat: _Chat, completion: _Completion, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Both ways to ask: with messages, or with the text to continue."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        if not tokenizer.chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        _check_messages(body.get("messages"))
        return await chat.handle_request(body, _request_id("chatcmpl"))

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Any:
        if isinstance(body.get("prompt"), str) and not tokenizer(body["prompt"])["input_ids"]:
            raise HTTPException(400, "prompt: it has no tokens")
        return await completion.handle_request(body, _request_id("cmpl"))


def _serve_names(app: FastAPI, name: str) -> None:
    """The list of models, which holds one, and a sign of life."""
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": started, "owned_by": "you"}],
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}


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


def _check_messages(messages: Any) -> None:
    """Raises HTTPException for what is not a list of messages with text."""
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise HTTPException(400, "messages: want a list of {role, content}")

    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list) and any(
            not isinstance(part, dict) or part.get("type") != "text" for part in parts
        ):
            raise HTTPException(400, "messages: only text is read here")


def _request_id(kind: str) -> str:
    return f"{kind}-{time.time_ns():x}"


def _refused(status: int, message: str) -> JSONResponse:
    """An error in the API's own form, which its clients show."""
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "code": status}}, status
    )


class ApiServer:
    """An application on a socket of its own; `run` serves until it is stopped."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((host.strip("[]"), port))
        except OSError as error:
            self.socket.close()
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}. Try another --port."
            ) from error

        shown = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"http://{shown}:{self.socket.getsockname()[1]}/v1"
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        asyncio.run(self.server.serve(sockets=[self.socket]))

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve on a thread, for notebooks and tests; yields the URL."""
        thread = threading.Thread(target=self.run, name="dlora-api", daemon=True)
        thread.start()
        while not self.server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield self.url
        finally:
            self.server.should_exit = True
            thread.join()
