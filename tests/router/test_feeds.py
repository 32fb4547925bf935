"""Tokens over a feed: the same answers as over the requests' own streams, and each request for itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from common.errors import EngineFailure
from common.feed_frames import HELLO, TICKET_BYTES
from decode_worker.feeds import Feeds
from router.feeds import Feed
from support.fake_cluster import MODEL, FakeCluster
from support.feeding_worker import FeedingWorker
from support.router_clients import http_client

BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 50, "seed": 3, "temperature": 0.7}


async def text_of(http: httpx.AsyncClient, **more: Any) -> str:
    reply = await http.post("/v1/completions", json={**BODY, **more})
    assert reply.status_code == 200, reply.text
    return "|".join(choice["text"] for choice in reply.json()["choices"])


@asynccontextmanager
async def fed(start_cluster: Any, **settings: Any) -> AsyncIterator[tuple[FakeCluster, httpx.AsyncClient]]:
    """A cluster whose router has a feed from every worker."""
    async with start_cluster(make_worker=FeedingWorker, **settings) as cluster, http_client(cluster) as http:
        async with asyncio.timeout(120):
            while not all(worker.requests for worker in cluster.workers):
                assert await text_of(http) == "hello there"
        for worker in cluster.workers:
            await worker.until_fed()
            worker.requests.clear()
        yield cluster, http


async def test_after_the_first_request_tokens_come_over_the_feed(start_cluster: Any) -> None:
    async with fed(start_cluster) as (cluster, http):
        worker = cluster.worker
        assert (worker.over_streams > 0, worker.over_lanes) == (True, 0)
        for more in ({}, {"n": 3}, {"logprobs": 2}, {"prompt": [[5, 6], [7, 8]]}, {"stop": ["the"]}):
            over_lanes = worker.over_lanes
            fresh = await text_of(http, **more)
            assert worker.over_lanes > over_lanes
            feed = await worker.until_fed()
            feed.number, number = 0, feed.number  # from here on nobody finds it
            worker.feeds._open.pop(number)
            assert await text_of(http, **more) == fresh
            worker.feeds._open[number], feed.number = feed, number
        assert await text_of(http) == "hello there"


async def test_an_error_comes_after_the_tokens_that_came_before_it(start_cluster: Any) -> None:
    async with fed(start_cluster) as (cluster, http):
        cluster.worker.fail_after, cluster.worker.failure = 3, EngineFailure("it broke")
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True, "return_token_ids": True}) as reply:
            events = [json.loads(line[6:]) async for line in reply.aiter_lines() if line.startswith("data: {")]
        ids = [token_id for event in events[:-1] for token_id in event["choices"][0]["token_ids"]]
        assert ids == cluster.tokenizer.encode("hello there", add_special_tokens=False)[:3]
        assert events[-1]["error"]["message"] == "it broke"


async def test_what_a_worker_left_out_at_its_end_is_asked_for_again(start_cluster: Any) -> None:
    async with fed(start_cluster) as (cluster, http):
        cluster.worker.fail_after = 3  # and no error: the stream ends as if all was well
        assert await text_of(http) == "hello there"
        assert [request.num_resumed_tokens for request in cluster.worker.requests] == [0, 3]


async def test_who_leaves_and_who_reads_slowly_disturb_nobody(start_cluster: Any) -> None:
    async with fed(start_cluster) as (cluster, http):
        worker = cluster.worker
        worker.stepwise, worker.answer = True, "hello there " * 200
        worker.hold_after = 300  # however late it is heard that somebody leaves, his answer is not over by then
        full = worker.tokenizer.encode(worker.answer, add_special_tokens=False)
        lengths = (60, 61, 62)

        async def step() -> None:
            while True:
                worker.steps.release()
                await asyncio.sleep(0)

        stepping = asyncio.create_task(step())
        long = {**BODY, "stream": True, "max_tokens": 400}
        async with http.stream("POST", "/v1/completions", json=long) as slow:
            async with http.stream("POST", "/v1/completions", json=long) as leaving:
                others = [asyncio.create_task(text_of(http, max_tokens=length)) for length in lengths]
                assert await anext(leaving.aiter_lines())
            assert await asyncio.gather(*others) == [worker.tokenizer.decode(full[:length]) for length in lengths]
            async with asyncio.timeout(120):
                await worker.cancelled.wait()
            worker.released.set()
            lines = [line async for line in slow.aiter_lines() if line]  # nothing of it was read before
        stepping.cancel()
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
        assert (text, lines[-1]) == (worker.tokenizer.decode(full[:400]), "data: [DONE]")
        async with asyncio.timeout(120):
            while (await worker.until_fed())._lanes:
                await asyncio.sleep(0.002)
        assert worker.served < worker.over_lanes + worker.over_streams


async def test_a_feed_that_is_lost_takes_no_answer_with_it(start_cluster: Any) -> None:
    async with fed(start_cluster, num_workers=2) as (cluster, http):
        for worker in cluster.workers:
            worker.hold_after = 2
        asked = [asyncio.create_task(text_of(http, n=1 + number % 2)) for number in range(4)]
        async with asyncio.timeout(120):
            while sum(worker.over_lanes for worker in cluster.workers) < 4:
                await asyncio.sleep(0.002)
        for worker in cluster.workers:
            worker.hold_after = None
        for worker in cluster.workers:
            (await worker.until_fed()).close()
        for worker in cluster.workers:
            worker.released.set()
        assert await asyncio.gather(*asked) == ["hello there", "hello there|hello there"] * 2
        assert sum(request.num_resumed_tokens > 0 for worker in cluster.workers for request in worker.requests) == 6


async def test_an_end_counts_after_all_that_was_given_and_a_lost_feed_at_once() -> None:
    for lost in (False, True):
        feed = Feed(1)
        lane = feed.lane()
        lane.push(5)
        lane.push(6)
        lane.expect(3)
        lane.end(EngineFailure("it broke"))
        assert await lane.next() == (5, 6), "tokens that waited come at once"
        reading = asyncio.create_task(lane.next())
        await asyncio.sleep(0)
        assert not reading.done()
        if lost:
            feed.connection_lost(None)
        else:
            lane.push(7)
            assert await reading == (7,)
            reading = asyncio.create_task(lane.next())
        with pytest.raises(EngineFailure, match="it broke"):
            await reading


async def answer_to(address: str, *said: bytes) -> bytes | None:
    """What a stranger at the feeds' port hears before anything else; None: it is turned away."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in said:
            writer.write(piece)
        return await asyncio.wait_for(reader.readexactly(len(HELLO)), 60)
    except (ConnectionResetError, asyncio.IncompleteReadError):
        return None
    finally:
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_without_a_ticket_nobody_is_let_in_and_with_one_once() -> None:
    feeds = Feeds()
    await feeds.start("127.0.0.1")
    offer = feeds.offer()
    for strange in (b"GET / HTTP/1.1\r\n", HELLO + bytes(TICKET_BYTES), b"pdserve feed 2\n" + offer.ticket):
        assert await answer_to(offer.address, strange) is None
    assert await answer_to(offer.address, HELLO, offer.ticket) == HELLO
    assert await answer_to(offer.address, HELLO + offer.ticket) is None
    assert await answer_to(offer.address, HELLO + feeds.offer().ticket) == HELLO
    await feeds.close()
