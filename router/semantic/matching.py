"""One scope's questions that have answers, and the one among them whose answer fits a new question best.

    reading, vector ──nearest──> candidates ──vetoes, quarantine──> rows ──Decider──> the best and its chance

Knows neither time nor where answers lie.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router.semantic.agreement import NUM_NEAREST, agreement
from router.semantic.decider import Decider
from router.semantic.embedder import Vector
from router.semantic.features import features
from router.semantic.prior import Prior
from router.semantic.reading import Reading
from router.semantic.scope_index import ScopeIndex
from router.semantic.vetoes import Veto, veto
from router.semantic.word_weights import WordWeights

_CANDIDATES = 5
_LEAST_COSINE = 0.3  # nothing below was ever served, and looking closer costs time


@dataclass(slots=True)
class Known:
    """A question with an answer."""

    key: bytes  # of the answer
    reading: Reading
    answer: str
    num_right: float = 0.0
    num_labels: float = 0.0
    refused: dict[bytes, None] = field(default_factory=dict)  # digests of questions that its answer was wrong for
    wrong_for: dict[bytes, None] = field(default_factory=dict)  # those of them that got it
    family: bytes = b""  # the same for all whose answers were found to say the same; by itself: the key

    def __post_init__(self) -> None:
        self.family = self.family or self.key


@dataclass(frozen=True, slots=True)
class Match:
    known: Known
    cosine: float
    row: NDArray[np.float64]  # what the decider's model sees
    chance: float


@dataclass(frozen=True, slots=True)
class Matches:
    best: Match | None
    vetoed: tuple[Veto, ...]


class Scope:
    def __init__(self, dimensions: int) -> None:
        self._index = ScopeIndex(dimensions)
        self._known: dict[int, Known] = {}
        self._rows: dict[bytes, int] = {}
        self._family_sizes: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, known: Known, vector: Vector) -> None:
        """Takes the place of an earlier question with the same answer key."""
        self.remove(known.key)
        row = self._index.add(vector)
        self._known[row] = known
        self._rows[known.key] = row
        self._family_sizes[known.family] += 1

    def remove(self, key: bytes) -> bool:
        row = self._rows.pop(key, None)
        if row is None:
            return False
        self._index.remove(row)
        family = self._known.pop(row).family
        self._family_sizes[family] -= 1
        if not self._family_sizes[family]:
            del self._family_sizes[family]
        return True

    def get(self, key: bytes) -> Known | None:
        row = self._rows.get(key)
        return None if row is None else self._known[row]

    def family_size(self, family: bytes) -> int:
        return self._family_sizes[family]

    def nearest(self, vector: Vector, count: int) -> list[tuple[Known, float]]:
        return [(self._known[row], cosine) for row, cosine in self._index.nearest(vector, count)]


class Matcher:
    def __init__(self, prior: Prior, weights: WordWeights, decider: Decider) -> None:
        self._prior = prior
        self._weights = weights
        self._decider = decider

    def match(self, scope: Scope, digest: bytes, reading: Reading, vector: Vector) -> Matches:
        """`digest` names the question's text in quarantines."""
        near = scope.nearest(vector, NUM_NEAREST)
        families = [(known.family, cosine) for known, cosine in near]
        kept: list[tuple[Known, float]] = []
        rows: list[list[float]] = []
        agreements: list[list[float]] = []
        vetoed: list[Veto] = []
        for place, (known, cosine) in enumerate(near[:_CANDIDATES]):
            if cosine < _LEAST_COSINE:
                break
            if digest in known.refused:
                continue
            reason = veto(reading, known.reading, self._weights)
            if reason is not None:
                vetoed.append(reason)
                continue
            gap = cosine - near[place + 1][1] if place + 1 < len(near) else cosine
            kept.append((known, cosine))
            agreements.append(agreement(place, families, scope.family_size(known.family), len(scope)))
            rows.append(
                features(
                    reading,
                    known.reading,
                    self._weights,
                    cosine=cosine,
                    gap=gap,
                    num_right=known.num_right,
                    num_labels=known.num_labels,
                )
            )
        if not rows:
            return Matches(None, tuple(vetoed))
        matrix = self._prior.rows(np.array(rows), np.array(agreements))
        chances = self._decider.chances(matrix)
        best = int(np.argmax(chances))
        known, cosine = kept[best]
        return Matches(Match(known, cosine, matrix[best], float(chances[best])), tuple(vetoed))
