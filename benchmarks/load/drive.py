"""Two ways of putting a plan on a server.

Open loop: each request starts at its planned time whether or not earlier ones have come back, as independent users do. Its
latencies count from the planned time: if the generator or the server's backlog delays the sending, the delay is the user's, and a
stall shows in every request that fell into it (no coordinated omission).

Closed loop: so many users, each sends its next request when its last has ended. Latencies count from the sending. A slow server
is asked less; that is what a closed loop measures, and why its latencies say little about a busy service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from benchmarks.load.client import Outcome
from benchmarks.load.plan import PlannedRequest

Send = Callable[[PlannedRequest, Outcome], Coroutine[Any, Any, None]]


class Timer(Protocol):
    def now(self) -> float: ...

    async def sleep_until(self, moment_s: float) -> None: ...


class SystemTimer:
    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, moment_s: float) -> None:
        # An event loop's timers count milliseconds and may fire early; a request must not.
        while (left_s := moment_s - time.perf_counter()) > 0:  # noqa: ASYNC110 (a moment, not a condition)
            await asyncio.sleep(left_s)


async def open_loop(plan: Sequence[PlannedRequest], send: Send, timer: Timer) -> list[Outcome]:
    start_s = timer.now()
    outcomes = [Outcome(item.index, start_s + item.at_s, item.max_tokens) for item in plan]
    async with asyncio.TaskGroup() as tasks:
        for item, outcome in zip(plan, outcomes, strict=True):
            await timer.sleep_until(outcome.intended_s)
            tasks.create_task(send(item, outcome))
    return outcomes


async def closed_loop(plan: Sequence[PlannedRequest], send: Send, timer: Timer, *, concurrency: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    waiting = iter(plan)

    async def user() -> None:
        for item in waiting:  # shared by all users: each takes the next
            outcome = Outcome(item.index, timer.now(), item.max_tokens)
            outcomes.append(outcome)
            await send(item, outcome)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(user())
    return outcomes
