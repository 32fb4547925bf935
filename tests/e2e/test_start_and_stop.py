"""How clusters begin and end: whole, alone, and without leaving anything behind, however they are ended. The end by Ctrl-C is
that of the cluster which all tests here share (conftest.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.cluster import CLI, RunningCluster, launched, share_kernels
from support.remains import Belongings, eventually, processes_of
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def state_of(cluster: RunningCluster) -> dict[str, Any]:
    path = Path(cluster.environment["PDSERVE_HOME"]) / "clusters" / f"{cluster.name}.json"
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def answers(cluster: RunningCluster) -> bool:
    body = {"model": "tiny", "prompt": [5] * 50}
    return httpx.post(f"{cluster.base_url}/v1/completions", json=body, trust_env=False, timeout=120.0).status_code == 200


def test_two_clusters_live_side_by_side_on_loopback_and_one_is_killed(
    cluster: RunningCluster, tiny_model: Path, tmp_path: Path
) -> None:
    """Neither joins the other, no port is open to the world; names and ports are taken once; a kill ends one alone, and whole."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with launched(tmp_path / "one", model_path=tiny_model, name="one") as one:
        pids = {worker["pid"] for worker in one.status()["workers"]}
        assert pids.isdisjoint(worker["pid"] for worker in cluster.status()["workers"])
        assert [model["name"] for model in one.status()["models"]] == ["tiny"]
        of_one, of_shared = Belongings.of(one), Belongings.of(cluster)
        assert of_one.pids.isdisjoint(of_shared.pids)
        assert len(of_one.pids | of_shared.pids) >= 10
        assert of_one.listening_elsewhere() == of_shared.listening_elsewhere() == []

        again = one.cli("up", str(tmp_path / "one" / "config.yaml"))
        assert again.returncode == 1
        assert "runs already" in again.stderr
        port = one.base_url.rsplit(":", 1)[1]
        taken = {"router": {"http_port": int(port), "grpc_port": 0}}
        with (
            pytest.raises(AssertionError, match=rf"HTTP: 127\.0\.0\.1:{port} is taken by \S+ \(pid \d+\)"),
            launched(tmp_path / "other", model_path=tiny_model, name="other", settings=taken),
        ):
            pytest.fail("a second router took the same port")
        assert answers(one)

        # Its janitor is killed first: there is another one before anybody needs it.
        first = state_of(one)["janitor_pid"]
        os.kill(first, signal.SIGKILL)
        one.wait_for("another janitor", lambda: state_of(one)["janitor_pid"] != first)
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait(60)
        assert eventually(lambda: not of_one.left()), of_one.left()
        assert one.process.returncode == -signal.SIGKILL
        one.process.returncode = 0  # `launched` checks the end by Ctrl-C
    assert len(cluster.workers("prefill")) == len(cluster.workers("decode")) == 1
    assert answers(cluster)


def test_a_router_that_is_killed_comes_back_where_it_was(cluster: RunningCluster) -> None:
    url = cluster.base_url
    (old,) = cluster.status()["routers"]
    os.kill(old["pid"], signal.SIGKILL)
    cluster.wait_for("another router", lambda: [one["pid"] for one in cluster.status()["routers"]] not in ([], [old["pid"]]))
    assert cluster.base_url.rpartition(":")[0] == url.rpartition(":")[0]
    cluster.wait_for("answers", lambda: answers(cluster))


def test_a_cluster_without_its_raylet_ends_says_why_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with launched(tmp_path, model_path=tiny_model, name="headless") as one:
        here = Belongings.of(one)
        (raylet,) = [pid for pid in here.pids if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"]
        os.kill(raylet, signal.SIGKILL)
        assert one.process.wait(120) == 1
        one.process.returncode = 0  # `launched` checks the end by Ctrl-C
    assert "pdserve: the pool manager is gone" in one.log.read_text()
    assert eventually(lambda: not here.left()), here.left()


def test_a_model_that_cannot_load_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    broken = make_tiny_model(tmp_path / "broken", seed=6)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(AssertionError, match=r"cannot start|safetensors"), launched(tmp_path, model_path=broken):
        pytest.fail("it served a model that cannot be read")
    assert eventually(lambda: not processes_of(str(tmp_path / "home")))


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server")
def test_detached_it_returns_when_it_can_be_asked_and_down_takes_its_redis_with_it(tiny_model: Path, tmp_path: Path) -> None:
    config = {
        "cluster": "away",
        "models": [{"name": "tiny", "source": str(tiny_model), "engine": {"threads": 1, "kv_pool_tokens": 4096}}],
        "router": {"http_port": 0, "grpc_port": 0},
        "head": {"redis": True},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {**os.environ, "PDSERVE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    share_kernels(tmp_path / "home")
    up = subprocess.run(
        [*CLI, "up", str(path), "--detach"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert up.returncode == 0, up.stderr
    (state,) = (tmp_path / "home/clusters").iterdir()
    launcher_pid = json.loads(state.read_text())["launcher_pid"]
    cluster = RunningCluster("away", _NotOurs(launcher_pid), environment, tmp_path / "home/logs/away.log")  # type: ignore[arg-type]
    here: Belongings | None = None
    try:
        cluster.wait_for("router and workers", lambda: cluster.status()["routers"] and cluster.workers("decode"))
        here = Belongings.of(cluster)
        assert any("redis-server" in line for line in processes_of(here.home).values())
        body = {"model": "tiny", "prompt": [5] * 50, "temperature": 0}
        url = f"{cluster.base_url}/v1/completions"

        def served() -> str:
            return httpx.post(url, json=body, trust_env=False, timeout=120.0).headers["x-cache"]

        assert served() == "miss"
        assert eventually(lambda: served() == "hit-exact"), "no request waits for a Redis that is slow, but it is one"
        log = (tmp_path / "home/logs/away.log").read_bytes()
        again = cluster.cli("up", str(path), "--detach")
        assert again.returncode == 1
        assert "runs already" in again.stderr
        assert log
        assert (tmp_path / "home/logs/away.log").read_bytes().startswith(log), "who is refused leaves the log as it is"
        assert not list((tmp_path / "home/logs").glob("*.starting"))
    finally:
        down = cluster.cli("down", "--cluster", "away", timeout_s=240.0)
    assert down.returncode == 0, down.stderr
    assert here is not None
    assert eventually(lambda: not here.left()), here.left()
    assert cluster.cli("status", "--cluster", "away").returncode == 1


class _NotOurs:
    """A process that is not our child, as far as waiting for a cluster asks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0
