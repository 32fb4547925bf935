"""The store lives and ends with the router's process, whether its Redis is there or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest

from common.config import CacheConfig
from common.errors import ConfigError
from router.server import run
from support.fake_cluster import TOKEN, router_config
from support.redis_server import RedisServer
from support.stores import shared


async def serve(cache: CacheConfig, wanted: str) -> None:
    """Runs a router until its metrics hold a line."""
    stop = asyncio.Event()
    addresses: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run(
            router_config().model_copy(update={"cache": cache}),
            manager_address="127.0.0.1:9",
            cluster_token=TOKEN,
            stop=stop,
            on_ready=lambda http, grpc: addresses.set_result(http),
        )
    )
    await asyncio.wait({addresses, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        async with httpx.AsyncClient(base_url=f"http://{addresses.result()}") as client, asyncio.timeout(120):
            while wanted not in (await client.get("/metrics")).text.splitlines():
                await asyncio.sleep(0.01)
    finally:
        stop.set()
        await task


async def test_without_a_redis() -> None:
    await serve(CacheConfig(), "pdserve_store_entries 0.0")


async def test_with_a_redis(redis_of_my_own: Callable[..., AbstractContextManager[RedisServer]], namespace: str) -> None:
    with redis_of_my_own() as server:
        await serve(shared(server.url, namespace), 'pdserve_store_breaker{state="closed"} 1.0')


async def test_with_a_redis_that_is_not_there(namespace: str) -> None:
    await serve(shared("unix:///nothing/here", namespace), 'pdserve_store_breaker{state="open"} 1.0')


async def test_a_configuration_that_cannot_work_ends_it_at_once(namespace: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        await serve(shared("redis://host:notaport", namespace), "nothing")
