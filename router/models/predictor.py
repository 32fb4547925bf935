"""How likely each model is to answer a text well: a linear model of its words, and known questions that resemble it.

    text -> runs of words -> tf * idf, length 1  \
    text -> length, digits, lines, options, ...   > weights of each model -> (less) -----------> probability
    vector and form of the text -> known questions -> what each has to say, as much as it is similar -^

What each known question has to say a ridge has found; what similar is, `likeness.py` says. Beside such questions the words count
for less than alone (`Neighbours.of_words`); without a vector they speak alone. Trained elsewhere
(`benchmarks/routing.py --train`): a file of JSON with numbers in base64, data only. Which model to take is not decided here; what
counts for that is the difference between models, not how hard a text is.

Needs NumPy, so this is imported by a router that has a predictor only.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from router.models.likeness import Form, likeness
from router.models.text_features import NUM_FACTS, facts, runs, words_of

SCHEMA = "pdserve-route-predictor-3"
MAX_FILE_BYTES = 64 * 1024 * 1024
_LEAST, _MOST = 0.01, 0.99
_MOST_FACT = 1e6  # squares of what is less are finite
Floats = NDArray[np.float32]
Numbers = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Words:
    """Linear in what is there of a text. Columns are models."""

    numbers: Numbers  # of the runs that are known, ascending
    idf: Floats
    of_runs: Floats  # [run][model]
    of_facts: Floats  # [fact][model]
    bias: Floats

    def scores(self, text: str) -> Floats:
        words = words_of(text)
        found = runs(words)
        given = np.fromiter(found, np.uint32, len(found))
        places = np.minimum(np.searchsorted(self.numbers, given), len(self.numbers) - 1)
        known = self.numbers[places] == given
        places = places[known]
        values = np.fromiter(found.values(), np.float32, len(found))[known] * self.idf[places]
        length = math.sqrt(float(values @ values)) or 1.0
        scores = values @ self.of_runs[places] / np.float32(length)
        return np.asarray(scores + np.array(facts(text, words), np.float32) @ self.of_facts + self.bias, np.float32)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Questions whose outcomes are known. Columns are models."""

    embedder: str  # the revision of the embedder that made the vectors
    vectors: Floats  # [question][dimension], each about of length 1
    form: Form
    forms: Floats  # [question][fact], as `form` says
    pull: Floats  # [question][model]: what a question has to say of one just like it
    sharpness: float
    of_words: float  # how much of the words' departure from the mean counts beside this
    mean: Floats  # of the outcomes

    def shift(self, vector: Floats, facts: Sequence[float]) -> Floats:
        own = self.form(np.asarray(facts, np.float32))[None]
        return np.asarray((likeness((self.vectors @ vector)[None], own, self.forms, self.sharpness) @ self.pull)[0], np.float32)

    def with_words(self, scores: Floats, shift: Floats) -> Floats:
        return np.asarray(self.mean + np.float32(self.of_words) * (scores - self.mean) + shift, np.float32)


