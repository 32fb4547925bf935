from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest

from common.errors import ConfigError
from router.models.predictor import NUM_FACTS, Logistic, Predictor, facts, features

BUCKETS = 64


def predictor() -> Predictor:
    """Model "words" likes one word, model "digits" likes digits."""
    liked = [0.0] * BUCKETS
    (bucket,) = features("theorem", BUCKETS)
    liked[bucket] = 3.0
    of_digits = [0.0] * NUM_FACTS
    of_digits[2] = 5.0
    nothing = [0.0] * BUCKETS
    return Predictor(
        [1.0] * BUCKETS, {"words": Logistic(-1.0, [0.0] * NUM_FACTS, liked), "digits": Logistic(0.0, of_digits, nothing)}
    )


def test_probabilities_are_logistics_of_words_and_facts() -> None:
    ours = predictor()
    assert ours.probabilities("theorem")["words"] == pytest.approx(1 / (1 + 2.718281828**-2.0))
    assert ours.probabilities("")["words"] == pytest.approx(1 / (1 + 2.718281828**1.0))
    assert ours.probabilities("12345678")["digits"] > ours.probabilities("abcdefgh")["digits"] == 0.5


def test_any_text_has_facts() -> None:
    for text in ("", " ", "\n" * 100, "é日😀", "x" * 9000, "A. one\nB) two"):
        assert len(facts(text)) == NUM_FACTS
        assert all(0.0 <= value <= 1.5 for value in facts(text))


def test_a_file_brings_the_same_predictor_back(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps(predictor().as_json()))
    loaded = Predictor.load(path, ["words", "digits"])
    for text in ("", "theorem 12", "what is 2 + 2"):
        assert loaded.probabilities(text) == pytest.approx(predictor().probabilities(text))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"idf": "AAAA"},
        {"idf": "not base64!"},
        {"models": {"words": {"bias": "1", "facts": [], "buckets": ""}}},
        {"models": []},
    ],
)
def test_what_is_no_predictor_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps({**predictor().as_json(), **change}))
    with pytest.raises(ConfigError, match="not a predictor that can be used"):
        Predictor.load(path, [])


def test_numbers_that_are_none_and_unknown_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    broken = predictor()
    path.write_text(json.dumps(Predictor(array("f", [float("nan")] * BUCKETS), broken.parts).as_json()))
    with pytest.raises(ConfigError, match="not finite"):
        Predictor.load(path, [])
    path.write_text(json.dumps(broken.as_json()))
    with pytest.raises(ConfigError, match="but not other"):
        Predictor.load(path, ["words", "other"])
    with pytest.raises(ConfigError, match="predictor"):
        Predictor.load(tmp_path / "absent", [])
