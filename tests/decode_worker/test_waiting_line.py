"""Who is admitted when: order by turns, aging, and the bound on how often anybody is overtaken, against a plain account."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from common.clock import ManualClock
from common.engine.sequence import PagedSequence
from common.types import Request, SamplingParams
from decode_worker.generation import Choice, Generation
from decode_worker.swap_space import Swapped
from decode_worker.waiting_line import WaitingLine

AGING_S = 10.0


def choice_of(serial: int, clock: ManualClock, *, priority: int = 0) -> Choice:
    request = Request(str(serial), "m", (1, 2, 3), SamplingParams(max_tokens=4, seed=1), priority=priority)
    prompt = PagedSequence(request.prompt_token_ids, b"root", 4)
    return Generation(request, (), prompt, clock, serial=serial, aging_s=AGING_S).choices[0]


def admitted(line: WaitingLine, fits: Callable[[Choice], bool] = lambda _: True) -> list[str]:
    found: list[str] = []
    line.admit(fits, lambda choice: found.append(choice.generation.request.request_id))
    return found


def test_the_more_urgent_goes_first_until_the_other_has_waited_long_enough() -> None:
    clock, line = ManualClock(), WaitingLine(4)
    line.add(choice_of(1, clock, priority=2))
    clock.advance(2 * AGING_S - 0.5)
    line.add(choice_of(2, clock))
    clock.advance(1.0)
    line.add(choice_of(3, clock))
    line.add(choice_of(4, clock))
    assert admitted(line) == ["2", "1", "3", "4"]


def test_what_was_swapped_out_comes_back_first() -> None:
    clock, line = ManualClock(), WaitingLine(4)
    line.add(choice_of(1, clock))
    clock.advance(1.0)
    swapped = choice_of(2, clock, priority=2)
    swapped.swapped = Swapped((0,), 4)
    line.add(swapped)
    assert admitted(line) == ["2", "1"]


def test_a_large_one_is_passed_so_often_and_then_waited_for() -> None:
    clock, line = ManualClock(), WaitingLine(3)
    line.add(choice_of(1, clock))
    passed: list[str] = []
    for serial in range(2, 9):
        line.add(choice_of(serial, clock))
        passed += admitted(line, lambda choice: choice.generation.serial != 1)
    assert passed == ["2", "3", "4"]
    assert admitted(line) == ["1", "5", "6", "7", "8"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nobody_is_overtaken_more_often_than_allowed(data: st.DataObject) -> None:
    """Random sizes and a random amount of room at each look. Who came later, of the same priority, and went first is counted."""
    limit = data.draw(st.integers(0, 4))
    clock, line = ManualClock(), WaitingLine(limit)
    size: dict[int, int] = {}
    overtaken: dict[int, int] = {}
    priority: dict[int, int] = {}
    for serial in range(data.draw(st.integers(1, 25))):
        clock.advance(data.draw(st.sampled_from([0.0, 1.0, 7.0])))
        priority[serial], size[serial] = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 10))
        line.add(choice_of(serial, clock, priority=priority[serial]))
        overtaken[serial] = 0
        room = data.draw(st.integers(0, 12))

        def fits(choice: Choice) -> bool:
            nonlocal room
            found = size[choice.generation.serial] <= room
            room -= size[choice.generation.serial] if found else 0
            return found

        for name in admitted(line, fits):
            waiting = [choice.generation.serial for choice in line]
            for other in waiting:
                overtaken[other] += other < int(name) and priority[other] == priority[int(name)]
    assert max(overtaken.values()) <= limit
    assert all(choice.num_overtaken <= limit for choice in line)
