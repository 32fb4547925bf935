"""How busy a worker says it is: totals that two readings make a rate of, and no queue where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from common.clock import ManualClock
from common.engine.core import SchedulerTotals
from common.engine.pace import Pace
from common.load import WorkerLoad


@dataclass
class Scheduler:
    num_running: int = 0
    num_waiting: int = 0
    waiting_since_s: float | None = None
    queued_tokens: int = 0
    totals: SchedulerTotals = field(default_factory=SchedulerTotals)
    looks: int = 0

    def load(self) -> WorkerLoad:
        self.looks += 1
        return WorkerLoad(queued_tokens=self.queued_tokens, decoding=self.num_running)


def test_time_per_token_is_what_a_sequence_waits_also_when_guesses_are_right() -> None:
    clock, scheduler = ManualClock(), Scheduler(num_running=4)
    pace = Pace(scheduler, clock)
    for tokens in (4, 12):  # the second step's guesses were right
        scheduler.totals.generated_tokens += tokens
        clock.advance(0.02)
        pace.step_done(0.02)
    told = pace.read()
    assert (told.generated_tokens, told.step_s) == (16, pytest.approx(0.04))
    assert told.sequence_step_s / told.generated_tokens == pytest.approx(4 * 0.04 / 16)


def test_the_queue_is_looked_at_now_and_then_and_its_age_is_of_now() -> None:
    clock, scheduler = ManualClock(100.0), Scheduler(num_running=1, num_waiting=2, waiting_since_s=97.0, queued_tokens=300)
    pace = Pace(scheduler, clock)
    for _ in range(10):
        clock.advance(0.02)
        pace.step_done(0.02)
    assert scheduler.looks == 2
    assert (pace.read().queued_tokens, pace.read().queue_age_s) == (300, pytest.approx(3.2))
    scheduler.num_running = scheduler.num_waiting = 0
    assert (pace.read().queued_tokens, pace.read().queue_age_s, pace.read().decoding) == (0, 0.0, 0)
