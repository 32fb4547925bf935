"""A fit to a grid of steps finds the law that made it, and placement's predictor begins from it."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.on_gpu.calibration import fit_steps
from router.placement.predictors import StepModel


def grid(a: float, b: float, c: float, noise: float) -> list[dict[str, float]]:
    chance = random.Random(1)
    points = []
    for batch, context, chunk in itertools.product((0, 1, 8, 64, 256), (64, 1024, 8192), (0, 256, 2048)):
        tokens = batch + chunk
        if tokens:
            pairs = float(batch * context + chunk * (context + chunk / 2))
            seconds = (a + b * tokens + c * pairs) * (1 + noise * (chance.random() - 0.5))
            points.append({"tokens": float(tokens), "pairs": pairs, "seconds": seconds})
    return points


def test_the_law_behind_a_grid_is_found_and_judged_by_points_it_was_not_fitted_to() -> None:
    fit = fit_steps(grid(4e-3, 2e-5, 1e-9, noise=0.1))
    assert (fit.a, fit.b, fit.c) == (
        pytest.approx(4e-3, rel=0.03),
        pytest.approx(2e-5, rel=0.1),
        pytest.approx(1e-9, rel=0.1),
    )
    assert 0.005 < fit.median_error < 0.05
    assert fit.median_error < fit.p90_error < 0.07
    model = StepModel(fit.a, fit.b, fit.c)
    assert model.seconds(2048, 2048 * 1024.0, 1) == pytest.approx(4e-3 + 2e-5 * 2048 + 1e-9 * 2048 * 1024, rel=0.05)


def test_what_takes_no_time_is_not_less_than_nothing() -> None:
    fit = fit_steps(grid(4e-3, 2e-5, -2e-10, noise=0.02))
    assert fit.c == 0.0
    assert fit.a == pytest.approx(4e-3, rel=0.05)
