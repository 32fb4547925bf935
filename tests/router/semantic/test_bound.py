"""Bounds and thresholds against naive computations."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.semantic.bound import lower_bound, lowest_threshold, upper_bound
from router.semantic.reckoning import represented


def exact_upper(wrong: int, size: int) -> float:
    """Clopper and Pearson, by bisection of the binomial's tail."""

    def tail(chance: float) -> float:
        return sum(math.comb(size, count) * chance**count * (1 - chance) ** (size - count) for count in range(wrong + 1))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 0.05 else (low, middle)
    return high


@pytest.mark.parametrize("size", [20, 60, 150, 400])
@pytest.mark.parametrize("wrong", [0, 1, 3, 8])
def test_the_upper_bound_is_near_the_exact_one(wrong: int, size: int) -> None:
    exact = exact_upper(wrong, size)
    assert 0.96 * exact <= float(upper_bound(wrong / size, size)) <= 1.06 * exact


def test_the_lower_bound_is_below_and_grows_with_evidence() -> None:
    assert lower_bound(0.0, 0) == 0.0
    bounds = [lower_bound(0.1, size) for size in (10, 100, 1000)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.1


def test_a_true_share_is_covered() -> None:
    dice = random.Random(5)
    missed = 0
    for _ in range(400):
        wrong = sum(dice.random() < 0.05 for _ in range(200))
        missed += float(upper_bound(wrong / 200, 200)) < 0.05
    assert missed <= 400 * 0.07


labels = st.lists(
    st.tuples(st.integers(0, 30), st.booleans(), st.sampled_from([1.0, 2.0, 5.0]), st.booleans()), min_size=1, max_size=150
)


@given(labels, st.sampled_from([0.02, 0.05, 0.1, 0.3]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_threshold_is_the_lowest_that_a_search_through_all_would_find(
    found: list[tuple[int, bool, float, bool]], bound: float, chosen: bool
) -> None:
    allowed = {score / 30: all(fine for other, _, _, fine in found if other == score) for score, _, _, _ in found}
    best: float | None = None
    for threshold in allowed:
        kept = [(wrong, weight) for score, wrong, weight, _ in found if score / 30 >= threshold]
        total = sum(weight for _, weight in kept)
        size = total**2 / sum(weight**2 for _, weight in kept)
        ratio = sum(weight for wrong, weight in kept if wrong) / total
        if float(upper_bound(ratio, size)) <= bound and (allowed[threshold] or not chosen):
            best = threshold if best is None else min(best, threshold)
    scores, wrong, weights = (np.array(column, float) for column in list(zip(*found, strict=True))[:3])
    among = np.array([allowed[score / 30] for score, _, _, _ in found]) if chosen else None
    standing = lowest_threshold(scores / 30, wrong, weights, bound, among=among)
    assert (None if standing is None else standing.threshold) == best


def test_no_labels_show_nothing() -> None:
    assert lowest_threshold(np.array([]), np.array([]), np.array([]), 0.05) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_labels_together_stand_for_all(questions: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in questions])
    labelled = np.array([told for _, told in questions])
    weights = represented(scores, labelled)
    assert len(weights) == labelled.sum()
    if labelled.any():
        assert weights.sum() == pytest.approx(len(questions))


def test_where_a_tenth_is_labelled_a_label_stands_for_ten() -> None:
    scores = np.concatenate([np.linspace(0.9, 1.0, 1000), np.linspace(0.0, 0.1, 500)])
    labelled = np.concatenate([np.arange(1000) % 10 == 0, np.ones(500, bool)])
    weights = represented(scores, labelled)
    assert np.median(weights[:100]) == pytest.approx(10, rel=0.1)
    assert np.median(weights[100:]) == 1.0
