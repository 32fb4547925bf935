"""Embedding within a budget: at once on the loop if that is quick, else on one thread with a short queue.

Over budget, or with the queue full, there is no vector, and the question counts as a miss. What was begun is finished all the
same, so that the answer to the question can still be learned under it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from router.semantic.embedder import Embedder, Vector
from router.semantic.reading import Reading

_MAX_WAITING = 8


class Embedding:
    def __init__(self, embedder: Embedder, *, budget_s: float) -> None:
        self._embedder = embedder
        self._budget_s = budget_s
        self._thread = None if embedder.quick else ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._waiting = 0

    def start(self, text: str, reading: Reading) -> Future[Vector] | None:
        """None: too many wait already."""
        if self._thread is None:
            done: Future[Vector] = Future()
            done.set_result(self._embedder.embed(text, reading))
            return done
        if self._waiting >= _MAX_WAITING:
            return None
        self._waiting += 1
        future = self._thread.submit(self._embedder.embed, text, reading)
        future.add_done_callback(self._done)
        return future

    async def vector(self, future: Future[Vector]) -> Vector | None:
        """None: the budget is spent, or the embedder failed."""
        if not future.done():
            await until_done(future, self._budget_s)
        return finished(future)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: Future[Vector]) -> None:
        self._waiting -= 1


async def until_done(future: Future[Vector], timeout_s: float | None) -> None:
    """Never raises what the embedder raised: `finished` gives None then."""
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait((waiter,), timeout=timeout_s)


def finished(future: Future[Vector]) -> Vector | None:
    return future.result() if future.done() and not future.cancelled() and future.exception() is None else None
