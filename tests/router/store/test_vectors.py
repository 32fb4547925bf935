from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from router.store.redis_store import RedisStore
from router.store.vectors import RedisVectors
from support.redis_server import RedisServer
from support.stores import Running, open_store, shared

TTL_S = 60.0


def vectors_of(running: Running, namespace: str) -> RedisVectors:
    assert isinstance(running.store, RedisStore)
    return RedisVectors(running.store, namespace=namespace)


def cosine(one: list[float], two: list[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)


async def test_it_finds_what_a_search_through_all_finds(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    async with open_store(shared(redis_server("packaged").url, namespace)) as running:
        await running.present(b"k")
        vectors = vectors_of(running, namespace)
        assert await vectors.is_there()
        rng = random.Random(1)
        known = {b"key %d\x00" % number: [rng.gauss(0, 1) for _ in range(16)] for number in range(60)}
        for key, vector in known.items():
            assert await vectors.add(b"p", key, vector, ttl_s=TTL_S)
        for _ in range(10):
            query = [rng.gauss(0, 1) for _ in range(16)]
            nearest = sorted(known, key=lambda key: -cosine(query, known[key]))
            (found,) = await vectors.nearest(b"p", query, 1)
            assert found.key in nearest[:2], "quantised to 8 bits, the first two may be taken for one another"
            assert found.cosine == pytest.approx(cosine(query, known[found.key]), abs=0.03)
        itself = b"key 7\x00"
        assert (await vectors.nearest(b"p", known[itself], 3))[0].key == itself
        await vectors.remove(b"p", (itself, b"unknown"))
        assert (await vectors.nearest(b"p", known[itself], 3))[0].key != itself


async def test_partitions_do_not_see_each_other(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    async with open_store(shared(redis_server("packaged").url, namespace)) as running:
        await running.present(b"k")
        vectors = vectors_of(running, namespace)
        await vectors.add(b"one", b"a", [1.0, 0.0], ttl_s=TTL_S)
        await vectors.add(b"two", b"b", [1.0, 0.0], ttl_s=TTL_S)
        assert [found.key for found in await vectors.nearest(b"one", [1.0, 0.1], 9)] == [b"a"]
        assert await vectors.nearest(b"three", [1.0, 0.1], 9) == ()
        await vectors.add(b"one", b"brief", [0.0, 1.0], ttl_s=TTL_S / 2)
        with redis_server("packaged").client() as client:
            assert client.pttl(f"{namespace}:x:one") > 500 * TTL_S
        assert not await vectors.add(b"one", b"c", [1.0, 0.0, 0.0], ttl_s=TTL_S), "of another length"


async def test_a_server_without_vector_sets_is_found_out(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    server = redis_server("system")
    with server.client() as client:
        if int(client.info("server")["redis_version"].partition(".")[0]) >= 8:
            pytest.skip("the redis-server on the PATH has vector sets")
    async with open_store(shared(server.url, namespace)) as running:
        await running.present(b"k")
        vectors = vectors_of(running, namespace)
        assert not await vectors.is_there()
        assert not await vectors.add(b"p", b"k", [1.0], ttl_s=TTL_S)
        assert await vectors.nearest(b"p", [1.0], 1) == ()


async def test_without_a_server_there_are_no_neighbours(namespace: str) -> None:
    async with open_store(shared("unix:///nothing/here", namespace)) as running:
        vectors = vectors_of(running, namespace)
        assert not await vectors.is_there()
        assert await vectors.nearest(b"p", [1.0], 1) == ()
        await vectors.remove(b"p", (b"k",))
