"""A cluster as a user starts it: `pdserve up` in a process of its own, watched as `pdserve status --json` does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from common.errors import PdserveError
from deploy.cluster_state import running_state
from deploy.commands.manager import ask_status, call_manager, describe

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 120.0
WORKER_START_S = 180.0  # on a machine that does a lot else
CLI = (sys.executable, "-m", "deploy.cli")


@dataclass
class RunningCluster:
    name: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    log: Path

    def cli(self, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CLI, *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def status(self) -> dict[str, Any]:
        """What `pdserve status --json` prints, without a new process each time. Raises ClusterError if nothing runs."""

        def ask() -> dict[str, Any]:
            state = running_state(Path(self.environment["PDSERVE_HOME"]), self.name)
            return describe(call_manager(state, ask_status), state)

        with ThreadPoolExecutor(1) as thread:  # the caller's may have a loop of its own
            return thread.submit(ask).result()

    @property
    def base_url(self) -> str:
        return f"http://{self.status()['routers'][0]['http_address']}"

    @property
    def grpc_address(self) -> str:
        address: str = self.status()["routers"][0]["grpc_address"]
        return address

    def workers(self, role: str, state: str = "ready") -> list[dict[str, Any]]:
        return [worker for worker in self.status()["workers"] if worker["role"] == role and worker["state"] == state]

    def wait_for(self, what: str, condition: Any, timeout_s: float = WORKER_START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the cluster ended while waiting for {what}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s: {self.status()}"
            time.sleep(0.1)

    def nothing_leaks(self) -> bool:
        return all(
            worker["blocks_free"] == worker["blocks_total"] and worker["leases_open"] == 0 and worker["requests_running"] == 0
            for worker in self.status()["workers"]
            if worker["state"] == "ready"
        )


@contextmanager
def launched(
    folder: Path,
    *,
    model_path: Path,
    name: str = "e2e",
    settings: dict[str, Any] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[RunningCluster]:
    """Up, ready, and down again by Ctrl-C; the end is part of what is tested: it must come in time and be clean."""
    config = {
        "cluster": name,
        "models": [
            {
                "name": "tiny",
                "source": str(model_path),
                "engine": {"dtype": "float32", "exact": True, "kv_pool_tokens": 4096, "threads": 1},
                "decode": {"local_prefill_tokens": 4},
            }
        ],
        "router": {"http_port": 0, "grpc_port": 0},
        "cache": {"exact": {"enabled": False}},  # an answer that is given again says nothing about workers
        **(settings or {}),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {**os.environ, "PDSERVE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    share_kernels(folder / "home")
    log = folder / "up.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*CLI, "up", str(path)], env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    cluster = RunningCluster(name, process, environment, log)
    try:
        _wait_ready(cluster, start_timeout_s)
        yield cluster
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def share_kernels(home: Path) -> None:
    """Workers compile their kernels, in exact mode before they serve: here, once for all clusters."""
    from common.config import pdserve_home
    from common.engine.native.build import build_library
    from common.engine.native.check import check_library

    compiled = pdserve_home() / "kernels"
    build_library(compiled, check_library)
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "kernels").exists():
        (home / "kernels").symlink_to(compiled, target_is_directory=True)


def _wait_ready(cluster: RunningCluster, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        assert cluster.process.poll() is None, f"`pdserve up` ended:\n{cluster.log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"not ready in time:\n{cluster.log.read_text()[-4000:]}"
        with suppress(PdserveError, httpx.TransportError):
            routers = cluster.status()["routers"]
            if (
                routers
                and httpx.get(f"http://{routers[0]['http_address']}/ready", trust_env=False, timeout=30.0).status_code == 200
            ):
                return
        time.sleep(0.2)
