"""Answers over HTTP that take a while: Server-Sent Events, and noticing that the client has left.

    first event  -> awaited before the status line: until then an error is a real HTTP status
    events       -> data: {json}\\n\\n
    an error     -> data: {"error": ...}\\n\\n, once
    the end      -> data: [DONE]\\n\\n, also after an error

While an answer is in the making, `until_disconnect` listens for the client hanging up and cancels the work inside it; everything
below is closed by that cancellation, down to the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import DeadlineExceeded, PdserveError, RequestCancelled
from common.logs import get_logger
from router.models.fallback import Answer
from router.openai_format import Formatter, Json, error_body

log = get_logger(__name__)

_DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def until_disconnect(receive: Receive, timeout_s: float) -> AsyncIterator[None]:
    """Cancels its body when the client disconnects (RequestCancelled) or the time is over (DeadlineExceeded).

    The request's body must have been read: from here on `receive` tells nothing but the disconnect. Listening and time begin when
    the body first waits: an answer that is there at once needs neither.
    """
    loop = asyncio.get_running_loop()
    gone = False
    listener: asyncio.Task[None] | None = None

    async def listen(scope: asyncio.Timeout) -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            continue
        gone = True
        if scope.when() is not None:
            scope.reschedule(loop.time())

    def begin(scope: asyncio.Timeout) -> None:
        nonlocal listener
        scope.reschedule(loop.time() + timeout_s)
        listener = loop.create_task(listen(scope), name="listen for disconnect")

    try:
        async with asyncio.timeout(None) as scope:
            beginning = loop.call_soon(begin, scope)  # in the loop's next turn, which is this task's first wait
            try:
                yield
            finally:
                beginning.cancel()
                if listener is not None:
                    listener.cancel()
                    await asyncio.wait([listener])
    except TimeoutError:
        if gone:
            raise RequestCancelled("the client went away") from None
        raise DeadlineExceeded("the request's time is over") from None


async def sse_events(answer: Answer, formatter: Formatter) -> AsyncGenerator[bytes, None]:
    """The whole stream. Raises only before the first event; later errors become events."""
    started = False
    try:
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                if event := b"".join(_event(chunk) for chunk in formatter.chunks(delta)):
                    started = True
                    yield event
        if last := formatter.last_chunk():
            yield _event(last)
    except PdserveError as error:
        if not started:
            raise
        log.warning("stream ended in an error", error=error.code, message=error.message)
        yield _event(error_body(error))
    yield _DONE


class EventStream(Response):
    """Sends the events of a generation, and closes it however the sending ends. `scope["state"]` tells the edge how
    a stream ended that had already begun with 200."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, formatter: Formatter, *, timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._formatter = formatter
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            events = sse_events(self._answer, self._formatter)
            async with until_disconnect(receive, self._timeout_s), aclosing(events):
                async for event in events:
                    if not started:
                        started = True
                        self.headers.update(self._answer.generation.cache_headers)
                        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            failure = self._answer.failure
        except PdserveError as error:
            if not started:
                raise
            failure = error  # the client has left, or reads so slowly that its time is over: there is nobody to tell
        if failure is not None:
            scope["state"]["outcome"] = str(failure.http_status)
            scope["state"]["failure"] = failure


def _event(data: Json) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"
