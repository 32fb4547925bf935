"""The OpenAI HTTP face: its routes put together, and errors in the shapes that clients expect.

Routes that generate are in `http_answers.py`, those that tokenise in `http_tokens.py`, bodies are read by `http_body.py`. Every
PdserveError raised by a route becomes its status and an OpenAI-shaped body. The framework's own pages, validation and error
shapes are switched off.
"""

from __future__ import annotations

from typing import cast

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from common.errors import EngineFailure, ModelNotFound, PdserveError
from common.metrics import METRICS_TYPE
from router.console.console import Console
from router.console.routes import add_routes
from router.front import Front
from router.http_answers import ReadJson, add_answer_routes
from router.http_body import read_json
from router.http_edge import Edge, Json, error_response
from router.http_routes import Routes
from router.http_tokens import add_token_routes
from router.openai_format import VERSION
from router.openai_format import Json as JsonObject
from router.registry import ModelView
from router.schemas import FeedbackBody, InvalidateBody, parse


def build_app(front: Front, prometheus: CollectorRegistry, console: Console | None = None) -> ASGIApp:
    routes = Routes()

    async def read(request: Request) -> object:
        return await read_json(request, limit_bytes=front.config.max_body_bytes)

    add_answer_routes(routes, front, read)
    add_token_routes(routes, front, read)
    _add_model_routes(routes, front)
    _add_cache_routes(routes, front, read)
    _add_state_routes(routes, front, prometheus)
    if console is not None:
        add_routes(routes, console, read)
    app = FastAPI(openapi_url=None, redirect_slashes=False, routes=list(routes.all))
    app.add_exception_handler(PdserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    return Edge(app, front, open_paths=frozenset() if console is None else console.pages.paths)


def _add_model_routes(routes: Routes, front: Front) -> None:
    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [_model(name, model, front) for name, model in front.names()]})

    @routes.get("/v1/models/{model_id:path}")
    async def model(request: Request) -> Response:
        model_id: str = request.path_params["model_id"]
        for name, view in front.names():
            if name == model_id:
                return Json(_model(name, view, front))
        raise ModelNotFound(f"The model {model_id[:256]!r} does not exist.", param="model")


def _add_cache_routes(routes: Routes, front: Front, read: ReadJson) -> None:
    @routes.post("/v1/cache/invalidate")
    async def invalidate(request: Request) -> Response:
        body = parse(InvalidateBody, await read(request))
        return Json(await front.invalidate(body, request.state.identity))

    @routes.post("/v1/cache/feedback")
    async def feedback(request: Request) -> Response:
        body = parse(FeedbackBody, await read(request))
        return Json(await front.feedback(body, request.state.identity))


def _add_state_routes(routes: Routes, front: Front, prometheus: CollectorRegistry) -> None:
    @routes.get("/health")
    async def health(request: Request) -> Response:
        return Response(status_code=200)

    @routes.get("/ready")
    async def ready(request: Request) -> Response:
        models = front.ready_models()
        status = "draining" if front.draining else "ready" if models else "no model has the workers that it takes"
        return Json({"status": status, "models": models}, status_code=200 if models else 503)

    @routes.get("/version")
    async def version(request: Request) -> Response:
        return Json({"version": VERSION})

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(generate_latest(prometheus), media_type=METRICS_TYPE)

    @routes.get("/metrics/targets")
    async def metrics_targets(request: Request) -> Response:
        front.require_admin(request.state.identity)
        return Json(front.registry.view.scrape_targets)


def _model(name: str, model: ModelView, front: Front) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "pdserve",
        "root": model.name,
        "parent": None,
        "max_model_len": front.registry.max_model_tokens(model) or None,
    }


async def _on_error(request: Request, error: Exception) -> Response:
    return _failed(request, cast(PdserveError, error))


def _failed(request: Request, error: PdserveError) -> Response:
    request.state.failure = error  # for the edge
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in the shape that clients expect."""
    raised = cast(HTTPException, error)
    kind = "NotFoundError" if raised.status_code == 404 else "BadRequestError"
    body = {"message": raised.detail, "type": kind, "param": None, "code": None}
    return Json({"error": body}, status_code=raised.status_code, headers=dict(raised.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    """What should not happen. The traceback goes to the log, by the framework; the client learns nothing of it."""
    return _failed(request, EngineFailure("internal error"))
