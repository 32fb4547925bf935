"""Does the Redis that the configuration names answer, and is it one that the caches can use."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator

from common.config import RedisConfig
from deploy.diagnosis.finding import Finding, Severity

_AREA = "store"
_LEAST_VERSION = (7, 0)
_TIMEOUT_S = 3.0
_MOST_CLOCK_DIFFERENCE_S = 2.0


def check_store(config: RedisConfig) -> Iterator[Finding]:
    if config.url is None:
        yield Finding(_AREA, "redis", "none: each router keeps its own cache")
        return
    if importlib.util.find_spec("redis") is None:
        return  # said among the packages
    import redis

    try:
        with redis.Redis.from_url(config.url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S) as client:
            started_s = time.perf_counter()
            seconds, micros = client.time()
            round_trip_s = time.perf_counter() - started_s
            about = client.info("server")
            persistence = client.info("persistence")
    except (redis.RedisError, OSError, ValueError) as error:
        yield Finding(
            _AREA,
            "redis",
            f"does not answer: {error}",
            Severity.WARNING,
            "routers serve without their shared cache until it does",
            "check cache.redis.url, and that the server runs",
        )
        return
    yield _version(str(about.get("redis_version", "0")))
    yield _speed(round_trip_s, config.operation_timeout_s)
    difference_s = seconds + micros / 1e6 - time.time()
    if abs(difference_s) > _MOST_CLOCK_DIFFERENCE_S:
        means = "expiry is in the server's clock, so nothing breaks; logs of the two do not line up"
        yield Finding(_AREA, "redis clock", f"differs by {difference_s:+.1f} s", Severity.NOTE, means)
    if not persistence.get("aof_enabled"):
        means = "after a restart of the server all that was cached is left behind, as it may have gone back in time"
        yield Finding(_AREA, "redis append-only file", "off", Severity.NOTE, means, "appendonly yes, if that matters")


def _version(version: str) -> Finding:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= _LEAST_VERSION:
        return Finding(_AREA, "redis", version)
    wanted = ".".join(map(str, _LEAST_VERSION))
    return Finding(_AREA, "redis", version, Severity.FAILURE, "the shared cache stays away", f"{wanted} or later is needed")


def _speed(round_trip_s: float, budget_s: float) -> Finding:
    found = f"{round_trip_s * 1e3:.2f} ms of {budget_s * 1e3:g} ms"
    if round_trip_s < budget_s:
        return Finding(_AREA, "redis round trip", found)
    means = "look-ups are given up before the answer comes, so nothing is found"
    return Finding(_AREA, "redis round trip", found, Severity.WARNING, means, "raise cache.redis.operation_timeout_s")
