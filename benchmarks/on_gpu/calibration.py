"""From a grid of step times to what a planner needs: seconds = a + b * tokens + c * pairs, as placement predicts steps.

Fitted so that it is good in per cent, with coefficients that are not negative. How good it is is said of steps that it was not
fitted to: each point is predicted by a fit to every second other one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_FEATURES = 3
Point = Mapping[str, float]
"""`tokens`, `pairs` and `seconds` of a step, as `benchmarks.on_gpu.engine.step_grid` writes them."""


@dataclass(frozen=True)
class StepFit:
    """`router.placement.predictors.StepModel` begins from such three numbers."""

    a: float
    b: float
    c: float
    median_error: float  # relative, of points that were not fitted to
    p90_error: float


def fit_steps(grid: Sequence[Point]) -> StepFit:
    """Of at least a dozen steps."""
    points = np.array([(1.0, point["tokens"], point["pairs"], point["seconds"]) for point in grid])
    features, seconds = points[:, :_FEATURES], points[:, _FEATURES]
    errors = np.empty(len(points))
    for half in (0, 1):
        others = np.arange(len(points)) % 2 != half
        predicted = features[~others] @ _coefficients(features[others], seconds[others])
        errors[~others] = np.abs(predicted / seconds[~others] - 1.0)
    a, b, c = _coefficients(features, seconds).tolist()
    return StepFit(a, b, c, float(np.median(errors)), float(np.quantile(errors, 0.9)))


def _coefficients(features: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The best of the fits to some of the features in which none is negative."""
    relative = features / seconds[:, None]
    best, least = np.zeros(_FEATURES), np.inf
    for count in range(1, _FEATURES + 1):
        for used in itertools.combinations(range(_FEATURES), count):
            scales = np.linalg.norm(relative[:, used], axis=0)
            found = np.linalg.lstsq(relative[:, used] / scales, np.ones(len(seconds)), rcond=None)[0] / scales
            candidate = np.zeros(_FEATURES)
            candidate[list(used)] = found
            error = float(np.square(relative @ candidate - 1.0).sum())
            if (found >= 0).all() and error < least:
                best, least = candidate, error
    return best
