"""How much a word says: the rarer it is in questions, the more (its inverse document frequency, 0 to 1).

The table of common words comes with the prior (`router.semantic.prior`). A word that is not in it counts as rare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from router.semantic.words import FUNCTION_WORDS

_FUNCTION_WORD_WEIGHT = 0.12


class WordWeights:
    """`counts` is in how many of `num_questions` questions a stem occurs."""

    def __init__(self, counts: Mapping[str, int], num_questions: int) -> None:
        top = math.log(1.0 + num_questions)
        self._weights = {word: math.log((1.0 + num_questions) / (1.0 + count)) / top for word, count in counts.items()}
        self._weights.update(dict.fromkeys(FUNCTION_WORDS, _FUNCTION_WORD_WEIGHT))

    def of(self, stem: str) -> float:
        return self._weights.get(stem, 1.0)
