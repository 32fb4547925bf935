"""How busy a worker is and how fast, for whoever decides how many workers there should be.

    engine thread, after each step: totals of time and tokens; a look at the queue, ten times a second at most
    asyncio side: `read`, at any time

It is there from the worker's start to its end and costs microseconds per step, so it needs nobody who watches. Totals only grow;
whoever reads twice has a rate. It knows no request.
"""

from __future__ import annotations

from typing import Protocol

from common.clock import Clock
from common.engine.core import SchedulerTotals
from common.load import WorkerLoad, WorkerPace

_LOOK_S = 0.1


class PacedScheduler(Protocol):
    """`load` on the engine's thread only."""

    totals: SchedulerTotals
    waiting_since_s: float | None
    """Since when the oldest request waits that nothing was computed of; as of the last step."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def load(self) -> WorkerLoad: ...


class Pace:
    def __init__(self, scheduler: PacedScheduler, clock: Clock) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._load = WorkerLoad()
        self._looked_s = -_LOOK_S
        self._generated_tokens = 0
        self._step_s = self._sequence_step_s = 0.0

    def step_done(self, seconds: float) -> None:
        """On the engine's thread, after each step."""
        scheduler, now_s = self._scheduler, self._clock.monotonic_s()
        generated_tokens = scheduler.totals.generated_tokens
        # A sequence whose guesses were right gets several tokens in a step.
        got_tokens = min(scheduler.num_running, generated_tokens - self._generated_tokens)
        self._generated_tokens = generated_tokens
        self._step_s += seconds
        self._sequence_step_s += seconds * got_tokens
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._load = scheduler.load()

    def read(self) -> WorkerPace:
        """From any thread."""
        scheduler, totals = self._scheduler, self._scheduler.totals
        busy = bool(scheduler.num_running or scheduler.num_waiting)
        load = self._load if busy else WorkerLoad()
        since_s = scheduler.waiting_since_s if busy else None
        return WorkerPace(
            queue_age_s=0.0 if since_s is None else max(0.0, self._clock.monotonic_s() - since_s),
            queued_tokens=load.queued_tokens,
            decoding=load.decoding,
            computed_tokens=totals.computed_tokens,
            generated_tokens=totals.generated_tokens,
            step_s=self._step_s,
            sequence_step_s=self._sequence_step_s,
        )
