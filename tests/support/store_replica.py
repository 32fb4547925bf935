"""One replica of a router's store in a process of its own: reads, and computes what it does not find, until it is killed.

What it computes is the number of the present version, which the test keeps in a shared file: the answer of a deployment that
changes. Before each read it notes the version whose predecessors were invalidated for good (the floor); a smaller one that is
then served is stale. It counts in the file, too, so that a kill loses nothing.

Arguments: file, slot of the counters, URL, namespace, and whether to bind values to nothing, which is the mistake to be found.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.metrics import StoreMetrics
from router.store.making import make_store
from support.stores import TOKEN, shared

KEYS = 4
REPLICAS = 3
_NUMBER = struct.Struct("@Q")
_VERSION, _FLOOR, _FIRST_COUNTER = 0, 1, 2
SIZE_BYTES = _NUMBER.size * (_FIRST_COUNTER + 2 * REPLICAS)


class Board:
    """Numbers that processes share: the version, the floor, and (served, stale) of each replica."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE_BYTES)

    def read(self, position: int) -> int:
        return int(_NUMBER.unpack_from(self._memory, position * _NUMBER.size)[0])

    def write(self, position: int, number: int) -> None:
        _NUMBER.pack_into(self._memory, position * _NUMBER.size, number)

    @property
    def version(self) -> int:
        return self.read(_VERSION)

    @version.setter
    def version(self, number: int) -> None:
        self.write(_VERSION, number)

    @property
    def floor(self) -> int:
        return self.read(_FLOOR)

    @floor.setter
    def floor(self, number: int) -> None:
        self.write(_FLOOR, number)

    def count(self, replica: int, *, stale: bool) -> None:
        for position in (_FIRST_COUNTER + 2 * replica, *([_FIRST_COUNTER + 2 * replica + 1] if stale else [])):
            self.write(position, self.read(position) + 1)

    def served(self, replica: int) -> int:
        return self.read(_FIRST_COUNTER + 2 * replica)

    def stale(self, replica: int) -> int:
        return self.read(_FIRST_COUNTER + 2 * replica + 1)


async def main(path: Path, replica: int, url: str, namespace: str, is_forgetful: bool) -> None:
    board = Board(path)
    store = make_store(
        shared(url, namespace), cluster_token=TOKEN, clock=SystemClock(), metrics=StoreMetrics(CollectorRegistry())
    )
    names = () if is_forgetful else ("model:m",)
    running = asyncio.create_task(store.run())
    turn = 0
    while not running.done():
        turn += 1
        key = b"question %d" % (turn % KEYS)
        floor = board.floor
        reading = await store.get(key, names)
        if reading.value is not None:
            board.count(replica, stale=int(reading.value) < floor)
        elif reading.epochs is not None:
            store.put(key, b"%d" % board.version, ttl_s=60, epochs=reading.epochs)
        await asyncio.sleep(0.001)
    running.result()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "forgetful"))
