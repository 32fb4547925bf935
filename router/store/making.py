"""Which store a configuration asks for, and the secret that signs what it shares."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from common.clock import Clock
from common.config import CacheConfig, RedisConfig
from common.errors import ConfigError
from common.metrics import StoreMetrics
from router.store.base import Store
from router.store.embedded import EmbeddedStore
from router.store.redis_store import RedisStore
from router.store.sealed import Sealer

_LEAST_SECRET_CHARACTERS = 16


def make_store(config: CacheConfig, *, cluster_token: str, clock: Clock, metrics: StoreMetrics) -> Store:
    """Opens nothing yet: `Store.run` does. Raises ConfigError."""
    if config.redis.url is None:
        return EmbeddedStore(max_bytes=config.max_bytes, max_value_bytes=config.max_value_bytes, clock=clock, metrics=metrics)
    return _redis_store(config.redis, config.redis.url, config, cluster_token=cluster_token, clock=clock, metrics=metrics)


def _redis_store(
    config: RedisConfig, url: str, cache: CacheConfig, *, cluster_token: str, clock: Clock, metrics: StoreMetrics
) -> RedisStore:
    if importlib.util.find_spec("redis") is None:
        raise ConfigError(
            "cache.redis.url is set, but the Redis client is missing: pip install 'pdserve[redis]'", param="cache.redis.url"
        )
    from redis.asyncio.connection import ConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        # The pool only reads the address and makes connections; it never holds one.
        pool = ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=config.connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,
            client_name="pdserve-router",
        )
        pool.make_connection()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cache.redis.url: {error}", param="cache.redis.url") from error
    return RedisStore(
        config,
        connect=pool.make_connection,
        sealer=Sealer(_secret(config, cluster_token)),
        max_value_bytes=cache.max_value_bytes,
        clock=clock,
        metrics=metrics,
        jitter=random.Random(),
    )


def _secret(config: RedisConfig, cluster_token: str) -> str:
    if config.secret_file is None:
        return config.secret or cluster_token
    try:
        secret = Path(config.secret_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cache.redis.secret_file cannot be read", param="cache.redis.secret_file") from error
    if len(secret) < _LEAST_SECRET_CHARACTERS:
        raise ConfigError(
            f"cache.redis.secret_file holds fewer than {_LEAST_SECRET_CHARACTERS} characters", param="cache.redis.secret_file"
        )
    return secret
