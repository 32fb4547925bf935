from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from router.models.likeness import Form
from router.models.predictor import MAX_FILE_BYTES, Neighbours, Predictor, Words
from router.models.text_features import NUM_FACTS, facts, runs, words_of


def number(run: str) -> int:
    return zlib.crc32(run.encode())


def predictor(*, with_neighbours: bool = True) -> Predictor:
    """Model "words" likes one word and a pair, model "digits" likes digits. Two questions are known, one is all digits."""
    known = sorted(
        (number(run), idf, liked) for run, idf, liked in (("theorem", 2.0, 0.3), ("a theorem", 1.0, 0.1), ("a", 1.0, 0.0))
    )
    of_facts = np.zeros((NUM_FACTS, 2), np.float32)
    of_facts[2, 1] = 0.5
    words = Words(
        np.array([one[0] for one in known], np.uint32),
        np.array([one[1] for one in known], np.float32),
        np.array([[one[2], 0.0] for one in known], np.float32),
        of_facts,
        np.array([0.5, 0.25], np.float32),
    )
    vectors = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    pull = np.array([[-0.4, 0.2], [0.1, 0.0]], np.float32)
    only_digits = np.eye(NUM_FACTS, dtype=np.float32)[2]
    form = Form(0.5 * only_digits, 2.0 * only_digits)
    forms = np.stack([-only_digits, only_digits])  # no digits, and nothing but digits
    neighbours = Neighbours("some-1", vectors, form, forms, pull, 10.0, 0.5, np.array([0.6, 0.4], np.float32))
    return Predictor(("words", "digits"), words, neighbours if with_neighbours else None)


def test_words_are_counted_alone_in_pairs_and_in_threes() -> None:
    found = runs(words_of("A b, a B"))
    once = {",": 0.5, "b ,": 1.0, ", a": 1.0, "a b ,": 0.5, "b , a": 0.5, ", a b": 0.5}
    twice = {"a": 0.5, "b": 0.5, "a b": 1.0}
    assert found == {
        **{number(run): weight for run, weight in once.items()},
        **{number(run): pytest.approx(weight * (1 + math.log(2))) for run, weight in twice.items()},
    }
    assert runs([]) == {}


def test_probabilities_are_sums_over_known_words_and_facts() -> None:
    ours = predictor()
    length = math.sqrt(1.0**2 + 1.0**2 + 0.5**2)  # of "theorem", "a theorem" and "a"; "unheard" counts for nothing
    assert ours.probabilities("a theorem unheard")["words"] == pytest.approx(0.5 + (1.0 * 0.3 + 1.0 * 0.1) / length)
    assert ours.probabilities("theorem")["words"] == pytest.approx(0.8)
    assert ours.probabilities("") == pytest.approx({"words": 0.5, "digits": 0.25})
    assert ours.probabilities("12345678")["digits"] == pytest.approx(0.75)


def test_similar_questions_pull_and_words_count_for_less() -> None:
    neighbours = predictor().neighbours
    assert neighbours is not None
    near, far = 1.0, math.exp(-10.0 - 4.0)
    prose, sums = (facts(text, words_of(text)) for text in ("prove it", "12345678"))
    shift = neighbours.shift(np.array([1.0, 0.0], np.float32), prose)
    assert shift == pytest.approx([near * -0.4 + far * 0.1, near * 0.2], rel=1e-4)
    assert np.abs(neighbours.shift(np.array([-1.0, 0.0], np.float32), prose)).max() < 1e-4  # resembles nothing
    other = neighbours.shift(np.array([1.0, 0.0], np.float32), sums)  # about the same as the first, in the form of the second
    assert other == pytest.approx([math.exp(-4.0) * -0.4 + math.exp(-10.0) * 0.1, math.exp(-4.0) * 0.2], rel=1e-4)
    small = np.array([-0.1, 0.1], np.float32)
    half_way = {"words": 0.6 + 0.5 * (0.5 - 0.6) - 0.1, "digits": 0.4 + 0.5 * (0.25 - 0.4) + 0.1}
    assert predictor().probabilities("", small) == pytest.approx(half_way)
    assert predictor().probabilities("", small * 100) == pytest.approx({"words": 0.01, "digits": 0.99})
    assert predictor(with_neighbours=False).probabilities("", small) == pytest.approx({"words": 0.5, "digits": 0.25})


