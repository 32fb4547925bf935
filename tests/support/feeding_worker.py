"""A decode worker without an engine that gives its tokens over feeds: those of a real worker, and a script for each request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from common.codec import chunk_from_wire, request_from_wire, started_from_wire, work_from_wire
from common.rpc import abort_with
from common.types import Request
from common.wire import worker_pb2
from decode_worker.events import Output
from decode_worker.feeds import Feed, Feeds, Lane
from support.fake_cluster import FakeDecodeWorker


def output_of(request: Request, event: worker_pb2.GenerateEvent, *, done: bool) -> Output:
    return Output(
        request.request_id,
        started_from_wire(event.started) if event.HasField("started") else None,
        tuple(map(chunk_from_wire, event.chunks)),
        done,
        work_from_wire(event.account) if event.HasField("account") else None,
    )


@dataclass
class FeedingWorker(FakeDecodeWorker):
    """As its parent. A request gets one event per `step` that was allowed, if `stepwise`; all at once otherwise."""

    stepwise: bool = False
    feeds: Feeds = field(default_factory=Feeds)
    over_lanes: int = 0  # requests
    over_streams: int = 0
    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def start(self) -> None:
        await self.feeds.start("127.0.0.1")
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        await self.feeds.close()

    async def until_fed(self) -> Feed:
        """The feed that a router has opened."""
        async with asyncio.timeout(120):
            while not self.feeds._open:
                await asyncio.sleep(0.002)
        return next(iter(self.feeds._open.values()))

    async def OpenFeed(self, message: worker_pb2.OpenFeedRequest, context: Any) -> worker_pb2.OpenFeedReply:
        return self.feeds.offer()

    async def _generate(self, message: worker_pb2.GenerateRequest, context: Any) -> None:
        feed = self.feeds.find(message.feed)
        if feed is None:
            self.over_streams += 1
            return await super()._generate(message, context)
        self.over_lanes += 1
        request = request_from_wire(message.request)
        self.requests.append(request)
        with feed.lane(message.lane, request.first_choice if request.num_choices == 1 else None) as lane:
            failed = await self._give(lane, request)
        await context.write(worker_pb2.GenerateEvent(given=lane.given))
        if failed and self.failure is not None:
            await abort_with(context, self.failure)
        self.served += 1

    async def _give(self, lane: Lane, request: Request) -> bool:
        events = self.events(request)
        for number, event in enumerate(events):
            if self.fail_after is not None and number >= self.fail_after:
                return True
            if self.hold_after is not None and number >= self.hold_after:
                self.holding.set()
                await self.released.wait()
            if self.stepwise:
                await self.steps.acquire()
            lane.give(output_of(request, event, done=number == len(events) - 1))
            self.feeds.flush()
        return False
