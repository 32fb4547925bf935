"""Work that would hold up the event loop, on one thread with a short queue: who comes to a full queue is told so at once.

What was begun is finished, also if nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_MAX_WAITING = 8


class OffLoop:
    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting = 0

    def start(self, work: Callable[[], T]) -> Future[T] | None:
        """None: too many wait already."""
        if self._waiting >= _MAX_WAITING:
            return None
        self._waiting += 1
        future = self._thread.submit(work)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: Future[Any]) -> None:
        self._waiting -= 1


async def until_done(future: Future[Any], timeout_s: float | None) -> None:
    """Never raises what the work raised: `finished` gives None then."""
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait((waiter,), timeout=timeout_s)


def finished(future: Future[T]) -> T | None:
    return future.result() if future.done() and not future.cancelled() and future.exception() is None else None
