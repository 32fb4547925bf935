"""The lock and the file by which one cluster name is one cluster."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ClusterError
from deploy.cluster_state import (
    ClusterState,
    cluster_lock,
    read_state,
    running_state,
    started_at,
    state_path,
    wait_until_gone,
    write_state,
)


def state_of(launcher: int, janitor: int = 0) -> ClusterState:
    return ClusterState(
        cluster="c",
        cluster_id="i",
        launcher_pid=launcher,
        launcher_started=started_at(launcher) or 0,
        manager_address="127.0.0.1:1",
        token="t",
        janitor_pid=janitor,
        janitor_started=started_at(janitor) or 0,
    )


def test_only_its_owner_can_read_the_token(tmp_path: Path) -> None:
    write_state(tmp_path, state_of(os.getpid()))
    assert stat.S_IMODE(state_path(tmp_path, "c").stat().st_mode) == 0o600
    assert running_state(tmp_path, "c") == state_of(os.getpid())
    assert "token" not in repr(state_of(os.getpid()))


def test_a_second_launcher_is_refused_and_names_the_first(tmp_path: Path) -> None:
    write_state(tmp_path, state_of(os.getpid()))
    with (
        cluster_lock(tmp_path, "c"),
        pytest.raises(ClusterError, match=f"runs already .pid {os.getpid()}"),
        cluster_lock(tmp_path, "c"),
    ):
        pytest.fail("two launchers of one name")
    with cluster_lock(tmp_path, "c"), cluster_lock(tmp_path, "another"):
        pass


def test_a_launcher_that_is_only_starting_holds_the_name_too(tmp_path: Path) -> None:
    with cluster_lock(tmp_path, "c"), pytest.raises(ClusterError, match="try again"), cluster_lock(tmp_path, "c"):
        pytest.fail("two launchers of one name")


def test_the_next_launcher_waits_for_the_janitor_of_a_dead_one(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait(60)
    with cluster_lock(tmp_path, "c") as descriptor:
        # The janitor inherits the lock; it ends when its pipe does, and so it outlives its launcher's hold.
        janitor = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    with janitor:
        write_state(tmp_path, state_of(dead.pid, janitor.pid))
        assert read_state(tmp_path, "c") is None
        assert not wait_until_gone(tmp_path, "c", 0.05)
        with pytest.raises(ClusterError, match="try again"), cluster_lock(tmp_path, "c", patience_s=0.05):
            pytest.fail("the janitor was still at work")
        assert janitor.stdin is not None
        janitor.stdin.close()
        with cluster_lock(tmp_path, "c", patience_s=30.0):
            assert started_at(janitor.pid) is None or janitor.poll() is not None or wait_until_gone(tmp_path, "c", 0)
