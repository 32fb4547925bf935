"""Whether steps leave a core free: what is found out by trying, on a clock of the test's own."""

from __future__ import annotations

import pytest

from common.engine.spare_core import FIRST_PAUSE_CALLS, LONGEST_PAUSE_CALLS, TRIED_CALLS, SpareCore


class Machine:
    """Computations that take so long with a core left free, and so long with none."""

    def __init__(self, *, leaving: int, taking: int) -> None:
        self.ns = 0
        self.leaving, self.taking = leaving, taking
        self.spare = SpareCore(now_ns=lambda: self.ns)

    def call(self, rows: int = 16) -> bool:
        with self.spare.computing(rows) as leaves_one:
            self.ns += self.leaving if leaves_one else self.taking
        return leaves_one

    def calls(self, count: int, rows: int = 16) -> list[bool]:
        return [self.call(rows) for _ in range(count)]


def test_all_cores_are_taken_until_leaving_one_was_tried() -> None:
    machine = Machine(leaving=10, taking=20)
    assert not any(machine.calls(FIRST_PAUSE_CALLS))
    assert all(machine.calls(TRIED_CALLS))


def test_what_is_faster_is_done_from_then_on_and_given_up_when_the_load_changes() -> None:
    machine = Machine(leaving=10, taking=20)
    machine.calls(FIRST_PAUSE_CALLS + TRIED_CALLS)
    assert all(machine.calls(FIRST_PAUSE_CALLS))
    assert not any(machine.calls(TRIED_CALLS)), "the former way is tried in its turn"
    machine.leaving = 40
    calls = machine.calls(8 * FIRST_PAUSE_CALLS)
    assert not any(calls[-FIRST_PAUSE_CALLS:])


@pytest.mark.parametrize("leaving", [10, 19, 40])
def test_what_is_not_faster_by_a_margin_is_seldom_tried(leaving: int) -> None:
    machine = Machine(leaving=leaving, taking=10)
    calls = machine.calls(100_000)
    tries = calls.count(True) / TRIED_CALLS
    assert 5 <= tries <= 5 + 100_000 / LONGEST_PAUSE_CALLS + 1, "each pause is twice the one before, up to a limit"


def test_a_few_slow_calls_count() -> None:
    """Somebody else needs the core now and then: the mean says so, a median would not."""
    machine = Machine(leaving=20, taking=10)
    machine.calls(FIRST_PAUSE_CALLS - TRIED_CALLS)
    for number in range(TRIED_CALLS):
        machine.taking = 100 if number % 4 == 0 else 10
        machine.call()
    assert all(machine.calls(TRIED_CALLS + FIRST_PAUSE_CALLS))


def test_few_rows_and_many_are_judged_apart() -> None:
    machine = Machine(leaving=10, taking=20)
    machine.calls(FIRST_PAUSE_CALLS + TRIED_CALLS, rows=16)
    assert machine.calls(3, rows=31) == [True] * 3
    assert machine.calls(3, rows=32) == machine.calls(3, rows=1) == [False] * 3


def test_a_computation_that_fails_counts_for_nothing() -> None:
    machine = Machine(leaving=10, taking=20)
    machine.calls(FIRST_PAUSE_CALLS)
    for _ in range(TRIED_CALLS):
        with pytest.raises(ValueError, match="no result"), machine.spare.computing(16):
            raise ValueError("no result")
    assert all(machine.calls(TRIED_CALLS)), "it is still being tried"
