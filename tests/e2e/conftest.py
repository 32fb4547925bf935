"""Real clusters for all of these tests: `pdserve up` as a subprocess, with the tiny model, everything a user would start.

`cluster` places prompts as it forecasts: on an idle machine that is often on the decode worker itself. `disaggregated` never does
so, for tests that look at a hand-off or count on prefill workers at work; it has an autoscaler, which is off.
Tests that kill or scale leave either as they found it but for incarnations. Who does not test the cache says `x-cache: bypass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster import RunningCluster, launched
from support.remains import Belongings, eventually
from support.tiny_models import make_tiny_model

AUTOSCALING: dict[str, Any] = {
    "prefill": {"min_replicas": 0, "max_replicas": 2},
    "decode": {"min_replicas": 0, "max_replicas": 2},
    "idle_s": 6.0,
    "max_workers": 3,
    "target_utilization": 0.2,
    "target_ongoing_requests": 2.0,
    "look_back_period_s": 2.0,
    "flip_delay_s": 1.0,
    "upscale_delay_s": 2.0,
    "cooldown_s": 1.0,
    "interval_s": 0.5,
}


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


@pytest.fixture(scope="session")
def disaggregated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    model = {
        "name": "tiny",
        "source": str(tiny_model),
        "engine": {"dtype": "float32", "exact": True, "kv_pool_tokens": 8192, "threads": 1},
        "decode": {"local_prefill": "never"},
        "autoscaling": AUTOSCALING,
    }
    settings = {"models": [model], "ray": {"num_cpus_per_worker": 0.01}}
    with launched(tmp_path_factory.mktemp("scaling"), model_path=tiny_model, name="disaggregated", settings=settings) as running:
        yield running
