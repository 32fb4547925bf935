"""What a router that does not hold all questions finds through a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.clock import ManualClock
from router.semantic.wider_index import SharedIndex
from router.store.redis_store import RedisStore
from router.store.vectors import RedisVectors
from support.redis_server import RedisServer
from support.semantic import NAMES, SemanticBench
from support.stores import Running, open_store, shared

ASKED, ALIKE = "How do I learn to play the guitar quickly?", "how do I learn to play the guitar quickly"
OTHERS = [
    "What is the capital of Mongolia?",
    "Which metals are liquid at room temperature?",
    "Who painted the ceiling of the chapel in Rome?",
    "Where do penguins spend the winter?",
]


def wider_index(running: Running, namespace: str) -> SharedIndex:
    assert isinstance(running.store, RedisStore)
    return SharedIndex(RedisVectors(running.store, namespace=namespace), revision=b"hashed-1", clock=ManualClock())


def bench_of(running: Running, namespace: str, *, max_entries: int) -> SemanticBench:
    return SemanticBench(max_entries=max_entries, store=running.store, wider=wider_index(running, namespace))


async def forget_the_first(running: Running, namespace: str) -> SemanticBench:
    """The question was learned, and had to make room for others."""
    bench = bench_of(running, namespace, max_entries=2)
    await running.present(b"any", NAMES)
    for text in (ASKED, *OTHERS):
        await bench.ask(text)
        await bench.cache._wider.close()  # all writes are there
    await running.keep(b"after the records", b"")
    return bench


async def test_a_question_that_had_to_make_room_is_found_again(
    redis_server: Callable[[str], RedisServer], namespace: str
) -> None:
    async with open_store(shared(redis_server("packaged").url, namespace)) as running:
        bench = await forget_the_first(running, namespace)
        hit = await bench.ask(ALIKE)
        assert hit is not None
        assert hit.key == (await bench.ask(ASKED)).key  # type: ignore[union-attr]
        await bench.cache.close()


async def test_another_scope_is_not_looked_through(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    async with open_store(shared(redis_server("packaged").url, namespace)) as running:
        bench = await forget_the_first(running, namespace)
        assert await bench.ask(ALIKE, scope=b"other") is None
        await bench.cache.close()


async def test_what_was_invalidated_is_not_found_and_leaves_the_index(
    redis_server: Callable[[str], RedisServer], namespace: str
) -> None:
    async with open_store(shared(redis_server("packaged").url, namespace)) as running:
        bench = await forget_the_first(running, namespace)
        assert running.store is not None
        await running.store.invalidate(["tenant:t"])
        assert await bench.ask(ALIKE, answer="Another one.") is None
        await bench.cache.close()
        assert len(await wider_index(running, namespace).near(b"scope", bench.vector(ASKED))) < len(OTHERS)


async def test_a_server_without_vector_sets_is_an_empty_index(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    async with open_store(shared(redis_server("system").url, namespace)) as running:
        bench = await forget_the_first(running, namespace)
        assert await bench.ask(ALIKE) is None
        await bench.cache.close()


async def test_while_records_wait_to_be_read_the_index_helps(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    """A second router that has only just started."""
    url = redis_server("packaged").url
    async with open_store(shared(url, namespace)) as running:
        first = bench_of(running, namespace, max_entries=100)
        await running.present(b"any", NAMES)
        await first.ask(ASKED)
        await first.cache._wider.close()
        await running.keep(b"after the records", b"")
        async with open_store(shared(url, namespace)) as later:
            second = bench_of(later, namespace, max_entries=100)
            async with asyncio.timeout(120):
                while second.cache._records.empty():  # told of, and not read: nobody runs this cache
                    await asyncio.sleep(0.005)
            await later.present(b"any", NAMES)
            assert await second.ask(ALIKE) is not None
            await second.cache.close()
        await first.cache.close()
