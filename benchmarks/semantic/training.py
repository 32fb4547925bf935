"""Trains the prior that the router ships: a small network on what a cache would meet, and how far it can be trusted.

What it sees is what the router's own candidate search gives on a stream of questions, and edited questions, which are wrong by
construction. One part of the classes trains; the trials are made on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.semantic.edits import edited_pairs
from benchmarks.semantic.pairs import Questions
from router.semantic.embedder import Embedder
from router.semantic.features import NUM_FEATURES, features
from router.semantic.prior import EmbedderPrior, Network, Trial
from router.semantic.reading import Reading, read
from router.semantic.scope_index import ScopeIndex
from router.semantic.vetoes import veto
from router.semantic.word_weights import WordWeights

Vectors = Callable[[str, Reading], NDArray[np.float32]]
_HIDDEN = 24
_EPOCHS = 30
_TRIALS = 200
_CANDIDATES = 3
_COMMON_WORDS = 4000


def word_counts(texts: list[str]) -> tuple[dict[str, int], int]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(read(text).stems)
    return dict(counts.most_common(_COMMON_WORDS)), len(texts)


def examples(
    questions: Questions, order: list[int], embedder: Embedder, weights: WordWeights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(features, right) of the candidates that each question of a stream meets, vetoed ones left out."""
    index = ScopeIndex(embedder.dimensions)
    readings: list[Reading] = []
    rows, right = [], []
    for question in order:
        text = questions.texts[question]
        reading = read(text)
        vector = embedder.embed(text, reading)
        near = index.nearest(vector, _CANDIDATES + 1)
        for place, (row, cosine) in enumerate(near[:_CANDIDATES]):
            if veto(reading, readings[row], weights) is not None:
                continue
            gap = cosine - near[place + 1][1] if place + 1 < len(near) else cosine
            rows.append(features(reading, readings[row], weights, cosine=cosine, gap=gap))
            right.append(float(questions.classes[question] == questions.classes[order[row]]))
        index.add(vector)
        readings.append(reading)
    return np.array(rows), np.array(right)


def edited_examples(texts: list[str], count: int, embedder: Embedder, weights: WordWeights) -> NDArray[np.float64]:
    rows = []
    for _, text, edited in edited_pairs(texts, count, seed=1):
        one, other = read(text), read(edited)
        if veto(one, other, weights) is None and one.words != other.words:
            cosine = float(embedder.embed(text, one) @ embedder.embed(edited, other))
            rows.append(features(one, other, weights, cosine=cosine, gap=0.3))
    return np.array(rows).reshape(-1, NUM_FEATURES)  # vetoes may leave none


def train(
    rows: NDArray[np.float64], right: NDArray[np.float64], trial_rows: NDArray[np.float64], trial_right: NDArray[np.float64]
) -> EmbedderPrior:
    torch.manual_seed(0)
    mean, scale = rows.mean(0), np.maximum(rows.std(0), 0.02)
    first, last = torch.nn.Linear(rows.shape[1], _HIDDEN), torch.nn.Linear(_HIDDEN, 1)
    network = torch.nn.Sequential(first, torch.nn.Tanh(), last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=2e-2)
    inputs = torch.tensor(np.clip((rows - mean) / scale, -6, 6), dtype=torch.float32)
    targets = torch.tensor(right, dtype=torch.float32)
    for epoch in range(_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - epoch / _EPOCHS)
        for batch in torch.tensor_split(torch.randperm(len(inputs)), len(inputs) // 256 + 1):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(inputs[batch])[:, 0], targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        scores = torch.sigmoid(
            network(torch.tensor(np.clip((trial_rows - mean) / scale, -6, 6), dtype=torch.float32))[:, 0]
        ).numpy()
    return EmbedderPrior(
        network=Network(
            mean=_short(mean),
            scale=_short(scale),
            hidden_weights=[_short(row) for row in first.weight.detach().numpy().T],
            hidden_bias=_short(first.bias.detach().numpy()),
            output_weights=_short(last.weight.detach().numpy()[0]),
            output_bias=float(last.bias.detach()[0]),
        ),
        trials=_trials(scores, trial_right),
    )


def _trials(scores: NDArray[np.float32], right: NDArray[np.float64]) -> list[Trial]:
    order = np.argsort(-scores, kind="stable")
    wrong = np.cumsum(1.0 - right[order])
    places = sorted({int(place) for place in np.geomspace(20, len(scores) - 1, _TRIALS)})
    return [Trial(threshold=round(float(scores[order[place]]), 4), served=place + 1, wrong=int(wrong[place])) for place in places]


def _short(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]
