"""Two replicas on one Redis against a naive model: what both read, after any sequence of what either does, flushes included."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.store.base import Epochs, Inserted
from support.stores import Running, open_store, shared

KEYS = st.sampled_from(["a", "b", "c"])
NAMES = st.frozensets(st.sampled_from(["tenant:1", "model:m", "tag:t"]), min_size=1, max_size=3)
WHO = st.integers(0, 1)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), WHO, KEYS, NAMES),
        st.tuples(st.just("put"), WHO, KEYS, st.integers(0, 3)),
        st.tuples(st.just("invalidate"), WHO, NAMES),
        st.tuples(st.just("delete"), WHO, KEYS),
        st.tuples(st.just("lose"), st.sampled_from(["tenant:1", "model:m", "tag:t"])),
        st.tuples(st.just("flush")),
    ),
    min_size=5,
    max_size=25,
)


class Model:
    """Values by key, with what they are bound to: names, and the moment when the epochs of these were read."""

    def __init__(self) -> None:
        self.moment = 0
        self.ended_at: dict[str, int] = {}
        self.flushed_at = 0
        self.values: dict[str, tuple[bytes, frozenset[str], int]] = {}

    def read(self, key: str, names: frozenset[str]) -> bytes | None:
        value, bound_to, since = self.values.get(key, (None, frozenset(), 0))
        is_current = since > self.flushed_at and all(self.ended_at.get(name, 0) < since for name in bound_to)
        return value if is_current and bound_to <= names else None


async def play(actions: list[tuple[Any, ...]], replicas: list[Running], client: Any, namespace: str, example: int) -> None:
    model = Model()
    readings: list[tuple[int, frozenset[str], Epochs]] = []
    for action in actions:
        model.moment += 1
        match action:
            case "get", who, key, names:
                reading = await replicas[who].present(f"{example} {key}".encode(), tuple(names))
                assert reading.value == model.read(key, names)
                assert reading.epochs is not None
                readings.append((model.moment, names, reading.epochs))
            case "put", who, key, which if readings:
                since, names, epochs = readings[-1 - which % len(readings)]
                value = f"{example} {model.moment}".encode()
                told = Inserted(f"{example} {key}".encode(), epochs.names)
                await replicas[who].put(told, value, epochs)
                model.values[key] = (value, names, since)
            case "invalidate", who, names:
                await replicas[who].store.invalidate(tuple(names))
                model.ended_at |= dict.fromkeys(names, model.moment)
            case "delete", who, key:
                await replicas[who].store.delete((f"{example} {key}".encode(),))
                model.values.pop(key, None)
            case "lose", name:  # as if it had been evicted
                await asyncio.to_thread(client.delete, f"{namespace}:e:{name}")
                model.ended_at[name] = model.moment
            case ("flush",):
                await asyncio.to_thread(client.flushall)
                model.flushed_at = model.moment
                model.values.clear()


def test_two_replicas_read_what_the_model_reads(redis_of_my_own: Any, namespace: str) -> None:
    with asyncio.Runner() as runner, redis_of_my_own() as server, server.client() as client:
        stack = AsyncExitStack()
        config = shared(server.url, namespace)
        replicas = [runner.run(stack.enter_async_context(open_store(config))) for _ in range(2)]
        examples = 0

        @settings(max_examples=25, deadline=None)
        @given(ACTIONS)
        def check(actions: list[tuple[Any, ...]]) -> None:
            nonlocal examples
            examples += 1
            runner.run(play(actions, replicas, client, namespace, examples))

        try:
            check()
        finally:
            runner.run(stack.aclose())
