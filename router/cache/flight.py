"""One generation that any number of identical requests listen to.

    start ──> events, kept from the first ──> complete        every choice has ended as a client sees it; may be stored now
                 │                        └─> failed          one typed error, given to every listener
                 └─ the last listener left ─> abandoned       cancelled, down to the workers

A flight is a task of its own, nobody's: the request that happened to start it may leave, and nothing changes for the others. Each
listener reads the kept events at its own pace, from the beginning; what is kept is the answer itself, so a slow one costs nothing
but its place in it.

Knows neither stores nor clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from common.clock import Clock
from common.errors import DeadlineExceeded, EngineFailure, NoWorkerAvailable, PdserveError, error_from_code
from common.rpc import cancel_and_wait
from common.types import Request
from router.cache.entry import Recording
from router.dispatch import DispatchEvent


class TokenSource(Protocol):
    """Whoever computes answers: the dispatcher, or what stands before it."""

    @property
    def lane(self) -> str:
        """Requests share a generation within a lane only, so that none waits with what is less urgent than itself."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]: ...

    def in_background(self) -> TokenSource:
        """The same for what nobody waits for."""
        ...


class Flight:
    """Made inside a running loop. `on_complete` is called once, before any listener sees the last event; `on_leave` whenever
    nobody may join any more, the last time with `ended` true."""

    def __init__(
        self,
        request: Request,
        source: TokenSource,
        recording: Recording,
        *,
        clock: Clock,
        on_complete: Callable[[Recording], None],
        on_leave: Callable[[Flight], None],
    ) -> None:
        self.request = request
        self.complete = False
        self.ended = False  # the task is over
        self._source = source
        self._recording = recording
        self._clock = clock
        self._on_complete = on_complete
        self._on_leave = on_leave
        self._events: list[DispatchEvent] = []
        self._listeners = 0
        self._failure: PdserveError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._task = asyncio.create_task(self._fly(), name="shared answer")
        self._task.add_done_callback(self._end)

    async def listen(self, deadline_s: float) -> AsyncGenerator[DispatchEvent, None]:
        """All events from the first. Raises the flight's failure, or DeadlineExceeded at the listener's own deadline."""
        self._listeners += 1
        position = 0
        loop = asyncio.get_running_loop()
        late = False

        def time_is_over() -> None:
            nonlocal late
            late = True
            self._tell()

        # One timer for all waits: there is one wait per token.
        timer = loop.call_later(max(0.0, deadline_s - self._clock.monotonic_s()), time_is_over)
        try:
            while True:
                while position < len(self._events):
                    position += 1
                    yield self._events[position - 1]
                if self.complete:
                    return
                if self.ended:
                    raise self._outcome()
                if late:
                    raise DeadlineExceeded("the request's time is over")
                news = loop.create_future()
                self._waiting.append(news)
                await news
        finally:
            timer.cancel()
            self._listeners -= 1
            if self._listeners == 0 and not self.complete and not self.ended:
                self._on_leave(self)  # at once: who comes now must not join what is being cancelled
                await cancel_and_wait(self._task)

    async def close(self) -> None:
        await cancel_and_wait(self._task)

    async def _fly(self) -> None:
        try:
            async with aclosing(self._source.generate(self.request)) as events:
                async for event in events:
                    self._recording.add(event)
                    self._events.append(event)
                    if self._recording.complete:
                        self.complete = True
                        self._on_complete(self._recording)
                        self._on_leave(self)
                    self._tell()
                    if self.complete:
                        return
            raise EngineFailure("the answer ended before it was complete")
        except PdserveError as error:
            self._failure = error

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)

    def _end(self, task: asyncio.Task[None]) -> None:
        self.ended = True
        self._on_leave(self)
        self._tell()

    def _outcome(self) -> BaseException:
        """Why there is no more. Each listener gets an error of its own: one that is raised twice collects tracebacks."""
        if self._failure is not None:
            error = self._failure
            return error_from_code(error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)
        if not self._task.cancelled() and (bug := self._task.exception()) is not None:
            return bug
        return NoWorkerAvailable("the router is shutting down", retry_after_s=1.0)
