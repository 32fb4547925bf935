"""A semantic cache without a router, whose model has learned already: for tests of what it does with questions and labels."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from common.clock import ManualClock
from common.config import SemanticCacheConfig
from common.metrics import SemanticMetrics, StoreMetrics
from common.types import FinishReason
from router.cache.semantic_port import FreshAnswer, Question, SemanticHit
from router.sampling_class import SamplingClass
from router.semantic.agreement import NAMES as OF_AGREEMENT
from router.semantic.decider import Decider, Verdict
from router.semantic.embedder import HashedEmbedder, Vector
from router.semantic.features import NUM_FEATURES
from router.semantic.judge import TextJudge
from router.semantic.lookup import SemanticCache
from router.semantic.matching import Matcher
from router.semantic.prior import Prior, shipped, word_weights
from router.semantic.reading import read
from router.semantic.wider_index import NoWiderIndex, WiderIndex
from router.store.base import Epochs, Store
from router.store.embedded import EmbeddedStore

MODEL = "m"
NAMES = ("model:m", "tenant:t")
WIDTH = NUM_FEATURES + len(OF_AGREEMENT) + 2  # of a row that the matcher makes


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def question(text: str, *, scope: bytes = b"scope", tenant: str = "t", earlier: int = 0) -> Question:
    key = digest(text + scope.hex())
    return Question(key, NAMES, scope, text, tenant, MODEL, SamplingClass.GREEDY, 100, earlier, has_tools=False)


def prove(decider: Decider, kind: str, *, width: int = WIDTH, wrong_share: float = 0.0, count: int = 400) -> None:
    """Labels of candidates that were surely right and surely wrong, and a refit: the class has a threshold then. And enough hits
    are verified, if they are given, that few more need to be."""
    dice = random.Random(0)
    for place in range(count):
        row = np.zeros(width)
        row[-1] = 1.0
        row[0] = dice.uniform(1.0, 4.0) if place % 2 else dice.uniform(-6.0, -3.0)
        _, seen = decider.decide(kind, row, 0.0)
        assert seen is not None
        decider.learn(seen, right=bool(place % 2) and dice.random() >= wrong_share)
    decider.take(decider.refit(decider.evidence()))
    for _ in range(2 * count):
        row = np.zeros(width)
        row[0], row[-1] = dice.uniform(1.0, 4.0), 1.0
        verdict, seen = decider.decide(kind, row, 1.0)
        if verdict is Verdict.SERVE_AND_VERIFY and seen is not None:
            decider.learn(seen, right=dice.random() >= wrong_share)
    decider.take(decider.refit(decider.evidence()))


def ask_about(decider: Decider, row: NDArray[np.float64], *, right: bool, kind: str = "a") -> Verdict:
    """A question with such a candidate; what is not served unseen becomes a label, and what labels bring about is done."""
    verdict, seen = decider.decide(kind, row, float(decider.chances(row[None])[0]))
    assert seen is not None
    if verdict is not Verdict.SERVE and decider.learn(seen, right=right):
        decider.take(decider.refit(decider.evidence()))
    return verdict


@dataclass
class SemanticBench:
    shadow: float = 0.0
    max_wrong_hits: float = 0.05
    proven: bool = True
    max_entries: int = 1000
    store: Store | None = None
    wider: WiderIndex = field(default_factory=NoWiderIndex)
    clock: ManualClock = field(default_factory=lambda: ManualClock(1000.0))

    def __post_init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.store = self.store or EmbeddedStore(
            max_bytes=1 << 24, max_value_bytes=1 << 20, clock=self.clock, metrics=StoreMetrics(CollectorRegistry())
        )
        file = shipped()
        prior = Prior(file, "hashed-1")
        self.decider = Decider(prior, max_wrong_hits=self.max_wrong_hits, shadow_share=self.shadow, dice=random.Random(1))
        if self.proven:
            prove(self.decider, MODEL)
        self.cache = SemanticCache(
            SemanticCacheConfig(enabled=True, max_entries=self.max_entries, ttl_s=500.0, budget_s=1.0),
            store=self.store,
            embedder=HashedEmbedder(word_weights(file)),
            matcher=Matcher(prior, word_weights(file), self.decider),
            decider=self.decider,
            judge=TextJudge(),
            wider=self.wider,
            clock=self.clock,
            metrics=SemanticMetrics(registry),
        )

    def vector(self, text: str) -> Vector:
        return HashedEmbedder(word_weights(shipped())).embed(text, read(text))

    async def epochs(self) -> Epochs:
        assert self.store is not None
        found = (await self.store.get(b"any", NAMES)).epochs
        assert found is not None
        return found

    async def ask(self, text: str, answer: str = "An answer of some words.", **more: object) -> SemanticHit | None:
        """As the answer cache asks: what is not found is computed and learned."""
        asked = question(text, **more)
        hit = await self.cache.find(asked)
        if hit is None or hit.verify:
            await self.learn(asked, answer)
        return hit

    async def learn(self, asked: Question, answer: str) -> None:
        epochs = await self.epochs()
        self.cache.learn(asked, FreshAnswer(asked.key, answer, 8, FinishReason.STOP, NAMES, epochs, 1000.0))

    def labels(self) -> dict[tuple[str, str], float]:
        return {
            (sample.labels["source"], sample.labels["verdict"]): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "pdserve_cache_labels_total"
        }
