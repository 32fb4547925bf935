"""Nearest neighbours among the vectors of one partition, kept in Redis as vector sets (Redis 8 and later).

    RedisVectors.is_there() -> add -> nearest -> remove ...

What it finds is a hint: keys to look up with `Store.get`, which says whether they still are. So nothing here is signed, nothing
fails a request (a missing answer is an empty one), and a vector whose entry has gone is removed by whoever looks it up in vain.

A partition holds vectors of one length and one meaning, such as one tenant, model and embedder; its set ends with the vector in
it that was to live longest.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.store.base import check_key
from router.store.link import Command, Reply

MAX_DIMENSIONS = 4096
MAX_NEIGHBOURS = 64
_MAX_PARTITION_BYTES = 64


@dataclass(frozen=True, slots=True)
class Neighbour:
    key: bytes
    cosine: float  # -1 to 1; approximate where the index is


class NearestNeighbours(Protocol):
    """An index over (partition, key, vector). Vectors need not be of length 1; only their direction counts."""

    async def is_there(self) -> bool:
        """Whether it can be used at all."""
        ...

    async def add(self, partition: bytes, key: bytes, vector: Sequence[float], *, ttl_s: float) -> bool:
        """Whether it is in the index now."""
        ...

    async def nearest(self, partition: bytes, vector: Sequence[float], count: int) -> tuple[Neighbour, ...]:
        """The closest first; empty if there are none or the index is away."""
        ...

    async def remove(self, partition: bytes, keys: Sequence[bytes]) -> None: ...


class Asked(Protocol):
    """What the vectors need of the store: see `RedisStore`."""

    async def ask(self, operation: str, commands: Sequence[Command]) -> list[Reply] | None: ...


class RedisVectors:
    """Shares the connections, the budget and the breaker of a RedisStore."""

    def __init__(self, server: Asked, *, namespace: str) -> None:
        self._server = server
        self._prefix = f"{namespace}:x:".encode()

    async def is_there(self) -> bool:
        """Whether the server is there and has vector sets."""
        replies = await self._server.ask("vectors", [("COMMAND", "INFO", "VADD", "VSIM", "VREM")])
        known = replies[0] if replies is not None else None
        return isinstance(known, list) and len(known) == 3 and all(isinstance(entry, list) for entry in known)

    async def add(self, partition: bytes, key: bytes, vector: Sequence[float], *, ttl_s: float) -> bool:
        check_key(key)
        name, ttl_ms = self._name(partition), max(1, int(ttl_s * 1000))
        replies = await self._server.ask(
            "vectors",
            [
                ("VADD", name, "FP32", _packed(vector), key),
                ("PEXPIRE", name, ttl_ms, "NX"),
                ("PEXPIRE", name, ttl_ms, "GT"),
            ],
        )
        return replies is not None and isinstance(replies[0], int)

    async def nearest(self, partition: bytes, vector: Sequence[float], count: int) -> tuple[Neighbour, ...]:
        name = self._name(partition)
        wanted = max(1, min(count, MAX_NEIGHBOURS))
        replies = await self._server.ask("vectors", [("VSIM", name, "FP32", _packed(vector), "WITHSCORES", "COUNT", wanted)])
        return _parsed(replies[0]) if replies is not None else ()

    async def remove(self, partition: bytes, keys: Sequence[bytes]) -> None:
        name = self._name(partition)
        if keys:
            await self._server.ask("vectors", [("VREM", name, key) for key in keys])

    def _name(self, partition: bytes) -> bytes:
        if not 1 <= len(partition) <= _MAX_PARTITION_BYTES:
            raise ValueError(f"a partition is named by 1 to {_MAX_PARTITION_BYTES} bytes")
        return self._prefix + partition


def _packed(vector: Sequence[float]) -> bytes:
    if not 1 <= len(vector) <= MAX_DIMENSIONS:
        raise ValueError(f"a vector has 1 to {MAX_DIMENSIONS} numbers, this one {len(vector)}")
    return struct.pack(f"<{len(vector)}f", *vector)


def _parsed(reply: Reply) -> tuple[Neighbour, ...]:
    """Pairs of element and score, where 1 is the same direction and 0 the opposite one. Anything else is no neighbour."""
    if not isinstance(reply, list):
        return ()
    found: list[Neighbour] = []
    for key, score in zip(reply[::2], reply[1::2], strict=False):
        try:
            cosine = 2.0 * float(score) - 1.0
        except (TypeError, ValueError):
            continue
        if isinstance(key, bytes) and -1.01 <= cosine <= 1.01:
            found.append(Neighbour(key, cosine))
    return tuple(found)
