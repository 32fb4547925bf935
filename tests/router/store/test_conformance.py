"""What every store must do, held against each of them: in the process, Redis 7, Redis 8."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from common.config import CacheConfig
from router.store.base import MAX_KEY_BYTES, MAX_NAMES, Deleted, Inserted, Invalidated
from support.redis_server import KINDS, RedisServer
from support.stores import Running, open_store, shared


@pytest.fixture(params=["embedded", *KINDS])
def config(request: pytest.FixtureRequest, namespace: str, redis_server: Callable[[str], RedisServer]) -> CacheConfig:
    if request.param == "embedded":
        return CacheConfig(max_value_bytes=4096)
    return CacheConfig(max_value_bytes=4096, redis=shared(redis_server(request.param).url, namespace).redis)


@pytest.fixture
async def running(config: CacheConfig) -> AsyncIterator[Running]:
    async with open_store(config) as running:
        await running.present(b"nothing")
        yield running


async def test_a_value_is_read_as_it_was_put(running: Running) -> None:
    value = bytes(range(256))
    await running.keep(b"key \x00\xff", value, ("tenant:a", "model:m"))
    assert (await running.store.get(b"key \x00\xff", ("model:m", "tenant:a"))).value == value
    assert (await running.store.get(b"another", ("tenant:a", "model:m"))).value is None


async def test_the_last_value_of_a_key_counts(running: Running) -> None:
    await running.keep(b"k", b"one")
    await running.keep(b"k", b"two")
    assert (await running.store.get(b"k", ())).value == b"two"


async def test_equal_epochs_are_equal_and_hashable_whatever_the_order_of_the_names(running: Running) -> None:
    one = (await running.present(b"k", ("b", "a", "b"))).epochs
    two = (await running.present(b"other", ("a", "b"))).epochs
    assert one == two
    assert one is not None
    assert one.names == ("a", "b")
    assert len({one, two}) == 1


@pytest.mark.parametrize("which", ["tenant:a", "model:m", "tag:t"])
async def test_invalidating_one_name_ends_what_is_bound_to_it(running: Running, which: str) -> None:
    names = ("tenant:a", "model:m", "tag:t")
    await running.keep(b"k", b"v", names)
    await running.keep(b"free", b"v", ("tenant:b",))
    before = (await running.store.get(b"k", names)).epochs
    await running.store.invalidate((which,))
    reading = await running.store.get(b"k", names)
    assert reading.value is None
    assert reading.epochs != before
    assert (await running.store.get(b"free", ("tenant:b",))).value == b"v"


async def test_an_answer_whose_computation_began_before_an_invalidation_is_never_read(running: Running) -> None:
    before = (await running.present(b"k", ("tenant:a",))).epochs
    assert before is not None
    await running.store.invalidate(("tenant:a",))
    running.store.put(b"k", b"outdated", ttl_s=60, epochs=before)
    await running.keep(b"after", b"v", ("tenant:a",))  # what was put before it has been written, or never will be
    assert (await running.store.get(b"k", ("tenant:a",))).value is None


async def test_the_names_of_the_put_must_be_asked_for(running: Running) -> None:
    await running.keep(b"k", b"v", ("tenant:a", "tag:t"))
    assert (await running.store.get(b"k", ("tenant:a",))).value is None
    assert (await running.store.get(b"k", ("tenant:a", "tag:t", "tag:more"))).value == b"v"


async def test_deleted_values_are_gone_when_it_returns(running: Running) -> None:
    for key in (b"1", b"2", b"3"):
        await running.keep(key, b"v")
    await running.store.delete((b"1", b"3", b"unknown"))
    found = [(await running.store.get(key, ())).value for key in (b"1", b"2", b"3")]
    assert found == [None, b"v", None]
    await running.store.delete(())


async def test_a_put_that_waits_does_not_outlive_a_deletion(running: Running) -> None:
    reading = await running.present(b"k")
    assert reading.epochs is not None
    running.store.put(b"k", b"v", ttl_s=60, epochs=reading.epochs)
    await running.store.delete((b"k",))
    await running.keep(b"after", b"v")
    assert (await running.store.get(b"k", ())).value is None


async def test_values_expire_and_reading_does_not_prolong_them(running: Running) -> None:
    await running.keep(b"long", b"v", ttl_s=60)
    reading = await running.present(b"k")
    assert reading.epochs is not None
    running.store.put(b"k", b"v", ttl_s=0.15, epochs=reading.epochs)
    async with asyncio.timeout(120):
        while (await running.store.get(b"k", ())).value is None and not running.changes.count(Inserted(b"k", ())):
            await asyncio.sleep(0.005)
        while (await running.store.get(b"k", ())).value is not None:
            await asyncio.sleep(0.02)
    assert (await running.store.get(b"long", ())).value == b"v"


@pytest.mark.parametrize(("value", "ttl_s", "reason"), [(bytes(4097), 60, "too_large"), (b"v", 0, "outdated")])
async def test_what_cannot_be_kept_is_dropped_and_counted(running: Running, value: bytes, ttl_s: float, reason: str) -> None:
    reading = await running.present(b"k")
    assert reading.epochs is not None
    running.store.put(b"k", value, ttl_s=ttl_s, epochs=reading.epochs)
    assert running.counted("pdserve_store_dropped_writes_total", reason=reason) == 1
    await running.keep(b"after", b"v")
    assert (await running.store.get(b"k", ())).value is None


async def test_listeners_hear_of_changes_in_order(running: Running) -> None:
    await running.keep(b"k", b"v", ("tag:t", "tenant:a"))
    await running.store.delete((b"k",))
    await running.store.invalidate(("tenant:a", "model:m"))
    await running.heard(Invalidated(("model:m", "tenant:a")))
    assert running.changes == [Inserted(b"k", ("tag:t", "tenant:a")), Deleted((b"k",)), Invalidated(("model:m", "tenant:a"))]


async def test_keys_and_names_have_limits(running: Running) -> None:
    for key in (b"", bytes(MAX_KEY_BYTES + 1)):
        with pytest.raises(ValueError, match="a key has"):
            await running.store.get(key, ())
    with pytest.raises(ValueError, match="names"):
        await running.store.get(b"k", [f"tag:{number}" for number in range(MAX_NAMES + 1)])
    with pytest.raises(ValueError, match="a name of an epoch"):
        await running.store.invalidate(("",))
    await running.store.invalidate(())


async def test_names_are_taken_as_they_are(running: Running) -> None:
    odd = ("tag:a b\r\nSET x y", "tag:é*", "tag:{x}")
    await running.keep(b"k", b"v", odd)
    await running.store.invalidate((odd[1],))
    assert (await running.store.get(b"k", odd)).value is None
