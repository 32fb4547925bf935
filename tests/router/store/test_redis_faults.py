"""A Redis that is away, hung, slow, full, emptied, rolled back or written to by others: no request fails, none is misled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import pytest

from common.errors import StoreUnavailable
from router.store.base import AWAY, Epochs, Inserted, Reset
from support.redis_server import RedisServer
from support.slow_proxy import slow_proxy
from support.stores import Running, open_store, shared

NAMES = ("tenant:a",)
StartRedis = Callable[..., AbstractContextManager[RedisServer]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def breaker(running: Running) -> str:
    return next(state for state in ("closed", "open", "half_open") if running.counted("pdserve_store_breaker", state=state))


def results(running: Running, result: str, operation: str = "get") -> float:
    return running.counted("pdserve_store_operations_total", operation=operation, result=result)


def dropped(running: Running, reason: str) -> float:
    return running.counted("pdserve_store_dropped_writes_total", reason=reason)


async def epochs_of(running: Running, key: bytes = b"k") -> Epochs:
    epochs = (await running.present(key, NAMES)).epochs
    assert epochs is not None
    return epochs


async def test_it_is_away_until_it_is_there(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own() as server:
        server.stop()
        async with open_store(shared(server.url, namespace)) as running:
            await until(lambda: breaker(running) == "open")
            assert await running.store.get(b"k", NAMES) == AWAY
            with pytest.raises(StoreUnavailable):
                await running.store.invalidate(NAMES)
            with pytest.raises(StoreUnavailable):
                await running.store.delete((b"k",))
            server.start()
            await running.keep(b"k", b"v", NAMES)
            assert breaker(running) == "closed"


@pytest.mark.parametrize("has_file", [True, False], ids=["append-only file", "no file"])
async def test_killed_and_started_again(redis_of_my_own: StartRedis, namespace: str, has_file: bool) -> None:
    options = ("--appendonly", "yes") if has_file else ()
    with redis_of_my_own(*options) as server:
        async with open_store(shared(server.url, namespace)) as running, open_store(shared(server.url, namespace)) as other:
            await running.keep(b"kept", b"v", NAMES)
            await running.keep(b"ended", b"v", ("tenant:b",))
            epochs = await epochs_of(running)
            await other.present(b"k")
            await running.store.invalidate(("tenant:b",))
            server.kill()
            await until(lambda: breaker(running) == "open" == breaker(other))
            assert await running.store.get(b"kept", NAMES) == AWAY
            running.store.put(b"k", b"v", ttl_s=60, epochs=epochs)
            assert dropped(running, "away") == 1
            server.start()
            for replica in (running, other):
                assert (await replica.present(b"kept", NAMES)).value == (b"v" if has_file else None)
                assert (await replica.present(b"ended", ("tenant:b",))).value is None
                assert (await epochs_of(replica) == epochs) == has_file


async def test_a_server_that_went_back_to_an_old_snapshot_brings_nothing_back(
    redis_of_my_own: StartRedis, namespace: str
) -> None:
    with redis_of_my_own() as server:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"k", b"v", NAMES)
            with server.client() as client:
                client.save()
            await running.store.invalidate(NAMES)
            server.kill()
            server.start()
            with server.client() as client:
                assert client.get(f"{namespace}:v:k") is not None, "the snapshot has it"
            assert (await running.present(b"k", NAMES)).value is None


async def test_one_that_hangs_costs_a_few_requests_their_budget_and_then_none(
    redis_of_my_own: StartRedis, namespace: str
) -> None:
    with redis_of_my_own() as server:
        async with open_store(shared(server.url, namespace, operation_timeout_s=0.05)) as running:
            await running.keep(b"k", b"v", NAMES)
            epochs = await epochs_of(running)
            before = results(running, "late")
            server.pause()
            async with asyncio.timeout(120):
                while breaker(running) == "closed":
                    answers = await asyncio.gather(*(running.store.get(b"k", NAMES) for _ in range(5)))
                    assert answers == [AWAY] * 5
            late = results(running, "late")
            assert 3 <= late - before <= 15
            assert await running.store.get(b"k", NAMES) == AWAY
            assert results(running, "late") == late
            running.store.put(b"k", b"another", ttl_s=60, epochs=epochs)
            assert dropped(running, "away") == 1
            server.resume()
            await until(lambda: breaker(running) == "closed")
            assert (await running.present(b"k", NAMES)).value == b"v"


async def test_one_that_hangs_for_long_is_connected_to_anew(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own() as server:
        async with open_store(shared(server.url, namespace, operation_timeout_s=0.05, write_timeout_s=0.2)) as running:
            await running.keep(b"k", b"v", NAMES)
            server.pause()
            with pytest.raises(StoreUnavailable):
                await running.store.invalidate(NAMES)
            await until(lambda: breaker(running) == "open")
            server.resume()
            async with asyncio.timeout(120):
                while True:
                    with suppress(StoreUnavailable):
                        await running.store.invalidate(NAMES)
                        break
                    await asyncio.sleep(0.02)
            assert (await running.present(b"k", NAMES)).value is None


@pytest.mark.parametrize(("delay_s", "expected"), [(1.5, "late"), (0.25, "found")], ids=["beyond the budget", "within it"])
async def test_one_that_is_slow_is_left_alone(redis_of_my_own: StartRedis, namespace: str, delay_s: float, expected: str) -> None:
    with redis_of_my_own() as server:
        async with slow_proxy(server.socket) as proxy:
            config = shared(f"redis://127.0.0.1:{proxy.port}/0", namespace, operation_timeout_s=0.45, connect_timeout_s=5)
            async with open_store(config) as running:
                await running.keep(b"k", b"v", NAMES)
                proxy.delay_s = delay_s
                async with asyncio.timeout(120):
                    while breaker(running) == "closed":
                        await running.store.get(b"k", NAMES)
                assert results(running, expected) >= 3
                assert await running.store.get(b"k", NAMES) == AWAY
                proxy.delay_s = 0
                await until(lambda: breaker(running) == "closed")
                assert (await running.present(b"k", NAMES)).value == b"v"
                assert proxy.connections == 3, "nothing was connected anew for it"


async def test_one_that_is_full_still_reads_and_invalidates(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own("--maxmemory-policy", "noeviction") as server, server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"k", b"v", NAMES)
            await running.keep(b"gone", b"v", ("tenant:b",))
            epochs = await epochs_of(running)
            client.config_set("maxmemory", "1")
            assert (await running.store.get(b"k", NAMES)).value == b"v"
            running.store.put(b"k", b"another", ttl_s=60, epochs=epochs)
            await until(lambda: dropped(running, "refused") == 1)
            assert await running.store.get(b"k", ("tenant:new",)) == AWAY
            await running.store.invalidate(("tenant:b",))
            await running.store.delete((b"k",))
            assert (await running.store.get(b"k", NAMES)).value is None
            assert breaker(running) == "closed"
            client.config_set("maxmemory", "0")
            assert (await running.present(b"gone", ("tenant:b",))).value is None
            await running.keep(b"gone", b"anew", ("tenant:b",))


async def test_one_that_was_emptied_is_a_new_one(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own() as server, server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"k", b"v", NAMES)
            before = await epochs_of(running)
            stolen = client.get(f"{namespace}:v:k")
            client.flushall()
            after = await running.present(b"k", NAMES)
            assert after.value is None
            assert after.epochs is not None
            assert {epoch.incarnation for _, epoch in after.epochs.pairs}.isdisjoint(
                epoch.incarnation for _, epoch in before.pairs
            )
            client.set(f"{namespace}:v:k", stolen)
            assert (await running.store.get(b"k", NAMES)).value is None
            await running.heard(Reset())
            await running.keep(b"k", b"anew", NAMES)
            await running.heard(Inserted(b"k", NAMES))
            assert running.changes[-1] == Inserted(b"k", NAMES)


async def test_what_somebody_else_wrote_is_not_served(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    server = redis_server("system")
    with server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"mine", b"v", NAMES)
            sealed = client.get(f"{namespace}:v:mine")
            for written in (b"garbage", b"", sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:40] + b"x" + sealed[41:]):
                client.set(f"{namespace}:v:mine", written)
                assert (await running.store.get(b"mine", NAMES)).value is None
            client.set(f"{namespace}:v:mind", sealed)
            assert (await running.store.get(b"mind", NAMES)).value is None, "a value belongs to its key"
            assert results(running, "unverified") == 5
            client.delete(f"{namespace}:v:mine")
            client.rpush(f"{namespace}:v:mine", "a list")
            assert (await running.store.get(b"mine", NAMES)).value is None
            client.set(f"{namespace}:v:mine", sealed)
            assert (await running.store.get(b"mine", NAMES)).value == b"v"
            await running.store.invalidate(NAMES)
            client.set(f"{namespace}:v:mine", sealed)
            assert (await running.store.get(b"mine", NAMES)).value is None, "an old value stays invalidated"
            assert breaker(running) == "closed"


async def test_a_value_ends_with_its_time_even_if_somebody_keeps_it(
    redis_server: Callable[[str], RedisServer], namespace: str
) -> None:
    server = redis_server("system")
    with server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"k", b"v", NAMES, ttl_s=2.0)
            client.persist(f"{namespace}:v:k")
            async with asyncio.timeout(120):
                while (await running.store.get(b"k", NAMES)).value is not None:
                    await asyncio.sleep(0.02)
            assert client.exists(f"{namespace}:v:k")
            assert results(running, "expired") == 1


@pytest.mark.parametrize("key", ["incarnation", "e:tenant:a"])
@pytest.mark.parametrize("kind", ["text", "list", "nothing"])
async def test_epochs_that_were_tampered_with_end_what_is_bound_to_them(
    redis_server: Callable[[str], RedisServer], namespace: str, key: str, kind: str
) -> None:
    server = redis_server("system")
    with server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"k", b"v", NAMES)
            client.delete(f"{namespace}:{key}")
            if kind == "text":
                client.set(f"{namespace}:{key}", "not ours")
            elif kind == "list":
                client.rpush(f"{namespace}:{key}", "not ours")
            assert (await running.present(b"k", NAMES)).value is None
            await running.keep(b"k", b"anew", NAMES)
            if key != "incarnation" and kind != "nothing":
                client.delete(f"{namespace}:{key}")
                client.rpush(f"{namespace}:{key}", "not ours")
            await running.store.invalidate(NAMES)
            assert (await running.present(b"k", NAMES)).value is None


async def test_a_log_that_was_tampered_with_is_repaired(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    server = redis_server("system")
    with server.client() as client:
        async with open_store(shared(server.url, namespace)) as running:
            await running.keep(b"1", b"v", NAMES)
            for fields in (
                {"kind": "inserted"},
                {"what": "else"},
                {"kind": "deleted", "key": "x" * 1000},
                {"kind": "invalidated", "name": b"\xff"},
            ):
                client.xadd(f"{namespace}:log", fields)
            await until(lambda: results(running, "refused", "log") == 4)
            client.delete(f"{namespace}:log")
            client.rpush(f"{namespace}:log", "a list")
            await running.heard(Reset())
            await running.keep(b"2", b"v", NAMES)
            await running.heard(Inserted(b"2", NAMES))
            assert running.changes == [Inserted(b"1", NAMES), Reset(), Inserted(b"2", NAMES)]


async def test_who_fell_behind_the_log_begins_anew(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own("--stream-node-max-entries", "10") as server, server.client() as client:
        async with slow_proxy(server.socket) as proxy:
            near = shared(server.url, namespace, log_entries=100)
            far = shared(f"redis://127.0.0.1:{proxy.port}", namespace, log_entries=100)
            async with open_store(near) as writer, open_store(far) as behind:
                await writer.keep(b"first", b"v", NAMES)
                await behind.heard(Inserted(b"first", NAMES))
                proxy.delay_s = 1.0
                epochs = await epochs_of(writer)
                for number in range(300):
                    writer.store.put(b"%d" % number, b"v", ttl_s=60, epochs=epochs)
                await writer.heard(Inserted(b"299", NAMES))
                proxy.delay_s = 0
                await behind.heard(Inserted(b"299", NAMES))
                known = behind.changes[behind.changes.index(Reset()) + 1 :]
                assert 100 <= len(known) < 300
                assert known == [Inserted(b"%d" % number, NAMES) for number in range(300 - len(known), 300)]
                assert client.xlen(f"{namespace}:log") < 150


async def test_a_replica_that_starts_hears_what_is_there(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    config = shared(redis_server("system").url, namespace)
    async with open_store(config) as running:
        for number in range(3):
            await running.keep(b"%d" % number, b"v", NAMES)
    async with open_store(config) as running:
        await running.heard(Inserted(b"2", NAMES))
        assert running.changes == [Inserted(b"%d" % number, NAMES) for number in range(3)]
        assert (await running.present(b"1", NAMES)).value == b"v"


async def test_a_router_with_another_secret_reads_and_misleads_nobody(
    redis_server: Callable[[str], RedisServer], namespace: str
) -> None:
    config = shared(redis_server("system").url, namespace)
    async with open_store(config) as running, open_store(config, token="the token of another cluster") as stranger:
        await running.keep(b"k", b"mine", NAMES)
        assert (await stranger.present(b"k", NAMES)).value is None
        await stranger.keep(b"k", b"yours", NAMES)
        assert (await running.store.get(b"k", NAMES)).value is None


async def test_a_wrong_password_is_an_absence(redis_of_my_own: StartRedis, namespace: str) -> None:
    with redis_of_my_own() as server, server.client() as client:
        client.config_set("requirepass", "right")
        async with open_store(shared(f"{server.url}?password=wrong", namespace)) as running:
            await until(lambda: breaker(running) == "open")
            assert await running.store.get(b"k", NAMES) == AWAY
        async with open_store(shared(f"{server.url}?password=right", namespace)) as running:
            await running.keep(b"k", b"v", NAMES)
        client.execute_command("AUTH", "right")


async def test_more_writes_than_may_wait_are_dropped(redis_server: Callable[[str], RedisServer], namespace: str) -> None:
    config = shared(redis_server("system").url, namespace, queued_bytes=1000)
    async with open_store(config) as running:
        epochs = await epochs_of(running)
        for number in range(5):
            running.store.put(b"%d" % number, bytes(400), ttl_s=60, epochs=epochs)
        assert dropped(running, "queue_full") == 3
        await running.heard(Inserted(b"1", NAMES))
