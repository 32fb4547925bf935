"""Candidates that vouch for each other: known questions whose answers were found to say the same, as numbers.

A fresh answer that says the same as its best candidate's joins that one's family. A candidate that is hardly nearer than the
next one says little, unless the next one has the same answer: what counts is how much nearer it is than another family. And what
was asked in many ways will be asked in more. As a cache fills, the same nearness comes to say more, for what fits is more often
there: a model that was not told would hold what it saw at first against all that comes.

Labels alone tell of families, so a prior knows nothing of them, and the pooled model learns what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

NAMES: Final = (
    "others of the family among the nearest",
    "gap to the nearest of another family",
    "log of how many the family has",
    "log of how many are known",
)
NUM_NEAREST: Final = 16  # known questions that are looked at

_MOST_OTHERS = 4
_WIDE_GAP = 0.1
_FEW_KNOWN = 100
_USUAL_LOG = 8.0  # of some three thousand known questions


def agreement(place: int, nearest: Sequence[tuple[bytes, float]], family_size: int, num_known: int) -> list[float]:
    """Of the candidate at `place` among the nearest, given as their families and cosines. All numbers are of the order of 1."""
    family, cosine = nearest[place]
    others = sum(other == family for other, _ in nearest) - 1
    foreign = max((nearness for other, nearness in nearest if other != family), default=0.0)
    return [
        min(others, _MOST_OTHERS) / 2.0,
        (cosine - foreign) / _WIDE_GAP,
        math.log(max(1, family_size)),
        math.log(max(_FEW_KNOWN, num_known)) - _USUAL_LOG,
    ]
