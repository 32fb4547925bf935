"""What happens between a request and the workers, seen from both ends: a client on a real socket, workers that misbehave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, InternalServerError, RateLimitError

from common.errors import (
    DigestMismatch,
    EngineFailure,
    InvalidRequest,
    NoWorkerAvailable,
    Overloaded,
    PdserveError,
    RequestCancelled,
    WorkerLost,
)
from common.wire import worker_pb2
from support.fake_cluster import MODEL, FakeCluster, without_started
from support.router_clients import http_client, openai_client

BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 50}


async def metric(http: httpx.AsyncClient, line: str) -> float:
    for found in (await http.get("/metrics")).text.splitlines():
        if found.startswith(line + " "):
            return float(found.rpartition(" ")[2])
    return 0.0


@pytest.mark.parametrize(
    "failure",
    [
        WorkerLost("gone"),
        Overloaded("full", retry_after_s=3.0),
        NoWorkerAvailable("draining"),
        DigestMismatch("flipped"),
        RequestCancelled("stopping"),
    ],
    ids=lambda failure: failure.code,
)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(start_cluster: Any, failure: PdserveError) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        for worker in cluster.workers:
            worker.refuse = failure
        cluster.workers[1].refuse = None
        for _ in range(3):  # whichever worker is asked first
            reply = await http.post("/v1/completions", json={**BODY, "seed": 7})
            assert reply.status_code == 200
            assert reply.json()["choices"][0]["text"] == "hello there"
        first = cluster.workers[0].requests[0]
        again = next(request for request in cluster.workers[1].requests if request.request_id == first.request_id)
        assert again.sampling == first.sampling
        assert again.prompt_token_ids == first.prompt_token_ids
        assert again.timeout_s <= first.timeout_s
        code = "WorkerLost" if isinstance(failure, RequestCancelled) else failure.code
        assert await metric(http, f'pdserve_router_retries_total{{model_name="{MODEL}",reason="{code}"}}') >= 1


async def test_a_dead_worker_is_found_out_and_avoided(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        await cluster.workers[0].stop()
        for _ in range(6):
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert cluster.workers[1].served == 6
        assert await metric(http, f'pdserve_router_retries_total{{model_name="{MODEL}",reason="WorkerLost"}}') == 1


async def test_a_drawn_seed_is_kept_on_retry_and_differs_between_requests(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        cluster.workers[0].refuse = WorkerLost("gone")
        for _ in range(2):
            await http.post("/v1/completions", json=BODY)
        (refused,) = cluster.workers[0].requests
        seeds = {request.request_id: request.sampling.seed for request in cluster.workers[1].requests}
        assert seeds[refused.request_id] == refused.sampling.seed
        assert len(set(seeds.values())) == 2


async def test_what_the_client_did_wrong_is_not_retried(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        for worker in cluster.workers:
            worker.refuse = InvalidRequest("no", param="seed")
        reply = await http.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "seed")
        assert sum(len(worker.requests) for worker in cluster.workers) == 1


async def test_when_every_worker_is_full_the_client_may_come_back(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, openai_client(cluster) as openai:
        for worker in cluster.workers:
            worker.refuse = Overloaded("full", retry_after_s=2.5)
        with pytest.raises(RateLimitError) as raised:
            await openai.completions.create(model=MODEL, prompt="hi")
        assert raised.value.response.headers["retry-after"] == "3"
        assert sum(len(worker.requests) for worker in cluster.workers) == 2


async def test_retries_are_bounded(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1, first_token_retries=2) as cluster, openai_client(cluster) as openai:
        cluster.worker.refuse = WorkerLost("gone")
        with pytest.raises(InternalServerError) as raised:
            await openai.completions.create(model=MODEL, prompt="hi")
        assert raised.value.status_code == 503
        assert len(cluster.worker.requests) == 3


async def test_a_restarted_worker_is_used_at_once(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1, migration_wait_s=0.2) as cluster, http_client(cluster) as http:
        await cluster.worker.stop()
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
        cluster.worker.incarnation += 1
        await cluster.worker.start()
        cluster.publish()
        async with asyncio.timeout(120):
            while (await http.post("/v1/completions", json=BODY)).status_code != 200:
                await asyncio.sleep(0.01)


async def test_no_worker_is_503_with_a_time_to_come_back(start_cluster: Any) -> None:
    async with start_cluster(num_workers=0) as cluster, http_client(cluster) as http:
        async with asyncio.timeout(120):
            while not (await http.get("/v1/models")).json()["data"]:
                await asyncio.sleep(0.005)
        reply = await http.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker_available")
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["type"] == "ServiceUnavailableError"
        assert (await http.get("/ready")).status_code == 503
        assert (await http.post("/v1/completions", json={**BODY, "n": 99})).status_code == 400  # wrong is wrong all the same


@pytest.mark.parametrize("failure", [None, EngineFailure("the engine raised")], ids=["link", "engine"])
async def test_after_the_first_token_a_failure_is_one_error_event(start_cluster: Any, failure: PdserveError | None) -> None:
    """Of an answer that may not go on elsewhere: by configuration, or because it was the engine that failed."""
    async with start_cluster(migrations=0 if failure is None else 3) as cluster, http_client(cluster) as http:
        await one_error_event(cluster, http, failure)


async def one_error_event(cluster: FakeCluster, http: httpx.AsyncClient, failure: PdserveError | None) -> None:
    cluster.worker.fail_after, cluster.worker.failure = 2, failure
    async with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply:
        assert reply.status_code == 200
        events = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
    assert events[-1] == "[DONE]"
    errors = [json.loads(event)["error"] for event in events[:-1] if "error" in json.loads(event)]
    assert [error["code"] for error in errors] == ["worker_lost" if failure is None else "engine_failure"]
    assert "error" in json.loads(events[-2])
    assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in events[:-2])
    assert len(cluster.worker.requests) == 1  # never replayed
    status = "503" if failure is None else "500"
    labels = f'endpoint="/v1/chat/completions",model_name="{MODEL}",status="{status}"'
    assert await metric(http, f"pdserve_router_requests_total{{{labels}}}") == 1


async def test_the_openai_client_raises_on_an_error_event(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.fail_after, cluster.worker.failure = 2, EngineFailure("the engine raised")
    text = ""

    async def read() -> None:
        nonlocal text
        async for chunk in await openai.chat.completions.create(**chat(), stream=True):
            text += chunk.choices[0].delta.content or ""

    with pytest.raises(APIError):
        await read()
    assert "hello there".startswith(text)
    assert text


async def test_after_the_first_token_a_failure_of_a_whole_answer_is_a_status(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.fail_after, cluster.worker.failure = 2, EngineFailure("the engine raised")
    with pytest.raises(InternalServerError) as raised:
        await openai.chat.completions.create(**chat())
    assert raised.value.status_code == 500


async def test_an_error_before_the_first_token_is_a_status_of_a_stream_too(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.refuse = Overloaded("full", retry_after_s=1.0)
    with pytest.raises(RateLimitError):
        await openai.chat.completions.create(**chat(), stream=True)


async def test_one_failing_prompt_of_several_fails_the_call_and_cancels_the_others(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        cluster.workers[0].hold_after = 1
        cluster.workers[1].refuse = EngineFailure("the engine raised")
        reply = await http.post("/v1/completions", json={**BODY, "prompt": ["a", "b"]})
        assert reply.status_code == 500
        await cluster.workers[0].cancelled.wait()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
async def test_a_client_that_hangs_up_cancels_the_work(
    cluster: FakeCluster, http: httpx.AsyncClient, path: str, stream: bool, hold_after: int
) -> None:
    cluster.worker.hold_after = hold_after
    body = json.dumps({**(chat() if "chat" in path else BODY), "stream": stream}).encode()
    host, _, port = cluster.http_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await cluster.worker.holding.wait()
    if stream and hold_after:
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert not cluster.worker.cancelled.is_set()
    writer.close()
    async with asyncio.timeout(120):
        await cluster.worker.cancelled.wait()
    await writer.wait_closed()
    async with asyncio.timeout(120):
        while await metric(http, f'pdserve_router_cancelled_total{{model_name="{MODEL}"}}') != 1:
            await asyncio.sleep(0.005)
    labels = f'endpoint="{path}",model_name="{MODEL}",status="499"'
    assert await metric(http, f"pdserve_router_requests_total{{{labels}}}") == 1
    assert await metric(http, f'pdserve_router_inflight_requests{{model_name="{MODEL}"}}') == 0


async def test_an_abandoned_openai_stream_cancels_the_work(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.hold_after = 2
    stream = await openai.chat.completions.create(**chat(), stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(120):
        await cluster.worker.cancelled.wait()


@pytest.mark.parametrize("hold_after", [0, 2])
async def test_the_deadline_ends_a_request_and_its_work(start_cluster: Any, hold_after: int) -> None:
    # Long enough for the request to reach its worker on a machine that is slow.
    async with start_cluster(request_timeout_s=3.0) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = hold_after
        reply = await http.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        await cluster.worker.cancelled.wait()


async def test_prefill_candidates_travel_in_order(start_cluster: Any) -> None:
    async with start_cluster() as cluster, http_client(cluster) as http:
        cluster.manager.publish(cluster.snapshot(prefill=("tiny/prefill/1", "tiny/prefill/0")))
        async with asyncio.timeout(120):
            while not cluster.worker.prefill_candidates or not cluster.worker.prefill_candidates[-1]:
                await http.post("/v1/completions", json=BODY)
        assert cluster.worker.prefill_candidates[-1] == ("tiny/prefill/0", "tiny/prefill/1")


async def test_concurrent_requests_are_spread(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        await asyncio.gather(*(http.post("/v1/completions", json=BODY) for _ in range(8)))
        assert sorted(worker.served for worker in cluster.workers) == [4, 4]


def _other_choice(event: worker_pb2.GenerateEvent) -> worker_pb2.GenerateEvent:
    for chunk in event.chunks:
        chunk.choice += 1
    return event


def _endless(event: worker_pb2.GenerateEvent) -> worker_pb2.GenerateEvent:
    for chunk in event.chunks:
        chunk.ClearField("finish_reason")
    return event


@pytest.mark.parametrize(
    ("transform", "status"),
    [(without_started, 500), (_other_choice, 500), (_endless, 503)],
    ids=["tokens before Started", "unknown choice", "ends without a finish reason"],
)
async def test_a_worker_that_breaks_the_contract_ends_in_a_typed_error(
    cluster: FakeCluster, http: httpx.AsyncClient, transform: Any, status: int
) -> None:
    cluster.worker.transform = transform
    reply = await http.post("/v1/completions", json=BODY)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}
