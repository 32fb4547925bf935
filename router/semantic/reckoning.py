"""How many questions will have been answered wrongly at worst, once the next ones are answered from a threshold on.

A bound on wrong answers among all that is asked has room for more where little was given, as while a cache fills: what was not
used of it is used later, what was used in excess is missing. So what was given is counted; what of it nobody has judged, and what
will be given soon, is foretold, with the spread of what is estimated and of what is still to be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.semantic.bound import CONFIDENCE_Z, MORE_WRONG

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_LABELS_PER_STRATUM = 25


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of one class, in a window: every question's best candidate."""

    scores: Floats
    right: Floats  # 1, 0, or not a number where nobody knows
    given: Flags
    asked: NDArray[np.int64]  # its number among all questions of the class


def thresholds_with_room(seen: Candidates, num_asked: int, horizon: int, max_wrong: float) -> Flags:
    """By label: whether at most `max_wrong` of all questions is answered wrongly, at worst, when the next `horizon` of them are
    answered from its score on. They are taken to find candidates as good as the last ones did.
    """
    labelled = ~np.isnan(seen.right)
    soon = min(num_asked, horizon)
    lately = np.sort(seen.scores[seen.asked > num_asked - soon])
    known_wrong = float((1.0 - seen.right[labelled & seen.given]).sum())
    num_questions = num_asked - int(seen.asked.min()) + 1
    order = np.argsort(-seen.scores[labelled], kind="stable")
    thresholds, wrong = seen.scores[labelled][order], 1.0 - seen.right[labelled][order]
    stands = represented(seen.scores, labelled)[order]
    unjudged = represented(seen.scores, labelled, seen.given & ~labelled)[order]
    will = (len(lately) - np.searchsorted(lately, thresholds)).astype(float)
    scale = will / np.cumsum(stands)  # a label at or above the threshold stands for so many times as many that will be given
    expected = (unjudged * wrong).sum() + scale * np.cumsum(stands * wrong)
    unknown = unjudged.sum() + will
    squares = (unjudged**2).sum() + 2 * scale * np.cumsum(unjudged * stands) + scale**2 * np.cumsum(stands**2)
    worst = known_wrong + at_worst(expected, unknown, unknown**2 / np.maximum(squares, 1e-9))
    room = np.empty(len(order), bool)
    room[order] = worst <= max_wrong * (num_questions + soon)
    return room


def at_worst(expected: Floats, count: Floats, size: Floats, z: float = CONFIDENCE_Z) -> Floats:
    """So many of `count` answers are wrong at most, where a sample worth `size` labels expects `expected`.

    A binomial number whose chance is estimated, by the first terms of its quantile: the third is for the skew of small numbers.
    """
    size = np.maximum(size, 1e-9)
    chance = np.minimum(1.0, expected / np.maximum(count, 1e-9) + MORE_WRONG / size)
    mean = chance * count
    variance = mean * (1.0 - chance) * (1.0 + count / size)
    skewed = np.maximum(0.0, 2.0 * variance / np.maximum(mean, 1e-9) - 1.0)
    return np.asarray(np.minimum(count, mean + z * np.sqrt(variance) + skewed * (z * z - 1.0) / 6.0))


def represented(scores: Floats, labelled: Flags, of: Flags | None = None) -> Floats:
    """For each label, in order: for how many questions of like score it stands. Together they stand for all, or all `of` them.

    What was served has few labels, what was not served has one each; a stratum of scores holds some of either.
    """
    order = np.argsort(-scores, kind="stable")
    counts = np.cumsum(labelled[order])
    stratum = np.empty(len(scores), int)
    stratum[order] = np.maximum(0, counts - 1) // _LABELS_PER_STRATUM
    if counts[-1] >= _LABELS_PER_STRATUM:  # the rest joins the last whole one
        stratum = np.minimum(stratum, counts[-1] // _LABELS_PER_STRATUM - 1)
    num_strata = int(stratum.max()) + 1
    all_of = np.bincount(stratum if of is None else stratum[of], minlength=num_strata)
    labels_of = np.bincount(stratum[labelled], minlength=num_strata)
    return np.asarray((all_of / np.maximum(1, labels_of))[stratum[labelled]])
