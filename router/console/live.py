"""What viewers are told once a second: the picture as it is, then what has changed in it.

    joined -> whole picture, last requests, last seconds, events -> change, change, ... -> left | end (the router stops)

One round a second while anybody looks, for all of them together; each gets what has changed since the round that it last took.
So whoever reads slowly misses rounds and nothing else, and no viewer has a queue. Their number is bounded. A frame comes every
second even if nothing has changed: its absence tells the page that something is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import orjson

from common.clock import Clock
from common.errors import NoWorkerAvailable, Overloaded
from common.rpc import cancel_and_wait
from router.console.merge_patch import merge_patch
from router.console.picture import Picture
from router.console.records import active_json, request_json, second_json
from router.observe.observatory import Observatory
from router.observe.records import RequestRecord, Second

Json = dict[str, Any]

_INTERVAL_S = 1.0
_FIRST_REQUESTS = 200
_MOST_ACTIVE = 50


@dataclass(frozen=True, slots=True)
class _Round:
    """What was seen at one moment."""

    number: int
    at_s: float
    picture: Json
    active: list[Json]
    requests: tuple[RequestRecord, ...]  # newest first
    series: tuple[Second, ...]
    last_event: int


class Live:
    """`close` ends every stream in an orderly way; no one can join afterwards."""

    def __init__(self, picture: Picture, observatory: Observatory, *, max_viewers: int, clock: Clock) -> None:
        self._picture = picture
        self._observatory = observatory
        self._max_viewers = max_viewers
        self._clock = clock
        self._num_viewers = 0
        self._number = 0
        self._last: _Round | None = None
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None
        self._shared: tuple[tuple[int, int], bytes] = ((0, 0), b"")  # most viewers want the same change

    def check_room(self) -> None:
        """Raises Overloaded when too many look already, NoWorkerAvailable once it is closed."""
        if self._closed.is_set():
            raise NoWorkerAvailable("the router is shutting down", retry_after_s=1.0)
        if self._num_viewers >= self._max_viewers:
            raise Overloaded(f"{self._max_viewers} pages are shown live already", retry_after_s=5.0)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """JSON objects, until `close`. Iterated inside `aclosing`. Raises what `check_room` raises, before the first."""
        self.check_room()
        self._num_viewers += 1
        try:
            self._last = self._look()
            if self._rounds is None or self._rounds.done():
                self._rounds = asyncio.create_task(self._look_every_second(), name="console")
            seen = self._last
            yield orjson.dumps(self._whole(seen))
            while not self._closed.is_set():
                if self._last is seen:
                    await self._changed.wait()
                if self._last is not seen:
                    before, seen = seen, self._last
                    yield self._change(before, seen)
            yield orjson.dumps({"end": "the router is stopping"})
        finally:
            self._num_viewers -= 1
            if not self._num_viewers and self._rounds is not None:
                rounds, self._rounds = self._rounds, None
                rounds.cancel()

    async def close(self) -> None:
        self._closed.set()
        self._changed.set()
        if self._rounds is not None:
            await cancel_and_wait(self._rounds)

    async def _look_every_second(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self._last = self._look()
            self._changed.set()
            self._changed = asyncio.Event()

    def _look(self) -> _Round:
        self._number += 1
        return _Round(
            number=self._number,
            at_s=round(self._clock.wall_s(), 3),
            picture=self._picture.now(),
            active=[active_json(request) for request in self._observatory.active()[:_MOST_ACTIVE]],
            requests=self._observatory.requests(),
            series=self._observatory.series(),
            last_event=self._picture.last_event,
        )

    def _whole(self, seen: _Round) -> Json:
        return {
            "at_s": seen.at_s,
            "picture": seen.picture,
            "active": seen.active,
            "requests": [request_json(record) for record in seen.requests[:_FIRST_REQUESTS]],
            "series": [second_json(second) for second in seen.series],
            "events": self._picture.events(),
        }

    def _change(self, before: _Round, after: _Round) -> bytes:
        name = (before.number, after.number)
        if self._shared[0] != name:
            self._shared = (name, orjson.dumps(self._difference(before, after)))
        return self._shared[1]

    def _difference(self, before: _Round, after: _Round) -> Json:
        frame: Json = {"at_s": after.at_s}
        if patch := merge_patch(before.picture, after.picture):
            frame["patch"] = patch
        if after.active or before.active:
            frame["active"] = after.active
        if requests := _newer(after.requests, before.requests):
            frame["requests"] = [request_json(record) for record in requests]
        since_s = before.series[-1].at_s if before.series else 0.0
        if seconds := [second_json(second) for second in after.series if second.at_s > since_s]:
            frame["series"] = seconds
        if after.last_event > before.last_event:
            frame["events"] = self._picture.events(before.last_event)
        return frame


def _newer(now: tuple[RequestRecord, ...], before: tuple[RequestRecord, ...]) -> list[RequestRecord]:
    """Those of `now` that were not there before; both with the newest first."""
    newest = before[0] if before else None
    found: list[RequestRecord] = []
    for record in now[:_FIRST_REQUESTS]:
        if record is newest:
            break
        found.append(record)
    return found
