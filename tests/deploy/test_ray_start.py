"""A Ray of our own that does not come up the first time."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import ray

from common.errors import ClusterError
from deploy.ray_environment import CLUSTER_ID_VARIABLE
from deploy.ray_start import start_private_ray

TIMED_OUT = "The current node timed out during startup."


@pytest.fixture
def half_started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Ray's start leaves a process each time; the test says how often it fails."""
    monkeypatch.setenv(CLUSTER_ID_VARIABLE, uuid.uuid4().hex)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return []


def failing(times: int, left: list[subprocess.Popen[bytes]]) -> Any:
    def init(**_options: Any) -> None:
        left.append(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], env=dict(os.environ)))
        if len(left) <= times:
            raise Exception(TIMED_OUT)  # a bare one, as Ray raises it

    return init


def test_it_is_started_once_more_and_nothing_of_the_first_is_left(
    half_started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "init", failing(1, half_started))
    start_private_ray(tmp_path)
    first, second = half_started
    assert first.wait(60.0) < 0
    assert second.poll() is None
    second.kill()
    second.wait(60.0)


def test_one_that_never_comes_up_says_why(
    half_started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "init", failing(9, half_started))
    with pytest.raises(ClusterError, match=f"Ray did not start: {TIMED_OUT}"):
        start_private_ray(tmp_path)
    assert len(half_started) == 2
    for process in half_started:
        process.kill()
        process.wait(60.0)
