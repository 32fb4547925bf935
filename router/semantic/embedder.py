"""Texts as vectors of length one, near each other where texts are alike. The seam, and the embedder that needs no model.

`HashedEmbedder` adds up signed random directions for words, pairs of words and runs of letters, each weighted by how rare the
word is. It takes some tens of microseconds, knows nothing of synonyms, and is the same in every process.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.semantic.reading import Reading, stem
from router.semantic.word_weights import WordWeights

Vector = NDArray[np.float32]

_DIMENSIONS = 384
_WORD, _PAIR, _LETTERS = 1.0, 0.35, 0.55  # how much each kind says
_RUN = 4  # letters
_BITS_PER_FEATURE = 6


class Embedder(Protocol):
    """May block its caller for as long as a text takes; whoever calls it decides where. One thread at a time."""

    @property
    def revision(self) -> str:
        """Vectors of different revisions cannot be compared."""
        ...

    @property
    def dimensions(self) -> int: ...

    @property
    def quick(self) -> bool:
        """Whether `embed` may be called on the event loop."""
        ...

    def embed(self, text: str, reading: Reading) -> Vector: ...


class HashedEmbedder:
    def __init__(self, weights: WordWeights) -> None:
        self._weights = weights
        self._of_word = lru_cache(maxsize=8192)(self._word)

    @property
    def revision(self) -> str:
        return "hashed-1"

    @property
    def dimensions(self) -> int:
        return _DIMENSIONS

    @property
    def quick(self) -> bool:
        return True

    def embed(self, text: str, reading: Reading) -> Vector:
        vector = np.zeros(_DIMENSIONS, np.float32)
        for word in reading.words:
            vector += self._of_word(word)
        for first, second in zip(reading.content, reading.content[1:], strict=False):
            places, signs = _places(f"{first} {second}")
            vector[places] += signs * np.float32(_PAIR * min(self._weights.of(first), self._weights.of(second)))
        length = float(np.sqrt(vector @ vector))
        return vector if length == 0.0 else vector / np.float32(length)

    def _word(self, word: str) -> Vector:
        root = stem(word)
        weight = self._weights.of(root)
        vector = np.zeros(_DIMENSIONS, np.float32)
        places, signs = _places(root)
        vector[places] += signs * np.float32(_WORD * weight)
        bounded = f"<{root}>"
        runs = [bounded[start : start + _RUN] for start in range(max(1, len(bounded) - _RUN + 1))]
        for run in runs:
            places, signs = _places(f"#{run}")
            vector[places] += signs * np.float32(_LETTERS * weight / len(runs) ** 0.5)
        return vector


@lru_cache(maxsize=32768)
def _places(feature: str) -> tuple[NDArray[np.intp], Vector]:
    """Where a feature lies: a few of the dimensions, each with a sign; together of length one."""
    state = zlib.crc32(feature.encode()) | zlib.adler32(feature.encode()) << 32
    places, signs = [], []
    for _ in range(_BITS_PER_FEATURE):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        places.append((state >> 33) % _DIMENSIONS)
        signs.append(1.0 if state >> 32 & 1 else -1.0)
    return np.array(places, np.intp), np.array(signs, np.float32) / np.float32(_BITS_PER_FEATURE**0.5)
