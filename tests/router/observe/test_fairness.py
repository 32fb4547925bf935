"""Jain's index of those who wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.observe.fairness import WINDOW, FairnessWindow, jain


@given(st.lists(st.floats(0.001, 1e6), min_size=2, max_size=50))
def test_the_index_lies_between_one_of_them_and_all(shares: list[float]) -> None:
    index = jain(shares)
    assert index is not None
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9
    assert jain([share * 7 for share in shares]) == pytest.approx(index)


def test_known_values() -> None:
    assert jain([5.0, 5.0, 5.0]) == 1.0
    assert jain([9.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert jain([1.0]) is None
    assert jain([0.0, 0.0]) is None


def test_only_those_who_waited_all_the_time_are_compared() -> None:
    window = FairnessWindow()
    window.look([("a", 100.0), ("b", 100.0), ("gone", 0.0)])
    assert window.index is None
    window.look([("a", 160.0), ("b", 120.0), ("new", 0.0)])
    assert window.index == pytest.approx(80**2 / (2 * (60**2 + 20**2)))


def test_the_window_forgets() -> None:
    window = FairnessWindow()
    window.look([("a", 0.0), ("b", 0.0)])
    window.look([("a", 1000.0), ("b", 0.0)])
    for look in range(WINDOW):
        window.look([("a", 1000.0 + look), ("b", float(look))])
    assert window.index == 1.0


def test_a_band_with_more_tenants_than_are_looked_at() -> None:
    window = FairnessWindow()
    for look in range(2):
        window.look((str(tenant), float(look)) for tenant in range(5000))
    assert window.index == 1.0
    assert all(len(counters) <= 1024 for counters in window._looks)
