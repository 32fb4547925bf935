"""Policies over one stream of questions: the router's own, and what it is compared with. All see the same candidates and labels.

A policy answers each question from its cache or not. If not, the answer is computed, which tells whether the nearest
candidate's would have been right; the question joins the cache. Right means: of the same class.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.semantic.decider import Decider, Verdict
from router.semantic.logistic import fit, sigmoid
from router.semantic.matching import Known, Matcher, Scope
from router.semantic.prior import Prior
from router.semantic.reading import Reading
from router.semantic.word_weights import WordWeights

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    number: int
    kind: int  # the class
    text: str
    reading: Reading
    vector: NDArray[np.float32]


@dataclass
class Outcome:
    hits: int = 0
    wrong: int = 0
    verified: int = 0  # hits that were computed all the same
    requests: int = 0
    wrong_hits: list[tuple[int, int]] = field(default_factory=list)
    hits_by_quarter: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    wrong_by_quarter: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def count(self, place: float, *, hit: bool, wrong: bool = False) -> None:
        self.requests += 1
        self.hits += hit
        self.wrong += wrong
        quarter = min(3, int(4 * place))
        self.hits_by_quarter[quarter] += hit
        self.wrong_by_quarter[quarter] += wrong


class Policy(Protocol):
    def run(self, stream: Iterable[Asked], length: int) -> Outcome: ...


class Ours:
    """The router's matcher and decider, fed with the labels that the router would have."""

    def __init__(
        self,
        prior: Prior,
        weights: WordWeights,
        *,
        max_wrong_hits: float,
        max_wrong_requests: float | None = None,
        shadow_share: float,
        seed: int,
        only_cosine: bool = False,
    ) -> None:
        self.max_wrong_hits, self.max_wrong_requests = max_wrong_hits, max_wrong_requests
        self.decider = Decider(
            prior,
            max_wrong_hits=max_wrong_hits,
            max_wrong_requests=max_wrong_requests,
            shadow_share=shadow_share,
            dice=random.Random(seed),
        )
        self._matcher = Matcher(prior, weights, self.decider)
        self._only_cosine = only_cosine
        self._prior = prior
        self._num_known = 0
        self._full: Scope | None = None

    def run(self, stream: Iterable[Asked], length: int) -> Outcome:
        outcome = Outcome()
        scope: Scope | None = None
        kinds: dict[bytes, int] = {}
        numbers: dict[bytes, int] = {}
        for place, asked in enumerate(stream):
            if scope is None:
                scope = Scope(len(asked.vector))
            key = asked.number.to_bytes(8, "big")
            best = self._matcher.match(scope, key, asked.reading, asked.vector).best
            if best is not None and self._only_cosine:
                best.row[3:-1] = 0.0
            verdict, seen = self.decider.decide("all", None if best is None else best.row, 0.0 if best is None else best.chance)
            right = best is not None and kinds[best.known.key] == asked.kind
            hit = verdict is not Verdict.WITHHOLD
            outcome.count(place / length, hit=hit, wrong=hit and not right)
            if hit and best is not None and not right:
                outcome.wrong_hits.append((asked.number, numbers[best.known.key]))
            due = False
            if best is not None and seen is not None and verdict is not Verdict.SERVE:
                outcome.verified += hit
                due = self.decider.learn(seen, right=right)
                best.known.num_labels += 1
                best.known.num_right += right
                if hit and not right:
                    best.known.refused[key] = None
            if not hit:
                kinds[key], numbers[key] = asked.kind, asked.number
                family = best.known.family if best is not None and right else key
                scope.add(Known(key, asked.reading, "", family=family), asked.vector)
            if due:
                self.decider.take(self.decider.refit(self.decider.evidence()))
        self._num_known = 0 if scope is None else len(scope)
        return outcome

    def would_serve(self, asked: Asked, known: Asked) -> bool:
        """With what it has learnt: `asked`, while `known` alone is near, of as many as it came to know. Learns nothing."""
        scope = self._full
        if scope is None:
            scope = self._full = Scope(len(known.vector))
            for number in range(self._num_known):
                scope.add(Known(number.to_bytes(8, "big"), known.reading, ""), np.zeros_like(known.vector))
        scope.add(Known(b"known", known.reading, ""), known.vector)
        best = self._matcher.match(scope, b"asked", asked.reading, asked.vector).best
        return best is not None and best.chance >= self.decider.view()[0].threshold


