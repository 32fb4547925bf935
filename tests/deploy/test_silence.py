"""The rule by which a worker that does not answer is given up, by a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.config import HealthConfig
from deploy.activity import Activity
from deploy.manager_spec import HealthPolicy
from deploy.silence import Silence

POLICY = HealthPolicy(interval_s=0.3, timeout_s=0.7, most_misses=3, busy_timeout_s=10.0)
LONGEST_S = 60.0


def found_after_s(activity: Callable[[float], Activity], *, check_s: float = POLICY.timeout_s) -> tuple[float, str]:
    """When a worker that answers at 0 and never again is given up, and why; by checks that take so long."""
    silence = Silence(POLICY, 0.0)
    silence.asked(0.0)
    silence.answered(0.0)
    now_s = 0.0
    while now_s < LONGEST_S:
        now_s += silence.wait_s(now_s)
        silence.asked(now_s)
        looked = silence.suspicious
        now_s += check_s
        if reason := silence.missed(activity(now_s) if looked else None, now_s):
            return now_s, reason
    raise AssertionError("it was never given up")


@pytest.mark.parametrize("activity", [Activity.STOPPED, Activity.ASLEEP, Activity.UNHEARD, Activity.GONE])
def test_a_hang_is_found_within_the_worst_case_of_its_intervals(activity: Activity) -> None:
    took_s, reason = found_after_s(lambda _: activity)
    assert took_s == pytest.approx(POLICY.interval_s + POLICY.most_misses * POLICY.timeout_s)
    assert reason == f"hung: missed 3 health checks, its process is {activity}"


def test_the_worst_case_that_is_shipped_is_two_and_a_half_seconds() -> None:
    shipped = HealthConfig()
    assert HealthPolicy(**shipped.model_dump()) == HealthPolicy()
    assert shipped.interval_s + shipped.most_misses * shipped.timeout_s <= 2.5


@pytest.mark.parametrize("activity", [Activity.WORKING, Activity.UNSURE])
def test_one_that_works_is_waited_for_but_not_for_ever(activity: Activity) -> None:
    took_s, reason = found_after_s(lambda _: activity)
    assert POLICY.busy_timeout_s <= took_s <= POLICY.busy_timeout_s + POLICY.timeout_s
    assert f"its process is {activity}" in reason
    took_s, _ = found_after_s(lambda now_s: Activity.WORKING if now_s < 4.0 else Activity.STOPPED)
    assert 4.0 <= took_s <= 4.0 + POLICY.timeout_s


def test_an_answer_ends_the_suspicion() -> None:
    silence = Silence(POLICY, 0.0)
    for round_s in (0.0, 10.0, 20.0):
        silence.answered(round_s)
        assert not silence.suspicious
        for miss in (1, 2):
            silence.asked(round_s + miss)
            assert silence.missed(Activity.ASLEEP, round_s + miss + 0.7) == ""
            assert silence.suspicious


def test_checks_that_the_manager_itself_was_late_for_do_not_count() -> None:
    """Its own loop was kept waiting, so an answer may have been there; however late it is, a silence has an end."""
    took_s, reason = found_after_s(lambda _: Activity.ASLEEP, check_s=2.5)
    assert POLICY.busy_timeout_s <= took_s <= POLICY.busy_timeout_s + 2.5
    assert reason.startswith("hung: silent for")


def test_checks_that_fail_at_once_keep_their_distance() -> None:
    took_s, _ = found_after_s(lambda _: Activity.ASLEEP, check_s=0.001)
    assert took_s >= 2 * POLICY.interval_s
