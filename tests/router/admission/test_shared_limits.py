"""Several routers, one count: real Redis servers, a naive counter beside them, and a Redis that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.clock import ManualClock
from common.config import RouterConfig
from common.rpc import cancel_and_wait
from router.admission.limits import Limit
from router.admission.shared_limits import Limits
from router.admission.tenants import Identity, tenants_of
from router.store.redis_store import RedisStore
from support.redis_server import RedisServer
from support.stores import Running, open_store, shared

RedisOf = Callable[[str], RedisServer]
StartRedis = Callable[..., AbstractContextManager[RedisServer]]
REPLICAS = 3


def identity(key_id: str = "k1", tenant: str = "acme", **part: Any) -> Identity:
    config = RouterConfig.model_validate({"tenants": {tenant: part}})
    return Identity(tenants_of(config)[tenant], key_id)


@asynccontextmanager
async def replicas(url: str, namespace: str, count: int = 2, **redis: Any) -> AsyncIterator[list[tuple[Limits, Running]]]:
    """Each with a store of its own, connected."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            running = await stack.enter_async_context(open_store(shared(url, namespace, **redis)))
            await running.present(b"any")
            assert isinstance(running.store, RedisStore)
            found.append((Limits(running.store, namespace=namespace, clock=ManualClock()), running))
        yield found


