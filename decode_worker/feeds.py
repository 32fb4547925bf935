"""Feeds: what a step has to say to all requests of a router goes there in one write (`common.feed_frames`).

    OpenFeed -> a ticket, good once and for ten seconds -> the router connects and shows it -> open -> lanes -> lost

    deliver(events of a step) -> Lane.give(output) for each request that has a lane -> Feeds.flush() -> one write per feed

A feed is a connection of one router's. Whatever arrives on it after the greeting, or its end, ends it: its requests then fail as
lost, for nobody hears of them any more. A router that does not read holds up nobody: what is not taken stays in the connection's
buffer, which is bounded by the answers that its requests may still come to.

Knows neither the engine nor what a request is. Lives on the worker's asyncio loop.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from common.codec import chunk_to_wire, started_to_wire, work_to_wire
from common.errors import PdserveError, WorkerLost
from common.feed_frames import HELLO, TICKET_BYTES, FrameWriter
from common.logs import get_logger
from common.wire import worker_pb2
from decode_worker.events import Output

_log = get_logger(__name__)

_TICKET_S = 10.0
_GREETING_BYTES = len(HELLO) + TICKET_BYTES


def event_to_wire(output: Output) -> worker_pb2.GenerateEvent:
    return worker_pb2.GenerateEvent(
        started=started_to_wire(output.started) if output.started is not None else None,
        chunks=[chunk_to_wire(chunk) for chunk in output.chunks],
        account=work_to_wire(output.account) if output.account is not None else None,
    )


class Lane:
    """One request's part of a feed; its outputs are given in order."""

    def __init__(self, feed: Feed, number: int, choice: int | None) -> None:
        """`choice`: the only one of the request; None if it has several."""
        self._feed = feed
        self._number = number
        self._choice = choice
        self.given = 0
        self.lost: asyncio.Future[PdserveError] = asyncio.get_running_loop().create_future()

    def give(self, output: Output) -> None:
        self.given += 1
        chunks = output.chunks
        if len(chunks) == 1 and output.started is None and not output.done:
            chunk = chunks[0]
            if len(chunk.token_ids) == 1 and chunk.choice == self._choice and chunk.finish_reason is None and not chunk.logprobs:
                self._feed.token(self._number, chunk.token_ids[0])
                return
        self._feed.event(self._number, event_to_wire(output))


class Feed(asyncio.Protocol):
    """One connection. Its lanes are those of requests in progress."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._transport: asyncio.Transport | None = None
        self._greeting = bytearray()
        self._writer = FrameWriter()
        self._lanes: dict[int, Lane] = {}
        self._dirty = False
        self.number = 0  # 0: it has not been let in

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._feeds.came(self)

    def data_received(self, data: bytes) -> None:
        self._greeting += data
        if self.number or not self._feeds.let_in(self, bytes(self._greeting)):
            self.close()
        elif self.number and self._transport is not None:
            self._transport.write(HELLO)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._feeds.went(self)
        for lane in self._lanes.values():
            if not lane.lost.done():
                lane.lost.set_result(WorkerLost("the connection to the router was lost"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- lanes ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def lane(self, number: int, choice: int | None) -> Iterator[Lane]:
        lane = self._lanes[number] = Lane(self, number, choice)
        try:
            yield lane
        finally:
            del self._lanes[number]

    def token(self, lane: int, token_id: int) -> None:
        self._writer.token(lane, token_id)
        self._mark()

    def event(self, lane: int, event: worker_pb2.GenerateEvent) -> None:
        self._writer.event(lane, event)
        self._mark()

    def flush(self) -> None:
        self._dirty = False
        data = self._writer.take()
        if self._transport is not None:
            self._transport.write(data)

    def _mark(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._feeds.dirty.append(self)


class Feeds:
    """One per worker."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._tickets: dict[bytes, tuple[int, asyncio.TimerHandle]] = {}
        self._connections: set[Feed] = set()
        self._open: dict[int, Feed] = {}
        self._server: asyncio.Server | None = None
        self._address = ""
        self.dirty: list[Feed] = []  # that have something to write

    async def start(self, host: str) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Feed(self), host, 0)
        bound_host, port = self._server.sockets[0].getsockname()[:2]
        self._address = f"[{bound_host}]:{port}" if ":" in bound_host else f"{bound_host}:{port}"

    async def close(self) -> None:
        for _, expiry in self._tickets.values():
            expiry.cancel()
        self._tickets.clear()
        for feed in tuple(self._connections):
            feed.close()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def offer(self) -> worker_pb2.OpenFeedReply:
        number, ticket = next(self._numbers), secrets.token_bytes(TICKET_BYTES)
        expiry = asyncio.get_running_loop().call_later(_TICKET_S, self._tickets.pop, ticket, None)
        self._tickets[ticket] = (number, expiry)
        return worker_pb2.OpenFeedReply(address=self._address, feed=number, ticket=ticket)

    def find(self, number: int) -> Feed | None:
        """None: it is not open (yet, or any more)."""
        return self._open.get(number)

    def flush(self) -> None:
        """After the last event of a step was given."""
        for feed in self.dirty:
            feed.flush()
        self.dirty.clear()

    # -- for a feed ----------------------------------------------------------------------------------------------------

    def came(self, feed: Feed) -> None:
        self._connections.add(feed)
        asyncio.get_running_loop().call_later(_TICKET_S, self._throw_out, feed)

    def let_in(self, feed: Feed, greeting: bytes) -> bool:
        """Whether what it has said so far is the greeting of somebody who was asked in, or may become it."""
        if len(greeting) < _GREETING_BYTES:
            return HELLO.startswith(greeting[: len(HELLO)])
        hello, ticket = greeting[: len(HELLO)], greeting[len(HELLO) :]
        known = next((held for held in self._tickets if hmac.compare_digest(held, ticket)), None)
        if hello != HELLO or known is None:
            _log.warning("somebody without a ticket was turned away from the feeds")
            return False
        number, expiry = self._tickets.pop(known)
        expiry.cancel()
        feed.number = number
        self._open[number] = feed
        return True

    def went(self, feed: Feed) -> None:
        self._connections.discard(feed)
        self._open.pop(feed.number, None)

    def _throw_out(self, feed: Feed) -> None:
        if not feed.number:
            feed.close()
