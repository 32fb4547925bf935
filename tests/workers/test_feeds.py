"""A real decode worker that gives its tokens over a feed: the same tokens, and nothing is left of those who leave or are lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.codec import chunk_from_wire, request_to_wire
from common.config import DecodeConfig, EngineConfig
from common.errors import WorkerLost
from common.types import Request
from common.wire import worker_pb2, worker_pb2_grpc
from router.feeds import Feeds, Lane
from support.tiny_models import make_tiny_model
from support.workers import Workers, request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048)
LOCAL = DecodeConfig(local_prefill="always")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


async def fed(workers: Workers, feeds: Feeds) -> None:
    async with asyncio.timeout(120):
        while (lane := feeds.lane(workers.decode_ref, workers.channel)) is None:
            await asyncio.sleep(0.002)
    lane.close()


def open_call(workers: Workers, lane: Lane, work: Request) -> worker_pb2_grpc.DecodeStub:
    message = worker_pb2.GenerateRequest(request=request_to_wire(work), feed=lane.feed_number, lane=lane.number)
    return worker_pb2_grpc.DecodeStub(workers.channel).Generate(message, timeout=60)


async def tokens_of(lane: Lane, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        news = await asyncio.wait_for(lane.next(), 60)
        chunks = [news] if isinstance(news, tuple) else [chunk_from_wire(chunk).token_ids for chunk in news.chunks]
        found += [token_id for chunk in chunks for token_id in chunk]
    return found


async def test_the_feed_brings_the_same_tokens_and_the_stream_says_how_many_events_there_were(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, num_prefill=0, decode=LOCAL) as workers:
        feeds = Feeds()
        await fed(workers, feeds)
        work = [request([3 + number, 4, 5], request_id=f"r{number}", max_tokens=20) for number in range(3)]
        expected = [(await workers.generate(item)).tokens for item in work]
        lanes = [feeds.lane(workers.decode_ref, workers.channel) for _ in work]
        calls = [open_call(workers, lane, item) for lane, item in zip(lanes, work, strict=True) if lane is not None]
        assert [await tokens_of(lane, 20) for lane in lanes if lane is not None] == expected
        for call, lane in zip(calls, lanes, strict=True):
            (said,) = [event async for event in call]
            assert lane is not None
            assert said == worker_pb2.GenerateEvent(given=lane._num_came)
        await workers.assert_nothing_leaks()
        await feeds.close()


async def test_nothing_is_left_of_who_leaves_and_of_who_is_lost_with_the_feed(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, num_prefill=0, decode=LOCAL) as workers:
        feeds = Feeds()
        await fed(workers, feeds)
        lanes = [lane for _ in range(3) if (lane := feeds.lane(workers.decode_ref, workers.channel)) is not None]
        work = [request([3 + number, 4], request_id=f"r{number}", max_tokens=400) for number in range(3)]
        calls = [open_call(workers, lane, item) for lane, item in zip(lanes, work, strict=True)]
        for lane in lanes:
            await tokens_of(lane, 2)
        calls[0].cancel()
        for lane in lanes[1:]:
            await tokens_of(lane, 2)
        await feeds.close()
        for lane in lanes[1:]:
            with pytest.raises(WorkerLost):
                await tokens_of(lane, 10_000)
        await workers.assert_nothing_leaks()  # though nobody has cancelled the calls
