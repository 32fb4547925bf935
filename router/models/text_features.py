"""What model routing sees of a text: its words, pairs and triples of words, and a few facts. Pure functions of the text.

Pairs count twice as much as words and triples: a word alone says what a text is about, which misleads about texts of a kind that
nobody has met, and triples are rare.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter

_WORDS = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]", re.ASCII)
_MAX_WORDS = 1024
_WEIGHTS = (0.5, 1.0, 0.5)  # of runs of one, two and three words
_OPTION = re.compile(r"^[A-J][.)]", re.MULTILINE)
_QUESTIONS = ("which", "what", "how", "why", "when", "who", "where", "not", "except", "following", "true", "calculate")
NUM_FACTS = 8 + len(_QUESTIONS)


def words_of(text: str) -> list[str]:
    return _WORDS.findall(text.lower())[:_MAX_WORDS]


def runs(words: list[str]) -> dict[int, float]:
    """How often each run of one to three words is there, damped and weighted. Its number is the same in every process."""
    found: dict[int, float] = {}
    for length, weight in enumerate(_WEIGHTS, 1):
        counted = Counter(
            zlib.crc32(" ".join(words[start : start + length]).encode()) for start in range(len(words) - length + 1)
        )
        for number, count in counted.items():
            found[number] = found.get(number, 0.0) + weight * (1.0 + math.log(count))
    return found


def facts(text: str, words: list[str]) -> tuple[float, ...]:
    """Each about 0 to 1."""
    length = max(1, len(text))
    known = set(words)
    return (
        min(1.0, math.log1p(length) / 9.0),
        min(1.0, math.log1p(len(words)) / 7.0),
        sum(char.isdigit() for char in text) / length,
        sum(not (char.isalnum() or char.isspace()) for char in text) / length,
        sum(char.isupper() for char in text) / length,
        min(1.0, text.count("\n") / 20.0),
        min(1.0, len(_OPTION.findall(text)) / 10.0),
        min(1.0, sum(map(len, words)) / max(1, len(words)) / 10.0),
        *(float(word in known) for word in _QUESTIONS),
    )
