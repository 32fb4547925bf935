"""Weighted logistic regression that is drawn towards given coefficients, for some thousand rows of some thirty columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MAX_STEPS = 12
_CLOSE_ENOUGH = 1e-5


def sigmoid(value: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * value)))


def fit(rows: Floats, labels: Floats, weights: Floats, *, towards: Floats, pull: Floats, start: Floats | None = None) -> Floats:
    """The coefficients that maximise the likelihood less `pull * (coefficient - towards)**2 / 2`, by Newton's method."""
    found = (towards if start is None else start).copy()
    for _ in range(_MAX_STEPS):
        chances = sigmoid(rows @ found)
        slope = rows.T @ (weights * (labels - chances)) - pull * (found - towards)
        curvature = (rows * (weights * chances * (1.0 - chances))[:, None]).T @ rows + np.diag(pull)
        step = np.linalg.solve(curvature, slope)
        size = float(np.abs(step).max())
        found += step if size <= 2.0 else step * (2.0 / size)
        if size < _CLOSE_ENOUGH:
            break
    return found
