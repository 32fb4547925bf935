"""A real cluster for the module: `pdserve up` as a subprocess, with the tiny model, everything a user would start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.cluster import RunningCluster, launched
from support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("e2e")
    model = make_tiny_model(folder / "tiny", seed=4)
    with launched(folder, model_path=model) as running:
        yield running
