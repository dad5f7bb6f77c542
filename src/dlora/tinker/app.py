"""The addresses of the Tinker SDK, on the edge's loopback.

Bodies are the SDK's own types. What is refused at once has a status of HTTP, and the SDK raises its
error of that status; what fails later is a failed future, which it raises as RequestFailedError.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import pydantic

from dlora.errors import DivergedError, DLoRAError, UsageError
from dlora.extras import missing_extra
from dlora.protocol.address import LOOPBACK

try:
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from tinker import types

    from dlora.inference.api_requests import BodyLimit
    from dlora.tinker.checkpoints import STATE, Checkpoint
    from dlora.tinker.service import NotThere, Service
except ImportError as error:
    raise missing_extra("tinker", "the Tinker interface") from error

__all__ = ["build_app"]

_MAX_BODY_BYTES: Final = 64 * 2**20
"""The SDK cuts a pass over rows into requests of 5 MB, unless one row is larger."""
_WAIT_S: Final = 20.0
"""How long a request for a result waits; the SDK then asks again. It gives up after 45 s."""
_PROTO: Final = "application/x-protobuf"
_CONFIG: Final = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": False,
    "use_pyqwest_transport": False,
    "sample_enable_stuck_detection": False,
}
"""What the SDK is told: parts of a pass come in order, an answer may take long."""

Asked = TypeVar("Asked", bound=pydantic.BaseModel)


def build_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """The application. `api_key`: what clients must send; None: anything.

    It answers only under names of this machine's loopback, so that no web page can reach it under a
    name of its own.
    """
    app = FastAPI(title="dlora tinker", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=_MAX_BODY_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    _require_key(app, api_key)
    _answer_errors(app)
    _serve_sessions(app, service)
    _serve_training(app, service)
    _serve_weights(app, service)
    _serve_sampling(app, service)
    _serve_results(app, service)
    _serve_names(app, service)
    return app


def _refused(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status_code=status)


def _require_key(app: FastAPI, api_key: str | None) -> None:
    """Every request must bring the key, if there is one; none may come from a web page."""

    @app.middleware("http")
    async def check_key(request: Request, answer: Callable[[Request], Awaitable[Any]]) -> Any:
        if "origin" in request.headers:  # browsers send it, the SDK does not
            return _refused(403, "web pages are not served")
        given = request.headers.get("x-api-key", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            return _refused(401, "the API key is missing or wrong")
        return await answer(request)


def _answer_errors(app: FastAPI) -> None:
    """Errors become answers with their reason."""

    @app.exception_handler(DLoRAError)
    async def on_error(_: Request, error: DLoRAError) -> JSONResponse:
        return _refused(400 if isinstance(error, UsageError) else 502, str(error))

    @app.exception_handler(NotThere)
    async def on_missing(_: Request, error: NotThere) -> JSONResponse:
        return _refused(404, str(error))

    @app.exception_handler(pydantic.ValidationError)
    async def on_bad_body(_: Request, error: pydantic.ValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        return _refused(422, f"{where}: {first['msg']}")

    @app.exception_handler(AnyHTTPException)
    async def on_refusal(request: Request, error: AnyHTTPException) -> JSONResponse:
        unknown = error.status_code in (404, 405) and error.detail in (
            "Not Found",
            "Method Not Allowed",
        )
        reason = f"{request.url.path} is not served by dlora tinker" if unknown else error.detail
        return _refused(error.status_code, str(reason))


async def _asked(kind: type[Asked], request: Request) -> Asked:
    """The body as the SDK's type. Raises pydantic.ValidationError for another."""
    return kind.model_validate_json(await request.body())


def _future(request_id: str, **more: Any) -> dict[str, Any]:
    return {"request_id": request_id, **more}


# ----------------------------------------------------------------- addresses


