"""Vectors: what is near what, and what a slow embedder may cost."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from common.errors import ModelLoadError
from router.semantic.embedder import HashedEmbedder, Vector
from router.semantic.embedding import Embedding
from router.semantic.features import NUM_FEATURES
from router.semantic.off_loop import finished
from router.semantic.prior import Prior, shipped, word_weights
from router.semantic.reading import Reading, read


def hashed(text: str) -> Vector:
    return HashedEmbedder(word_weights(shipped())).embed(text, read(text))


def test_the_hashed_embedder_puts_what_is_alike_together() -> None:
    asked = hashed("How do I learn to play the piano?")
    assert float(asked @ asked) == pytest.approx(1.0, abs=1e-5)
    assert float(asked @ hashed("How can I learn playing the piano?")) > 0.8
    assert float(asked @ hashed("Which mountain is the highest?")) < 0.3


def test_it_is_the_same_in_every_process() -> None:
    vector = hashed("bread")
    assert np.flatnonzero(vector).tolist() == FOUND
    assert float(np.abs(vector).max()) == pytest.approx(LARGEST, abs=1e-6)


FOUND = [
    13,
    95,
    108,
    122,
    125,
    144,
    173,
    176,
    181,
    196,
    209,
    218,
    234,
    249,
    269,
    271,
    282,
    318,
    321,
    323,
    335,
    348,
    357,
    359,
    372,
    378,
    383,
]
LARGEST = 0.4448765


@pytest.mark.parametrize("revision", ["hashed-1", "minilm-1"])
def test_the_shipped_prior_fits_the_features(revision: str) -> None:
    prior = Prior(shipped(), revision)
    unknown = np.array([[5.0, 6.0, 7.0], [0.0, 0.0, 0.0]])
    rows = prior.rows(np.zeros((2, NUM_FEATURES)), unknown)
    assert rows.shape == (2, NUM_FEATURES + 3 + 2)
    assert rows[0, -4:].tolist() == [5.0, 6.0, 7.0, 1.0]
    chances = prior.chances(rows)
    assert chances[0] == chances[1]  # it makes nothing of what it does not know
    thresholds = [prior.threshold(bound) for bound in (0.5, 0.1, 0.05)]
    assert None not in thresholds
    assert thresholds == sorted(thresholds)  # a tighter bound asks for more
    assert prior.threshold(1e-6) is None


class Slow:
    """Embeds when it is told to."""

    revision, dimensions, quick = "slow", 2, False

    def __init__(self) -> None:
        self.go = threading.Event()
        self.fails = False

    def embed(self, text: str, reading: Reading) -> Vector:
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("broken model")
        return np.array([1.0, 0.0], np.float32)


async def test_over_budget_there_is_no_vector_and_later_there_is() -> None:
    slow = Slow()
    embedding = Embedding(slow, budget_s=0.001)
    future = embedding.start("a", read("a"))
    assert future is not None
    assert await embedding.vector(future) is None
    slow.go.set()
    future.result(60)
    assert finished(future) is not None
    embedding.close()


async def test_few_wait_for_a_slow_embedder() -> None:
    slow = Slow()
    embedding = Embedding(slow, budget_s=0.001)
    started = [embedding.start("a", read("a")) for _ in range(20)]
    assert None in started
    slow.go.set()
    embedding.close()


async def test_a_broken_embedder_is_a_miss() -> None:
    slow = Slow()
    slow.fails = True
    slow.go.set()
    embedding = Embedding(slow, budget_s=10.0)
    future = embedding.start("a", read("a"))
    assert future is not None
    assert await embedding.vector(future) is None
    embedding.close()


def test_a_folder_without_a_model_is_a_typed_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime")
    from router.semantic.onnx_embedder import OnnxEmbedder

    with pytest.raises(ModelLoadError):
        OnnxEmbedder(tmp_path)


@pytest.mark.model
def test_minilm_knows_synonyms() -> None:
    pytest.importorskip("onnxruntime")
    from router.semantic.onnx_embedder import OnnxEmbedder

    try:
        embedder = OnnxEmbedder.stored()
    except ModelLoadError:
        pytest.skip("needs `pdserve pull minilm`")
    one, same, other = (
        embedder.embed(text, read(text)) for text in ("How do I purchase a car?", "How do I buy a car?", "How do I bake bread?")
    )
    assert float(one @ same) > 0.9 > 0.5 > float(one @ other)
