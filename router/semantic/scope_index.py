"""The vectors of one scope, and which of them are nearest to another. Exact while they are few.

Beyond `_EXACT` vectors a search looks at a projection to few dimensions first and at whole vectors for the best of those only: a
look-up is bound by the memory that it reads. Rows of removed entries are filled again by later ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.semantic.embedder import Vector

_EXACT = 6_000
_SHORT_DIMENSIONS = 64
_SHORTLISTED = 256
_FIRST_ROWS = 8


class ScopeIndex:
    """Rows are small integers, given out by `add`."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._vectors: NDArray[np.float32] = np.zeros((_FIRST_ROWS, dimensions), np.float32)
        self._short: NDArray[np.float32] | None = None
        self._used = 0  # rows that were ever given out
        self._free: list[int] = []

    def __len__(self) -> int:
        return self._used - len(self._free)

    def add(self, vector: Vector) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = self._used
            self._used += 1
            if row == len(self._vectors):
                self._grow()
        self._vectors[row] = vector
        if self._short is not None:
            self._short[row] = vector @ _projection(self._dimensions)
        elif self._used > _EXACT:
            self._short = self._vectors @ _projection(self._dimensions)
        return row

    def remove(self, row: int) -> None:
        self._vectors[row] = 0.0
        if self._short is not None:
            self._short[row] = 0.0
        self._free.append(row)

    def nearest(self, vector: Vector, count: int) -> list[tuple[int, float]]:
        """(row, cosine), the nearest first; those at right angles and beyond are left out."""
        rows: NDArray[np.intp] | None = None
        if self._short is None:
            cosines = self._vectors[: self._used] @ vector
        else:
            rough = self._short[: self._used] @ (vector @ _projection(self._dimensions))
            rows = np.argpartition(rough, len(rough) - _SHORTLISTED)[-_SHORTLISTED:]
            cosines = self._vectors[rows] @ vector
        if len(cosines) > count:
            best = np.argpartition(cosines, len(cosines) - count)[-count:]
            best = best[np.argsort(-cosines[best], kind="stable")]
        else:
            best = np.argsort(-cosines, kind="stable")
        return [(int(place if rows is None else rows[place]), float(cosines[place])) for place in best if cosines[place] > 0.0]

    def _grow(self) -> None:
        grown = np.zeros((2 * len(self._vectors), self._dimensions), np.float32)
        grown[: len(self._vectors)] = self._vectors
        self._vectors = grown
        if self._short is not None:
            short = np.zeros((len(grown), _SHORT_DIMENSIONS), np.float32)
            short[: len(self._short)] = self._short
            self._short = short


_projections: dict[int, NDArray[np.float32]] = {}


def _projection(dimensions: int) -> NDArray[np.float32]:
    """Orthogonal columns, the same in every process."""
    found = _projections.get(dimensions)
    if found is None:
        noise = np.random.default_rng(dimensions).standard_normal((dimensions, _SHORT_DIMENSIONS))
        found = _projections[dimensions] = np.linalg.qr(noise)[0].astype(np.float32)
    return found
