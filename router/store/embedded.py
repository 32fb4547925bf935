"""The store of a router that has no Redis: in this process, least recently used first out, bounded by bytes.

An entry lives from `put` until it expires (an absolute time; reading does not prolong it), is evicted, deleted, overwritten or
invalidated. An invalidated one goes when it is next met or its room is needed. Everything ends with the process; that is why its
epochs are numbers that start at 0 under an incarnation of this process.

Other replicas are not known here: with several routers and no Redis, `invalidate` holds in the router that was told.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from common.clock import Clock
from common.metrics import StoreMetrics
from router.store.base import (
    Change,
    Deleted,
    Epoch,
    Epochs,
    Inserted,
    Invalidated,
    Listener,
    Reading,
    Reset,
    check_key,
    sorted_names,
)

_SWEEP_S = 30.0
_ENTRY_OVERHEAD_BYTES = 512  # objects, dictionary slots and queue positions around a key and a value
_MAX_COUNTERS = 65_536  # names that were ever invalidated; beyond it all are forgotten under a new incarnation


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    epochs: Epochs
    expires_s: float


class EmbeddedStore:
    def __init__(self, *, max_bytes: int, max_value_bytes: int, clock: Clock, metrics: StoreMetrics) -> None:
        self._max_bytes = max_bytes
        self._max_value_bytes = max_value_bytes
        self._clock = clock
        self._metrics = metrics
        self._incarnation = secrets.token_bytes(16)
        self._counters: dict[str, int] = {}
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._expiries: list[tuple[float, bytes]] = []  # a heap; what no longer fits an entry is skipped
        self._bytes = 0
        self._listeners: list[Listener] = []
        metrics.read_size_from(lambda: (len(self._entries), self._bytes))

    async def get(self, key: bytes, names: Sequence[str]) -> Reading:
        check_key(key)
        epochs = self._epochs(sorted_names(names))
        self._sweep()
        entry = self._entries.get(key)
        if entry is None:
            self._metrics.operation("get", "absent")
            return Reading(None, epochs)
        if entry.epochs != epochs and entry.epochs != self._epochs(entry.epochs.names):
            self._remove((key,))
            self._metrics.operation("get", "invalidated")
            return Reading(None, epochs)
        if entry.epochs != epochs and not set(entry.epochs.names) <= set(epochs.names):
            self._metrics.operation("get", "refused")
            return Reading(None, epochs)
        self._entries.move_to_end(key)
        self._metrics.operation("get", "found")
        return Reading(entry.value, epochs)

    def put(self, key: bytes, value: bytes, *, ttl_s: float, epochs: Epochs) -> None:
        check_key(key)
        size_bytes = _size_bytes(key, value)
        if len(value) > self._max_value_bytes or size_bytes > self._max_bytes:
            self._metrics.dropped("too_large")
            return
        if ttl_s <= 0 or epochs != self._epochs(epochs.names):
            self._metrics.dropped("outdated")
            return
        self._sweep()
        before = self._entries.pop(key, None)
        if before is not None:
            self._bytes -= _size_bytes(key, before.value)
        self._bytes += size_bytes
        evicted: list[bytes] = []
        while self._bytes > self._max_bytes:
            oldest, entry = self._entries.popitem(last=False)
            self._bytes -= _size_bytes(oldest, entry.value)
            evicted.append(oldest)
        entry = self._entries[key] = _Entry(value, epochs, self._clock.monotonic_s() + ttl_s)
        heapq.heappush(self._expiries, (entry.expires_s, key))
        if len(self._expiries) > 2 * len(self._entries) + 64:
            self._expiries = [(entry.expires_s, key) for key, entry in self._entries.items()]
            heapq.heapify(self._expiries)
        self._metrics.operation("put", "ok")
        if evicted:
            self._tell(Deleted(tuple(evicted)))
        self._tell(Inserted(key, epochs.names))

    async def delete(self, keys: Sequence[bytes]) -> None:
        self._remove(keys)
        self._metrics.operation("delete", "ok")

    async def invalidate(self, names: Sequence[str]) -> None:
        unique = sorted_names(names)
        for name in unique:
            self._counters[name] = self._counters.get(name, 0) + 1
        self._metrics.operation("invalidate", "ok")
        if len(self._counters) > _MAX_COUNTERS:
            self._incarnation = secrets.token_bytes(16)
            self._counters.clear()
            self._entries.clear()
            self._expiries.clear()
            self._bytes = 0
            self._tell(Reset())
        elif unique:
            self._tell(Invalidated(unique))

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._sweep()

    async def close(self) -> None:
        """Nothing is open here."""

    def _epochs(self, names: tuple[str, ...]) -> Epochs:
        return Epochs(tuple((name, Epoch(self._counters.get(name, 0), self._incarnation)) for name in names))

    def _sweep(self) -> None:
        """Drops what has expired."""
        now_s = self._clock.monotonic_s()
        expired: list[bytes] = []
        while self._expiries and self._expiries[0][0] <= now_s:
            _, key = heapq.heappop(self._expiries)
            entry = self._entries.get(key)
            if entry is not None and entry.expires_s <= now_s:
                expired.append(key)
        if expired:
            self._remove(expired)

    def _remove(self, keys: Sequence[bytes]) -> None:
        removed: list[bytes] = []
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._bytes -= _size_bytes(key, entry.value)
                removed.append(key)
        if removed:
            self._tell(Deleted(tuple(removed)))

    def _tell(self, change: Change) -> None:
        for listener in self._listeners:
            listener(change)


def _size_bytes(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _ENTRY_OVERHEAD_BYTES
