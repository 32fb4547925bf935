"""The routes that generate: chat, completions, and what would be decided about such a call.

count the request -> read the body -> parse -> route (which validates) -> generation -> JSON, or server-sent events
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from common.errors import InvalidRequest
from router.cache.control import CacheControl, cache_control
from router.chat_format import ChatFormat
from router.completion_format import CompletionFormat
from router.event_stream import EventStream, until_disconnect
from router.front import Front
from router.generation import Generation
from router.http_edge import Json
from router.http_routes import Routes
from router.models.facts import Header
from router.models.fallback import Answer, LateFormat
from router.models.routes import Route
from router.openai_format import whole_choices
from router.schemas import ChatBody, CompletionBody, parse
from router.validate import Caller

ReadJson = Callable[[Request], Awaitable[object]]
_Format = type[ChatFormat] | type[CompletionFormat]

_SLOW_CLIENT_S = 30.0  # beyond the request's own deadline, to take what is still being written
_TIMEOUT_HEADER = "x-request-timeout-s"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


def add_answer_routes(routes: Routes, front: Front, read_json: ReadJson) -> None:
    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _generate(request, front, read_json, ChatBody, ChatFormat)

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(request, front, read_json, CompletionBody, CompletionFormat)

    @routes.post("/v1/route/explain")
    async def explain(request: Request) -> Response:
        data = await read_json(request)
        is_completion = isinstance(data, dict) and "prompt" in data
        body = parse(CompletionBody, data) if is_completion else parse(ChatBody, data)
        return Json((await front.explain(body, _caller(request), _header(request), _tenant(request))).as_json())


async def _generate(
    request: Request, front: Front, read_json: ReadJson, schema: type[ChatBody] | type[CompletionBody], kind: _Format
) -> Response:
    state = request.state
    await front.admit(state.identity)
    control = cache_control(lambda name: ",".join(request.headers.getlist(name)))
    body = parse(schema, await read_json(request))
    state.standing = state.sighting.standing = front.standing(state.identity, request.headers.get("x-priority"), body.priority)
    route = await front.route(body, _caller(request), _header(request), _tenant(request))
    return await _answer(request, front, route, control, kind)


async def _answer(request: Request, front: Front, route: Route, control: CacheControl, kind: _Format) -> Response:
    state = request.state

    def begin(route: Route) -> Generation:
        call = route.call
        state.model, state.answer_headers = call.model.name, route.headers
        if request.headers.get("x-pdserve-timings") == "1":
            call = replace(call, plan=replace(call.plan, timings=True))
        generation = front.generation(call, state.received_s, state.standing, control, waits=not route.has_other)
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
