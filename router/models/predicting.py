"""Who predicts, for a call: the words alone, or words and similar questions, where an embedder is at hand and in time.

The embedder and the comparison with known questions run on one thread beside the loop, within a budget. Over it, with too many
waiting, or if the embedder fails, the words speak alone, and the prediction says so. Imported by a router that has a predictor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config import RoutingConfig
from common.errors import ConfigError
from router.models.predictor import Floats, Neighbours, Predictor
from router.models.text_features import facts, words_of
from router.semantic.embedder import Embedder
from router.semantic.off_loop import OffLoop, finished, until_done
from router.semantic.reading import read


@dataclass(frozen=True, slots=True)
class Prediction:
    probabilities: Mapping[str, float]  # of a good answer, by model
    by: str  # who spoke, and if somebody did not, why


class Predicting:
    """Made once per router. `close` waits for what is being computed."""

    def __init__(self, predictor: Predictor, embedder: Embedder | None, *, budget_s: float) -> None:
        self._predictor = predictor
        self._embedder = embedder
        self._budget_s = budget_s
        self._thread = None if embedder is None else OffLoop("predict")

    def by_words(self, text: str) -> Prediction:
        return Prediction(self._predictor.probabilities(text), "words")

    async def of(self, text: str) -> Prediction:
        embedder, neighbours = self._embedder, self._predictor.neighbours
        if self._thread is None or embedder is None or neighbours is None:
            return self.by_words(text)
        future = self._thread.start(lambda: _shift(text, embedder, neighbours))
        if future is None:
            return Prediction(self._predictor.probabilities(text), "words, for many wait for the embedder")
        await until_done(future, self._budget_s)
        shift = finished(future)
        if shift is not None:
            return Prediction(self._predictor.probabilities(text, shift), "words and similar questions")
        late = "the embedder failed" if future.done() else f"the embedder took more than {self._budget_s:g} s"
        return Prediction(self._predictor.probabilities(text), f"words, for {late}")

    async def close(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.close)


def make_predicting(config: RoutingConfig) -> Predicting | None:
    """Raises ConfigError, and ModelLoadError if the embedder's model is not on this machine or cannot be run."""
    if config.predictor is None:
        return None
    wanted = [model for alias in config.aliases.values() if alias.policy == "predicted" for model in alias.candidates]
    predictor = Predictor.load(Path(config.predictor).expanduser(), wanted)
    if config.embedder == "none":
        return Predicting(predictor, None, budget_s=config.embedder_budget_s)
    known = predictor.neighbours
    if known is None:
        raise ConfigError(
            f"{config.predictor} was trained without an embedder, so it has no use for one", param="routing.embedder"
        )
    from router.semantic.onnx_embedder import DIMENSIONS, REVISION, OnnxEmbedder

    if (known.embedder, known.vectors.shape[1]) != (REVISION, DIMENSIONS):
        raise ConfigError(
            f"{config.predictor} was trained with the embedder {known.embedder}, not {REVISION}", param="routing.embedder"
        )
    return Predicting(predictor, OnnxEmbedder.stored(), budget_s=config.embedder_budget_s)


def _shift(text: str, embedder: Embedder, neighbours: Neighbours) -> Floats:
    return neighbours.shift(embedder.embed(text, read(text)), facts(text, words_of(text)))
