"""Coefficients are found again from noisy samples, whatever a few samples say."""

from __future__ import annotations

import random

import pytest

from common.load import pairs
from router.placement.predictors import HandoffModel, StepModel


@pytest.mark.parametrize(("a", "b", "c"), [(0.008, 6e-5, 1e-9), (0.1, 2e-3, 3e-7), (2e-4, 1e-6, 0.0)])
def test_steps_are_learnt_through_noise_and_outliers(a: float, b: float, c: float) -> None:
    dice, model = random.Random(1), StepModel()
    for _ in range(400):
        new = round(10 ** dice.uniform(0, 3))
        total = new + dice.randrange(0, 4000)
        seconds = a + b * new + c * pairs(new, total)
        factor = dice.lognormvariate(0, 0.05) if dice.random() > 0.03 else 20.0  # somebody else took the machine
        model.learn(new, pairs(new, total), seconds * factor)
    for new, total in ((1, 500), (300, 300), (900, 4000)):
        expected = a + b * new + c * pairs(new, total)
        # Old samples fade, so that what is left of the noise shows.
        assert model.seconds(new, pairs(new, total), 1) == pytest.approx(expected, rel=0.2)
    assert model.typical_error < 0.3


def test_a_worker_that_becomes_slower_is_followed() -> None:
    model = StepModel()
    for factor in (1.0, 3.0):
        for turn in range(300):
            tokens = 50 + 37 * turn % 400
            model.learn(tokens, 0.0, factor * (0.005 + 1e-4 * tokens))
    assert model.seconds(200, 0.0, 1) == pytest.approx(0.075, rel=0.1)


def test_what_pairs_cost_is_found_on_a_slow_machine() -> None:
    """A small model on a CPU: attention is a third of a long prompt, and nothing of a short one."""
    model, lengths = StepModel(), (32, 512, 128, 1800, 64, 900, 256)
    for turn in range(40):
        new = lengths[turn % len(lengths)]
        model.learn(new, pairs(new, new), 0.008 + 5e-4 * new + 3e-7 * pairs(new, new))
    for new in (40, 300, 1800):
        expected = 0.008 + 5e-4 * new + 3e-7 * pairs(new, new)
        assert model.seconds(new, pairs(new, new), 1) == pytest.approx(expected, rel=0.1)


def test_a_thousand_steps_of_one_kind_leave_what_others_told() -> None:
    dice, model = random.Random(3), StepModel()
    for turn in range(60):
        new = (32, 512, 128, 1800)[turn % 4]
        model.learn(new, pairs(new, new), 0.008 + 5e-4 * new + 3e-7 * pairs(new, new))
    for _ in range(1000):
        rows = dice.randrange(2, 5)
        model.learn(rows, 300.0 * rows, (0.008 + 5e-4 * rows + 9e-5 * rows) * dice.lognormvariate(0, 0.1))
    for new in (512, 1800):
        expected = 0.008 + 5e-4 * new + 3e-7 * pairs(new, new)
        assert model.seconds(new, pairs(new, new), 1) == pytest.approx(expected, rel=0.15)


def test_what_was_never_seen_stays_near_the_prior() -> None:
    """Only decode steps of one size: what a token of a prompt costs is not known from them, and must not run away."""
    model = StepModel(a=3e-3, b=1e-4, c=1e-9)
    for _ in range(3000):
        model.learn(8, 8000.0, 0.004)
    assert model.seconds(8, 8000.0, 1) == pytest.approx(0.004, rel=0.02)
    assert 1e-5 < model.b < 5e-4


def test_nonsense_is_not_learnt() -> None:
    model, handoff = StepModel(), HandoffModel()
    for _ in range(50):
        model.learn(0, 0.0, 5.0)
        model.learn(10, 0.0, 0.0)
        handoff.learn(10, 0.0)
    assert (model.num_samples, handoff.num_samples) == (0, 0)
