"""Three routers before one Redis: they give each other's answers, and none after an invalidation, whatever happens to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from support.fake_cluster import MODEL, FakeCluster
from support.redis_server import RedisServer, any_binary
from support.router_clients import http_client

REPLICAS = 3
pytestmark = pytest.mark.long


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    path = any_binary()
    if path is None:
        pytest.skip("no redis-server is here")
    server = RedisServer(path, "--save", "")
    try:
        server.start()
        yield server
    finally:
        server.remove()


@dataclass
class Replicas:
    clusters: list[FakeCluster]
    clients: list[httpx.AsyncClient]

    def now_says(self, answer: str) -> None:
        for cluster in self.clusters:
            cluster.worker.answer = answer

    async def ask(self, which: int, **more: Any) -> tuple[str, str]:
        """What the cache did, and the text."""
        body = {"model": MODEL, "prompt": "say", "temperature": 0, "max_tokens": 60, **more}
        reply = await self.clients[which].post("/v1/completions", json=body, headers={"x-cache-tags": "doc"})
        assert reply.status_code == 200, reply.text
        return reply.headers["x-cache"], reply.json()["choices"][0]["text"]

    async def until_hit(self, which: int) -> str:
        """Writes are not waited for, so that it may take a moment until another replica sees one."""
        async with asyncio.timeout(120):
            while True:
                result, text = await self.ask(which)
                if result == "hit-exact":
                    return text

    async def invalidate(self, which: int, **body: Any) -> httpx.Response:
        return await self.clients[which].post("/v1/cache/invalidate", json=body)


@pytest.fixture
async def replicas(start_cluster: Any, redis_server: RedisServer) -> AsyncIterator[Replicas]:
    cache = {"redis": {"url": redis_server.url, "operation_timeout_s": 0.5}}  # generous: the machine may be busy
    async with AsyncExitStack() as stack:
        clusters = [await stack.enter_async_context(start_cluster(cache=cache)) for _ in range(REPLICAS)]
        clients = [await stack.enter_async_context(http_client(cluster)) for cluster in clusters]
        yield Replicas(clusters, clients)


async def test_an_answer_of_one_replica_serves_all(replicas: Replicas) -> None:
    await replicas.until_hit(0)
    asked = len(replicas.clusters[0].worker.requests)
    for which in range(1, REPLICAS):
        assert await replicas.ask(which) == ("hit-exact", "hello there")
        assert not replicas.clusters[which].worker.requests
    assert len(replicas.clusters[0].worker.requests) == asked


@pytest.mark.parametrize("body", [{"tags": ["doc"]}, {"tenant": "self"}, {"model": MODEL}])
async def test_after_an_invalidation_no_replica_gives_the_old_answer(replicas: Replicas, body: dict[str, Any]) -> None:
    for number in range(8):
        replicas.now_says(f"version {number}")
        done = await replicas.invalidate(number % REPLICAS, **body)
        assert done.status_code == 200
        said = await asyncio.gather(*(replicas.ask(which) for which in range(REPLICAS) for _ in range(3)))
        assert {text for _, text in said} == {f"version {number}"}
        await replicas.until_hit((number + 1) % REPLICAS)


async def test_an_answer_in_the_making_is_outlived_by_an_invalidation(replicas: Replicas) -> None:
    await replicas.until_hit(0)
    await replicas.invalidate(0, tags=["doc"])
    making = replicas.clusters[1].worker
    making.answer, making.hold_after = "old news", 2
    slow = asyncio.create_task(replicas.ask(1))
    await making.holding.wait()
    assert (await replicas.invalidate(2, tags=["doc"])).status_code == 200
    making.hold_after = None
    replicas.now_says("new")
    assert await replicas.ask(1) == ("miss", "new")  # it does not join what was begun before
    making.released.set()
    assert await slow == ("miss", "old news")  # who asked before gets what was begun before
    assert {(await replicas.ask(which))[1] for which in range(REPLICAS)} == {"new"}


async def test_a_redis_that_is_killed_loses_answers_and_never_an_invalidation(
    replicas: Replicas, redis_server: RedisServer
) -> None:
    await replicas.until_hit(0)
    redis_server.kill()
    replicas.now_says("new")
    refused = await replicas.invalidate(0, tags=["doc"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert [(await replicas.ask(which))[0] for which in range(REPLICAS)] == ["miss"] * REPLICAS  # and nobody fails
    redis_server.start()
    assert [await replicas.until_hit(which) for which in range(REPLICAS)] == ["new"] * REPLICAS
