"""A thread that does one job after another for an event loop: what blocks, or takes long without the interpreter.

    event loop    start(job) -> future        start(job) -> future              drained()
    lane thread        job ........ done -> the loop's turn: job ...... done -> the loop's turn       the thread ends

Jobs are done in the order in which they were started, whatever becomes of their futures: to cancel one is to be told nothing,
and no more. A transfer waits for whatever happens between `start` and the job's first line, so there is little: a future of the
loop's own and a queue, where an executor keeps a second future and a lock for each job.

Does not know what jobs do. Made on the event loop whose futures it gives; ended by `drained`, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
_Job = tuple[Callable[[], Any], asyncio.Future[Any]]


class Lane:
    def __init__(self, name: str, failed: Callable[[Exception], object]) -> None:
        """`failed` is told on the loop of each error that ends a job, before who waits for it is."""
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, job: Callable[[], Result]) -> asyncio.Future[Result]:
        future: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put((job, future))
        return future

    async def drained(self) -> None:
        """Returns when all jobs that were started are done; no more may be started."""
        self._jobs.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()  # it has nothing left to do

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits for anything
            while (work := self._jobs.get()) is not None:
                job, future = work
                try:
                    result = job()
                except Exception as error:  # noqa: BLE001 - whoever waits for the job is told, whatever it is
                    self._loop.call_soon_threadsafe(self._end_in_error, future, error)
                else:
                    self._loop.call_soon_threadsafe(_end, future, result)
                del work, job, future
            self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _end_in_error(self, future: asyncio.Future[Any], error: Exception) -> None:
        self._failed(error)
        if not future.done():
            future.set_exception(error)
            future.exception()  # retrieved: who does not wait for it has been told


def _end(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)
