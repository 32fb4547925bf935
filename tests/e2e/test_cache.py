"""The cache before real workers: what it gives is what they would have given, also when one is killed under a shared answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import pytest

from support.cluster import RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [(7 * index) % 370 + 3 for index in range(60)],
    "max_tokens": 400,
    "ignore_eos": True,
}
MANY = 20


async def stream(http: httpx.AsyncClient, body: dict[str, Any], begun: asyncio.Event) -> tuple[str, list[int]]:
    """What the cache did, and the tokens."""
    tokens: list[int] = []
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True, "return_token_ids": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    tokens += choice["token_ids"]
                begun.set()
    return reply.headers["x-cache"], tokens


async def test_a_worker_killed_under_a_shared_answer_is_not_noticed(cluster: RunningCluster) -> None:
    body = BODY | {"temperature": 0.8, "seed": 5}
    limits = httpx.Limits(max_connections=2 * MANY)
    async with httpx.AsyncClient(base_url=cluster.base_url, trust_env=False, timeout=120.0, limits=limits) as http:
        (worker,) = await asyncio.to_thread(cluster.workers, "decode")
        begun = [asyncio.Event() for _ in range(MANY)]
        asking = [asyncio.create_task(stream(http, body, begun[0]))]
        await begun[0].wait()
        os.kill(worker["pid"], signal.SIGSTOP)  # it stands in the middle of its answer until all have come
        asking += [asyncio.create_task(stream(http, body, event)) for event in begun[1:]]
        await asyncio.gather(*(event.wait() for event in begun))
        os.kill(worker["pid"], signal.SIGKILL)
        said = await asyncio.gather(*asking)
        assert [result for result, _ in said] == ["miss"] + ["coalesced"] * (MANY - 1)
        again = await stream(http, body, asyncio.Event())
        assert again[0] == "hit-exact"
        fresh = await http.post("/v1/completions", json=body | {"return_token_ids": True}, headers={"x-cache": "bypass"})
        assert fresh.status_code == 200, fresh.text
        tokens = fresh.json()["choices"][0]["token_ids"]
        assert len(tokens) == BODY["max_tokens"]
        assert all(heard == tokens for _, heard in (*said, again))
        assert 'pdserve_router_migrations_total{model_name="tiny"}' in (await http.get("/metrics")).text