class Predictor:
    """Immutable; any thread may ask. The words of a page take well under a millisecond, ten thousand neighbours one or two."""

    def __init__(self, models: Sequence[str], words: Words, neighbours: Neighbours | None = None) -> None:
        self.models = tuple(models)
        self.words = words
        self.neighbours = neighbours

    def probabilities(self, text: str, shift: Floats | None = None) -> dict[str, float]:
        """`shift` is what the neighbours of the text make of it, if they were asked."""
        scores = self.words.scores(text)
        if shift is not None and self.neighbours is not None:
            scores = self.neighbours.with_words(scores, shift)
        return dict(zip(self.models, np.clip(scores, _LEAST, _MOST).tolist(), strict=True))

    def as_json(self) -> dict[str, Any]:
        words, known = self.words, self.neighbours
        written: dict[str, Any] = {
            "schema": SCHEMA,
            "models": list(self.models),
            "words": {
                "numbers": _packed(words.numbers, "<u4"),
                "idf": _packed(words.idf, "<f4"),
                "of_runs": _packed(words.of_runs, "<f4"),
                "of_facts": words.of_facts.tolist(),
                "bias": words.bias.tolist(),
            },
        }
        if known is not None:
            scale = float(np.abs(known.vectors).max()) / 127
            written["neighbours"] = {
                "embedder": known.embedder,
                "dimensions": known.vectors.shape[1],
                "scale": scale,
                "vectors": _packed(np.rint(known.vectors / scale), "|i1"),
                "centre": known.form.centre.tolist(),
                "factor": known.form.factor.tolist(),
                "forms": _packed(known.forms, "<f4"),
                "pull": _packed(known.pull, "<f4"),
                "sharpness": known.sharpness,
                "of_words": known.of_words,
                "mean": known.mean.tolist(),
            }
        return written

    @classmethod
    def load(cls, path: Path, wanted: Sequence[str]) -> Predictor:
        """Raises ConfigError if the file is not a predictor, or does not know a wanted model."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
            found = cls._read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
            raise ConfigError(f"{path} is not a predictor that can be used: {error}", param="routing.predictor") from error
        missing = [name for name in wanted if name not in found.models]
        if missing:
            raise ConfigError(f"{path} knows {', '.join(found.models)}, but not {missing[0]}", param="routing.predictor")
        return found

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Predictor:
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
        models = [str(name) for name in data["models"]]
        part = data["words"]
        words = Words(
            np.asarray(_unpacked(part["numbers"], "<u4"), np.uint32),
            _floats(_unpacked(part["idf"], "<f4")),
            _floats(_unpacked(part["of_runs"], "<f4")).reshape(-1, len(models)),
            _floats(np.array(part["of_facts"], np.float64)),
            _floats(np.array(part["bias"], np.float64)),
        )
        if not models or len(set(models)) < len(models):
            raise ValueError("it names no models, or one twice")
        if words.of_facts.shape != (NUM_FACTS, len(models)) or words.bias.shape != (len(models),):
            raise ValueError("its parts do not fit together")
        if not len(words.numbers) or not len(words.numbers) == len(words.idf) == len(words.of_runs):
            raise ValueError("its parts do not fit together")
        if not bool((words.numbers[1:] > words.numbers[:-1]).all()):
            raise ValueError("its runs of words are not in order")
        return cls(models, words, None if data.get("neighbours") is None else _neighbours(data["neighbours"], len(models)))


def _neighbours(part: Mapping[str, Any], num_models: int) -> Neighbours:
    dimensions, embedder = part["dimensions"], part["embedder"]
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1 or not isinstance(embedder, str):
        raise ValueError("its neighbours have no embedder or no dimensions")
    scale, sharpness, of_words = _floats(np.array([part["scale"], part["sharpness"], part["of_words"]], np.float64)).tolist()
    vectors = _unpacked(part["vectors"], "|i1").reshape(-1, dimensions) * np.float32(scale)
    pull = _floats(_unpacked(part["pull"], "<f4")).reshape(-1, num_models)
    mean = _floats(np.array(part["mean"], np.float64))
    if not 0 <= sharpness <= 1000:
        raise ValueError("its neighbours have no sharpness from 0 to 1000")
    form = Form(_floats(np.array(part["centre"], np.float64)), _floats(np.array(part["factor"], np.float64)))
    forms = _floats(_unpacked(part["forms"], "<f4")).reshape(-1, NUM_FACTS)
    if form.centre.shape != (NUM_FACTS,) or form.factor.shape != (NUM_FACTS,):
        raise ValueError("its neighbours have another number of facts")
    if max(float(np.abs(part).max(initial=0.0)) for part in (form.centre, form.factor, forms)) > _MOST_FACT:
        raise ValueError("its neighbours have facts that cannot be")
    if not len(vectors) or not len(vectors) == len(pull) == len(forms) or mean.shape != (num_models,):
        raise ValueError("its neighbours do not fit together")
    return Neighbours(embedder, vectors, form, forms, pull, sharpness, of_words, mean)


def _floats(values: NDArray[Any]) -> Floats:
    with np.errstate(over="ignore"):  # what does not fit is not finite then
        single = np.asarray(values, np.float32)
    if not bool(np.isfinite(single).all()):
        raise ValueError("it holds numbers that are not finite")
    return single


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode("ascii")


def _unpacked(text: str, kind: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), kind)
