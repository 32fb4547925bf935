"""How the routes of the HTTP face are written down, whichever file they are in: a method, a path, and who answers.

They are Starlette's, which a FastAPI app takes as they are: one of its own would look for parameters, dependencies and a response
model in each endpoint, and go through all that with each request, where there is nothing but a request and a response.

@routes.post("/v1/completions")
async def completions(request: Request) -> Response: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Endpoint = Callable[[Request], Awaitable[Response]]


class Routes:
    """Of one app. The one that was written first comes first where two paths fit."""

    def __init__(self) -> None:
        self.all: list[Route] = []

    def get(self, path: str) -> Callable[[Endpoint], Endpoint]:
        return self._of("GET", path)

    def post(self, path: str) -> Callable[[Endpoint], Endpoint]:
        return self._of("POST", path)

    def _of(self, method: str, path: str) -> Callable[[Endpoint], Endpoint]:
        def add(endpoint: Endpoint) -> Endpoint:
            route = Route(path, endpoint, methods=[method])
            route.methods = {method}  # not HEAD beside GET: a stream that is shown to nobody would have no end
            self.all.append(route)
            return endpoint

        return add
