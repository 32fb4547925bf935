"""What two kills leave: the next command of that cluster's name finds it by its state file, and ends it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.cluster_state import ClusterState, started_at, state_path, write_state
from deploy.remains import clear_remains_of

WAIT_S = 120.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def sleeper(stack: ExitStack, cluster_id: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PDSERVE_CLUSTER_ID": cluster_id}
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], env=environment)
    stack.callback(process.__exit__, None, None, None)
    stack.callback(process.kill)
    return process


def state_of(cluster_id: str, launcher: int, folder: Path) -> ClusterState:
    return ClusterState(
        cluster="c",
        cluster_id=cluster_id,
        launcher_pid=launcher,
        launcher_started=started_at(launcher) or 1,
        manager_address="127.0.0.1:1",
        token="t",
        files=(str(folder),),
    )


def test_what_is_left_of_a_killed_cluster_goes_and_nothing_else(stack: ExitStack, tmp_path: Path) -> None:
    ours, theirs = uuid.uuid4().hex, uuid.uuid4().hex
    launcher = sleeper(stack, uuid.uuid4().hex)
    left, other = sleeper(stack, ours), sleeper(stack, theirs)
    folder = tmp_path / "run"
    folder.mkdir()
    write_state(tmp_path, state_of(ours, launcher.pid, folder))
    launcher.kill()
    launcher.wait(WAIT_S)
    assert clear_remains_of(tmp_path, "c")
    assert left.wait(WAIT_S) < 0
    assert other.poll() is None
    assert not folder.exists()
    assert not state_path(tmp_path, "c").exists()
    assert not clear_remains_of(tmp_path, "c"), "there is nothing any more"


def test_down_does_it_too(stack: ExitStack, tmp_path: Path) -> None:
    cluster_id = uuid.uuid4().hex
    gone = subprocess.Popen(["true"])
    gone.wait(WAIT_S)
    left = sleeper(stack, cluster_id)
    write_state(tmp_path, state_of(cluster_id, gone.pid, tmp_path / "run"))
    down = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "down", "--cluster", "c"],
        env={**os.environ, "PDSERVE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert down.returncode == 0, down.stderr
    assert "what was left of a killed cluster 'c' is gone" in down.stdout + down.stderr
    assert left.wait(WAIT_S) < 0
