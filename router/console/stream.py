"""The live frames as Server-Sent Events. A stream ends with its viewer, with the router, or after a while, so that a key that was
taken away does not see for ever; the page then connects again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import DeadlineExceeded, RequestCancelled
from router.console.live import Live
from router.event_stream import until_disconnect

_LONGEST_S = 900.0
_SEND_S = 10.0  # a viewer that takes nothing for so long is let go


class LiveStream(Response):
    media_type = "text/event-stream"

    def __init__(self, live: Live) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._live.check_room()  # until here an error is a real status
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with until_disconnect(receive, _LONGEST_S), aclosing(self._live.frames()) as frames:
                async for frame in frames:
                    async with asyncio.timeout(_SEND_S):
                        await send({"type": "http.response.body", "body": b"data: " + frame + b"\n\n", "more_body": True})
        except RequestCancelled:
            return  # nobody is there any more
        except (DeadlineExceeded, TimeoutError):
            scope["state"]["outcome"] = "200"
        await send({"type": "http.response.body", "body": b"", "more_body": False})