def test_any_text_has_facts() -> None:
    for text in ("", " ", "\n" * 100, "é日😀", "x" * 9000, "A. one\nB) two"):
        found = facts(text, words_of(text))
        assert len(found) == NUM_FACTS
        assert all(0.0 <= value <= 1.5 for value in found)


@pytest.mark.parametrize("with_neighbours", [True, False])
def test_a_file_brings_the_same_predictor_back(tmp_path: Path, with_neighbours: bool) -> None:
    path = tmp_path / "predictor.json"
    ours = predictor(with_neighbours=with_neighbours)
    path.write_text(json.dumps(ours.as_json()))
    loaded = Predictor.load(path, ["words", "digits"])
    for text in ("", "theorem 12", "what is 2 + 2", "a theorem"):
        assert loaded.probabilities(text) == ours.probabilities(text)
    assert (loaded.neighbours is not None) == with_neighbours
    if loaded.neighbours is not None and ours.neighbours is not None:
        vector = np.array([0.6, 0.8], np.float32)
        for text in ("prove it", "prove 12", "12345678"):
            given = facts(text, words_of(text))
            assert loaded.neighbours.shift(vector, given) == pytest.approx(ours.neighbours.shift(vector, given), abs=1e-3)
        assert loaded.neighbours.embedder == "some-1"


def test_numbers_are_written_as_the_file_says(tmp_path: Path) -> None:
    """Read without NumPy: little-endian, so that a file trained on one machine is read on any."""
    written = predictor().as_json()
    raw = base64.b64decode(written["words"]["numbers"])
    assert list(struct.unpack("<3I", raw)) == sorted(number(run) for run in ("theorem", "a theorem", "a"))
    assert struct.unpack("4b", base64.b64decode(written["neighbours"]["vectors"])) == (127, 0, 0, 127)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "pdserve-route-predictor-2"},
        {"models": []},
        {"models": ["one"]},
        {"models": ["same", "same"]},
        {"words": []},
        {"words.idf": "AAAA"},
        {"words.numbers": "not base64!"},
        {"words.numbers": base64.b64encode(struct.pack("<3I", 3, 2, 1)).decode()},
        {"words.of_facts": [[0.0, 0.0]]},
        {"words.bias": [0.0, float("nan")]},
        {"words.bias": [0.0, 1e39]},
        {"words.bias": ["0", "x"]},
        {"neighbours.dimensions": 3},
        {"neighbours.dimensions": 0},
        {"neighbours.dimensions": True},
        {"neighbours.embedder": None},
        {"neighbours.mean": [0.5]},
        {"neighbours.of_words": float("nan")},
        {"neighbours.sharpness": -1.0},
        {"neighbours.scale": float("inf")},
        {"neighbours.pull": ""},
        {"neighbours.forms": ""},
        {"neighbours.forms": base64.b64encode(struct.pack("<2f", 0.0, 1.0)).decode()},
        {"neighbours.forms": base64.b64encode(struct.pack(f"<{2 * NUM_FACTS}f", *[1e30] * 2 * NUM_FACTS)).decode()},
        {"neighbours.centre": [0.5]},
        {"neighbours.factor": [0.5]},
        {"neighbours.factor": [1e30] * NUM_FACTS},
        {"neighbours.factor": [float("nan")] * NUM_FACTS},
    ],
)
def test_what_is_no_predictor_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "predictor.json"
    data: dict[str, Any] = predictor().as_json()
    for name, value in change.items():
        part, _, field = name.partition(".")
        if field:
            data[part][field] = value
        else:
            data[part] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="not a predictor that can be used") as caught:
        Predictor.load(path, [])
    assert caught.value.param == "routing.predictor"


def test_absent_huge_and_ignorant_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps(predictor().as_json()))
    with pytest.raises(ConfigError, match="but not other"):
        Predictor.load(path, ["words", "other"])
    with pytest.raises(ConfigError, match="not a predictor"):
        Predictor.load(tmp_path / "absent", [])
    with path.open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than"):
        Predictor.load(path, [])
