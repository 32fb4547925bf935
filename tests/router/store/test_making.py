from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from common.clock import ManualClock
from common.config import CacheConfig, RedisConfig, load_config
from common.errors import ConfigError
from common.metrics import StoreMetrics
from router.store.base import Store
from router.store.embedded import EmbeddedStore
from router.store.making import make_store
from router.store.redis_store import RedisStore


def made(**redis: Any) -> Store:
    config = CacheConfig(redis=RedisConfig(**redis))
    return make_store(config, cluster_token="token", clock=ManualClock(), metrics=StoreMetrics(CollectorRegistry()))


def test_without_an_address_it_is_in_the_process() -> None:
    assert isinstance(made(), EmbeddedStore)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:6379/3", "rediss://user:word@example.org", "unix:///run/redis.sock?db=1"])
async def test_with_an_address_it_is_in_redis(url: str) -> None:
    assert isinstance(made(url=url), RedisStore)


@pytest.mark.parametrize("url", ["redis://host:notaport", "redis://host?max_connections=x", "redis://host/?unknown_option=1"])
async def test_an_address_that_cannot_be_read_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=r"cache\.redis\.url"):
        made(url=url)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValidationError):
        RedisConfig(url="http://host")


def test_a_missing_package_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[redis\]'"):
        made(url="redis://127.0.0.1")


async def test_the_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    good, short = tmp_path / "good", tmp_path / "short"
    good.write_text("sixteen letters and more\n")
    short.write_text("short\n")
    made(url="redis://127.0.0.1", secret_file=str(good))
    for bad in (short, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="secret_file") as caught:
            made(url="redis://127.0.0.1", secret_file=str(bad))
        assert str(tmp_path) not in caught.value.message
    with pytest.raises(ValidationError, match="exclude"):
        RedisConfig(secret="x" * 16, secret_file=str(good))


def test_the_secret_and_the_address_are_not_shown() -> None:
    shown = repr(RedisConfig(url="redis://:a-password@host", secret="a-secret-of-sixteen"))
    assert "a-password" not in shown
    assert "a-secret" not in shown


def test_the_address_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("models: [{name: m, source: m}]\n")
    config = load_config(file, environment={"PDSERVE_CACHE__REDIS__URL": "redis://127.0.0.1:1"})
    assert config.cache.redis.url == "redis://127.0.0.1:1"
    with pytest.raises(ConfigError, match="did you mean 'max_value_bytes'"):
        load_config(file, overrides=["cache.max_value_byte=1"], environment={})
