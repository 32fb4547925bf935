"""Virtual time, and an asyncio event loop for each simulated process.

    VirtualTime    one heap of events; time jumps from one to the next; whatever is random comes from the seed
      └─ ProcessLoop   one per process: what is ready runs in the order in which it became ready, as asyncio promises;
                       timers are late by a seeded jitter; the process's clock has an offset and a rate of its own

Processes take turns: a turn of a loop runs what was ready at its start, like one iteration of asyncio's own loop, and the time
until the next turn is drawn. So the order between processes is the seed's, the order within one is asyncio's. A paused process
takes no turns and loses nothing. A dead one is gone at once: nothing of it runs again while the simulation lasts.

Nothing here sleeps, opens a selector or starts a thread. It knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import itertools
import struct
import zlib
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from random import Random
from typing import Any
from weakref import WeakSet

SHORT_TURN_S, LONG_TURN_S = 40e-6, 5e-3
THREAD_WORK_S = 2e-3  # at most, for what another thread does
MAX_AFTERLIFE_ROUNDS = 50
_CLOCK_RESOLUTION_S = 1e-9
_mark = struct.Struct("<dII").pack


class Deadlock(AssertionError):
    """Nothing will ever happen again, and somebody still waits."""


class OutOfTime(AssertionError):
    """What was waited for did not happen within the time that it may take."""


class VirtualTime:
    """`trace` gets a line for everything worth telling; None, the usual case, costs nothing."""

    def __init__(self, random: Random, *, long_turns: float = 0.0, trace: Callable[[str], None] | None = None) -> None:
        self.now_s = 0.0
        self.random = random
        self.trace = trace
        self.long_turns = long_turns  # how often a process is kept from running for a while
        self.history = 0  # a sum over who ran when: equal for equal histories
        self.num_turns = 0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._serial = itertools.count()

    def at(self, when_s: float, action: Callable[..., object], *arguments: Any) -> None:
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._serial), action, arguments))

    def after(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        self.at(self.now_s + delay_s, action, *arguments)

    def run(self, done: Callable[[], bool], *, until_s: float, what: str) -> None:
        """Lets time pass until `done`, which is asked after every event. Raises Deadlock or OutOfTime."""
        queue = self._events
        while not done():
            if not queue:
                raise Deadlock(f"{what}: nothing is left that could bring it about")
            when_s, _, action, arguments = heapq.heappop(queue)
            if when_s > until_s:
                raise OutOfTime(f"{what}: not by {until_s:.3f} s")
            self.now_s = when_s
            action(*arguments)

    def mark(self, number: int, what: int) -> None:
        self.history = zlib.crc32(_mark(self.now_s, number, what), self.history)

    def tell(self, who: str, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now_s * 1e3:12.3f} ms  {who:<12} {text}")


class Life(enum.Enum):
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"  # killed
    AFTERLIFE = "afterlife"  # only to let its coroutines end; nothing of it has any effect
    BURIED = "buried"


class _Handle:
    """Of a callback, ready or to come: what asyncio expects of a Handle and a TimerHandle."""

    __slots__ = ("_arguments", "_callback", "_cancelled", "_context", "_when_s")

    def __init__(
        self, when_s: float, callback: Callable[..., object], arguments: tuple[Any, ...], context: Context | None
    ) -> None:
        self._when_s = when_s
        self._callback = callback
        self._arguments = arguments
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when_s

    def run(self) -> None:
        if self._context is None:
            self._callback(*self._arguments)
        else:
            self._context.run(self._callback, *self._arguments)


class ProcessLoop(asyncio.AbstractEventLoop):
    def __init__(self, time: VirtualTime, name: str, number: int, *, offset_s: float = 0.0, rate: float = 1.0) -> None:
        """The process's clock shows `offset_s + rate * virtual time`. `host` is whatever the process's code may look for."""
        self.name = name
        self.host: Any = None
        self.life = Life.RUNNING
        self.complaints: list[str] = []  # what asyncio would have logged: nobody looked at an exception
        self._virtual = time
        self._number = number
        self._offset_s, self._rate = offset_s, rate
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._serial = itertools.count()
        self._tasks: WeakSet[asyncio.Task[Any]] = (
            WeakSet()
        )  # asyncio's own has those of every simulation that is not collected yet
        self._turn_s = float("inf")  # when the next turn is due, in virtual time
        self._in_turn = False

    # -- asyncio's side -----------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._offset_s + self._virtual.now_s * self._rate

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> _Handle:  # type: ignore[override]
        handle = _Handle(0.0, callback, args, context)
        if self.life is not Life.BURIED:
            self._ready.append(handle)
            if not self._in_turn and self.alive:
                self._wake()
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> _Handle:  # type: ignore[override]
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> _Handle:  # type: ignore[override]
        handle = _Handle(when, callback, args, context)
        if self.life in (Life.RUNNING, Life.PAUSED):
            heapq.heappush(self._timers, (when, next(self._serial), handle))
            if not self._in_turn:
                self._wake_for_timers()
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.add(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A thread does it, some time later and all at once; also if nobody waits for it any more, unless the process ends."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 (as executors do, whatever it is)
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self._virtual.random.random() * THREAD_WORK_S, work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    # -- the simulation's side ----------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.life is Life.RUNNING

    @property
    def alive(self) -> bool:
        return self.life is Life.RUNNING or self.life is Life.PAUSED

    @property
    def num_timers(self) -> int:
        return sum(not handle.cancelled() for _, _, handle in self._timers)

    def pending_tasks(self) -> list[asyncio.Task[Any]]:
        return sorted((task for task in self._tasks if not task.done()), key=lambda task: task.get_name())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls it as if from a callback of this loop."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            return function(*arguments)
        finally:
            events._set_running_loop(before)

    def pause(self) -> None:
        if self.life is Life.RUNNING:
            self.life = Life.PAUSED

    def resume(self) -> None:
        if self.life is Life.PAUSED:
            self.life = Life.RUNNING
            self._turn_s = float("inf")
            self._wake()

    def kill(self) -> None:
        """As by SIGKILL: no callback, no `finally`, nothing."""
        self.life = Life.DEAD

    def bury(self) -> None:
        """At the end of a simulation: lets every coroutine come to its end, so that none is left to the garbage collector."""
        self.life = Life.AFTERLIFE
        self._timers.clear()
        for _ in range(MAX_AFTERLIFE_ROUNDS):
            waiting = self.pending_tasks()
            if not waiting and not self._ready:
                break
            for task in waiting:
                task.cancel()
            self._run_ready()
        else:
            self.complaints.append(f"{self.name}: does not end when cancelled: {[task.get_name() for task in waiting]}")
            return
        self.life = Life.BURIED

    def _run_ready(self) -> None:
        self._in_turn = True
        events._set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle._cancelled:
                    handle.run()
        finally:
            events._set_running_loop(None)
            self._in_turn = False

    def _turn(self, due_s: float) -> None:
        if due_s != self._turn_s or self.life is not Life.RUNNING:
            return  # called off, or brought forward
        self._turn_s = float("inf")
        timers, ready = self._timers, self._ready
        end_s = self.time() + _CLOCK_RESOLUTION_S
        while timers and timers[0][0] <= end_s:
            handle = heapq.heappop(timers)[2]
            if not handle._cancelled:
                ready.append(handle)
        self._virtual.num_turns += 1
        self._virtual.mark(self._number, len(ready))
        self._run_ready()
        if ready:
            self._wake()
        elif timers:
            self._wake_for_timers()

    def _wake(self) -> None:
        self._schedule(self._virtual.now_s)

    def _wake_for_timers(self) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if timers:
            self._schedule(max(self._virtual.now_s, (timers[0][0] - self._offset_s) / self._rate))

    def _schedule(self, earliest_s: float) -> None:
        if self._turn_s <= earliest_s:
            return
        random, virtual = self._virtual.random, self._virtual
        delay_s = random.random() * (LONG_TURN_S if virtual.long_turns and random.random() < virtual.long_turns else SHORT_TURN_S)
        turn_s = earliest_s + delay_s
        if turn_s < self._turn_s:
            self._turn_s = turn_s
            virtual.at(turn_s, self._turn, turn_s)


def running_process() -> ProcessLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ProcessLoop)
    return loop