def _serve_sessions(app: FastAPI, service: Service) -> None:
    """Sessions and their signs of life; what the SDK tells about itself is not kept."""

    @app.post("/api/v1/client/config")
    async def config() -> dict[str, Any]:
        return _CONFIG

    @app.post("/api/v1/client/dynamic_config")
    async def dynamic_config() -> dict[str, Any]:
        return {}

    @app.post("/api/v1/create_session")
    async def create_session(request: Request) -> Any:
        await _asked(types.CreateSessionRequest, request)
        return {"type": "create_session", "session_id": service.create_session()}

    @app.post("/api/v1/session_heartbeat")
    async def heartbeat(request: Request) -> Any:
        asked = await _asked(types.SessionHeartbeatRequest, request)
        try:
            service.heard_of(asked.session_id)
        except NotThere as error:
            raise HTTPException(410, str(error)) from error  # the SDK then sends no more
        return {"type": "session_heartbeat"}

    @app.post("/api/v1/sessions/{session_id}/finish")
    async def finish(session_id: str) -> Any:
        service.finish_session(session_id)
        return {}

    @app.post("/api/v1/telemetry")
    async def telemetry() -> dict[str, str]:
        return {"status": "accepted"}


def _serve_training(app: FastAPI, service: Service) -> None:
    """Adapters, passes and steps."""

    @app.post("/api/v1/create_model")
    async def create_model(request: Request) -> Any:
        return _future(service.create(await _asked(types.CreateModelRequest, request)))

    @app.post("/api/v1/unload_model")
    async def unload_model(request: Request) -> Any:
        asked = await _asked(types.UnloadModelRequest, request)
        return _future(service.unload(asked.model_id))

    @app.post("/api/v1/get_info")
    async def get_info(request: Request) -> Any:
        run = service.run((await _asked(types.GetInfoRequest, request)).model_id)
        return {
            "type": "get_info",
            "model_id": run.run_id,
            "model_name": service.name,
            "is_lora": True,
            "lora_rank": run.notes.rank,
            "model_data": {
                "arch": service.models.base.config.model_type,
                "model_name": service.name,
                "tokenizer_id": str(service.models.link.edge_files()),
            },
            "optimizer_config": {"type": "adamw"},
        }

    @app.post("/api/v1/forward_backward")
    async def forward_backward(request: Request) -> Any:
        if request.headers.get("content-type", "") != _PROTO:
            raise UsageError(f"forward_backward: want a body of type {_PROTO}, as the SDK sends")
        request_id, model_id = service.forward_backward(await request.body())
        return _future(request_id, model_id=model_id)

    @app.post("/api/v1/optim_step")
    async def optim_step(request: Request) -> Any:
        return _future(service.step(await _asked(types.OptimStepRequest, request)))


def _serve_weights(app: FastAPI, service: Service) -> None:
    """Saving and loading."""

    @app.post("/api/v1/save_weights")
    async def save_weights(request: Request) -> Any:
        return _future(service.save(await _asked(types.SaveWeightsRequest, request)))

    @app.post("/api/v1/save_weights_for_sampler")
    async def save_for_sampler(request: Request) -> Any:
        asked = await _asked(types.SaveWeightsForSamplerRequest, request)
        return _future(service.save_for_sampler(asked))

    @app.post("/api/v1/load_weights")
    async def load_weights(request: Request) -> Any:
        return _future(service.load(await _asked(types.LoadWeightsRequest, request)))

    @app.post("/api/v1/weights_info")
    async def weights_info(body: dict[str, Any]) -> Any:
        notes = service.checkpoints.found(str(body.get("tinker_path"))).notes()
        return {
            "base_model": notes.base_model,
            "is_lora": True,
            "lora_rank": notes.rank,
            "train_attn": notes.train_attn,
            "train_mlp": notes.train_mlp,
            "train_unembed": notes.train_unembed,
        }

    @app.get("/api/v1/training_runs/{run_id}/checkpoints")
    async def checkpoints(run_id: str) -> Any:
        return {"checkpoints": [_listed(one) for one in service.checkpoints.of_run(run_id)]}

    @app.delete("/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}")
    async def delete(run_id: str, kind: str, name: str) -> Any:
        service.checkpoints.delete(f"tinker://{run_id}/{kind}/{name}")
        return {}


