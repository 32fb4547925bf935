"""A bound on wrong answers among all that is asked, beside that on hits."""

from __future__ import annotations

import random

import numpy as np

from router.semantic.decider import Decider, Verdict
from router.semantic.prior import Prior, shipped
from support.semantic import ask_about

WIDTH = 28
SURE, UNSURE = 0.01, 0.08  # wrong of the candidates of either kind


def new_decider(*, of_requests: float | None, informed: bool = False, of_hits: float = 0.2) -> Decider:
    prior = Prior(shipped(), "hashed-1", informed=informed)
    return Decider(prior, max_wrong_hits=of_hits, max_wrong_requests=of_requests, shadow_share=0.02, dice=random.Random(1))


def ask(decider: Decider, dice: random.Random, count: int, *, sure: float, unsure: float) -> tuple[int, int]:
    """Such shares of the questions have a candidate of either kind, which its row tells. How many were given, how many wrong."""
    given = wrong = 0
    for _ in range(count):
        drawn = dice.random()
        if drawn >= sure + unsure:
            assert decider.decide("a", None, 0.0) == (Verdict.WITHHOLD, None)
            continue
        row = np.zeros(WIDTH)
        row[1], row[-1] = dice.gauss(2.0 if drawn < sure else -2.0, 0.5), 1.0
        right = dice.random() >= (SURE if drawn < sure else UNSURE)
        verdict = ask_about(decider, row, right=right)
        given += verdict is not Verdict.WITHHOLD
        wrong += verdict is not Verdict.WITHHOLD and not right
    return given, wrong


def test_what_is_asked_is_answered_wrongly_no_more_often_than_the_bound() -> None:
    both = {"sure": 0.4, "unsure": 0.6}
    free, bound = new_decider(of_requests=None), new_decider(of_requests=0.02)
    ask(free, random.Random(2), 3_000, **both)
    ask(bound, random.Random(2), 3_000, **both)
    given, wrong = ask(free, random.Random(3), 3_000, **both)
    assert given > 2_900
    assert wrong > 0.04 * 3_000  # nothing is wrong with that if only hits are bounded
    given, wrong = ask(bound, random.Random(3), 3_000, **both)
    assert wrong <= 0.02 * 3_000
    assert 0.4 * 3_000 < given < 0.6 * 3_000  # all that are sure, and as many of the others as there is room for


def test_questions_that_nothing_resembles_count_too() -> None:
    """With a tenth of the questions, candidates of both kinds together are wrong in less than a hundredth of all."""
    few = {"sure": 0.04, "unsure": 0.06}
    decider = new_decider(of_requests=0.02)
    ask(decider, random.Random(4), 20_000, **few)
    given, wrong = ask(decider, random.Random(5), 20_000, **few)
    assert given > 0.09 * 20_000
    assert wrong <= 0.02 * 20_000


def test_when_more_questions_find_an_answer_fewer_of_these_may_be_wrong() -> None:
    """As a cache fills. Of all that was asked so far the later wrong answers would be few."""
    decider = new_decider(of_requests=0.02)
    ask(decider, random.Random(8), 8_000, sure=0.04, unsure=0.06)
    ask(decider, random.Random(9), 2_000, sure=0.4, unsure=0.6)
    given, wrong = ask(decider, random.Random(10), 3_000, sure=0.4, unsure=0.6)
    assert given > 0.2 * 3_000
    assert wrong <= 0.02 * 3_000


def test_the_bound_on_hits_stays() -> None:
    """Few are asked that resemble anything, so the bound on requests would let all of it through."""
    few = {"sure": 0.04, "unsure": 0.06}
    decider = new_decider(of_requests=0.02, of_hits=0.03)
    ask(decider, random.Random(6), 20_000, **few)
    given, _ = ask(decider, random.Random(7), 20_000, **few)
    assert 0.03 * 20_000 < given < 0.05 * 20_000


def test_before_any_label_there_are_no_more_hits_than_may_be_wrong() -> None:
    free, bound = (new_decider(of_requests=bound, informed=True) for bound in (None, 0.01))
    row = np.zeros(WIDTH)
    row[0] = 9.0
    given = {
        decider: sum(decider.decide("a", row, 0.9999)[0] is not Verdict.WITHHOLD for _ in range(1_000))
        for decider in (free, bound)
    }
    assert given[free] == 50
    assert given[bound] == 10
