"""What a raylet leaves on a host ends with it, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from deploy.node_guard import MARK_VARIABLE

WAIT_S = 120.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start(stack: ExitStack, *command: str, mark: str = "") -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, env={**os.environ, MARK_VARIABLE: mark}, start_new_session=True)
    stack.callback(process.__exit__, None, None, None)
    stack.callback(process.kill)
    return process


def test_what_a_raylet_leaves_ends_with_it_and_nothing_else(stack: ExitStack) -> None:
    mark = uuid.uuid4().hex
    raylet, left = (start(stack, "sleep", "300", mark=mark) for _ in range(2))
    other = start(stack, "sleep", "300", mark=uuid.uuid4().hex)
    guard = start(stack, sys.executable, "-m", "deploy.node_guard", "--mark", mark, "--raylet", str(raylet.pid))
    with pytest.raises(subprocess.TimeoutExpired):
        guard.wait(0.5)
    assert left.poll() is None
    raylet.kill()
    raylet.wait(WAIT_S)
    assert guard.wait(WAIT_S) == 0
    assert left.wait(WAIT_S) != 0
    assert other.poll() is None


def test_a_raylet_that_is_gone_already_leaves_nothing_either(stack: ExitStack) -> None:
    mark = uuid.uuid4().hex
    gone = subprocess.Popen(["true"])
    gone.wait(WAIT_S)
    left = start(stack, "sleep", "300", mark=mark)
    guard = start(stack, sys.executable, "-m", "deploy.node_guard", "--mark", mark, "--raylet", str(gone.pid))
    assert guard.wait(WAIT_S) == 0
    assert left.wait(WAIT_S) != 0
