"""The routes of the OpenAI HTTP face, and nothing else: parse, validate, generate, format.

A body is read here, within a size and a time; every PdserveError raised by a route becomes its status and an OpenAI-shaped body.
The framework's own pages, validation and error shapes are switched off.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from dataclasses import replace
from typing import cast

import orjson
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from common.errors import EngineFailure, InvalidRequest, ModelNotFound, PayloadTooLarge, PdserveError, RequestCancelled
from common.metrics import METRICS_TYPE
from router.admission.tenants import Standing
from router.cache.control import CacheControl, cache_control
from router.chat_format import ChatFormat
from router.completion_format import CompletionFormat
from router.console.console import Console
from router.console.routes import add_routes
from router.event_stream import EventStream, until_disconnect
from router.front import Front
from router.generation import Generation
from router.http_edge import Edge, Json, error_response
from router.models.facts import Header
from router.models.fallback import Answer, LateFormat
from router.models.routes import Route
from router.openai_format import VERSION, whole_choices
from router.openai_format import Json as JsonObject
from router.registry import ModelView
from router.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    FeedbackBody,
    GenerationBody,
    InvalidateBody,
    TokenizeBody,
    parse,
)
from router.validate import Caller

_BODY_TIMEOUT_S = 30.0
# What is too large is still read, up to here, and thrown away: a client that is cut off while it sends may not see the answer.
_DISCARDED_BYTES = 16 * 1024 * 1024
_SLOW_CLIENT_S = 30.0  # beyond the request's own deadline, to take what is still being written
_TIMEOUT_HEADER = "x-request-timeout-s"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


def build_app(front: Front, prometheus: CollectorRegistry, console: Console | None = None) -> ASGIApp:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(PdserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        front.admit(request.state.identity)
        control = _cache_control(request)
        body = parse(ChatBody, await _read_json(request, front))
        request.state.standing = standing(request, body)
        route = await front.route(body, _caller(request), _header(request), _tenant(request))
        return await answer(request, route, control, ChatFormat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        front.admit(request.state.identity)
        control = _cache_control(request)
        body = parse(CompletionBody, await _read_json(request, front))
        request.state.standing = standing(request, body)
        route = await front.route(body, _caller(request), _header(request), _tenant(request))
        return await answer(request, route, control, CompletionFormat)

    @app.post("/v1/route/explain")
    async def explain(request: Request) -> Response:
        data = await _read_json(request, front)
        is_completion = isinstance(data, dict) and "prompt" in data
        body = parse(CompletionBody, data) if is_completion else parse(ChatBody, data)
        return Json((await front.explain(body, _caller(request), _header(request), _tenant(request))).as_json())

    async def answer(
        request: Request, route: Route, control: CacheControl, kind: type[ChatFormat] | type[CompletionFormat]
    ) -> Response:
        state = request.state

        def begin(route: Route) -> Generation:
            call = route.call
            state.model, state.answer_headers = call.model.name, route.headers
            if request.headers.get("x-pdserve-timings") == "1":
                call = replace(call, plan=replace(call.plan, timings=True))
            generation = front.generation(call, state.received_s, state.standing, control)
            state.sighting.generation = generation
            return generation

        given = Answer(route, begin)
        created_s = int(front.clock.wall_s())
        formatter = LateFormat(lambda: kind(given.generation, request_id=state.request_id, created_s=created_s))
        timeout_s = front.config.request_timeout_s + _SLOW_CLIENT_S
        if route.call.plan.stream:
            return EventStream(given, formatter, timeout_s=timeout_s)
        async with until_disconnect(request.receive, timeout_s), aclosing(given.deltas()) as stream:
            deltas = [delta async for delta in stream]
        return Json(formatter.body(whole_choices(deltas, route.call.num_choices)), headers=given.generation.cache_headers)

    def standing(request: Request, body: GenerationBody) -> Standing:
        found = front.standing(request.state.identity, request.headers.get("x-priority"), body.priority)
        request.state.sighting.standing = found
        return found

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [_model(name, model, front) for name, model in front.names()]})

    @app.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> Response:
        for name, view in front.names():
            if name == model_id:
                return Json(_model(name, view, front))
        raise ModelNotFound(f"The model {model_id[:256]!r} does not exist.", param="model")

    @app.post("/v1/cache/invalidate")
    async def invalidate(request: Request) -> Response:
        body = parse(InvalidateBody, await _read_json(request, front))
        return Json(await front.invalidate(body, request.state.identity))

    @app.post("/v1/cache/feedback")
    async def feedback(request: Request) -> Response:
        body = parse(FeedbackBody, await _read_json(request, front))
        return Json(await front.feedback(body, request.state.identity))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await _read_json(request, front))
        text = await front.validator.tokenize(body)
        ids = text.token_ids
        strings = [text.model.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
        return Json({"count": len(ids), "max_model_len": text.model.max_model_tokens, "tokens": ids, "token_strs": strings})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await _read_json(request, front))
        return Json({"prompt": await front.validator.detokenize(body)})

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        tokenizer = (await front.registry.model(request.query_params.get("model", ""))).tokenizer
        end, begin = tokenizer.eos_token_ids, tokenizer.bos_token_id
        return Json(
            {
                "eos_token": tokenizer.token_text(end[0]) if end else None,
                "bos_token": tokenizer.token_text(begin) if begin is not None else None,
                "vocab_size": tokenizer.vocab_size,
            }
        )

    @app.get("/health")
    async def health(request: Request) -> Response:
        return Response(status_code=200)

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        models = front.ready_models()
        status = "draining" if front.draining else "ready" if models else "no decode worker is ready"
        return Json({"status": status, "models": models}, status_code=200 if models else 503)

    @app.get("/version")
    async def version(request: Request) -> Response:
        return Json({"version": VERSION})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(generate_latest(prometheus), media_type=METRICS_TYPE)

    @app.get("/metrics/targets")
    async def metrics_targets(request: Request) -> Response:
        front.require_admin(request.state.identity)
        return Json(front.registry.view.scrape_targets)

    if console is None:
        return Edge(app, front)
    add_routes(app, console, lambda request: _read_json(request, front))
    return Edge(app, front, open_paths=console.pages.paths)


def _caller(request: Request) -> Caller:
    given = request.headers.get(_TIMEOUT_HEADER)
    # Not what `float` takes: "nan" and "1_0" are no times.
    timeout_s = float(given) if given is not None and _SECONDS.fullmatch(given) else None
    if given is not None and not timeout_s:
        raise InvalidRequest(f"{_TIMEOUT_HEADER} must be a number of seconds above 0", param=_TIMEOUT_HEADER)
    return Caller(request.state.request_id, request.state.identity.tenant.cache_salt, timeout_s)


def _tenant(request: Request) -> str:
    name: str = request.state.identity.tenant.name
    return name


def _header(request: Request) -> Header:
    return lambda name: request.headers.get(name, "")


def _cache_control(request: Request) -> CacheControl:
    return cache_control(lambda name: ",".join(request.headers.getlist(name)))


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


async def _read_json(request: Request, front: Front) -> object:
    limit_bytes = front.config.max_body_bytes
    too_large = PayloadTooLarge(f"the body is larger than {limit_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes + _DISCARDED_BYTES:
        raise too_large
    body = bytearray()
    size_bytes = 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                size_bytes += len(piece)
                if size_bytes > limit_bytes + _DISCARDED_BYTES:
                    raise too_large
                if size_bytes <= limit_bytes:
                    body += piece
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise RequestCancelled("the client went away") from None
    if size_bytes > limit_bytes:
        raise too_large
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None


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
