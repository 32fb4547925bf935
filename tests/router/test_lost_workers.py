"""A request that meets nobody because the only worker was lost waits for the successor, and is served by it.

Whether one comes is the manager's word, which the tests give; the router, its workers and its clients are on real sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.errors import NoWorkerAvailable, WorkerLost
from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 20, "seed": 3, "temperature": 0.7}
WAIT_S = 120.0
PATIENT: dict[str, Any] = {
    "request_timeout_s": 4 * WAIT_S,
    "migration_wait_s": 4 * WAIT_S,
}  # whatever the tests wait for is sooner


async def lose(cluster: FakeCluster, *, awaits: bool = True) -> None:
    """The manager has seen the end of the decode worker, and the router has heard of it."""
    cluster.awaits_successor = awaits
    cluster.publish(tiny_decode_0="starting" if awaits else "failed")
    await cluster.until_seen()


def succeed(cluster: FakeCluster) -> None:
    cluster.worker.incarnation += 1
    cluster.awaits_successor = False
    cluster.publish()


async def value(http: httpx.AsyncClient, name: str) -> float:
    """Of a metric, all its label values together."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


async def until_in_flight(http: httpx.AsyncClient, number: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while await value(http, "pdserve_router_inflight_requests") != number:
            await asyncio.sleep(0.005)


def ask(http: httpx.AsyncClient, **headers: str) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(http.post("/v1/completions", json=BODY, headers=headers))


@pytest.fixture
async def cluster(start_cluster: Any) -> AsyncIterator[FakeCluster]:
    async with start_cluster(**PATIENT) as running:
        yield running


async def test_it_waits_for_the_successor_as_long_as_one_is_to_come(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    await lose(cluster)
    asked = [ask(http) for _ in range(2)]
    await until_in_flight(http, 2)
    leaving = ask(http)
    await until_in_flight(http, 3)
    leaving.cancel()  # its connection ends
    await until_in_flight(http, 2)
    assert not any(one.done() for one in asked)
    succeed(cluster)
    for one in asked:
        assert ((await one).status_code, (await one).json()["choices"][0]["text"]) == (200, "hello there")

    await lose(cluster)
    hurried = await ask(http, **{"x-request-timeout-s": "0.1"})  # its own time is over first
    asked = [ask(http)]
    await until_in_flight(http, 1)
    await lose(cluster, awaits=False)  # the manager has given it up
    for reply in (hurried, await asked[0], await ask(http)):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker_available")
        assert int(reply.headers["retry-after"]) >= 1


async def test_the_wait_is_bounded(start_cluster: Any) -> None:
    async with start_cluster(migration_wait_s=0.1) as cluster, http_client(cluster) as http:
        await lose(cluster)
        reply = await ask(http)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker_available")
        assert int(reply.headers["retry-after"]) >= 1


async def test_a_worker_is_missed_before_the_manager_says_that_it_is_gone(
    cluster: FakeCluster, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.patience._NOTICED_S", WAIT_S)
    await cluster.worker.stop()
    asked = ask(http)
    async with asyncio.timeout(WAIT_S):
        while await value(http, "pdserve_router_retries_total") <= 2:  # as often as a request is tried elsewhere
            await asyncio.sleep(0.005)
    assert not asked.done()
    await lose(cluster)
    await cluster.worker.start()
    succeed(cluster)
    assert (await asked).status_code == 200


async def test_the_successor_of_a_prefill_worker_is_waited_for(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    """Where decode workers may compute no prompt."""
    cluster.worker.refuse = NoWorkerAvailable("no prefill worker can be reached", retry_after_s=1.0)
    await lose(cluster)  # both
    cluster.publish()  # the decode worker is back
    await cluster.until_seen()
    asked = ask(http)
    async with asyncio.timeout(WAIT_S):
        while len(cluster.worker.requests) <= 3:  # tries of a request that nobody is expected for
            await asyncio.sleep(0.005)
    assert not asked.done()
    cluster.worker.refuse = None
    assert (await asked).status_code == 200


async def test_a_request_that_kills_its_workers_kills_a_bounded_number(start_cluster: Any) -> None:
    async with start_cluster(first_token_retries=1, **PATIENT) as cluster, http_client(cluster) as http:
        cluster.worker.refuse = WorkerLost("gone")
        await lose(cluster)
        cluster.publish()  # another prefill worker is still to come
        await cluster.until_seen()
        assert (await ask(http)).status_code == 503
        assert len(cluster.worker.requests) == 2


async def test_while_workers_are_awaited_the_queue_is_bounded_and_ends_with_the_router(start_cluster: Any) -> None:
    bounds = {"max_queued_requests": 1, "room_batches": 0.01}  # one is dispatched, one waits its turn
    async with start_cluster(admission=bounds, drain_grace_s=0.1, **PATIENT) as cluster, http_client(cluster) as http:
        await lose(cluster)
        asked = [ask(http) for _ in range(2)]
        async with asyncio.timeout(WAIT_S):
            while await value(http, "pdserve_queue_requests") != 1:
                await asyncio.sleep(0.005)
        assert (await ask(http)).status_code == 429
        cluster.stop.set()
        for one in asked:
            assert ((await one).status_code, (await one).json()["error"]["code"]) == (503, "no_worker_available")


@pytest.mark.parametrize("other_is_up", [True, False])
async def test_where_another_model_may_take_over_nobody_waits(start_cluster: Any, other_is_up: bool) -> None:
    routing = {"aliases": {"auto": {"candidates": [MODEL], "fallback": ["other"]}}}
    body = {**BODY, "model": "auto"}
    async with start_cluster(models=("other",), routing=routing, **PATIENT) as cluster, http_client(cluster) as http:
        cluster.awaits_successor = True
        if other_is_up:
            cluster.publish()
            await cluster.worker.stop()
        else:
            cluster.publish(tiny_decode_0="starting", other_decode_0="starting")
            await cluster.until_seen()
        asked = asyncio.create_task(http.post("/v1/completions", json=body))
        if not other_is_up:
            await until_in_flight(http, 1)
            succeed(cluster)
        reply = await asked
        assert (reply.status_code, reply.headers["x-route-model"]) == (200, "other" if other_is_up else MODEL)
        assert await value(http, "pdserve_router_retries_total") == (2 if other_is_up else 0)  # and no more: nobody waits
