"""Which semantic cache a configuration asks for. Its parts are imported only then: a router without it needs no numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.clock import Clock
from common.config import CacheConfig, SemanticCacheConfig
from common.metrics import SemanticMetrics
from router.cache.semantic_port import NoSemantics, SemanticLookup
from router.store.base import Store
from router.store.redis_store import RedisStore
from router.store.vectors import RedisVectors

if TYPE_CHECKING:
    from router.semantic.embedder import Embedder
    from router.semantic.prior import PriorFile
    from router.semantic.wider_index import WiderIndex


def make_semantics(config: CacheConfig, *, store: Store, clock: Clock, metrics: SemanticMetrics) -> SemanticLookup:
    """Raises ModelLoadError if the embedder's model is not on this machine or cannot be run."""
    if not config.semantic.enabled:
        return NoSemantics()
    import random

    from router.semantic.decider import Decider
    from router.semantic.judge import TextJudge
    from router.semantic.lookup import SemanticCache
    from router.semantic.matching import Matcher
    from router.semantic.prior import Prior, shipped, word_weights
    from router.semantic.wider_index import NoWiderIndex, SharedIndex

    file = shipped()
    embedder = make_embedder(config.semantic, file)
    prior = Prior(file, embedder.revision)
    decider = Decider(
        prior,
        max_wrong_hits=config.semantic.max_wrong_hits,
        max_wrong_requests=config.semantic.max_wrong_requests,
        shadow_share=config.semantic.shadow,
        dice=random.Random(),
    )
    shared = RedisVectors(store, namespace=config.redis.namespace) if isinstance(store, RedisStore) else None
    if shared is None or not config.semantic.shared_index:
        wider: WiderIndex = NoWiderIndex()
    else:
        wider = SharedIndex(shared, revision=embedder.revision.encode(), clock=clock)
    return SemanticCache(
        config.semantic,
        store=store,
        embedder=embedder,
        matcher=Matcher(prior, word_weights(file), decider),
        decider=decider,
        judge=TextJudge(),
        wider=wider,
        clock=clock,
        metrics=metrics,
    )


def make_embedder(config: SemanticCacheConfig, file: PriorFile) -> Embedder:
    from router.semantic.embedder import HashedEmbedder
    from router.semantic.prior import word_weights

    if config.embedder == "minilm":
        from router.semantic.onnx_embedder import OnnxEmbedder

        return OnnxEmbedder.stored()
    return HashedEmbedder(word_weights(file))
