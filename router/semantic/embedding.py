"""Embedding within a budget: at once on the loop if that is quick, else on one thread with a short queue.

Over budget, or with the queue full, there is no vector, and the question counts as a miss. What was begun is finished all the
same, so that the answer to the question can still be learned under it.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from router.semantic.embedder import Embedder, Vector
from router.semantic.off_loop import OffLoop, finished, until_done
from router.semantic.reading import Reading


class Embedding:
    def __init__(self, embedder: Embedder, *, budget_s: float) -> None:
        self._embedder = embedder
        self._budget_s = budget_s
        self._thread = None if embedder.quick else OffLoop("embed")

    def start(self, text: str, reading: Reading) -> Future[Vector] | None:
        """None: too many wait already."""
        if self._thread is None:
            done: Future[Vector] = Future()
            done.set_result(self._embedder.embed(text, reading))
            return done
        return self._thread.start(partial(self._embedder.embed, text, reading))

    async def vector(self, future: Future[Vector]) -> Vector | None:
        """None: the budget is spent, or the embedder failed."""
        if not future.done():
            await until_done(future, self._budget_s)
        return finished(future)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
