from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import common.metrics.serving
from kvtransfer.transports import TRANSPORTS
from support.planted_links import PlantedPeer, PlantedTransport, Plants
from support.tiny_models import make_tiny_model
from support.zoo import Oracle


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("zoo"), seed=5)


@pytest.fixture(scope="session")
def oracle(model_path: Path) -> Oracle:
    return Oracle(model_path)


@pytest.fixture(autouse=True)
def quick_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's metrics server notices within a tenth of a second that it is to end; hundreds of them end here."""
    serve = common.metrics.serving.MetricsServer.serve_forever
    monkeypatch.setattr(common.metrics.serving.MetricsServer, "serve_forever", lambda server, poll_interval: serve(server, 0.005))


@pytest.fixture
async def plants(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plants]:
    """To be asked for before the workers are started."""
    plants = Plants()
    for kind, create in tuple(TRANSPORTS.items()):
        monkeypatch.setitem(TRANSPORTS, kind, lambda create=create: PlantedTransport(create(), plants))  # type: ignore[arg-type]
    monkeypatch.setattr("decode_worker.server.GrpcPrefillPeer", lambda ref, token: PlantedPeer(ref, token, plants))
    yield plants
    plants.let_end()
