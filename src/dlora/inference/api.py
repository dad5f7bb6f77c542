"""The OpenAI API on the edge's loopback, over a private adapter: apps change one URL.

Requests are checked in `api_requests`, and answered in `api_answers`. Here are the addresses that
can be asked, who may ask, and errors with reasons.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dlora.edge.model import SplitModel
from dlora.errors import DLoRAError, UsageError
from dlora.extras import missing_extra
from dlora.protocol.address import LOOPBACK

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from transformers.cli.serving.utils import Modality

    from dlora.inference.api_answers import Answers, ClientLeft
    from dlora.inference.api_checks import check_messages, check_texts
    from dlora.inference.api_requests import (
        BodyLimit,
        Chat,
        Completion,
        largest_body,
        prompts_of,
        refused,
    )
except ImportError as error:
    raise missing_extra("api", "the API server") from error

__all__ = ["ApiServer", "build_app"]


class _OneModel:
    """What transformers' handlers ask of their model manager, for a model that is always there."""

    def __init__(self, name: str, model: SplitModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.force_model, self.model, self.tokenizer = name, model, tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Any:
        return Modality.LLM


class _Ours:
    """What the handlers ask of their generation state: our answers, and nothing else."""

    _compile = False

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    @staticmethod
    def use_continuous_batching(*_: Any) -> bool:
        return False

    def get_manager(self, *_: Any, **__: Any) -> Answers:
        return self.answers


@dataclass(frozen=True)
class _Served:
    """One model's answers, and who takes the requests for them."""

    answers: Answers
    chat: Chat
    completion: Completion


def build_app(
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    others: Mapping[str, SplitModel] = MappingProxyType({}),
    api_key: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    max_new_tokens: int = 1024,
    prompt_lookup: int = 0,
) -> FastAPI:
    """The application: chat completions, completions, models, health.

    Requests that come together are answered together, where they may. `others` are more models
    with the same tokenizer, by name: a request's `model` picks one, and `name` is the first.
    `hosts` are the names under which it may be addressed, so that no web page can reach it under a
    name of its own.
    """
    app = FastAPI(title="dlora api", docs_url=None, redoc_url=None, openapi_url=None)
    context = int(model.link.description.limits.max_length)
    app.add_middleware(BodyLimit, most=largest_body(context))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _require_key(app, api_key)
    _answer_errors(app)

    served: dict[str, _Served] = {}
    for one, its_model in {name: model, **others}.items():
        answers = Answers(its_model, tokenizer)
        manager, state = _OneModel(one, its_model, tokenizer), _Ours(answers)
        served[one] = _Served(answers, Chat(manager, state), Completion(manager, state))
        for handler in (served[one].chat, served[one].completion):
            handler.max_new_tokens, handler.prompt_lookup = max_new_tokens, prompt_lookup
    app.state.answers = served[name].answers
    _serve_chat(app, served, tokenizer)
    _serve_completions(app, served, tokenizer)
    _serve_names(app, list(served))
    return app


def _asked(served: dict[str, _Served], body: dict[str, Any]) -> _Served:
    """The model that a request names; without a name, or where there is one alone, the first.

    What is no model of a single one is for its handler to refuse. Raises HTTPException.
    """
    names, wanted = list(served), body.get("model")
    if wanted is None or len(served) == 1:
        return served[names[0]]
    if not isinstance(wanted, str) or wanted not in served:
        raise _no_model(names, wanted)
    return served[wanted]


def _no_model(names: list[str], wanted: Any) -> HTTPException:
    listed = ", ".join(map(repr, names))
    are = "model is" if len(names) == 1 else "models are"
    return HTTPException(404, f"the {are} {listed}, got {wanted!r}")


def _require_key(app: FastAPI, api_key: str | None) -> None:
    """Every request must bring the key, if there is one."""

    @app.middleware("http")
    async def check_key(request: Request, answer: Callable[[Request], Awaitable[Any]]) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            return refused(401, "the API key is missing or wrong")
        return await answer(request)


def _answer_errors(app: FastAPI) -> None:
    """Errors become answers in the API's own form, with their reason."""

    @app.exception_handler(DLoRAError)
    async def on_error(_: Request, error: DLoRAError) -> JSONResponse:
        return refused(400 if isinstance(error, UsageError) else 502, str(error))

    @app.exception_handler(AnyHTTPException)  # also of addresses that are not there
    async def on_refusal(_: Request, error: AnyHTTPException) -> JSONResponse:
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refused(400, f"the body is not JSON: {first['ctx']['error']}")
        return refused(400, "the body: want a JSON object, as content type application/json")

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    async def on_bad_value(_: Request, error: Exception) -> JSONResponse:
        return refused(400, str(error))

    @app.exception_handler(TemplateError)
    async def on_template(_: Request, error: Exception) -> JSONResponse:
        return refused(400, f"the model's chat template refused these messages: {error}")

    @app.exception_handler(ClientLeft)
    async def on_leaving(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def on_fault(_: Request, error: Exception) -> JSONResponse:
        return refused(500, f"{type(error).__name__}: {error}")


def _serve_chat(
    app: FastAPI, served: dict[str, _Served], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Messages, and the next one."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        if not tokenizer.chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        check_texts(body)
        check_messages(body.get("messages"))
        return await _asked(served, body).chat.handle_request(body, _request_id("chatcmpl"))


def _serve_completions(
    app: FastAPI, served: dict[str, _Served], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Texts, and what follows each."""

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Any:
        check_texts(body)
        prompts, number = prompts_of(body, tokenizer), _request_id("cmpl")
        asked = _asked(served, body)
        bodies = [body | {"prompt": prompt} for prompt in prompts]
        if len(prompts) == 1:
            return await asked.completion.handle_request(bodies[0], number)
        if body.get("stream"):
            raise HTTPException(400, "a list of prompts is not streamed: ask for one at a time")

        # A turn of the event loop, and all of them wait for their answer.
        with asked.answers.held():
            tasks = [
                asyncio.ensure_future(asked.completion.handle_request(one, number))
                for one in bodies
            ]
            await asyncio.sleep(0)
        try:
            return _joined(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()


def _joined(answers: list[JSONResponse]) -> JSONResponse:
    """Answers to several prompts as one, in order."""
    parts = [json.loads(bytes(answer.body)) for answer in answers]
    whole: dict[str, Any] = parts[0]
    whole["choices"] = [part["choices"][0] | {"index": number} for number, part in enumerate(parts)]
    whole["usage"] = {
        name: sum(part["usage"][name] for part in parts)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    return JSONResponse(whole)


def _serve_names(app: FastAPI, names: list[str]) -> None:
    """The list of models, each of them, and a sign of life."""
    started = int(time.time())
    listed = {
        name: {"id": name, "object": "model", "created": started, "owned_by": "you"}
        for name in names
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(listed.values())}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted not in listed:
            raise _no_model(names, wanted)
        return listed[wanted]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}


def _request_id(kind: str) -> str:
    return f"{kind}-{time.time_ns():x}"


class ApiServer:
    """An application on a socket of its own; `run` serves until it is stopped."""

    def __init__(self, app: FastAPI, host: str, port: int, path: str = "/v1") -> None:
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
        self.url = f"http://{shown}:{self.socket.getsockname()[1]}{path}"
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
