"""What Prometheus is told, and what its own checker says of it."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from common.config import Config, load_config
from common.errors import ConfigError
from common.metrics.access import metrics_token
from common.wire.registry_pb2 import ClusterSnapshot, RouterInfo
from common.wire.types_pb2 import ROLE_DECODE, ROLE_PREFILL
from common.wire.worker_pb2 import InfoReply
from deploy.head_services import head_services
from deploy.scraping import prepare, scraping_folder, update

SNAPSHOT = ClusterSnapshot(
    workers=[
        InfoReply(worker_id="m/prefill/0", role=ROLE_PREFILL, model="m", metrics_address="10.0.0.11:4001"),
        InfoReply(worker_id="m/decode/0", role=ROLE_DECODE, model="m", metrics_address="10.0.0.12:4002"),
        InfoReply(worker_id="m/decode/1", role=ROLE_DECODE, model="m"),  # not up yet
    ],
    manager_metrics_address="10.0.0.10:4000",
    routers=[RouterInfo(http_address="127.0.0.1:8000")],
)


def test_the_files_hold_the_metrics_token_only_and_are_their_owners(tmp_path: Path) -> None:
    folder = scraping_folder(tmp_path, "c")
    prepare(folder, "the cluster's token")
    update(folder, SNAPSHOT)
    assert (folder / "token").read_text() == metrics_token("the cluster's token")
    for path in folder.iterdir():
        assert "the cluster's token" not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (job,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert (folder / job["authorization"]["credentials_file"]).is_file()
    (discovery,) = job["file_sd_configs"]
    found = {group["targets"][0]: group["labels"] for group in json.loads((folder / discovery["files"][0]).read_text())}
    assert set(found) == {"10.0.0.11:4001", "10.0.0.12:4002", "10.0.0.10:4000", "127.0.0.1:8000"}
    assert found["10.0.0.12:4002"]["worker"] == "m/decode/0"
    assert "http_sd_configs" not in job


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    folder = scraping_folder(tmp_path, "c")
    prepare(folder, "token")
    update(folder, SNAPSHOT)
    done = subprocess.run(
        ["promtool", "check", "config", str(folder / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def config_of(**head: object) -> Config:
    return Config.model_validate({"models": [{"name": "m", "source": "m"}], "head": head})


def test_services_of_the_head_listen_on_a_socket_file_or_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("redis-server", "prometheus"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    redis, prometheus = head_services(
        config_of(redis=True, prometheus_port=9999), run_folder=Path("/run/x"), scraping=Path("/home/x")
    )
    assert redis.command[redis.command.index("--port") + 1] == "0"
    path = tmp_path / "config.yaml"
    path.write_text("models: [{name: m, source: m}]\nhead: {redis: true}\n")
    router = load_config(path, overrides=redis.router_settings, environment={})
    assert router.cache.redis.url == "unix:///run/x/redis.sock"
    assert "--web.listen-address=127.0.0.1:9999" in prometheus.command
    assert head_services(config_of(), run_folder=Path("/run/x"), scraping=Path("/home/x")) == []


def test_a_service_whose_program_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no redis-server in the PATH") as caught:
        head_services(config_of(redis=True), run_folder=tmp_path, scraping=tmp_path)
    assert caught.value.param == "head.redis"
