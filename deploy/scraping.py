"""What a Prometheus needs to scrape every process of a cluster, in one folder, kept true by the launcher.

    <home>/prometheus/<cluster>/prometheus.yml   for `prometheus --config.file`: deploy/dashboards/prometheus.yaml, completed
                               /targets.json     every worker, the manager and the routers; read again when it changes
                               /token            opens their metrics off loopback, and nothing else

Written at the start and with every change of membership; token and targets go with the cluster, the data of a Prometheus that
`pdserve up` started stays.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from common.metrics.access import metrics_token
from common.wire.registry_pb2 import ClusterSnapshot
from router.observe.targets import scrape_targets

CONFIG_FILE, TARGETS_FILE, TOKEN_FILE = "prometheus.yml", "targets.json", "token"
_SHIPPED = Path(__file__).parent / "dashboards" / "prometheus.yaml"


def scraping_folder(home: Path, cluster: str) -> Path:
    return home / "prometheus" / cluster


def prepare(folder: Path, cluster_token: str) -> None:
    """Configuration and token; there are no targets yet."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TOKEN_FILE, metrics_token(cluster_token))
    config = yaml.safe_load(_SHIPPED.read_text(encoding="utf-8"))
    config["rule_files"] = [str(_SHIPPED.parent / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    # A file and not a router's word: it needs no API key, and is there when no router is. Paths are relative to this folder.
    del job["http_sd_configs"]
    job["file_sd_configs"] = [{"files": [TARGETS_FILE], "refresh_interval": "30s"}]
    job["authorization"] = {"type": "Bearer", "credentials_file": TOKEN_FILE}
    _write(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))
    _write(folder / TARGETS_FILE, "[]")


def update(folder: Path, snapshot: ClusterSnapshot) -> None:
    _write(folder / TARGETS_FILE, json.dumps(scrape_targets(snapshot), indent=1))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for its owner only."""
    draft = path.with_suffix(".tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
