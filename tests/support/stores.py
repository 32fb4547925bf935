"""Stores at work for tests: run, listened to, and asked what they counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from common.clock import Clock, SystemClock
from common.config import CacheConfig, RedisConfig
from common.metrics import StoreMetrics
from common.rpc import cancel_and_wait
from router.store.base import Change, Epochs, Inserted, Reading, Store
from router.store.making import make_store

TOKEN = "the token of a cluster of tests"
DEADLINE_S = 120.0
_DROPPED_AFTER_S = 10.0  # more than any budget of a write


@dataclass
class Running:
    """A store at work, what it counted and what it told."""

    store: Store
    registry: CollectorRegistry
    changes: list[Change] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, change: Change) -> None:
        self.changes.append(change)
        self._changed.set()

    async def heard(self, change: Change) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while change not in self.changes:
                self._changed.clear()
                await self._changed.wait()

    async def put(self, told: Inserted, value: bytes, epochs: Epochs) -> None:
        """Until it is told: on a busy machine a store may drop what it is given, for no request is to wait for it."""
        self.changes.clear()
        async with asyncio.timeout(DEADLINE_S):
            while told not in self.changes:
                self.store.put(told.key, value, ttl_s=60.0, epochs=epochs)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_DROPPED_AFTER_S):
                        await self.heard(told)

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def present(self, key: bytes, names: tuple[str, ...] = ()) -> Reading:
        """The reading once the store is there. A first answer may be late on a busy machine."""
        async with asyncio.timeout(DEADLINE_S):
            while (reading := await self.store.get(key, names)).epochs is None:
                await asyncio.sleep(0.005)
        return reading

    async def keep(self, key: bytes, value: bytes, names: tuple[str, ...] = (), ttl_s: float = 60.0) -> None:
        """Puts and waits until it can be read."""
        reading = await self.present(key, names)
        assert reading.epochs is not None
        self.store.put(key, value, ttl_s=ttl_s, epochs=reading.epochs)
        async with asyncio.timeout(DEADLINE_S):
            while (await self.store.get(key, names)).value != value:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def open_store(config: CacheConfig, *, clock: Clock | None = None, token: str = TOKEN) -> AsyncIterator[Running]:
    registry = CollectorRegistry()
    store = make_store(config, cluster_token=token, clock=clock or SystemClock(), metrics=StoreMetrics(registry))
    running = Running(store, registry)
    store.subscribe(running.hear)
    task = asyncio.create_task(store.run())
    try:
        yield running
    finally:
        await cancel_and_wait(task)
        await store.close()


def shared(url: str, namespace: str, **settings: Any) -> CacheConfig:
    """Configuration of a store in Redis. The budget is generous, for it is not what most tests are about."""
    return CacheConfig(redis=RedisConfig(url=url, namespace=namespace, **{"operation_timeout_s": 1.0, **settings}))
