"""The requests that a worker is serving now, and the door that drain closes.

A request enters when its call starts and leaves when its call has ended, however it ended. After `close` nobody enters any more
and `wait_idle` returns when the last one has left. It knows nothing of the requests but their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import NoWorkerAvailable


class InFlight:
    def __init__(self) -> None:
        self._count = 0
        self._open = True
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        return self._count

    @property
    def is_open(self) -> bool:
        return self._open

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Around one request. Raises NoWorkerAvailable after `close`."""
        if not self._open:
            raise NoWorkerAvailable("the worker is draining", retry_after_s=1.0)
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    def close(self) -> None:
        self._open = False

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether the last request has left within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
