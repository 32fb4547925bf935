"""Stages add up to the whole, whoever calls whom: with a clock that goes by one at each look."""

from __future__ import annotations

from itertools import count

import pytest

from common.engine.profile.stopwatch import Stopwatch


class Layers:
    depth = 2

    def forward(self, rows: int) -> int:
        return rows + 1

    def whole(self) -> int:
        return self.forward(1)


@pytest.fixture
def stopwatch() -> Stopwatch:
    ticks = count()
    return Stopwatch(lambda: float(next(ticks)))


def test_a_stage_within_a_stage_counts_once(stopwatch: Stopwatch) -> None:
    inner = stopwatch.timed("inner", lambda: None)

    def body() -> None:
        inner()
        inner()

    stopwatch.timed("outer", body)()
    # Looks at 0 | 1, 2 | 3, 4 | 5: the whole is 5, of which 1 and 1 are the inner stage's.
    assert stopwatch.seconds == {"inner": 2.0, "outer": 3.0}
    assert stopwatch.calls == {"inner": 2, "outer": 1}
    stopwatch.reset()
    assert stopwatch.seconds == stopwatch.calls == {}


def test_what_raises_is_timed_and_leaves_no_trace_in_what_follows(stopwatch: Stopwatch) -> None:
    def fail() -> None:
        raise KeyError

    failing = stopwatch.timed("fails", fail)
    with pytest.raises(KeyError):
        failing()
    stopwatch.timed("next", lambda: None)()
    assert stopwatch.seconds == {"fails": 1.0, "next": 1.0}


def test_a_stand_in_does_what_its_target_does(stopwatch: Stopwatch) -> None:
    target = Layers()
    watched = stopwatch.around(target, forward="layers")
    assert watched.forward(2) == 3
    assert watched.forward(rows=4) == 5
    assert watched.depth == 2
    assert stopwatch.calls == {"layers": 2}
    assert target.whole() == 2  # nobody watches the target itself
    assert stopwatch.calls == {"layers": 2}
