"""A sketch against the sorted durations themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.observe.quantiles import Sketch, together

durations = st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200)


@given(durations, st.floats(0, 1))
def test_a_quantile_is_within_a_fortieth_of_the_true_one(values: list[float], share: float) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    true = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert sketch.quantile(share) == pytest.approx(true, rel=0.026)


@given(durations, durations)
def test_two_sketches_together_are_the_sketch_of_both(left: list[float], right: list[float]) -> None:
    parts = []
    for values in (left, right, [*left, *right]):
        parts.append(Sketch())
        for value in values:
            parts[-1].add(value)
    both = together(parts[:2])
    assert len(both) == len(left) + len(right)
    for share in (0.0, 0.5, 0.9, 1.0):
        assert both.quantile(share) == parts[2].quantile(share)


def test_without_durations_there_is_no_quantile_and_absurd_ones_take_no_memory() -> None:
    sketch = Sketch()
    assert sketch.quantile(0.5) is None
    for value in (0.0, -1.0, math.inf, 1e300):
        sketch.add(value)
    assert len(sketch._counts) == 2
