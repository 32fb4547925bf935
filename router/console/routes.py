"""The console's routes: pages for everybody, JSON for whoever may administrate this router.

GET  /, /console/*                  the page
GET  /admin/v1/cluster              the picture, and the events of the pools
GET  /admin/v1/requests             the last requests (?limit=, ?model=, ?outcome=ok|failed|cancelled) and those in progress
GET  /admin/v1/requests/{id}        one of them
GET  /admin/v1/series               the last quarter of an hour, second by second (?after_s=)
GET  /admin/v1/autoscaler           what the autoscaler sees and decided, as the pool manager says
GET  /admin/v1/live                 all of it as it changes, by Server-Sent Events
POST /admin/v1/actions/{name}       scale, drain, flip, roll, autoscaler
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from common.errors import InvalidRequest, RequestNotFound
from router.console.console import Console
from router.console.guard import check_actor, check_reader
from router.console.records import active_json, request_json, second_json
from router.console.stream import LiveStream
from router.http_edge import Json
from router.http_routes import Routes
from router.observe.records import RequestRecord

ReadJson = Callable[[Request], Awaitable[object]]

_DEFAULT_LIMIT = 100
_CLIENT_LEFT = 499
_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?", re.ASCII)
_OUTCOMES: dict[str, Callable[[RequestRecord], bool]] = {
    "ok": lambda record: record.status == 200,
    "failed": lambda record: record.status not in (200, _CLIENT_LEFT),
    "cancelled": lambda record: record.status == _CLIENT_LEFT,
}
_NO_STORE = {"Cache-Control": "no-store"}


def add_routes(routes: Routes, console: Console, read_json: ReadJson) -> None:
    """`read_json` reads a body within the limits of the HTTP face."""

    async def page(request: Request) -> Response:
        return console.pages.answer(request.url.path, request.headers)

    for path in console.pages.paths:
        routes.get(path)(page)
    _add_requests(routes, console)
    _add_cluster(routes, console)
    _add_actions(routes, console, read_json)


def _check_reader(request: Request, console: Console) -> None:
    check_reader(request.state.identity, request.headers, authenticates=console.authenticates)


def _add_requests(routes: Routes, console: Console) -> None:
    @routes.get("/admin/v1/requests")
    async def requests(request: Request) -> Response:
        _check_reader(request, console)
        limit = int(_number(request, "limit", _DEFAULT_LIMIT))
        model, outcome = request.query_params.get("model", ""), request.query_params.get("outcome", "")
        if outcome and outcome not in _OUTCOMES:
            raise InvalidRequest(f"outcome must be one of {', '.join(_OUTCOMES)}", param="outcome")
        found = [
            record
            for record in console.observatory.requests()
            if (not model or record.model == model) and (not outcome or _OUTCOMES[outcome](record))
        ]
        active = [active_json(one) for one in console.observatory.active()]
        return Json({"requests": [request_json(record) for record in found[:limit]], "active": active}, headers=_NO_STORE)

    @routes.get("/admin/v1/requests/{request_id:path}")
    async def one_request(request: Request) -> Response:
        _check_reader(request, console)
        record = console.observatory.request(request.path_params["request_id"])
        if record is None:
            raise RequestNotFound("no request with this id has ended here lately", param="id")
        return Json(request_json(record), headers=_NO_STORE)


def _add_cluster(routes: Routes, console: Console) -> None:
    @routes.get("/admin/v1/cluster")
    async def cluster(request: Request) -> Response:
        _check_reader(request, console)
        return Json({**console.picture.now(), "events": console.picture.events()}, headers=_NO_STORE)

    @routes.get("/admin/v1/series")
    async def series(request: Request) -> Response:
        _check_reader(request, console)
        seconds = console.observatory.series(after_s=_number(request, "after_s", 0.0))
        return Json({"series": [second_json(second) for second in seconds]}, headers=_NO_STORE)

    @routes.get("/admin/v1/live")
    async def live(request: Request) -> Response:
        _check_reader(request, console)
        console.live.check_room()
        return LiveStream(console.live)

    @routes.get("/admin/v1/autoscaler")
    async def autoscaler(request: Request) -> Response:
        _check_reader(request, console)
        return Json(await console.actions.autoscaler_report(), headers=_NO_STORE)


def _add_actions(routes: Routes, console: Console, read_json: ReadJson) -> None:
    async def act(request: Request) -> Response:
        check_actor(request.state.identity, request.headers, authenticates=console.authenticates)
        name = request.url.path.rpartition("/")[2]
        return Json(await console.actions.perform(name, await read_json(request), request.state.identity), headers=_NO_STORE)

    for name in console.actions.names:
        routes.post(f"/admin/v1/actions/{name}")(act)


def _number(request: Request, name: str, default: float) -> float:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not _NUMBER.fullmatch(given):
        raise InvalidRequest(f"{name} must be a number that is not negative", param=name)
    return float(given)
