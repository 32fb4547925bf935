"""Three replicas in processes of their own, invalidations from a fourth, kills and restarts: nothing invalidated is served."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import support.store_replica
from common.errors import StoreUnavailable
from support.redis_server import RedisServer
from support.store_replica import REPLICAS, SIZE_BYTES, Board
from support.stores import Running, open_store, shared

StartRedis = Callable[..., AbstractContextManager[RedisServer]]
PROGRAM = Path(support.store_replica.__file__)
TESTS = PROGRAM.parents[1]


class Fleet:
    """The replicas, and the file that they share."""

    def __init__(self, folder: Path, server: RedisServer, namespace: str, habit: str, replicas: int) -> None:
        self._file = folder / "board"
        self._file.write_bytes(bytes(SIZE_BYTES))
        self.board = Board(self._file)
        self.board.version = 1
        self._arguments = (server.url, namespace, habit)
        self.processes = [self._start(number) for number in range(replicas)]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self._file), str(number), *self._arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
            stdout=subprocess.DEVNULL,
        )

    def restart(self, number: int) -> None:
        self.end(number)
        self.processes[number] = self._start(number)

    def end(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait(timeout=60)

    async def serves(self, more: int = 20) -> None:
        """Returns when each replica has served `more` answers from the store."""
        goals = [self.board.served(number) + more for number in range(len(self.processes))]
        async with asyncio.timeout(120):
            while any(self.board.served(number) < goal for number, goal in enumerate(goals)):
                assert all(process.poll() is None for process in self.processes)
                await asyncio.sleep(0.01)

    @property
    def stale(self) -> int:
        return sum(self.board.stale(number) for number in range(len(self.processes)))


@contextmanager
def fleet_of(
    folder: Path, server: RedisServer, namespace: str, habit: str = "careful", replicas: int = REPLICAS
) -> Iterator[Fleet]:
    with ExitStack() as stack:
        fleet = Fleet(folder, server, namespace, habit, replicas)
        for number in range(replicas):
            stack.callback(fleet.end, number)
        yield fleet


async def move_on(fleet: Fleet, running: Running) -> None:
    """A new version: from its invalidation on, no older one may be served."""
    fleet.board.version += 1
    async with asyncio.timeout(120):
        while True:
            try:
                await running.store.invalidate(("model:m",))
                break
            except StoreUnavailable:
                await asyncio.sleep(0.02)
    fleet.board.floor = fleet.board.version


async def test_nothing_invalidated_is_served(redis_of_my_own: StartRedis, namespace: str, tmp_path: Path) -> None:
    with redis_of_my_own("--appendonly", "yes") as server, fleet_of(tmp_path, server, namespace) as fleet:
        async with open_store(shared(server.url, namespace)) as running:
            await running.present(b"k")
            for turn in range(6):
                await fleet.serves()
                await move_on(fleet, running)
                if turn == 1:
                    fleet.restart(turn)
                if turn == 3:
                    server.kill()
                    server.start()
            await fleet.serves()
            assert fleet.stale == 0


async def test_a_replica_that_binds_values_to_nothing_is_found(
    redis_of_my_own: StartRedis, namespace: str, tmp_path: Path
) -> None:
    with redis_of_my_own() as server, fleet_of(tmp_path, server, namespace, "forgetful", 1) as fleet:
        async with open_store(shared(server.url, namespace)) as running:
            await running.present(b"k")
            await fleet.serves()
            await move_on(fleet, running)
            await fleet.serves()
            assert fleet.stale > 0
