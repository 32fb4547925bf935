"""What a sample of labels says about the share of wrong answers, at worst; and how low a threshold may be under a bound on it.

Labels are weighted: one that stands for several answers that were given unlabelled has their number as its weight. A weighted
sample says as much as `effective_size` equal ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MORE_WRONG = 0.17
CONFIDENCE_Z = 1.6448536269514722  # one-sided 95 %
BEGINNING_Z = 2.3263478740408408  # one-sided 99 %: who gives nothing looks again and again, until luck shows it something


@dataclass(frozen=True, slots=True)
class Standing:
    """Of all answers with scores at or above a threshold: how many were wrong, by the labels, and at worst."""

    threshold: float
    wrong_ratio: float
    upper_bound: float
    effective_size: float
    share: float  # of the weight of all labels that is at or above the threshold


def upper_bound(wrong_ratio: Floats | float, size: Floats | float, z: float = CONFIDENCE_Z) -> Floats:
    """Wilson's one-sided upper bound, from a ratio that counts a little more than was seen.

    With that it follows the exact bound (Clopper and Pearson) within a few percent, also near zero where Wilson's own is too low.
    """
    size = np.maximum(np.asarray(size, float), 1e-9)
    ratio = np.minimum(1.0, np.asarray(wrong_ratio, float) + MORE_WRONG / size)
    centre = ratio + z * z / (2 * size)
    spread = z * np.sqrt(ratio * (1 - ratio) / size + (z / (2 * size)) ** 2)
    return np.asarray(np.minimum(1.0, (centre + spread) / (1 + z * z / size)))


def lower_bound(wrong_ratio: float, size: float, z: float = CONFIDENCE_Z) -> float:
    """Wilson's one-sided lower bound."""
    if size <= 0:
        return 0.0
    centre = wrong_ratio + z * z / (2 * size)
    spread = z * math.sqrt(wrong_ratio * (1 - wrong_ratio) / size + (z / (2 * size)) ** 2)
    return max(0.0, (centre - spread) / (1 + z * z / size))


def lowest_threshold(
    scores: Floats,
    wrong: Floats,
    weights: Floats,
    max_wrong: float,
    z: float = CONFIDENCE_Z,
    *,
    among: NDArray[np.bool_] | None = None,
) -> Standing | None:
    """The lowest threshold whose upper bound is at most `max_wrong`; None if there is none. `wrong` is 1 or 0 per label.

    A threshold is the score of a label; of those `among` them, if given.
    """
    if len(scores) == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered, weight = scores[order], weights[order]
    total, squares = np.cumsum(weight), np.cumsum(weight * weight)
    size = total * total / squares
    ratio = np.cumsum(weight * wrong[order]) / total
    worst = upper_bound(ratio, size, z)
    last_of_score = np.append(ordered[1:] < ordered[:-1], True)
    fine = (worst <= max_wrong) & last_of_score
    kept = np.flatnonzero(fine if among is None else fine & among[order])
    if not len(kept):
        return None
    place = int(kept[-1])
    return Standing(
        float(ordered[place]), float(ratio[place]), float(worst[place]), float(size[place]), float(total[place] / total[-1])
    )
