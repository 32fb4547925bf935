from __future__ import annotations

import math

import numpy as np
import pytest

from router.models.likeness import Form, likeness


def test_alike_is_who_is_about_the_same_and_of_the_same_form() -> None:
    dice = np.random.default_rng(0)
    cosines = dice.uniform(-1, 1, (4, 3)).astype(np.float32)
    forms, others = (dice.normal(0, 0.5, (count, 5)).astype(np.float32) for count in (4, 3))
    found = likeness(cosines, forms, others, 5.0)
    for row, form in enumerate(forms):
        for column, other in enumerate(others):
            exponent = 5.0 * (float(cosines[row, column]) - 1) - math.dist(form.tolist(), other.tolist()) ** 2
            assert found[row, column] == pytest.approx(math.exp(exponent), rel=1e-4)
    assert np.diagonal(likeness(np.ones((4, 4), np.float32), forms, forms, 5.0)) == pytest.approx(1.0, abs=1e-5)


def test_what_no_text_shares_with_another_is_no_likeness() -> None:
    one, far = np.zeros((1, 2), np.float32), np.array([[1e6, 0.0]], np.float32)
    assert likeness(np.ones((1, 1), np.float32), one, far, 5.0).tolist() == [[0.0]]


def test_known_texts_lie_about_one_apart() -> None:
    dice = np.random.default_rng(1)
    facts = dice.normal(3.0, (0.01, 1.0, 50.0), (4000, 3))
    forms = Form.of(facts)(facts)
    assert forms.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-3)
    squares = np.square(forms[:2000] - forms[2000:]).sum(axis=1)
    assert squares.mean() == pytest.approx(1.0, rel=0.05)


def test_a_fact_that_all_known_texts_share_is_not_asked_for() -> None:
    facts = np.array([[0.3, 0.1], [0.3, 0.9]])
    form = Form.of(facts)
    assert form.factor[0] == 0.0
    assert form(np.array([[5.0, 0.5]])) == pytest.approx(np.zeros((1, 2)), abs=1e-6)
