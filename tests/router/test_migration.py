"""A decode worker that dies in the middle of an answer is not noticed by the client: the rest comes from elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

PROMPT = [5, 6, 7]
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 50, "seed": 3, "temperature": 0.7}


async def stream(
    http: httpx.AsyncClient, *, begun: asyncio.Event | None = None, **more: Any
) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Text per choice, and all events but the last, which must be [DONE]. `begun` is set when the first text is here."""
    async with http.stream(
        "POST", "/v1/completions", json={**BODY, "stream": True, "stream_options": {"include_usage": True}, **more}
    ) as reply:
        assert reply.status_code == 200
        lines = []
        async for line in reply.aiter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
            if begun is not None and '"text":"h' in line.replace(" ", ""):
                begun.set()
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    text: dict[int, str] = {}
    for event in events:
        for choice in event.get("choices", ()):
            text[choice["index"]] = text.get(choice["index"], "") + choice["text"]
    return text, events


def finishes(events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return sorted(
        (choice["index"], choice["finish_reason"])
        for event in events
        for choice in event.get("choices", ())
        if choice["finish_reason"] is not None
    )


def usage(events: list[dict[str, Any]]) -> dict[str, int]:
    (found,) = [event["usage"] for event in events if event.get("usage")]
    return {name: found[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


async def metric(http: httpx.AsyncClient, name: str) -> float:
    for line in (await http.get("/metrics")).text.splitlines():
        if line.startswith(f'{name}{{model_name="{MODEL}"}} '):
            return float(line.rpartition(" ")[2])
    return 0.0


def answer_length(cluster: FakeCluster) -> int:
    return len(cluster.tokenizer.encode(cluster.worker.answer, add_special_tokens=False))


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_whenever_the_worker_dies_the_answer_is_the_same(start_cluster: Any, num_choices: int) -> None:
    async with start_cluster(num_workers=1) as cluster, http_client(cluster) as http:
        unbroken = await stream(http, n=num_choices)
        length = answer_length(cluster)
    assert set(unbroken[0].values()) == {"hello there"}
    for dies_after in range(1, length):
        async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
            cluster.workers[0].fail_after = dies_after * num_choices
            cluster.workers[0].tokens_per_event = 1
            broken = None
            while not cluster.workers[0].requests:  # whichever worker is asked first
                broken = await stream(http, n=num_choices)
            assert broken is not None
            assert broken[0] == unbroken[0]
            assert finishes(broken[1]) == finishes(unbroken[1])
            assert usage(broken[1]) == usage(unbroken[1])
            assert await metric(http, "pdserve_router_migrations_total") == 1
            rests = [request for request in cluster.workers[1].requests if request.num_resumed_tokens]
            ids = cluster.tokenizer.encode(cluster.worker.answer, add_special_tokens=False)[:dies_after]
            assert sorted(rest.first_choice for rest in rests) == list(range(num_choices))
            for rest in rests:
                assert rest.prompt_token_ids == (*PROMPT, *ids)
                assert (rest.num_resumed_tokens, rest.num_choices, rest.sampling.seed) == (dies_after, 1, 3)


async def test_log_probabilities_and_the_echoed_prompt_come_once(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1) as cluster, http_client(cluster) as http:
        unbroken = (await http.post("/v1/completions", json={**BODY, "logprobs": 2, "echo": True})).json()
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        cluster.workers[0].fail_after = 3
        reply: dict[str, Any] = {}
        while not cluster.workers[0].requests:
            reply = (await http.post("/v1/completions", json={**BODY, "logprobs": 2, "echo": True})).json()
        assert reply["choices"] == unbroken["choices"]
        assert [request.sampling.prompt_logprobs for request in cluster.workers[1].requests][-1] is None


async def test_what_the_manager_gave_up_is_left_though_it_still_seems_to_be_there(start_cluster: Any) -> None:
    """A host that vanished ends no stream: nobody there says so, and TCP takes its time."""
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        for worker in cluster.workers:
            worker.hold_after = 2
        asked = asyncio.create_task(stream(http))
        async with asyncio.timeout(120):
            while not any(worker.holding.is_set() for worker in cluster.workers):
                await asyncio.sleep(0.005)
        lost = cluster.serving()
        (other,) = [worker for worker in cluster.workers if worker is not lost]
        other.hold_after = None
        cluster.publish(**{lost.worker_id.replace("/", "_"): "starting"})
        text, _ = await asked
        assert text == {0: "hello there"}
        assert [request.num_resumed_tokens for request in other.requests] == [2]


async def test_with_nobody_else_it_waits_for_the_worker_to_come_back(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1) as cluster, http_client(cluster) as http:
        worker = cluster.worker
        worker.hold_after = 2
        cluster.publish()
        begun = asyncio.Event()

        async def come_back() -> None:
            await begun.wait()
            cluster.publish(tiny_decode_0="starting")
            await asyncio.sleep(0.1)
            worker.hold_after = None
            worker.incarnation = 2
            cluster.publish()

        coming = asyncio.create_task(come_back())
        async with asyncio.timeout(120):
            text, events = await stream(http, begun=begun)
        await coming
        assert [request.num_resumed_tokens for request in worker.requests] == [0, 2]
        assert text == {0: "hello there"}
        assert not any("error" in event for event in events)


async def test_an_answer_that_moves_too_often_ends_in_one_error(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1, migrations=2) as cluster, http_client(cluster) as http:
        cluster.worker.fail_after = 1
        _, events = await stream(http)
        assert [event["error"]["code"] for event in events if "error" in event] == ["worker_lost"]
        assert [request.num_resumed_tokens for request in cluster.worker.requests] == [0, 1, 2]


async def test_an_answer_that_waits_too_long_ends_in_one_error(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1, migration_wait_s=0.2) as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 1
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
            lines = reply.aiter_lines()
            await anext(lines)  # only now: before its first token a lost request is another matter
            cluster.publish(tiny_decode_0="failed")
            events = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        assert [event["error"]["code"] for event in events if "error" in event] == ["no_worker_available"]
        assert len(cluster.worker.requests) == 1


async def test_a_client_that_leaves_while_its_answer_waits_leaves_nothing(start_cluster: Any) -> None:
    async with start_cluster(num_workers=1) as cluster, http_client(cluster) as http:
        cluster.worker.fail_after = 1
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
            async for _ in reply.aiter_lines():
                cluster.publish(tiny_decode_0="failed")
                break
        cluster.worker.fail_after = None
        cluster.publish()
        await cluster.until_seen()
        async with asyncio.timeout(120):
            while 'pdserve_router_inflight_requests{model_name="tiny"} 0' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
