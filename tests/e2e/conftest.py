"""A real cluster for all of these tests: `pdserve up` as a subprocess, with the tiny model, everything a user would start.

Tests that kill or scale leave it as they found it but for incarnations. Who does not test the cache says `x-cache: bypass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import RunningCluster, launched
from support.remains import Belongings, eventually
from support.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=4)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("e2e")
    with launched(folder, model_path=tiny_model, settings={"cache": {"exact": {"enabled": True}}}) as running:
        yield running
        here = Belongings.of(running)
        assert any(file.startswith("/tmp/pd-") for file in here.files), "Ray's folder"
    assert eventually(lambda: not here.left()), f"Ctrl-C leaves {here.left()}"
