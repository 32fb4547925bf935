"""How likely each model is to answer a text well: hashed TF-IDF and a few facts of the text, one logistic per model.

    text -> words and pairs of words -> buckets (crc32) -> tf * idf, length 1  \
    text -> length, digits, lines, options, ...                                 > weights of each model -> probability

Trained elsewhere (`benchmarks/routing.py --train`) and read from a file that is JSON with numbers in base64: data only. Which
model to take is not decided here; what counts for that is the difference between models, not how hard a text is.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError

SCHEMA = "pdserve-route-predictor-1"
_WORDS = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]", re.ASCII)
_MAX_WORDS = 1024
_OPTION = re.compile(r"^[A-J][.)]", re.MULTILINE)
_QUESTIONS = ("which", "what", "how", "why", "when", "who", "where", "not", "except", "following", "true", "calculate")
NUM_FACTS = 8 + len(_QUESTIONS)


def features(text: str, buckets: int) -> dict[int, float]:
    """Counts, damped, by bucket."""
    words = _WORDS.findall(text.lower())[:_MAX_WORDS]
    names = [*words, *(f"{left} {right}" for left, right in itertools.pairwise(words))]
    counts = Counter(zlib.crc32(name.encode()) % buckets for name in names)
    return {bucket: 1.0 + math.log(count) for bucket, count in counts.items()}


def facts(text: str) -> tuple[float, ...]:
    """Each about 0 to 1."""
    length = max(1, len(text))
    words = _WORDS.findall(text.lower())[:_MAX_WORDS]
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


@dataclass(frozen=True, slots=True)
class Logistic:
    bias: float
    of_facts: Sequence[float]
    of_buckets: Sequence[float]


class Predictor:
    """Immutable. `probabilities` takes well under a millisecond for a text of a page."""

    def __init__(self, idf: Sequence[float], models: Mapping[str, Logistic]) -> None:
        self._idf = idf
        self._models = dict(models)

    @property
    def parts(self) -> Mapping[str, Logistic]:
        """By model."""
        return self._models

    def probabilities(self, text: str) -> dict[str, float]:
        weighted = {bucket: count * self._idf[bucket] for bucket, count in features(text, len(self._idf)).items()}
        norm = math.sqrt(sum(value * value for value in weighted.values())) or 1.0
        known = facts(text)
        found = {}
        for name, model in self._models.items():
            score = sum(value * model.of_buckets[bucket] for bucket, value in weighted.items()) / norm
            score += model.bias + sum(value * weight for value, weight in zip(known, model.of_facts, strict=True))
            found[name] = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score))))
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "idf": _packed(self._idf),
            "models": {
                name: {"bias": model.bias, "facts": list(model.of_facts), "buckets": _packed(model.of_buckets)}
                for name, model in self._models.items()
            },
        }

    @classmethod
    def load(cls, path: Path, wanted: Sequence[str]) -> Predictor:
        """Raises ConfigError if the file is not a predictor, or does not know a wanted model."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}")
            idf = _unpacked(data["idf"])
            models = {
                str(name): Logistic(
                    _finite(part["bias"]), [_finite(value) for value in part["facts"]], _unpacked(part["buckets"])
                )
                for name, part in data["models"].items()
            }
            if not idf or any(len(model.of_buckets) != len(idf) or len(model.of_facts) != NUM_FACTS for model in models.values()):
                raise ValueError("its parts do not fit together")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise ConfigError(f"{path} is not a predictor that can be used: {error}", param="routing.predictor") from error
        missing = [name for name in wanted if name not in models]
        if missing:
            raise ConfigError(f"{path} knows {', '.join(models)}, but not {missing[0]}", param="routing.predictor")
        return cls(idf, models)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _packed(values: Sequence[float]) -> str:
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _unpacked(text: str) -> array[float]:
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    if not all(map(math.isfinite, numbers)):
        raise ValueError("it holds numbers that are not finite")
    return numbers
