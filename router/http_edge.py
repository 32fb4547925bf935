"""The edge of the HTTP face: what happens to every request before and after its route.

    request id -> API key -> [route] -> status counted, one log line        every answer carries X-Request-Id

A plain ASGI layer around the app: it sees bytes and statuses, and never reads a body. What is open without a key is a short list
of exact paths; everything else is closed, whatever it is called.
"""

from __future__ import annotations

import math

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import AuthenticationFailed, CapacityError, PayloadTooLarge, PdserveError
from common.logs import bound, get_logger
from common.tracing.span import NO_SPAN, entered
from router.front import Front, request_id_or_new
from router.observe.observatory import Sighting
from router.openai_format import error_body

log = get_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
_LIMITED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_COUNTED_PATHS = frozenset(
    {*_LIMITED_PATHS, "/v1/models", "/v1/route/explain", "/tokenize", "/detokenize", "/v1/cache/invalidate"}
)


class Json(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)


def error_response(error: PdserveError) -> Json:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None or isinstance(error, CapacityError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if isinstance(error, AuthenticationFailed):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, PayloadTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not going to be read
    return Json(error_body(error), status_code=error.http_status, headers=headers)


class Edge:
    def __init__(self, app: ASGIApp, front: Front, *, open_paths: frozenset[str] = frozenset()) -> None:
        """`open_paths` are open without a key, beside those that always are."""
        self._app = app
        self._front = front
        self._open_paths = OPEN_PATHS | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_or_new(headers.get("x-request-id", ""))
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, received_s=self._front.clock.monotonic_s(), model="", answer_headers={})
        sighting: Sighting | None = None
        if scope["path"] in _LIMITED_PATHS:
            sighting = state["sighting"] = self._front.observatory.begin(
                request_id, scope["path"], state["received_s"], lambda name: headers.get(name, "")
            )
        status = "499"  # unless an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers_out = MutableHeaders(scope=message)
                headers_out.update({**state["answer_headers"], "X-Request-Id": request_id})
                if "identity" in state and scope["path"] in _LIMITED_PATHS:
                    headers_out.update(self._front.limits.headers(state["identity"]))
            await send(message)

        with bound(request_id=request_id), entered(NO_SPAN if sighting is None else sighting.span):
            try:
                if scope["path"] not in self._open_paths:
                    state["identity"] = await self._front.keys.identify(headers.get("authorization"))
                await self._app(scope, receive, send_with_id)
            except (AuthenticationFailed, CapacityError) as error:
                state["failure"] = error
                await error_response(error)(scope, receive, send_with_id)
            finally:
                outcome = state.get("outcome", status)
                if sighting is not None:
                    self._front.observatory.end(sighting, int(outcome), state.get("failure"))
                self._account(scope, outcome)

    def _account(self, scope: Scope, status: str) -> None:
        path, state = scope["path"], scope["state"]
        endpoint = path if path in _COUNTED_PATHS else "other"
        self._front.metrics.requests_total.labels(state["model"], endpoint, status).inc()
        if path not in self._open_paths:
            seconds = self._front.clock.monotonic_s() - state["received_s"]
            log.info("request", method=scope["method"], endpoint=endpoint, status=status, model=state["model"], seconds=seconds)