class Static:
    """Serves the nearest answer from a cosine on."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def run(self, stream: Iterable[Asked], length: int) -> Outcome:
        outcome = Outcome()
        scope: Scope | None = None
        kinds: dict[bytes, int] = {}
        for place, asked in enumerate(stream):
            if scope is None:
                scope = Scope(len(asked.vector))
            near = scope.nearest(asked.vector, 1)
            hit = bool(near) and near[0][1] >= self._threshold
            outcome.count(place / length, hit=hit, wrong=hit and kinds[near[0][0].key] != asked.kind)
            if not hit:
                key = asked.number.to_bytes(8, "big")
                kinds[key] = asked.kind
                scope.add(Known(key, asked.reading, ""), asked.vector)
        return outcome


class PerEntryLogistic:
    """A threshold of its own for every entry, after the formulas of arXiv 2502.03771: a logistic curve over similarity per
    entry, and exploration with the least probability that keeps the share of wrong answers among all requests under `delta`."""

    _GRID = np.linspace(0.001, 0.999, 50)
    _FIRST = 6

    def __init__(self, delta: float, seed: int) -> None:
        self._delta = delta
        self._dice = random.Random(seed)
        self._quantiles = np.array([_normal_quantile(1.0 - miss) for miss in self._GRID])
        self._observations: dict[bytes, list[tuple[float, float]]] = {}
        self._fits: dict[bytes, tuple[float, float, float]] = {}

    def run(self, stream: Iterable[Asked], length: int) -> Outcome:
        outcome = Outcome()
        scope: Scope | None = None
        kinds: dict[bytes, int] = {}
        for place, asked in enumerate(stream):
            if scope is None:
                scope = Scope(len(asked.vector))
            near = scope.nearest(asked.vector, 1)
            right, hit = False, False
            if near:
                entry, cosine = near[0]
                right = kinds[entry.key] == asked.kind
                hit = self._dice.random() >= self._explore(entry.key, cosine)
                if not hit:
                    self._observations[entry.key].append((cosine, float(right)))
                    self._fits.pop(entry.key, None)
            outcome.count(place / length, hit=hit, wrong=hit and not right)
            if not hit and not right:
                key = asked.number.to_bytes(8, "big")
                kinds[key] = asked.kind
                self._observations[key] = [(0.0, 0.0), (1.0, 1.0)]
                scope.add(Known(key, asked.reading, ""), asked.vector)
        return outcome

    def _explore(self, key: bytes, cosine: float) -> float:
        if len(self._observations[key]) < self._FIRST:
            return 1.0
        if key not in self._fits:
            self._fits[key] = self._fit(key)
        steepness, middle, variance = self._fits[key]
        cautious = middle + self._quantiles * math.sqrt(variance)
        chances = (1.0 - self._GRID) * sigmoid(steepness * (cosine - cautious))
        return float(np.clip(1.0 - self._delta / np.maximum(1e-9, 1.0 - chances), 0.0, 1.0).min())

    def _fit(self, key: bytes) -> tuple[float, float, float]:
        """Steepness, middle and the middle's variance by the delta method; a weak ridge stands in for separable data's table."""
        seen = np.array(self._observations[key])
        rows = np.column_stack([seen[:, 0], np.ones(len(seen))])
        ridge = np.array([1e-3, 1e-3])
        slope, offset = fit(rows, seen[:, 1], np.ones(len(rows)), towards=np.zeros(2), pull=ridge)
        slope = max(float(slope), 1e-3)
        chances = sigmoid(rows @ np.array([slope, offset]))
        information = (rows * (chances * (1 - chances))[:, None]).T @ rows + np.diag(ridge)
        gradient = np.array([offset / slope**2, -1.0 / slope])
        return slope, float(-offset / slope), float(gradient @ np.linalg.solve(information, gradient))


def _normal_quantile(chance: float) -> float:
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < chance else (low, middle)
    return (low + high) / 2
