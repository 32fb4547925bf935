"""Questions that a router does not hold itself, found in an index that all routers of a store share.

A router's own library holds all there are, but for two times: while it still reads what others wrote, and once it had to let
questions go for want of room. Only then is the shared index asked, so its price is paid only where there is something to win.
What it names are keys of records, which the asker reads, verifies and takes into its library like any other.

Nothing here fails a request, and `add` and `remove` do not wait: an index that is away, or a server without vector sets, is an
empty one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from typing import Protocol

from common.clock import Clock
from router.semantic.embedder import Vector
from router.store.vectors import NearestNeighbours

_NEIGHBOURS = 8
_MAX_WRITES = 256  # at a time; further ones are left out
_LOOK_AGAIN_S = 60.0  # whether a server that had no vector sets has them now


class WiderIndex(Protocol):
    def add(self, scope: bytes, key: bytes, vector: Vector, *, ttl_s: float) -> None: ...

    async def near(self, scope: bytes, vector: Vector) -> tuple[bytes, ...]:
        """Keys of answers to questions of the scope, the nearest first."""
        ...

    def remove(self, scope: bytes, keys: Sequence[bytes]) -> None: ...

    async def close(self) -> None: ...


class NoWiderIndex:
    """There is no store that is shared, or it is not to be used for this."""

    def add(self, scope: bytes, key: bytes, vector: Vector, *, ttl_s: float) -> None:
        """Nobody would find it."""

    async def near(self, scope: bytes, vector: Vector) -> tuple[bytes, ...]:
        return ()

    def remove(self, scope: bytes, keys: Sequence[bytes]) -> None:
        """Nothing was added."""

    async def close(self) -> None:
        """Nothing was opened."""


class SharedIndex:
    """Vectors of one embedder; those of another are other partitions."""

    def __init__(self, index: NearestNeighbours, *, revision: bytes, clock: Clock) -> None:
        self._index = index
        self._revision = revision
        self._clock = clock
        self._there = False
        self._looked_s: float | None = None
        self._writes: set[asyncio.Task[None]] = set()

    def add(self, scope: bytes, key: bytes, vector: Vector, *, ttl_s: float) -> None:
        self._write(self._add(scope, key, vector, ttl_s))

    async def near(self, scope: bytes, vector: Vector) -> tuple[bytes, ...]:
        if not await self._is_there():
            return ()
        found = await self._index.nearest(self._partition(scope), vector.tolist(), _NEIGHBOURS)
        return tuple(neighbour.key for neighbour in found if neighbour.cosine > 0.0)

    def remove(self, scope: bytes, keys: Sequence[bytes]) -> None:
        self._write(self._remove(scope, keys))

    async def close(self) -> None:
        await asyncio.gather(*self._writes)

    async def _add(self, scope: bytes, key: bytes, vector: Vector, ttl_s: float) -> None:
        if await self._is_there():
            await self._index.add(self._partition(scope), key, vector.tolist(), ttl_s=ttl_s)

    async def _remove(self, scope: bytes, keys: Sequence[bytes]) -> None:
        if await self._is_there():
            await self._index.remove(self._partition(scope), keys)

    def _write(self, write: Coroutine[None, None, None]) -> None:
        if len(self._writes) >= _MAX_WRITES:
            write.close()
            return
        task = asyncio.create_task(write, name="shared index")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _is_there(self) -> bool:
        now_s = self._clock.monotonic_s()
        if not self._there and (self._looked_s is None or now_s - self._looked_s >= _LOOK_AGAIN_S):
            self._looked_s = now_s
            self._there = await self._index.is_there()
        return self._there

    def _partition(self, scope: bytes) -> bytes:
        return hashlib.blake2b(scope, key=self._revision[:64], digest_size=16).digest()
