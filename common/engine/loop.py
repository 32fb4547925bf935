"""The engine's own thread beside an asyncio loop, and the two ways between them.

    asyncio loop  -- post(function, *args) -->  inbox  -->  engine thread: apply all, schedule, compute, and again
    asyncio loop  <--- deliver([events]) ----  before and after computing, and when the core has news within a step

The core is touched by the engine thread only, once `start` was called. When there is nothing to compute the thread sleeps in its
inbox until something is posted; it never polls. If the core raises, the loop fails as a whole: `on_failure` is called once on the
asyncio side, nothing is computed any more, and the error is raised in the thread for its traceback to be seen (a lost rank is
not: that says nothing of this thread).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar, TypeVarTuple

from common.errors import RankLost

Event = TypeVar("Event")
Arguments = TypeVarTuple("Arguments")


class EngineCore(Protocol[Event]):
    """What a worker runs on the engine thread."""

    def schedule(self) -> bool:
        """Decides what the next step computes. False: nothing, and only a post can change that."""
        ...

    def compute(self, hand_over: Callable[[], None]) -> None:
        """Computes what `schedule` decided, and accounts for it. Called only if that was something. Calling `hand_over` has the
        events so far delivered now; what is there at the end is delivered anyway."""
        ...

    def finish(self) -> None:
        """Before the thread ends: what is under way is computed to its end, and accounted for."""
        ...

    def abandon(self) -> None:
        """The same after an error: nothing computes any more when it returns."""
        ...

    def take_events(self) -> list[Event]:
        """What happened since the last call, for the asyncio side, in order."""
        ...


class Inbox(Protocol):
    """What those on the asyncio side see of an engine: it takes calls, in order, between its steps."""

    def post(self, function: Callable[[*Arguments], None], *arguments: *Arguments) -> None: ...


class EngineLoop(Generic[Event]):
    def __init__(
        self, core: EngineCore[Event], *, name: str, inside: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """`inside` makes what the thread is in from its start to its end: what a device wants to know of a thread."""
        self._core = core
        self._inside = inside
        self._deliver: Callable[[list[Event]], None] | None = None
        self._on_failure: Callable[[BaseException], None] | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._signs = 0
        self._waiting = True
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, *, deliver: Callable[[list[Event]], None], on_failure: Callable[[BaseException], None]) -> None:
        """Called once, on the asyncio loop that events are to be delivered on."""
        self._deliver, self._on_failure = deliver, on_failure
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    def post(self, function: Callable[[*Arguments], None], *arguments: *Arguments) -> None:
        """Has the engine thread call the function between two steps. Returns at once; calls are applied in order."""
        self._inbox.put(lambda: function(*arguments))

    def sign(self) -> int | None:
        """From any thread: another number after each step and whatever it had to say meanwhile; None while it waits for posts, or
        has ended."""
        return None if self._waiting else self._signs

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Returns when the thread has ended; a step in progress is completed first."""

        def end() -> None:
            self._stopping = True

        if self._thread.is_alive():
            self._inbox.put(end)
            await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        with self._inside():
            try:
                self._work()
            except RankLost as error:  # another process ended: nothing is to be learnt from where this one was
                self._give_up(error)
            except BaseException as error:
                self._give_up(error)
                raise
            finally:
                self._waiting = True

    def _give_up(self, error: BaseException) -> None:
        self._core.abandon()
        self._call(self._on_failure, error)

    def _work(self) -> None:
        progressed = False
        while True:
            self._apply_posted(wait=not progressed)
            if self._stopping:
                self._core.finish()
                self._hand_over()
                return
            progressed = self._core.schedule()
            # What posts and scheduling had to say does not wait for the computation: first tokens, remote prefills.
            self._hand_over()
            if progressed:
                self._core.compute(self._hand_over)
                self._hand_over()

    def _apply_posted(self, *, wait: bool) -> None:
        if wait:
            self._waiting = True
            apply = self._inbox.get()
            self._signs, self._waiting = self._signs + 1, False
            apply()
        while not self._stopping:
            try:
                apply = self._inbox.get_nowait()
            except queue.Empty:
                return
            apply()

    def _hand_over(self) -> None:
        self._signs += 1
        events = self._core.take_events()
        if events:
            self._call(self._deliver, events)

    def _call(self, function: Callable[[*Arguments], None] | None, *arguments: *Arguments) -> None:
        if function is not None and self._asyncio is not None and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(function, *arguments)
