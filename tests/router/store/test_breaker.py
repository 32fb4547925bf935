from __future__ import annotations

import random

import pytest

from common.clock import ManualClock
from common.errors import IllegalTransition
from router.store.breaker import Breaker, BreakerState

SLOW_S = 0.005
BUDGET_S = 2 * SLOW_S


class NoJitter(random.Random):
    def random(self) -> float:
        return 1.0


def opened(clock: ManualClock, breaker: Breaker) -> None:
    for _ in range(3):
        breaker.failed()
        clock.advance(BUDGET_S)
    clock.advance(-BUDGET_S)
    assert breaker.state is BreakerState.OPEN


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def breaker(clock: ManualClock) -> Breaker:
    return Breaker(clock=clock, budget_s=BUDGET_S, jitter=NoJitter())


def test_three_failures_within_two_seconds_open_it(clock: ManualClock, breaker: Breaker) -> None:
    for _ in range(2):
        breaker.failed()
        clock.advance(1.0)
    assert breaker.passes
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.passes


def test_many_failures_of_one_moment_are_one(clock: ManualClock, breaker: Breaker) -> None:
    for _ in range(2):
        clock.advance(BUDGET_S)
        for _ in range(100):
            breaker.failed()
    assert breaker.passes
    clock.advance(BUDGET_S)
    breaker.failed()
    assert breaker.state is BreakerState.OPEN


def test_failures_that_lie_further_apart_do_not(clock: ManualClock, breaker: Breaker) -> None:
    for _ in range(20):
        breaker.failed()
        clock.advance(1.01)
    assert breaker.passes


def answers(clock: ManualClock, breaker: Breaker, *seconds: float) -> None:
    for one in seconds:
        clock.advance(0.0501)
        breaker.answered(one)


def test_eight_slow_answers_of_sixteen_open_it(clock: ManualClock, breaker: Breaker) -> None:
    answers(clock, breaker, *[2 * SLOW_S, SLOW_S / 2] * 7)
    assert breaker.passes
    answers(clock, breaker, 2 * SLOW_S)
    assert breaker.state is BreakerState.OPEN


def test_seven_slow_answers_of_sixteen_do_not(clock: ManualClock, breaker: Breaker) -> None:
    for number in range(160):
        answers(clock, breaker, 2 * SLOW_S if number % 16 < 7 else SLOW_S)
    assert breaker.passes


def test_many_slow_answers_of_one_moment_are_one(clock: ManualClock, breaker: Breaker) -> None:
    for _ in range(7):
        clock.advance(0.0501)
        for _ in range(100):
            breaker.answered(2 * SLOW_S)
    assert breaker.passes
    answers(clock, breaker, 2 * SLOW_S)
    assert breaker.state is BreakerState.OPEN


def test_a_probe_in_good_time_closes_it(clock: ManualClock, breaker: Breaker) -> None:
    assert breaker.probe_in_s() is None
    opened(clock, breaker)
    assert breaker.probe_in_s() == 0.25
    clock.advance(0.25)
    assert breaker.probe_in_s() == 0
    breaker.probing()
    assert not breaker.passes
    breaker.probed(SLOW_S)
    assert breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("seconds", [None, 2 * SLOW_S])
def test_pauses_between_probes_grow_up_to_a_limit(clock: ManualClock, breaker: Breaker, seconds: float | None) -> None:
    opened(clock, breaker)
    pauses = []
    for _ in range(8):
        pause_s = breaker.probe_in_s()
        assert pause_s is not None
        pauses.append(pause_s)
        clock.advance(pause_s)
        breaker.probing()
        breaker.probed(seconds)
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 8, 8]


def test_after_a_good_while_pauses_are_short_again(clock: ManualClock, breaker: Breaker) -> None:
    opened(clock, breaker)
    breaker.probing()
    breaker.probed(0.0)
    opened(clock, breaker)
    assert breaker.probe_in_s() == 0.5  # it flaps
    breaker.probing()
    breaker.probed(0.0)
    clock.advance(8.1)
    opened(clock, breaker)
    assert breaker.probe_in_s() == 0.25


def test_pauses_are_spread(clock: ManualClock) -> None:
    pauses = set()
    for seed in range(50):
        breaker = Breaker(clock=clock, budget_s=BUDGET_S, jitter=random.Random(seed))
        opened(clock, breaker)
        pauses.add(breaker.probe_in_s())
    assert len(pauses) == 50
    assert all(pause is not None and 0.125 <= pause <= 0.25 for pause in pauses)


def test_what_comes_late_changes_nothing(clock: ManualClock, breaker: Breaker) -> None:
    opened(clock, breaker)
    before = breaker.probe_in_s()
    breaker.failed()
    breaker.answered(0.0)
    breaker.lost()
    assert (breaker.state, breaker.probe_in_s()) == (BreakerState.OPEN, before)


@pytest.mark.parametrize("state", [BreakerState.CLOSED, BreakerState.HALF_OPEN])
def test_a_lost_connection_opens_it(clock: ManualClock, breaker: Breaker, state: BreakerState) -> None:
    if state is BreakerState.HALF_OPEN:
        opened(clock, breaker)
        breaker.probing()
    breaker.lost()
    assert breaker.state is BreakerState.OPEN


def test_moves_that_are_not_in_the_table_are_refused(breaker: Breaker) -> None:
    with pytest.raises(IllegalTransition):
        breaker.probing()
