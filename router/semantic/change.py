"""Whether answers have changed: labels, one by one, against how likely each was thought to be right.

`doubt` is Page's cumulative sum of the evidence that answers are right `_KEPT` times as often as was thought, against that they
are as thought; it never falls below none. What that says of false alarms needs no more than chances that hold: then doubt is
above `x` for at most `exp(-x)` of the labels, and reaches `x` from nothing after `exp(x)` labels on average at the earliest.

The chances are those of a model that all classes share, so each class has its own `Calibration` of them: a class that is wrong
more often than others has not changed for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.semantic.logistic import fit, sigmoid

Floats = NDArray[np.float64]

_KEPT = 0.75
_SURE = 0.98  # a label or two must not be proof: judges err, and so do models that are very sure
_PULL = 5.0
_DOUBTED = 3.0  # at most 5 % of labels are above it if nothing has changed
# Not before 1,200,000 labels on average if nothing has changed; in doubt nothing is given, so it may take its time.
_CHANGED = 14.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of a model's log odds, for one class."""

    slope: float
    offset: float

    def chance(self, thought: float) -> float:
        thought = min(max(thought, 1e-6), 1.0 - 1e-6)
        odds = self.slope * math.log(thought / (1.0 - thought)) + self.offset
        return min(_SURE, float(sigmoid(np.asarray(odds))))


def calibrated(thought: Floats, right: Floats) -> Calibration:
    """By labels of which the model that thought so has seen none."""
    kept = np.clip(thought, 1e-6, 1.0 - 1e-6)
    rows = np.column_stack([np.log(kept / (1.0 - kept)), np.ones(len(kept))])
    slope, offset = fit(rows, right, np.ones(len(right)), towards=np.array([1.0, 0.0]), pull=np.array([_PULL, _PULL]))
    return Calibration(float(slope), float(offset))


@dataclass(slots=True)
class Surprise:
    doubt: float = 0.0

    def take(self, chance: float, *, right: bool) -> None:
        told = math.log(_KEPT) if right else math.log((1.0 - _KEPT * chance) / (1.0 - chance))
        self.doubt = max(0.0, self.doubt + told)

    @property
    def degree(self) -> float:
        """From none, 0, to where one doubts, 1."""
        return min(1.0, self.doubt / _DOUBTED)

    @property
    def doubted(self) -> bool:
        return self.doubt >= _DOUBTED

    @property
    def changed(self) -> bool:
        return self.doubt >= _CHANGED
