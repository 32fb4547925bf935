"""Tenants, limits, priorities and deadlines as clients of both faces meet them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from openai import AsyncOpenAI, RateLimitError

from common.api_keys import entry_of
from common.errors import DeadlineExceeded, InvalidRequest, PdserveError, PermissionDenied, RateLimited
from common.rpc import connect, error_from_rpc
from common.wire import inference_pb2 as pb
from common.wire.inference_pb2_grpc import InferenceStub
from support.fake_cluster import MODEL, FakeCluster
from support.redis_server import RedisServer
from support.router_clients import http_client, openai_client

StartCluster = Callable[..., AbstractAsyncContextManager[FakeCluster]]
BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
ONE_AT_A_TIME = {"room_batches": 1 / 64}  # of decode.max_running


def bearer(key: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **more}


async def waiting(http: httpx.AsyncClient, count: int) -> None:
    """Returns when so many wait in the queue."""
    async with asyncio.timeout(120):
        while True:
            lines = (await http.get("/metrics")).text.splitlines()
            if sum(float(line.split()[-1]) for line in lines if line.startswith("pdserve_queue_requests{")) == count:
                return
            await asyncio.sleep(0.005)


async def sample(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture
async def held(start_cluster: StartCluster) -> AsyncIterator[tuple[FakeCluster, httpx.AsyncClient]]:
    """One request at a time goes to the worker, which holds it until it is released."""
    async with start_cluster(admission=ONE_AT_A_TIME) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 1
        yield cluster, http


# -- tenants and their limits ------------------------------------------------------------------------------------------


async def test_two_routers_on_one_redis_give_a_minutes_worth_once(
    start_cluster: StartCluster, redis_server: Callable[[str], RedisServer], namespace: str
) -> None:
    settings: dict[str, Any] = {
        "cache": {"exact": {"enabled": False}, "redis": {"url": redis_server("system").url, "namespace": namespace}},
        "api_keys": ("key",),
        "tenants": {"default": {"key_limits": {"requests_per_minute": 5}}},
    }
    async with (
        start_cluster(**settings) as one,
        start_cluster(**settings) as two,
        http_client(one, headers=bearer("key")) as first,
        http_client(two, headers=bearer("key")) as second,
    ):
        for http in (first, second):
            async with asyncio.timeout(120):
                while not await sample(http, 'pdserve_store_breaker{state="closed"}'):
                    await asyncio.sleep(0.005)
        answers = [await http.post("/v1/completions", json=BODY) for http in (first, second) * 4]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [*"43210", *"000"]
        assert answers[-1].json()["error"]["param"] == "requests_per_minute"


async def test_a_tenant_with_several_keys_shares_what_no_other_sees(start_cluster: StartCluster, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"acme {entry_of('from-file')}\n")
    tenants = {"acme": {"keys": ["clear", entry_of("hashed")]}, "zeta": {"keys": ["other"]}}
    async with start_cluster(tenants=tenants, keys_file=str(path)) as cluster, http_client(cluster) as http:
        for key in ("clear", "hashed", "from-file", "other"):
            assert (await http.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 200
        assert (await http.post("/v1/completions", json=BODY, headers=bearer(entry_of("hashed")))).status_code == 401
        *acme, zeta = (request.cache_salt for request in cluster.worker.requests)
        assert len(set(acme)) == 1
        assert zeta not in acme
        assert await sample(http, 'pdserve_tenant_service_tokens_total{kind="generated",tenant="acme"}') > 0
        text = (await http.get("/metrics")).text
        assert not any(key in text for key in ("clear", "hashed", "from-file"))


async def test_requests_per_minute(start_cluster: StartCluster) -> None:
    tenants = {"acme": {"keys": ["a"], "limits": {"requests_per_minute": 2}}, "zeta": {"keys": ["z"]}}
    async with start_cluster(tenants=tenants) as cluster, http_client(cluster) as http:
        left = []
        for _ in range(2):
            reply = await http.post("/v1/completions", json=BODY, headers=bearer("a"))
            assert reply.status_code == 200
            assert reply.headers["x-ratelimit-limit-requests"] == "2"
            left.append(reply.headers["x-ratelimit-remaining-requests"])
        assert left == ["1", "0"]
        reply = await http.post("/v1/completions", content=b"not even JSON", headers=bearer("a"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 0 < int(reply.headers["retry-after"]) <= 30
        assert reply.headers["x-ratelimit-reset-requests"]
        assert (await http.get("/v1/models", headers=bearer("a"))).status_code == 200
        reply = await http.post("/v1/completions", json=BODY, headers=bearer("z"))
        assert reply.status_code == 200
        assert "x-ratelimit-limit-requests" not in reply.headers
        assert len(cluster.worker.requests) == 3
        assert await sample(http, 'pdserve_rejected_total{band="",reason="requests_per_minute"}') == 1
        async with openai_client(cluster, "a") as client:
            with pytest.raises(RateLimitError):
                await client.completions.create(**BODY)


async def test_tokens_per_minute_of_prompts_and_answers(start_cluster: StartCluster) -> None:
    tenants = {"default": {"limits": {"tokens_per_minute": 12}}}
    async with start_cluster(tenants=tenants) as cluster, http_client(cluster) as http:
        prompt = {**BODY, "prompt": [5] * 6}
        first = await http.post("/v1/completions", json=prompt)
        left = 12 - first.json()["usage"]["total_tokens"]
        assert 0 < left < 6
        second = await http.post("/v1/completions", json={**prompt, "stream": True})
        assert second.status_code == 429  # and not a stream with an error in it
        assert 1 <= int(second.headers["retry-after"]) <= 5 * (6 - left)
        assert second.headers["x-ratelimit-remaining-tokens"] == str(left)
        assert len(cluster.worker.requests) == 1


async def test_requests_at_a_time(start_cluster: StartCluster) -> None:
    tenants = {"acme": {"keys": ["a"], "key_limits": {"max_concurrent": 1}}}
    async with start_cluster(tenants=tenants) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 1
        first = asyncio.create_task(http.post("/v1/completions", json=BODY, headers=bearer("a")))
        await cluster.worker.holding.wait()
        reply = await http.post("/v1/completions", json=BODY, headers=bearer("a"))
        assert (reply.status_code, reply.json()["error"]["param"]) == (429, "max_concurrent")
        cluster.worker.released.set()
        assert (await first).status_code == 200
        assert (await http.post("/v1/completions", json=BODY, headers=bearer("a"))).status_code == 200


async def test_with_no_configuration_nothing_is_limited(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    replies = await asyncio.gather(*(openai.completions.with_raw_response.create(**BODY) for _ in range(40)))
    assert {reply.status_code for reply in replies} == {200}
    assert not any(name.startswith("x-ratelimit") for name in replies[0].headers)


# -- priorities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["header", "field"])
async def test_the_queue_goes_by_priority(held: tuple[FakeCluster, httpx.AsyncClient], by: str) -> None:
    cluster, http = held
    tasks = []
    bands = ["interactive", "background", "batch", "interactive"]
    for index, band in enumerate(bands):
        headers = {"x-request-id": f"{index}", **({"x-priority": band} if by == "header" else {})}
        body = {**BODY, **({"priority": band} if by == "field" else {})}
        tasks.append(asyncio.create_task(http.post("/v1/completions", json=body, headers=headers)))
        await (cluster.worker.holding.wait() if not index else waiting(http, index))
    assert len(cluster.worker.requests) == 1
    cluster.worker.released.set()
    assert {reply.status_code for reply in await asyncio.gather(*tasks)} == {200}
    assert [request.request_id[0] for request in cluster.worker.requests] == ["0", "3", "2", "1"]
    assert [request.priority for request in cluster.worker.requests] == [0, 0, 1, 2], "workers must know it as well"


async def test_priorities_are_checked(start_cluster: StartCluster) -> None:
    async with (
        start_cluster(tenants={"default": {"bands": ["batch", "background"]}}) as cluster,
        http_client(cluster) as http,
        openai_client(cluster) as client,
    ):
        for body, header, status in (
            (BODY, None, 200),
            ({**BODY, "priority": 0}, None, 200),
            ({**BODY, "priority": None}, "background", 200),
            ({**BODY, "priority": "batch"}, "batch", 200),
            ({**BODY, "priority": "batch"}, "background", 400),
            ({**BODY, "priority": "urgent"}, None, 400),
            ({**BODY, "priority": 5}, None, 400),
            (BODY, "urgent", 400),
            (BODY, "interactive", 403),
        ):
            headers = {} if header is None else {"x-priority": header}
            reply = await http.post("/v1/completions", json=body, headers=headers)
            assert reply.status_code == status, (body, header)
            if status != 200:
                assert reply.json()["error"]["param"] == "priority"
        assert len(cluster.worker.requests) == 4
        await client.completions.create(**BODY, extra_body={"priority": "background"})
        assert await sample(http, 'pdserve_queue_seconds_count{band="background"}') == 2


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_the_clients_deadline_goes_with_its_request(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for given in ("5", "7.5", "100000"):
        assert (await http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": given})).status_code == 200
    short, longer, longest = (request.timeout_s for request in cluster.worker.requests)
    assert short <= 5 < longer <= 7.5 < longest <= 20
    for given in ("0", "0.0", "-1", "nan", "inf", "1e3", "1_0", "five", "", "9" * 12):
        reply = await http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": given})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x-request-timeout-s")
    assert len(cluster.worker.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_too_long_is_told_so_and_costs_no_worker_anything(
    held: tuple[FakeCluster, httpx.AsyncClient], stream: bool
) -> None:
    cluster, http = held
    first = asyncio.create_task(http.post("/v1/completions", json=BODY))
    await cluster.worker.holding.wait()
    reply = await http.post("/v1/completions", json={**BODY, "stream": stream}, headers={"x-request-timeout-s": "0.05"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    cluster.worker.released.set()
    assert (await first).status_code == 200
    assert len(cluster.worker.requests) == 1
    assert await sample(http, 'pdserve_rejected_total{band="interactive",reason="expired"}') == 1


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_the_queue_never_reaches_a_worker(held: tuple[FakeCluster, httpx.AsyncClient]) -> None:
    cluster, http = held
    first = asyncio.create_task(http.post("/v1/completions", json=BODY))
    await cluster.worker.holding.wait()
    second = asyncio.create_task(http.post("/v1/completions", json=BODY))
    await waiting(http, 1)
    second.cancel()
    await waiting(http, 0)
    cluster.worker.released.set()
    assert (await first).status_code == 200
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    assert len(cluster.worker.requests) == 2


@pytest.mark.parametrize("grace_s", [0.0, 10.0])
async def test_a_drain_serves_the_queue_or_tells_it(start_cluster: StartCluster, grace_s: float) -> None:
    async with (
        start_cluster(admission=ONE_AT_A_TIME, drain_grace_s=grace_s) as cluster,
        http_client(cluster) as http,
    ):
        cluster.worker.hold_after = 1
        tasks = [asyncio.create_task(http.post("/v1/completions", json=BODY))]
        await cluster.worker.holding.wait()
        tasks.append(asyncio.create_task(http.post("/v1/completions", json=BODY)))
        await waiting(http, 1)
        cluster.stop.set()
        if grace_s:
            cluster.worker.released.set()
        replies = await asyncio.gather(*tasks)
        assert [reply.status_code for reply in replies] == ([200, 200] if grace_s else [503, 503])


async def test_a_worker_that_comes_serves_who_waits(start_cluster: StartCluster) -> None:
    async with start_cluster(admission=ONE_AT_A_TIME, num_workers=2) as cluster, http_client(cluster) as http:
        for worker in cluster.workers:
            worker.hold_after = 1
        for states in ({"tiny_decode_0": "draining", "tiny_decode_1": "starting"}, {"tiny_decode_1": "starting"}):
            cluster.publish(**states)
            await cluster.until_seen()
        tasks = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(3)]
        await cluster.workers[0].holding.wait()
        await waiting(http, 2)
        cluster.publish()
        async with asyncio.timeout(120):
            await cluster.workers[1].holding.wait()
        await waiting(http, 1)
        for worker in cluster.workers:
            worker.released.set()
        assert [reply.status_code for reply in await asyncio.gather(*tasks)] == [200] * 3


# -- gRPC --------------------------------------------------------------------------------------------------------------


async def failure_of(stub: InferenceStub, metadata: tuple[tuple[str, str], ...], timeout_s: float | None = None) -> PdserveError:
    call = stub.Generate(pb.InferenceRequest(**BODY), metadata=metadata, timeout=timeout_s)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await anext(aiter(call))
    return error_from_rpc(raised.value)


async def test_grpc_is_the_twin(start_cluster: StartCluster) -> None:
    tenants = {"acme": {"keys": ["a"], "bands": ["batch"], "limits": {"requests_per_minute": 5}}}
    async with start_cluster(tenants=tenants, admission=ONE_AT_A_TIME) as cluster, http_client(cluster) as http:
        channel = connect(cluster.grpc_address, None)
        stub, key = InferenceStub(channel), ("authorization", "Bearer a")
        assert isinstance(await failure_of(stub, (key, ("x-priority", "urgent"))), InvalidRequest)
        assert isinstance(await failure_of(stub, (key, ("x-priority", "interactive"))), PermissionDenied)
        async for _ in stub.Generate(pb.InferenceRequest(**BODY), metadata=(key, ("x-priority", "batch"))):
            continue
        assert await sample(http, 'pdserve_queue_seconds_count{band="batch"}') == 1
        cluster.worker.hold_after = 1
        first = stub.Generate(pb.InferenceRequest(**BODY), metadata=(key,))
        await cluster.worker.holding.wait()
        assert isinstance(await failure_of(stub, (key,), timeout_s=1.0), DeadlineExceeded)
        refused = await failure_of(stub, (key,))
        assert isinstance(refused, RateLimited)
        assert refused.retry_after_s
        cluster.worker.released.set()
        assert [event async for event in first]
        await channel.close()
