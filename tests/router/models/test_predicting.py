"""Who speaks of a text: the words, or words and similar questions; and what happens when the embedder is late, busy or broken."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.config import RoutingConfig
from common.errors import ConfigError, ModelLoadError
from router.models.likeness import Form
from router.models.predicting import Predicting, make_predicting
from router.models.predictor import Neighbours, Predictor, Words
from router.models.text_features import NUM_FACTS
from router.semantic.embedder import Vector
from router.semantic.reading import Reading

LONG_S = 60.0


def predictor(embedder: str = "slow") -> Predictor:
    """Words say 0.4 and 0.6 of any text; the one known question turned it round."""
    words = Words(
        np.array([zlib.crc32(b"x")], np.uint32),
        np.ones(1, np.float32),
        np.zeros((1, 2), np.float32),
        np.zeros((NUM_FACTS, 2), np.float32),
        np.array([0.4, 0.6], np.float32),
    )
    mean = np.array([0.4, 0.6], np.float32)
    return Predictor(("small", "large"), words, one_neighbour(embedder, np.array([1.0, 0.0], np.float32), 10.0, mean))


def one_neighbour(embedder: str, vector: Vector, sharpness: float, mean: Vector) -> Neighbours:
    """A question of any form."""
    form = Form(np.zeros(NUM_FACTS, np.float32), np.zeros(NUM_FACTS, np.float32))
    forms, pull = np.zeros((1, NUM_FACTS), np.float32), np.array([[0.2, -0.2]], np.float32)
    return Neighbours(embedder, vector[None], form, forms, pull, sharpness, 1.0, mean)


class Held:
    """An embedder that embeds when it is told to."""

    revision, dimensions, quick = "slow", 2, False

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.fails = False
        self.texts: list[str] = []
        self.threads: set[int] = set()

    def embed(self, text: str, reading: Reading) -> Vector:
        self.begun.set()
        assert self.go.wait(LONG_S)
        self.texts.append(text)
        self.threads.add(threading.get_ident())
        if self.fails:
            raise RuntimeError("broken model")
        return np.array([1.0, 0.0], np.float32)


async def test_similar_questions_are_asked_off_the_loop() -> None:
    held = Held()
    held.go.set()
    predicting = Predicting(predictor(), held, budget_s=LONG_S)
    said = await predicting.of("hello")
    assert said.by == "words and similar questions"
    assert said.probabilities == pytest.approx({"small": 0.6, "large": 0.4}, abs=1e-5)
    assert threading.get_ident() not in held.threads
    assert predicting.by_words("hello").probabilities == pytest.approx({"small": 0.4, "large": 0.6})
    assert held.texts == ["hello"]
    await predicting.close()


async def test_over_the_budget_and_with_a_broken_embedder_the_words_speak() -> None:
    held = Held()
    predicting = Predicting(predictor(), held, budget_s=0.001)
    late = await predicting.of("hello")
    assert late.by == "words, for the embedder took more than 0.001 s"
    assert late.probabilities == pytest.approx({"small": 0.4, "large": 0.6})
    held.fails = True
    held.go.set()
    await predicting.close()
    predicting = Predicting(predictor(), held, budget_s=LONG_S)
    broken = await predicting.of("hello")
    assert (broken.by, broken.probabilities) == ("words, for the embedder failed", late.probabilities)
    await predicting.close()


async def test_few_wait_for_the_embedder() -> None:
    held = Held()
    predicting = Predicting(predictor(), held, budget_s=LONG_S)
    asked = [asyncio.create_task(predicting.of(str(number))) for number in range(40)]
    done, waiting = await asyncio.wait(asked, timeout=LONG_S, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result().by for task in done} == {"words, for many wait for the embedder"}
    held.go.set()
    said = [(await task).by for task in asked]
    assert 0 < len(waiting) < 40
    assert said.count("words and similar questions") == len(held.texts) < 40
    await predicting.close()


def test_a_predictor_without_neighbours_or_of_another_embedder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    config: dict[str, Any] = {"predictor": str(path), "embedder": "minilm"}
    whole = predictor()
    path.write_text(json.dumps(Predictor(whole.models, whole.words).as_json()))
    with pytest.raises(ConfigError, match="trained without an embedder") as caught:
        make_predicting(RoutingConfig.model_validate(config))
    assert caught.value.param == "routing.embedder"
    path.write_text(json.dumps(whole.as_json()))
    with pytest.raises(ConfigError, match="embedder slow, not minilm-1"):
        make_predicting(RoutingConfig.model_validate(config))
    assert make_predicting(RoutingConfig.model_validate({**config, "embedder": "none"})) is not None
    assert make_predicting(RoutingConfig()) is None
    with pytest.raises(ValidationError, match=r"routing\.predictor"):
        RoutingConfig(embedder="minilm")


@pytest.mark.model
async def test_minilm_tells_what_resembles_a_known_question(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from router.semantic.onnx_embedder import OnnxEmbedder
    from router.semantic.reading import read

    try:
        known = OnnxEmbedder.stored().embed("How do I bake bread?", read("How do I bake bread?"))
    except ModelLoadError:
        pytest.skip("needs `pdserve pull minilm`")
    words = predictor().words
    neighbours = one_neighbour("minilm-1", known, 4.0, words.bias)
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps(Predictor(("small", "large"), words, neighbours).as_json()))
    predicting = make_predicting(RoutingConfig(predictor=str(path), embedder="minilm", embedder_budget_s=10.0))
    assert predicting is not None
    near, far = [await predicting.of(text) for text in ("What is the way to make a loaf?", "Prove that pi is irrational.")]
    assert near.by == far.by == "words and similar questions"
    assert near.probabilities["small"] - far.probabilities["small"] > 0.02
    await predicting.close()
