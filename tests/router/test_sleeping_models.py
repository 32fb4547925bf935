"""A model that sleeps because nobody used it: the request that wakes it is served, and so are those that come meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from common.errors import NoWorkerAvailable
from common.wire import registry_pb2
from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 20, "seed": 3, "temperature": 0.7}
WAIT_S = 120.0


def without_workers(cluster: FakeCluster, *, wakes: bool) -> registry_pb2.ClusterSnapshot:
    snapshot = cluster.snapshot()
    del snapshot.workers[:]
    for model in snapshot.models:
        model.wakes_on_demand = wakes
    return snapshot


async def until_gone(http: httpx.AsyncClient, cluster: FakeCluster, *, wakes: bool) -> None:
    """The router has seen that nobody serves any more, and then whether the model wakes."""
    for wakes_now in (False, wakes):
        cluster.manager.publish(without_workers(cluster, wakes=wakes_now))
        async with asyncio.timeout(WAIT_S):
            while (await http.get("/ready")).json()["models"] != ([MODEL] if wakes_now else []):
                await asyncio.sleep(0.005)


async def test_requests_for_a_sleeping_model_wait_until_it_is_awake(cluster: FakeCluster) -> None:
    async with http_client(cluster) as http:
        expected = (await http.post("/v1/completions", json=BODY)).json()["choices"]
        await until_gone(http, cluster, wakes=True)
        asked = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(3)]
        async with asyncio.timeout(WAIT_S):
            assert await cluster.manager.demanded.get() == MODEL
        waiting = without_workers(cluster, wakes=True)  # a worker starts: the manager still says that it is on its way
        waiting.workers.append(cluster.worker.info("starting"))
        cluster.manager.publish(waiting)
        cluster.publish()
        for reply in await asyncio.gather(*asked):
            assert reply.status_code == 200
            assert reply.json()["choices"] == expected


async def test_a_sleeping_model_that_does_not_wake_in_time_ends_in_one_error(cluster: FakeCluster) -> None:
    async with http_client(cluster) as http:
        await until_gone(http, cluster, wakes=True)
        reply = await http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": "0.2"})
        assert reply.status_code == 503
        assert "no worker" in reply.json()["error"]["message"]


async def test_without_workers_a_model_that_does_not_sleep_is_refused_at_once(cluster: FakeCluster) -> None:
    async with http_client(cluster) as http:
        await until_gone(http, cluster, wakes=False)
        reply = await http.post("/v1/completions", json=BODY)
        assert reply.status_code == 503
        assert cluster.manager.demanded.empty()


async def test_a_worker_that_drains_before_its_router_knows_costs_no_request(cluster: FakeCluster) -> None:
    """It refuses; the snapshot that names its successor is already on its way."""
    async with http_client(cluster) as http:
        cluster.worker.refuse = NoWorkerAvailable("the worker is draining", retry_after_s=1.0)
        asked = asyncio.create_task(http.post("/v1/completions", json=BODY))
        async with asyncio.timeout(WAIT_S):
            while not cluster.worker.requests:
                await asyncio.sleep(0.001)
        cluster.worker.refuse = None  # its successor, at the same address
        cluster.worker.incarnation += 1
        cluster.publish()
        assert (await asked).status_code == 200


async def test_a_model_that_is_half_awake_is_waited_for(cluster: FakeCluster) -> None:
    """Its decode worker is there and can compute no prompt yet: the prefill worker is still on its way."""
    async with http_client(cluster) as http:
        expected = (await http.post("/v1/completions", json=BODY)).json()["choices"]
        await until_gone(http, cluster, wakes=True)
        half = cluster.snapshot()
        for model in half.models:
            model.wakes_on_demand = True
        cluster.worker.refuse = NoWorkerAvailable("no prefill worker can be reached", retry_after_s=1.0)
        cluster.manager.publish(half)
        asked = asyncio.create_task(http.post("/v1/completions", json=BODY))
        async with asyncio.timeout(WAIT_S):
            while len(cluster.worker.requests) < 6:  # the first one was answered
                await asyncio.sleep(0.005)
        assert not asked.done()
        cluster.worker.refuse = None
        reply = await asked
        assert (reply.status_code, reply.json()["choices"]) == (200, expected)
