"""The semantic cache end to end: real clients, a real router, and workers that count what reaches them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

ASKED = "How do I learn to play the piano at home?"
SAME = "How can I learn to play piano at home?"
NEGATED = "How do I not learn to play the piano at home?"
ON: dict[str, Any] = {"semantic": {"enabled": True, "max_wrong_hits": 0.5}}


@pytest.fixture
async def cluster(start_cluster: Any) -> AsyncIterator[FakeCluster]:
    async with start_cluster(cache=ON, api_keys=("one", "two")) as running:
        running.worker.answer = "the of and to in"
        yield running


@pytest.fixture
async def http(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(cluster, headers={"authorization": "Bearer one"}) as client:
        yield client


async def ask(http: httpx.AsyncClient, text: str, key: str = "one", **more: Any) -> httpx.Response:
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": text}], **more}
    reply = await http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert reply.status_code == 200, reply.text
    return reply


async def test_a_paraphrase_is_answered_as_json_and_as_a_stream(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    fresh = await ask(http, ASKED)
    assert fresh.headers["x-cache"] == "miss"
    similar = await ask(http, SAME, stream=True)
    assert similar.headers["x-cache"] == "hit-semantic"
    assert 0.0 < float(similar.headers["x-cache-score"]) <= 1.0
    events = [line.removeprefix("data: ") for line in similar.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    text = "".join(choice["delta"].get("content") or "" for event in map(json.loads, events[:-1]) for choice in event["choices"])
    assert text == fresh.json()["choices"][0]["message"]["content"]
    async with asyncio.timeout(120):  # without evidence each hit is verified, in the background
        while cluster.worker.served < 2:
            await asyncio.sleep(0.005)
    assert len(cluster.worker.requests) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": NEGATED}]},
        {"seed": 7, "temperature": 0.5},
        {"temperature": 0.7},
        {"n": 2},
        {"logprobs": True},
        {"messages": [{"role": "system", "content": "Be rude."}, {"role": "user", "content": SAME}]},
        {"stop": ["and"]},
    ],
)
async def test_what_differs_is_computed(http: httpx.AsyncClient, more: dict[str, Any]) -> None:
    await ask(http, ASKED)
    assert (await ask(http, SAME, **more)).headers["x-cache"] in ("miss", "ineligible")


async def test_another_key_never_hits(http: httpx.AsyncClient) -> None:
    await ask(http, ASKED, "one")
    assert (await ask(http, SAME, "two")).headers["x-cache"] == "miss"
    assert (await ask(http, SAME, "one")).headers["x-cache"] == "hit-semantic"


async def test_feedback_ends_the_pair(http: httpx.AsyncClient) -> None:
    await ask(http, ASKED)
    hit = await ask(http, SAME)
    said = {"id": hit.headers["x-cache-id"], "ok": False}
    foreign = await http.post("/v1/cache/feedback", json=said, headers={"authorization": "Bearer two"})
    assert foreign.status_code == 400
    assert foreign.json()["error"]["param"] == "id"
    reply = await http.post("/v1/cache/feedback", json=said)
    assert reply.json() == {"object": "cache.feedback", **said, "removed": False}
    metrics = (await http.get("/metrics")).text
    assert 'pdserve_cache_labels_total{source="feedback",verdict="wrong"} 1.0' in metrics
    assert f'pdserve_cache_class{{model_name="{MODEL}",state="unproven"}} 1.0' in metrics


@pytest.mark.parametrize(
    ("body", "param"), [({"ok": True}, "id"), ({"id": "zz", "ok": True}, "id"), ({"id": "0" * 32, "ok": "maybe"}, "ok")]
)
async def test_feedback_names_the_field_that_is_wrong(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    reply = await http.post("/v1/cache/feedback", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_without_a_semantic_cache_there_is_nothing_to_speak_of(start_cluster: Any) -> None:
    async with start_cluster() as cluster, http_client(cluster) as client:
        reply = await client.post("/v1/cache/feedback", json={"id": "0" * 32, "ok": True})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "id")
