"""A thread that does one job after another for an event loop: what blocks, or takes long without the interpreter.

    event loop    start(job) -> future        start(job) -> future              drained()
    lane thread        job ........ done -> the loop's turn: job ...... done -> the loop's turn       the thread ends

Jobs are done in the order in which they were started, whatever becomes of their futures: to cancel one is to be told nothing,
and no more. A transfer waits for whatever the loop does between `start` and its next pause, for that holds the interpreter,
which the job's first line needs: so there is little, one future of the loop's own and none that shields it.

Does not know what jobs do. Made on the event loop whose futures it gives; ended by `drained`, once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")


class Lane:
    def __init__(self, name: str, failed: Callable[[BaseException], object]) -> None:
        """`failed` is told on the loop of each error that ends a job, before who waits for it is."""
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        self._num_started = 0  # and not told the end of
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    @property
    def idle(self) -> bool:
        """All jobs that were started are done, and the loop has been told."""
        return self._num_started == 0

    def start(self, job: Callable[[], Result]) -> asyncio.Future[Result]:
        future: asyncio.Future[Result] = self._loop.create_future()
        self._num_started += 1
        self._thread.submit(job).add_done_callback(partial(self._done, future))
        return future

    async def drained(self) -> None:
        """Returns when all jobs that were started are done; no more may be started."""
        await asyncio.shield(self.start(lambda: None))
        self._thread.shutdown()  # it has nothing left to do

    def _done(self, future: asyncio.Future[Any], work: Future[Any]) -> None:
        """In the thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits for anything
            self._loop.call_soon_threadsafe(self._tell, future, work)

    def _tell(self, future: asyncio.Future[Any], work: Future[Any]) -> None:
        self._num_started -= 1
        error = work.exception()
        if error is not None:
            self._failed(error)
        if future.done():
            return
        if error is None:
            future.set_result(work.result())
        else:
            future.set_exception(error)
            future.exception()  # retrieved: who does not wait for it has been told