def _serve_sampling(app: FastAPI, service: Service) -> None:
    """Sampling sessions and samples."""

    @app.post("/api/v1/create_sampling_session")
    async def create_sampling_session(request: Request) -> Any:
        asked = await _asked(types.CreateSamplingSessionRequest, request)
        session_id = service.create_sampling_session(asked)
        return {"type": "create_sampling_session", "sampling_session_id": session_id}

    @app.get("/api/v1/samplers/{sampler_id}")
    async def sampler(sampler_id: str) -> Any:
        session = service.sampling_session(sampler_id)
        return {
            "sampler_id": sampler_id,
            "base_model": service.name,
            "model_path": session.model_path,
        }

    @app.post("/api/v1/asample")
    async def sample(request: Request) -> Any:
        request_id, sequences = service.sample(await _asked(types.SampleRequest, request))
        return _future(request_id, sample_sequence_ids=sequences)


def _serve_results(app: FastAPI, service: Service) -> None:
    """What became of a request."""

    @app.post("/api/v1/retrieve_future")
    async def retrieve_future(request: Request) -> Any:
        asked = await _asked(types.FutureRetrieveRequest, request)
        try:
            result = await service.jobs.result(asked.request_id, _WAIT_S)
        except TimeoutError:
            # The SDK takes this status for "ask again".
            waiting = {"type": "try_again", "request_id": asked.request_id}
            return JSONResponse(waiting | {"queue_state": "active"}, status_code=408)
        except KeyError:
            raise HTTPException(410, f"request {asked.request_id} is not known") from None
        except Exception as error:
            return _failed(error)
        if isinstance(result, bytes):
            return Response(result, media_type=_PROTO)
        return JSONResponse(result.model_dump(mode="json", exclude_none=True))


def _failed(error: Exception) -> JSONResponse:
    """A failed request, as the SDK reads it: whose fault it is, and why."""
    users = isinstance(error, (UsageError, DivergedError, NotThere, pydantic.ValidationError))
    named = isinstance(error, (DLoRAError, NotThere))
    reason = str(error) if named else f"{type(error).__name__}: {error}"
    return JSONResponse({"error": reason, "category": "user" if users else "server"})


def _serve_names(app: FastAPI, service: Service) -> None:
    """What is served, and a sign of life."""

    @app.get("/api/v1/get_server_capabilities")
    async def capabilities() -> Any:
        most = int(service.models.link.description.limits.max_length)
        served = {"model_name": service.name, "max_context_length": most}
        return {"supported_models": [served | {"trainable": True, "sampleable": True}]}

    @app.get("/api/v1/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/v1/training_runs/{run_id}")
    async def training_run(run_id: str) -> Any:
        return _run_listed(run_id, service)


def _listed(checkpoint: Checkpoint) -> dict[str, Any]:
    notes = checkpoint.notes()
    return {
        "checkpoint_id": checkpoint.checkpoint_id,
        "checkpoint_type": checkpoint.checkpoint_type,
        "time": notes.time,
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes(),
        "user_metadata": notes.user_metadata,
    }


def _run_listed(run_id: str, service: Service) -> dict[str, Any]:
    """An adapter in training, or one of which there is only what it saved."""
    saved = service.checkpoints.of_run(run_id)
    run = service.runs.get(run_id)
    if run is None and not saved:
        raise NotThere(f"training run {run_id} is not known here")
    notes = run.notes if run is not None else saved[-1].notes()
    heard = run.last_request if run is not None else saved[-1].folder.stat().st_mtime
    states = [one for one in saved if one.kind == STATE]
    others = [one for one in saved if one.kind != STATE]
    return {
        "training_run_id": run_id,
        "base_model": notes.base_model,
        "model_owner": "you",
        "is_lora": True,
        "lora_rank": notes.rank,
        "last_request_time": datetime.fromtimestamp(heard, UTC).isoformat(),
        "last_checkpoint": _listed(states[-1]) if states else None,
        "last_sampler_checkpoint": _listed(others[-1]) if others else None,
        "user_metadata": notes.run_metadata,
    }
