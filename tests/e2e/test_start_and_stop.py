"""How clusters begin and end: whole, alone, and without leaving anything behind, however they are ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from support.cluster import CLI, RunningCluster, launched
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=6)


def processes_of(cluster: RunningCluster) -> dict[int, str]:
    """Everything that descends from the launcher, Ray's processes and the workers too: by the home in its environment."""
    marker = f"PDSERVE_HOME={cluster.environment['PDSERVE_HOME']}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:
                continue
    return found


def leftovers(cluster: RunningCluster) -> list[str]:
    """What must not exist after the end."""
    home = Path(cluster.environment["PDSERVE_HOME"])
    left = list(processes_of(cluster).values())
    left += [str(path) for path in (home / "clusters").glob("*")]
    left += [str(path) for path in Path("/tmp").glob("pd-*") if path.stat().st_mtime > cluster_started[cluster.name]]
    left += [str(path) for path in Path("/dev/shm").iterdir() if path.stat().st_mtime > cluster_started[cluster.name]]
    return left


cluster_started: dict[str, float] = {}


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def listening_elsewhere(pids: set[int]) -> list[str]:
    """Addresses off loopback on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(link)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue
    found = []
    for table, loopback in (
        ("tcp", ("0100007F",)),
        ("tcp6", ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")),
    ):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes and fields[1].split(":")[0] not in loopback:
                found.append(f"{table} {fields[1]}")
    return found


def test_two_clusters_live_side_by_side_on_loopback_and_end_clean(model_path: Path, tmp_path: Path) -> None:
    """Neither joins the other, no port is open to the world; one is killed, which the other does not notice."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        cluster_started[name] = time.time()
    with launched(tmp_path / "two", model_path=model_path, name="two") as two:
        cluster_started["one"] = time.time()
        with launched(tmp_path / "one", model_path=model_path, name="one") as one:
            assert {worker["pid"] for worker in one.status()["workers"]}.isdisjoint(
                worker["pid"] for worker in two.status()["workers"]
            )
            assert [model["name"] for model in one.status()["models"]] == ["tiny"]
            pids = set(processes_of(one)) | set(processes_of(two))
            assert len(pids) >= 10
            assert listening_elsewhere(pids) == []

            again = one.cli("up", str(tmp_path / "one" / "config.yaml"))
            assert again.returncode == 1
            assert "runs already" in again.stderr

            answer = httpx.post(
                f"{one.base_url}/v1/completions", json={"model": "tiny", "prompt": [5] * 50}, trust_env=False, timeout=30
            )
            assert answer.status_code == 200

            os.kill(one.process.pid, signal.SIGKILL)
            one.process.wait(10)
            assert eventually(lambda: not leftovers(one)), leftovers(one)
            ended_by_kill = one.process.returncode
            one.process.returncode = 0  # the end by Ctrl-C, that `launched` checks, is the other cluster's
        assert ended_by_kill == -signal.SIGKILL
        assert len(two.workers("prefill")) == len(two.workers("decode")) == 1
        answer = httpx.post(
            f"{two.base_url}/v1/completions", json={"model": "tiny", "prompt": [5] * 50}, trust_env=False, timeout=30
        )
        assert answer.status_code == 200
    assert eventually(lambda: not leftovers(two)), leftovers(two)


def test_down_ends_a_cluster_and_a_taken_port_is_a_clear_error(model_path: Path, tmp_path: Path) -> None:
    cluster_started["e2e"] = time.time()
    with launched(tmp_path, model_path=model_path) as cluster:
        port = cluster.base_url.rsplit(":", 1)[1]
        other = tmp_path / "other"
        other.mkdir()
        with (
            pytest.raises(AssertionError, match=port),
            launched(other, model_path=model_path, name="other", settings={"router": {"http_port": int(port), "grpc_port": 0}}),
        ):
            pytest.fail("a second router took the same port")
        down = cluster.cli("down", "--cluster", cluster.name)
        assert down.returncode == 0, down.stderr
        assert cluster.process.wait(5) == 0
        assert cluster.cli("status", "--cluster", cluster.name).returncode == 1
    assert eventually(lambda: not leftovers(cluster)), leftovers(cluster)


def test_a_model_that_cannot_load_ends_the_start_with_its_reason(model_path: Path, tmp_path: Path) -> None:
    broken = make_tiny_model(tmp_path / "broken", seed=6)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    cluster_started["e2e"] = time.time()
    with pytest.raises(AssertionError, match=r"cannot start|safetensors"), launched(tmp_path, model_path=broken):
        pytest.fail("it served a model that cannot be read")


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server")
def test_detached_it_returns_when_it_can_be_asked_and_takes_its_redis_with_it(model_path: Path, tmp_path: Path) -> None:
    config = {
        "cluster": "away",
        "models": [{"name": "tiny", "source": str(model_path), "engine": {"threads": 1, "kv_pool_tokens": 4096}}],
        "router": {"http_port": 0, "grpc_port": 0},
        "head": {"redis": True},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {**os.environ, "PDSERVE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    cluster_started["away"] = time.time()
    up = subprocess.run(
        [*CLI, "up", str(path), "--detach"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert up.returncode == 0, up.stderr
    (state,) = (tmp_path / "home/clusters").iterdir()
    launcher_pid = json.loads(state.read_text())["launcher_pid"]
    cluster = RunningCluster("away", _NotOurs(launcher_pid), environment, tmp_path / "home/logs/away.log")  # type: ignore[arg-type]
    try:
        cluster.wait_for("router and workers", lambda: cluster.status()["routers"] and cluster.workers("decode"), timeout_s=90.0)
        assert any("redis-server" in line for line in processes_of(cluster).values())
        body = {"model": "tiny", "prompt": [5] * 50, "temperature": 0}
        url = f"{cluster.base_url}/v1/completions"

        def served() -> str:
            return httpx.post(url, json=body, trust_env=False, timeout=60).headers["x-cache"]

        assert served() == "miss"
        assert eventually(lambda: served() == "hit-exact"), "no request waits for a Redis that is slow, but it is one"
        again = cluster.cli("up", str(path), "--detach")
        assert again.returncode == 1
        assert "runs already" in again.stderr
    finally:
        down = cluster.cli("down", "--cluster", "away", timeout_s=120.0)
    assert down.returncode == 0, down.stderr
    assert eventually(lambda: not leftovers(cluster)), leftovers(cluster)


class _NotOurs:
    """A process that is not our child, as far as waiting for a cluster asks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0
