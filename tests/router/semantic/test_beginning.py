"""Before anything is shown little is given, and what was shown by luck is found out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from router.semantic.bound import BEGINNING_Z, lowest_threshold
from router.semantic.decider import Decider, Verdict
from router.semantic.prior import Prior, shipped
from support.semantic import ask_about

WIDTH = 28


def new_decider(max_wrong: float, seed: int = 1) -> Decider:
    prior = Prior(shipped(), "hashed-1", informed=False)
    return Decider(prior, max_wrong_hits=max_wrong, shadow_share=0.02, dice=random.Random(seed))


def ask(decider: Decider, dice: random.Random, count: int, wrong_share: float) -> tuple[int, int, int]:
    """Candidates of which nothing tells whether they are right. How many were given, were wrong, were verified."""
    given = wrong = verified = 0
    for _ in range(count):
        row = np.zeros(WIDTH)
        row[0], row[1], row[-1] = dice.gauss(3.0, 1.0), dice.gauss(0.0, 1.0), 1.0
        right = dice.random() >= wrong_share
        verdict = ask_about(decider, row, right=right)
        given += verdict is not Verdict.WITHHOLD
        wrong += verdict is not Verdict.WITHHOLD and not right
        verified += verdict is Verdict.SERVE_AND_VERIFY
    return given, wrong, verified


@pytest.mark.parametrize("embedder", ["hashed-1", "minilm-1"])
def test_the_prior_alone_gives_nothing_under_a_narrow_bound(embedder: str) -> None:
    for max_wrong in (0.01, 0.02, 0.05):
        decider = Decider(Prior(shipped(), embedder), max_wrong_hits=max_wrong, shadow_share=0.0, dice=random.Random(0))
        row = np.zeros(WIDTH)
        row[0] = 9.0
        assert {decider.decide("a", row, 0.9999)[0] for _ in range(100)} == {Verdict.WITHHOLD}


def test_luck_shows_little() -> None:
    """Six of a hundred are wrong whatever their score, and five may be: now and then some labels show five."""
    dice = random.Random(11)
    given = sum(ask(new_decider(0.05, seed), dice, 3_000, 0.06)[0] for seed in range(12))
    assert given < 0.004 * 12 * 3_000


def test_what_is_well_below_the_bound_is_given_and_verified_at_first() -> None:
    dice, decider = random.Random(12), new_decider(0.15)
    given, wrong, verified = ask(decider, dice, 1_000, 0.02)
    assert given > 500
    assert wrong < 0.05 * given
    assert 8 / 0.15 <= verified < 0.5 * given
    later = ask(decider, dice, 1_000, 0.02)
    assert later[0] > 900
    assert later[2] < 0.06 * later[0]


def test_to_begin_takes_more_than_to_go_on() -> None:
    scores, wrong, weights = np.linspace(0.5, 1.0, 70), np.zeros(70), np.ones(70)
    going_on = lowest_threshold(scores, wrong, weights, 0.05)
    assert going_on is not None
    assert going_on.threshold == 0.5
    assert lowest_threshold(scores, wrong, weights, 0.05, z=BEGINNING_Z) is None
