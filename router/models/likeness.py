"""How alike two texts are: about the same, by the cosine of their vectors, and of the same form, by their facts.

Both, because how much a model gains by being large differs between a question of knowledge and a sum, though both be of physics;
and form is what a text shares with texts of a kind that nobody has met. Needs NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_SPREAD = 1e-6  # of a fact
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Form:
    """What the facts of a text are beside those of known texts: centred, and scaled so that texts are about 1 apart."""

    centre: Floats
    factor: Floats  # 0 for a fact that all known texts share: it tells none from another

    @classmethod
    def of(cls, facts: NDArray[np.floating[Any]]) -> Form:
        """`facts` [text][fact]."""
        spread = facts.std(axis=0)
        varies = spread > _LEAST_SPREAD
        factor = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0) / math.sqrt(2 * facts.shape[1])
        return cls(facts.mean(axis=0).astype(np.float32), factor.astype(np.float32))

    def __call__(self, facts: NDArray[np.floating[Any]]) -> Floats:
        return np.asarray((facts - self.centre) * self.factor, np.float32)


def likeness(cosines: Floats, forms: Floats, others: Floats, sharpness: float) -> Floats:
    """`exp(sharpness * (cosine - 1) - squared distance of the forms)`, [text][other text]: 1 for who is just alike.

    `cosines` are of their vectors, [text][other text]; `forms` and `others` are [text][fact].
    """
    squares = forms @ others.T
    squares *= np.float32(-2)
    squares += np.square(forms).sum(axis=1)[:, None]
    squares += np.square(others).sum(axis=1)
    np.maximum(squares, 0, out=squares)  # what rounding made less
    found = cosines - np.float32(1)
    found *= np.float32(sharpness)
    found -= squares
    return np.asarray(np.exp(found, out=found), np.float32)
