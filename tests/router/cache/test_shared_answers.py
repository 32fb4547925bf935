"""Equal requests at the same time: one generation, whole answers for everybody, whoever leaves or dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

ON: dict[str, Any] = {"exact": {"enabled": True}}
BODY: dict[str, Any] = {"model": MODEL, "prompt": "say", "temperature": 0, "max_tokens": 60, "stream": True}
MANY, SOME = 100, 20


class Listener:
    """A client that streams. `first` is set when its first event has come."""

    def __init__(self, http: httpx.AsyncClient, **more: Any) -> None:
        self.first = asyncio.Event()
        self.text = ""
        self.events: list[Any] = []
        self.result = ""
        self.task = asyncio.create_task(self._listen(http, BODY | more))

    async def _listen(self, http: httpx.AsyncClient, body: dict[str, Any]) -> Listener:
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            self.result = reply.headers.get("x-cache", "")
            async for line in reply.aiter_lines():
                if line:
                    self.first.set()
                    self.events.append(line.removeprefix("data: "))
        self.text = "".join(
            choice["text"] for event in self.events if event != "[DONE]" for choice in json.loads(event).get("choices", ())
        )
        return self

    @property
    def whole(self) -> bool:
        return self.events[-1:] == ["[DONE]"] and '"finish_reason":"stop"' in self.events[-2]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@pytest.fixture
async def cluster(start_cluster: Any) -> AsyncIterator[FakeCluster]:
    async with start_cluster(cache=ON) as running:
        running.worker.hold_after = 3
        yield running


async def many(cluster: FakeCluster, http: httpx.AsyncClient, number: int) -> list[Listener]:
    """So many listeners to one answer, each with its first event; the first of them began it."""
    listeners = [Listener(http)]
    await listeners[0].first.wait()
    listeners += [Listener(http) for _ in range(number - 1)]
    await asyncio.gather(*(listener.first.wait() for listener in listeners))
    return listeners


def unlimited(cluster: FakeCluster) -> httpx.AsyncClient:
    return http_client(cluster, limits=httpx.Limits(max_connections=2 * MANY))


async def metric(http: httpx.AsyncClient, line: str) -> float:
    found = [text for text in (await http.get("/metrics")).text.splitlines() if text.startswith(line)]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@pytest.mark.long
async def test_a_hundred_streams_are_one_generation(cluster: FakeCluster) -> None:
    async with unlimited(cluster) as http:
        listeners = await many(cluster, http, MANY)
        cluster.worker.released.set()
        done = await asyncio.gather(*(listener.task for listener in listeners))
        assert {(listener.text, listener.whole) for listener in done} == {("hello there", True)}
        assert [listener.result for listener in done] == ["miss"] + ["coalesced"] * (MANY - 1)
        assert len(cluster.worker.requests) == 1
        assert (await asyncio.gather(Listener(http).task))[0].result == "hit-exact"
        labels = f'{{model_name="{MODEL}",reason="",result="coalesced"}}'
        assert await metric(http, f"pdserve_cache_requests_total{labels}") == MANY - 1


async def test_whoever_began_it_may_leave(cluster: FakeCluster) -> None:
    async with unlimited(cluster) as http:
        listeners = await many(cluster, http, SOME)
        await listeners[0].leave()
        await asyncio.gather(*(listener.leave() for listener in listeners[SOME // 2 :]))
        cluster.worker.released.set()
        done = await asyncio.gather(*(listener.task for listener in listeners[1 : SOME // 2]))
        assert {(listener.text, listener.whole) for listener in done} == {("hello there", True)}
        assert len(cluster.worker.requests) == 1
        assert not cluster.worker.cancelled.is_set()


async def test_when_everybody_leaves_the_worker_hears_of_it(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    listeners = await many(cluster, http, 3)
    for listener in listeners:
        assert not cluster.worker.cancelled.is_set()
        await listener.leave()
    async with asyncio.timeout(120):
        await cluster.worker.cancelled.wait()
    cluster.worker.hold_after = None
    again = await Listener(http).task
    assert (again.result, again.text) == ("miss", "hello there")  # half an answer is no answer


async def test_who_comes_late_gets_it_from_the_beginning(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    first = Listener(http)
    await cluster.worker.holding.wait()
    late = Listener(http)
    await late.first.wait()
    cluster.worker.released.set()
    done = await asyncio.gather(first.task, late.task)
    assert [listener.text for listener in done] == ["hello there"] * 2
    assert [listener.result for listener in done] == ["miss", "coalesced"]


async def test_streamed_or_not_they_share(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    first = Listener(http)
    await first.first.wait()
    whole = asyncio.create_task(http.post("/v1/completions", json=BODY | {"stream": False}))
    other_question = Listener(http, prompt="say that")
    other_limit = Listener(http, max_tokens=59)
    await asyncio.gather(other_question.first.wait(), other_limit.first.wait())
    while await metric(http, f'pdserve_cache_requests_total{{model_name="{MODEL}",reason="",result="coalesced"}}') < 1:
        await asyncio.sleep(0.005)
    cluster.worker.released.set()
    reply = await whole
    assert (reply.headers["x-cache"], reply.json()["choices"][0]["text"]) == ("coalesced", "hello there")
    usage = reply.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    await asyncio.gather(first.task, other_question.task, other_limit.task)
    assert len(cluster.worker.requests) == 3


@pytest.mark.long
async def test_a_worker_that_dies_is_not_noticed_by_anybody(start_cluster: Any) -> None:
    async with start_cluster(cache=ON, num_workers=2) as cluster, unlimited(cluster) as http:
        for worker in cluster.workers:
            worker.hold_after = 3
        listeners = await many(cluster, http, SOME)
        dying = cluster.serving()
        (other,) = [worker for worker in cluster.workers if worker is not dying]
        other.hold_after = None
        await dying.stop()
        done = await asyncio.gather(*(listener.task for listener in listeners))
        assert {(listener.text, listener.whole) for listener in done} == {("hello there", True)}
        assert (len(dying.requests), len(other.requests)) == (1, 1)
        await dying.start()


async def test_a_flight_that_fails_is_begun_anew_by_one_of_its_followers(start_cluster: Any) -> None:
    async with start_cluster(cache=ON, num_workers=2, migrations=0) as cluster, unlimited(cluster) as http:
        for worker in cluster.workers:
            worker.hold_after = 3
        listeners = await many(cluster, http, SOME)
        dying = cluster.serving()
        (other,) = [worker for worker in cluster.workers if worker is not dying]
        other.hold_after = None
        await dying.stop()
        leader, *followers = await asyncio.gather(*(listener.task for listener in listeners))
        assert '"worker_lost"' in leader.events[-2]
        assert {(listener.text, listener.whole) for listener in followers} == {("hello there", True)}
        assert (len(dying.requests), len(other.requests)) == (1, 1)
        assert other.requests[0].num_resumed_tokens == 0
        await dying.start()


async def test_what_cannot_be_repeated_is_not_shared(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.worker.hold_after = 1
    sampled = [Listener(http, temperature=0.5) for _ in range(2)]
    await asyncio.gather(*(listener.first.wait() for listener in sampled))
    assert len(cluster.worker.requests) == 2
    cluster.worker.released.set()
    await asyncio.gather(*(listener.task for listener in sampled))


@pytest.mark.long
async def test_sharing_can_be_off(start_cluster: Any) -> None:
    async with start_cluster(cache={"exact": {"coalesce": False}}) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 1
        listeners = [Listener(http) for _ in range(2)]
        await asyncio.gather(*(listener.first.wait() for listener in listeners))
        assert len(cluster.worker.requests) == 2
        cluster.worker.released.set()
        await asyncio.gather(*(listener.task for listener in listeners))
        assert (await Listener(http).task).result == "hit-exact"


@pytest.mark.long
async def test_an_aborted_drain_ends_all_listeners_and_starts_nothing(start_cluster: Any) -> None:
    async with start_cluster(cache=ON, drain_grace_s=0.05) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 3
        listeners = await many(cluster, http, 5)
        cluster.stop.set()
        done = await asyncio.gather(*(listener.task for listener in listeners))
        assert all('"no_worker_available"' in listener.events[-2] for listener in done)
        assert len(cluster.worker.requests) == 1