class Naive:
    """One bucket, between what it holds if nothing flowed in since the start and if everything did that could."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.least = self.most = float(size)
        self._since_s = time.monotonic()

    def spend(self, cost: float) -> None:
        self.least = min(self.size, self.least - cost)
        self.most = min(self.size, self.most - cost)

    def flow(self) -> None:
        now_s = time.monotonic()
        self.most = min(self.size, self.most + (now_s - self._since_s) * self.size / 60)
        self._since_s = now_s


KEYS = st.sampled_from(["k1", "k2"])
WHO = st.integers(0, REPLICAS - 1)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), WHO, KEYS),
        st.tuples(st.just("enter"), WHO, KEYS, st.integers(1, 40)),
        st.tuples(st.just("spend"), WHO, KEYS, st.integers(-10, 40)),
        st.tuples(st.just("settle"), WHO),
    ),
    min_size=10,
    max_size=40,
)
PART = {
    "limits": {"requests_per_minute": 8, "tokens_per_minute": 60},
    "key_limits": {"requests_per_minute": 6, "tokens_per_minute": 45},
}


async def play(actions: list[tuple[Any, ...]], routers: list[Limits], tenant: str) -> None:
    callers = {key: identity(key, tenant, **PART) for key in ("k1", "k2")}
    requests = {name: Naive(size) for name, size in (("all", 8), ("k1", 6), ("k2", 6))}
    tokens = {name: Naive(size) for name, size in (("all", 60), ("k1", 45), ("k2", 45))}
    owed: list[dict[str, float]] = [{} for _ in routers]

    def settle(who: int, names: tuple[str, ...]) -> None:
        for name in names:
            tokens[name].spend(min(tokens[name].size, owed[who].pop(name, 0.0)))

    for action in actions:
        match action:
            case "ask", who, key:
                reached = await routers[who].ask(callers[key])
                check([requests["all"], requests[key]], 1, refused=reached is not None)
                assert reached is None or reached.limit is Limit.REQUESTS
            case "enter", who, key, cost:
                settle(who, ("all", key))
                reached = await routers[who].enter(callers[key], cost)
                check([tokens["all"], tokens[key]], cost, refused=reached is not None)
                assert reached is None or reached.limit is Limit.TOKENS
            case "spend", who, key, cost:
                routers[who].spend(callers[key], cost)
                for name in ("all", key):
                    owed[who][name] = min(tokens[name].size, owed[who].get(name, 0.0) + cost)
            case "settle", who:
                assert await routers[who].settle()
                settle(who, ("all", "k1", "k2"))


def check(buckets: list[Naive], cost: int, *, refused: bool) -> None:
    for one in buckets:
        one.flow()
    if refused:
        assert any(one.least < min(cost, one.size) for one in buckets)
    else:
        assert all(one.most >= min(cost, one.size) for one in buckets)
        for one in buckets:
            one.spend(cost)


def test_any_replicas_count_as_one_naive_counter_does(redis_of_my_own: StartRedis) -> None:
    with redis_of_my_own() as server, asyncio.Runner() as runner:
        stack = AsyncExitStack()
        found = runner.run(stack.enter_async_context(replicas(server.url, "property", REPLICAS)))
        routers = [limits for limits, _ in found]
        names = iter(range(10_000))

        @settings(max_examples=40, deadline=None, database=None)
        @given(ACTIONS)
        def example(actions: list[tuple[Any, ...]]) -> None:
            runner.run(play(actions, routers, f"tenant-{next(names)}"))

        try:
            example()
        finally:
            runner.run(stack.aclose())


@pytest.mark.parametrize("kind", ["system", "packaged"])
async def test_a_minutes_worth_is_given_once(redis_server: RedisOf, namespace: str, kind: str) -> None:
    who = identity(key_limits={"requests_per_minute": 10})
    async with replicas(redis_server(kind).url, namespace, REPLICAS) as found:
        answers = await asyncio.gather(*(limits.ask(who) for limits, _ in found * 10))
        assert answers.count(None) == 10
        reached = next(answer for answer in answers if answer is not None)
        assert (reached.limit, reached.of_key) == (Limit.REQUESTS, True)
        assert 0 < reached.retry_after_s <= 6.0
        for limits, _ in found:
            assert (await limits.ask(who)) is not None
            assert limits.headers(who)["x-ratelimit-remaining-requests"] == "0"


async def test_what_a_key_may_not_take_is_not_taken_from_its_tenant(redis_server: RedisOf, namespace: str) -> None:
    part = {"limits": {"requests_per_minute": 3}, "key_limits": {"requests_per_minute": 1}}
    one, two, three, four = (identity(f"k{number}", **part) for number in range(4))
    async with replicas(redis_server("system").url, namespace) as ((first, _), (second, _)):
        assert await first.ask(one) is None
        reached = await second.ask(one)
        assert reached is not None
        assert reached.of_key
        assert await first.ask(two) is None
        assert await second.ask(three) is None
        reached = await first.ask(four)
        assert reached is not None
        assert not reached.of_key


async def test_it_flows_in_by_the_servers_clock(redis_server: RedisOf, namespace: str) -> None:
    who = identity(key_limits={"requests_per_minute": 10})
    server = redis_server("system")
    async with replicas(server.url, namespace) as ((first, _), (second, _)):
        assert [await first.ask(who) is None for _ in range(11)] == [True] * 10 + [False]
        with server.client() as client:
            (key,) = client.keys(f"{namespace}:limit:*")
            assert 50_000 < client.pttl(key) <= 60_000  # then it is full, and forgotten
            client.hincrbyfloat(key, "seen_ms", -30_000)  # half a minute ago
        assert [await second.ask(who) is None for _ in range(6)] == [True] * 5 + [False]


async def test_no_more_than_a_minutes_worth_is_owed(redis_server: RedisOf, namespace: str) -> None:
    who = identity(limits={"tokens_per_minute": 60})
    async with replicas(redis_server("system").url, namespace) as ((first, _), (second, _)):
        first.spend(who, 1000)
        assert await first.settle()
        reached = await second.enter(who, 10)
        assert reached is not None
        assert reached.retry_after_s <= 10.0


async def test_what_answers_cost_is_told_to_the_others(redis_server: RedisOf, namespace: str) -> None:
    who = identity(limits={"tokens_per_minute": 600})
    async with replicas(redis_server("system").url, namespace) as ((first, _), (second, _)):
        telling = asyncio.create_task(first.run())
        assert await first.enter(who, 100) is None
        first.spend(who, 550)
        async with asyncio.timeout(120):
            while first._owed:
                await asyncio.sleep(0.01)
        reached = await second.enter(who, 50)
        assert reached is not None
        assert reached.limit is Limit.TOKENS
        await cancel_and_wait(telling)


async def test_requests_at_a_time_are_given_back_when_tokens_refuse(redis_server: RedisOf, namespace: str) -> None:
    who = identity(key_limits={"max_concurrent": 1, "tokens_per_minute": 10})
    async with replicas(redis_server("system").url, namespace) as ((first, _), (second, _)):
        assert await second.enter(who, 10) is None
        reached = await first.enter(who, 10)
        assert reached is not None
        assert reached.limit is Limit.TOKENS
        assert first._own.accounts(who, 0.0)[0].concurrent == 0


# -- a Redis that is away ----------------------------------------------------------------------------------------------


async def test_routers_go_on_alone_from_what_they_heard_last_and_settle_later(redis_of_my_own: StartRedis) -> None:
    who = identity(key_limits={"requests_per_minute": 10})
    with redis_of_my_own() as server:
        async with replicas(server.url, "away") as found:
            (first, one), (second, _) = found
            for _ in range(6):
                assert await first.ask(who) is None
            server.kill()
            async with asyncio.timeout(120):
                while one.counted("pdserve_store_breaker", state="closed"):
                    await asyncio.sleep(0.01)
            alone = [await limits.ask(who) for limits in (first, second) for _ in range(12)]
            # The first knew of four; the second had never asked, so it gives a minute's worth of its own.
            assert [answer is None for answer in alone] == [True] * 4 + [False] * 8 + [True] * 10 + [False] * 2
            server.start()  # it knows nothing any more
            for limits, running in found:
                await running.present(b"any")
                assert await limits.settle()
            reached = await first.ask(who)
            assert reached is not None
            assert reached.retry_after_s > 20.0  # 14 were given while it was away: below zero


async def test_a_redis_that_hangs_fails_nobody(redis_of_my_own: StartRedis, namespace: str) -> None:
    who = identity(key_limits={"requests_per_minute": 1000})
    with redis_of_my_own() as server:
        async with replicas(server.url, namespace, 1, operation_timeout_s=0.01) as ((limits, running),):
            server.pause()
            try:
                async with asyncio.timeout(120):
                    while running.counted("pdserve_store_breaker", state="closed"):
                        assert await limits.ask(who) is None
                waited = running.counted("pdserve_store_operation_seconds_count", operation="limit")
                for _ in range(50):
                    assert await limits.ask(who) is None
                assert running.counted("pdserve_store_operation_seconds_count", operation="limit") == waited  # nobody waits
            finally:
                server.resume()


@pytest.mark.parametrize("value", [b"a string", {"level": "nan", "seen_ms": "0"}, {"level": "x", "seen_ms": ""}])
async def test_what_others_wrote_there_is_not_believed(
    redis_server: RedisOf, namespace: str, value: bytes | dict[str, str]
) -> None:
    who = identity(key_limits={"requests_per_minute": 2})
    server = redis_server("system")
    async with replicas(server.url, namespace, 1) as ((limits, _),):
        assert await limits.ask(who) is None
        with server.client() as client:
            (key,) = client.keys(f"{namespace}:limit:*")
            client.delete(key)
            if isinstance(value, bytes):
                client.set(key, value)
            else:
                client.hset(key, mapping=value)
        assert [await limits.ask(who) is None for _ in range(3)] == [True, True, False]


async def test_a_full_redis_leaves_each_router_to_itself(redis_of_my_own: StartRedis, namespace: str) -> None:
    who = identity(key_limits={"requests_per_minute": 2})
    with redis_of_my_own() as server:
        async with replicas(server.url, namespace, 1) as ((limits, _),):
            with server.client() as client:
                client.config_set("maxmemory", "1")
                assert [await limits.ask(who) is None for _ in range(3)] == [True, True, False]


async def test_without_a_redis_nothing_is_owed() -> None:
    who = identity(key_limits={"requests_per_minute": 1, "tokens_per_minute": 10})
    limits = Limits(None, namespace="", clock=ManualClock())
    assert await limits.ask(who) is None
    assert await limits.ask(who) is not None
    assert await limits.enter(who, 5) is None
    limits.spend(who, 5)
    assert not limits._owed
