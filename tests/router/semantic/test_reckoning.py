"""What is foretold of wrong answers, against draws of known chance and sums by hand; and what whole streams then give."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from router.semantic.decider import Decider, Verdict
from router.semantic.prior import Prior, shipped
from router.semantic.reckoning import Candidates, at_worst, represented, thresholds_with_room
from support.semantic import ask_about

WIDTH = 28


@pytest.mark.parametrize("chance", [0.02, 0.08])
@pytest.mark.parametrize("labels", [60, 300])
@pytest.mark.parametrize("count", [40, 600])
def test_no_more_are_wrong_than_foretold(chance: float, labels: int, count: int) -> None:
    """Labels and answers are drawn with the same chance; 95 of 100 times what comes is covered."""
    dice = np.random.default_rng(labels + count)
    told = dice.binomial(labels, chance, 20_000)
    comes = dice.binomial(count, chance, 20_000)
    worst = at_worst(told * count / labels, np.full(20_000, float(count)), np.full(20_000, float(labels)))
    covered = (comes <= worst).mean()
    assert covered > 0.92
    rate_alone = told * count / labels
    assert (comes <= rate_alone).mean() < 0.75  # a rate without its spread would be broken often


def candidates(
    dice: random.Random, count: int, *, given_from: float, wrong_share: float = 0.0, slope: float = 0.0, judged: float = 1.0
) -> Candidates:
    """One for every second question; `judged` is the share of those given that have a label, of the others all have."""
    scores = np.array([dice.random() for _ in range(count)])
    given = scores >= given_from
    right = np.array([float(dice.random() >= wrong_share + slope * (1.0 - score)) for score in scores])
    right[given & np.array([dice.random() >= judged for _ in range(count)])] = np.nan
    return Candidates(scores, right, given, np.arange(1, 2 * count, 2))


@pytest.mark.parametrize("max_wrong", [0.04, 0.06, 0.08])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_those_of_a_sum_by_hand(seed: int, max_wrong: float) -> None:
    dice = random.Random(seed)
    seen = candidates(dice, 400, given_from=0.7, judged=0.3, slope=0.4)
    num_asked, horizon = 800, 300
    labelled = ~np.isnan(seen.right)
    labels = list(zip(seen.scores[labelled], seen.right[labelled], strict=True))
    stands = represented(seen.scores, labelled)
    unjudged = represented(seen.scores, labelled, seen.given & ~labelled)
    assert unjudged.sum() == pytest.approx((seen.given & ~labelled).sum())
    known = sum(right == 0.0 for right, given in zip(seen.right, seen.given, strict=True) if given)
    lately = seen.asked > num_asked - horizon
    room = thresholds_with_room(seen, num_asked, horizon, max_wrong)
    for (threshold, _), fine in zip(labels, room, strict=True):
        will = sum(1 for score in seen.scores[lately] if score >= threshold)
        above = sum(weight for weight, (score, _) in zip(stands, labels, strict=True) if score >= threshold)
        weights = [
            old + (will / above * weight if score >= threshold else 0.0)
            for old, weight, (score, _) in zip(unjudged, stands, labels, strict=True)
        ]
        expected = sum(weight * (1.0 - right) for weight, (_, right) in zip(weights, labels, strict=True))
        count, squares = sum(weights), sum(weight**2 for weight in weights)
        worst = float(at_worst(np.array(expected), np.array(count), np.array(count**2 / squares)))
        assert fine == (known + worst <= max_wrong * (num_asked + horizon))


def lowest(seen: Candidates, max_wrong: float, num_asked: int) -> float:
    room = thresholds_with_room(seen, num_asked, 2_000, max_wrong)
    return float(seen.scores[~np.isnan(seen.right)][room].min(initial=2.0))


def test_what_was_not_used_is_used_later_and_what_was_too_much_is_missing() -> None:
    """The same candidates, of which 6 % are wrong; either none or the half was given, and of all questions 2 % may be wrong."""
    none, half = (candidates(random.Random(3), 3_000, given_from=given_from, wrong_share=0.06) for given_from in (2.0, 0.5))
    assert lowest(none, 0.02, 6_000) < lowest(half, 0.02, 6_000)
    worse = candidates(random.Random(3), 3_000, given_from=0.5, wrong_share=0.12)
    assert lowest(worse, 0.02, 6_000) == 2.0  # 180 of 6,000 already


def realised(seed: int, *, max_wrong: float, length: int) -> tuple[int, int]:
    """Questions whose candidates are wrong with a chance that their row tells. How many were given, how many wrong."""
    dice = random.Random(seed)
    decider = Decider(
        Prior(shipped(), "hashed-1", informed=False),
        max_wrong_hits=0.2,
        max_wrong_requests=max_wrong,
        shadow_share=0.02,
        dice=random.Random(seed),
    )
    given = wrong = 0
    for _ in range(length):
        row = np.zeros(WIDTH)
        row[1], row[-1] = dice.gauss(0.0, 1.5), 1.0
        right = dice.random() < 1.0 / (1.0 + math.exp(-0.5 - 1.5 * row[1]))
        verdict = ask_about(decider, row, right=right)
        given += verdict is not Verdict.WITHHOLD
        wrong += verdict is not Verdict.WITHHOLD and not right
    return given, wrong


@pytest.mark.long
def test_no_more_is_wrong_than_promised_in_95_of_100_streams() -> None:
    streams, length = 40, 2_500
    found = [realised(seed, max_wrong=0.02, length=length) for seed in range(streams)]
    assert sum(given > 0.1 * length for given, _ in found) > 0.8 * streams
    assert sum(wrong <= 0.02 * length for _, wrong in found) >= 0.95 * streams
