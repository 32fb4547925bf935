"""The router's ends of feeds: over one connection per decode worker come the tokens of all requests (`common.feed_frames`).

    first request to a worker -> OpenFeed, connect, greet (nobody waits for it) -> open -> lanes -> lost -> opened again by the
    next

Until a feed is open, or where there is none, a request's events come over its own gRPC stream, so a worker that knows no feeds,
or whose port cannot be reached, costs speed and nothing else. If a feed is lost, the requests that have lanes on it are lost with
it.

A lane holds what has come and was not taken yet. That is bounded by the answer, and a client that reads slowly holds up nobody
else.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from typing import cast

import grpc.aio

from common.errors import EngineFailure, PdserveError, WorkerLost
from common.feed_frames import HELLO, FrameReader
from common.logs import get_logger
from common.rpc import cancel_and_wait
from common.types import WorkerRef
from common.wire import worker_pb2
from common.wire.worker_pb2_grpc import DecodeStub

_log = get_logger(__name__)

_OPEN_S = 5.0
_AGAIN_S = 10.0  # after one that could not be opened

News = tuple[int, ...] | worker_pb2.GenerateEvent
"""Tokens of the only choice, and nothing else; or an event."""


class Lane:
    """What comes for one request, from whichever side, in order. Read by one task."""

    def __init__(self, feed: Feed, number: int) -> None:
        self._feed = feed
        self.feed_number = feed.number
        self.number = number
        self._items: deque[int | worker_pb2.GenerateEvent] = deque()
        self._num_came = 0
        self._num_given: int | None = None
        self._end: PdserveError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> News:
        """What has come; tokens that follow each other at once. Raises the error that it ended in, after all that came before."""
        items = self._items
        while not items:
            if self._end is not None and (self._num_given is None or self._num_came >= self._num_given):
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        first = items.popleft()
        if not isinstance(first, int):
            return first
        if not items:
            return (first,)
        row = [first]
        while items and isinstance(items[0], int):
            row.append(cast(int, items.popleft()))
        return tuple(row)

    def close(self) -> None:
        self._feed.leave(self.number)

    # -- for those who bring it ----------------------------------------------------------------------------------------

    def push(self, item: int | worker_pb2.GenerateEvent) -> None:
        self._num_came += 1
        self._items.append(item)
        self._wake()

    def expect(self, num_given: int) -> None:
        """So much the worker gave; an end counts after it."""
        self._num_given = num_given

    def end(self, error: PdserveError, *, at_once: bool = False) -> None:
        """The first end counts. `at_once`: nothing more can come, whatever was given."""
        self._end = self._end or error
        if at_once:
            self._num_given = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Feed(asyncio.Protocol):
    """One connection to one worker."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._lanes: dict[int, Lane] = {}
        self._serial = itertools.count(1)
        self._reader = FrameReader()
        self._greeting = bytearray()
        self._transport: asyncio.Transport | None = None
        self.greeted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.lost = False

    def lane(self) -> Lane:
        number = next(self._serial)
        lane = self._lanes[number] = Lane(self, number)
        return lane

    def leave(self, number: int) -> None:
        self._lanes.pop(number, None)

    def greet(self, ticket: bytes) -> None:
        if self._transport is not None:
            self._transport.write(HELLO + ticket)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.greeted.done():
            data = self._rest_of_greeting(data)
        try:
            for deltas in self._reader.feed(data):
                self._distribute(deltas)
        except EngineFailure as error:
            _log.error("a feed cannot be read", reason=error.message)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost, self._transport = True, None
        if not self.greeted.done():
            self.greeted.set_result(False)
        for lane in tuple(self._lanes.values()):
            lane.end(WorkerLost("the connection that brings the tokens was lost"), at_once=True)

    def _rest_of_greeting(self, data: bytes) -> bytes:
        self._greeting += data
        if len(self._greeting) >= len(HELLO):
            if self._greeting.startswith(HELLO):
                self.greeted.set_result(True)
                return bytes(self._greeting[len(HELLO) :])
            self.close()
        return b""

    def _distribute(self, deltas: worker_pb2.Deltas) -> None:
        lanes = self._lanes
        for item in deltas.events:
            if (lane := lanes.get(item.lane)) is not None:  # else it has left
                lane.push(item.event)
        for number, token_id in zip(deltas.lanes, deltas.token_ids, strict=True):
            if (lane := lanes.get(number)) is not None:
                lane.push(token_id)


class Feeds:
    """One per router."""

    def __init__(self) -> None:
        self._feeds: dict[WorkerRef, Feed] = {}
        self._opening: dict[WorkerRef, asyncio.Task[None]] = {}
        self._not_before_s: dict[WorkerRef, float] = {}

    def lane(self, ref: WorkerRef, channel: grpc.aio.Channel) -> Lane | None:
        """None: there is no open feed. One is then being opened, over `channel`."""
        feed = self._feeds.get(ref)
        if feed is not None and not feed.lost:
            return feed.lane()
        now_s = asyncio.get_running_loop().time()
        if ref not in self._opening and now_s >= self._not_before_s.get(ref, now_s):
            self._opening[ref] = asyncio.create_task(self._open(ref, channel), name="open feed")
        return None

    def keep_only(self, present: Collection[WorkerRef]) -> None:
        """Forgets workers that are gone; a feed that is still in use ends with its worker."""
        for ref in [ref for ref, feed in self._feeds.items() if ref not in present and feed.lost]:
            del self._feeds[ref]
        for ref in [ref for ref in self._not_before_s if ref not in present]:
            del self._not_before_s[ref]

    async def close(self) -> None:
        for task in tuple(self._opening.values()):
            await cancel_and_wait(task)
        for feed in self._feeds.values():
            feed.close()

    async def _open(self, ref: WorkerRef, channel: grpc.aio.Channel) -> None:
        feed: Feed | None = None
        try:
            async with asyncio.timeout(_OPEN_S):
                offer = await DecodeStub(channel).OpenFeed(worker_pb2.OpenFeedRequest(), timeout=_OPEN_S)
                host, _, port = offer.address.rpartition(":")
                loop = asyncio.get_running_loop()
                _, feed = await loop.create_connection(lambda: Feed(offer.feed), host.strip("[]"), int(port))
                feed.greet(offer.ticket)
                if not await feed.greeted:
                    raise WorkerLost("the worker does not open its feed")
            self._feeds[ref], feed = feed, None
        except (grpc.aio.AioRpcError, OSError, TimeoutError, ValueError, WorkerLost) as error:
            self._not_before_s[ref] = asyncio.get_running_loop().time() + _AGAIN_S
            _log.info("no feed from a worker: its tokens come over gRPC", worker=ref.worker_id, reason=repr(error))
        finally:
            if feed is not None:
                feed.close()
            with suppress(KeyError):
                del self._opening[ref]
