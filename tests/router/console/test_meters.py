"""Rates of totals that are seen now and then."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.console.meters import Meter, Meters


def test_a_total_that_grows_steadily_has_its_rate() -> None:
    meter = Meter()
    for half_second in range(40):
        meter.take(50 * half_second, half_second / 2)
        if half_second > 8:
            assert meter.per_second(half_second / 2) == pytest.approx(100)


def test_it_falls_to_nothing_when_the_total_stands_still() -> None:
    meter = Meter()
    meter.take(0, 0.0)
    meter.take(300, 1.0)
    assert meter.per_second(1.0) == 300
    assert meter.per_second(2.0) == 150
    assert meter.per_second(3.9) == 100
    assert meter.per_second(4.1) == 0


def test_the_first_sight_of_a_large_total_is_no_rate() -> None:
    meter = Meter()
    meter.take(1e9, 5.0)
    assert meter.per_second(5.0) == 0
    meter.take(1e9 + 10, 6.0)
    assert meter.per_second(6.0) == 10


def test_a_total_that_falls_is_another_counter() -> None:
    meter = Meter()
    meter.take(1000, 0.0)
    meter.take(2000, 1.0)
    meter.take(3, 2.0)
    assert meter.per_second(2.0) == 0
    meter.take(13, 3.0)
    assert meter.per_second(3.0) == 10


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0.01, 2), st.integers(0, 100)), min_size=1, max_size=60))
def test_it_is_what_a_look_through_all_samples_says(steps: list[tuple[float, int]]) -> None:
    meter, now_s, total = Meter(), 0.0, 0
    seen: list[tuple[float, int]] = []
    for wait_s, growth in steps:
        now_s += wait_s
        total += growth
        meter.take(total, now_s)
        seen.append((now_s, total))
    before = [value for when_s, value in seen if when_s <= now_s - 3.0]
    since_s = now_s - 3.0 if before else seen[0][0]
    expected = (total - (before[-1] if before else seen[0][1])) / max(0.5, now_s - since_s)
    assert meter.per_second(now_s) == pytest.approx(expected)


def test_what_is_not_taken_in_a_round_is_forgotten() -> None:
    meters = Meters()
    for second in range(3):
        meters.take("a", 10 * second, float(second))
        meters.end_round()
    assert meters.per_second("a", 2.0) == 10
    meters.end_round()
    assert meters.per_second("a", 2.0) == 0
    assert meters.per_second("never", 2.0) == 0
