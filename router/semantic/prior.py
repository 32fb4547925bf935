"""What is known before the first label: trained on question pairs, shipped as `prior.json`, the same for everybody.

Per embedder a small network from features to the log odds that one answer serves both questions, and a table of how often it was
wrong above each threshold on questions that it had not seen. Beside it, in how many questions common words occur. Written by
`benchmarks/semantic_cache.py --train-prior`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from router.semantic.bound import upper_bound
from router.semantic.features import NUM_FEATURES
from router.semantic.logistic import sigmoid
from router.semantic.word_weights import WordWeights

Floats = NDArray[np.float64]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Network(_Part):
    mean: list[float]
    scale: list[float]
    hidden_weights: list[list[float]]  # [feature][hidden]; empty = nothing is known, all log odds are 0
    hidden_bias: list[float]
    output_weights: list[float]
    output_bias: float


class Trial(_Part):
    """Of one threshold on held-out questions."""

    threshold: float
    served: int
    wrong: int


class EmbedderPrior(_Part):
    network: Network
    trials: list[Trial]


class PriorFile(_Part):
    version: Annotated[int, Field(ge=1, le=1)]
    num_questions: int
    word_counts: dict[str, int]
    embedders: dict[str, EmbedderPrior]


class Prior:
    """For one embedder. `informed=False` gives the scales of the features and nothing else: a start without knowledge."""

    def __init__(self, file: PriorFile, revision: str, *, informed: bool = True) -> None:
        known = file.embedders[revision]
        network = known.network
        self.informed = informed
        self._trials = known.trials if informed else []
        self._mean, self._scale = np.array(network.mean), np.array(network.scale)
        self._hidden, self._hidden_bias = np.array(network.hidden_weights), np.array(network.hidden_bias)
        self._output, self._output_bias = np.array(network.output_weights), network.output_bias
        if len(self._mean) != NUM_FEATURES:
            raise ValueError("the prior was trained for other features")

    def rows(self, features: Floats, unknown: Floats) -> Floats:
        """[candidate][column] for the pooled model: the prior's log odds, the scaled features, what is `unknown` to it, and 1."""
        scaled = np.clip((features - self._mean) / self._scale, -6.0, 6.0)
        odds = np.zeros(len(scaled))
        if self.informed:
            odds = np.tanh(scaled @ self._hidden + self._hidden_bias) @ self._output + self._output_bias
        return np.column_stack([odds, scaled, unknown, np.ones(len(scaled))])

    def chances(self, rows: Floats) -> Floats:
        return sigmoid(rows[:, 0])

    def threshold(self, max_wrong: float) -> float | None:
        """Above which at most `max_wrong` was shown on held-out questions; None if that was not shown anywhere."""
        fitting = [
            trial.threshold
            for trial in self._trials
            if float(upper_bound(trial.wrong / max(1, trial.served), trial.served)) <= max_wrong
        ]
        return min(fitting, default=None)


@lru_cache(maxsize=1)
def shipped() -> PriorFile:
    return PriorFile.model_validate_json(resources.files(__package__).joinpath("prior.json").read_bytes())


def word_weights(file: PriorFile) -> WordWeights:
    return WordWeights(file.word_counts, file.num_questions)
