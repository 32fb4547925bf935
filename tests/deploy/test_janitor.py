"""The janitor against real processes: it kills what bears the cluster's id, all of it, and nothing else."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.janitor import _bears, members

DEAF_TO = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # what may be sent to everything in sight

# A process with a child of its own, both deaf to everything but SIGKILL.
FAMILY = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.fork()
sys.stdout.write("x")
sys.stdout.flush()
signal.pause()
"""


def start_family(stack: ExitStack, cluster_id: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PDSERVE_CLUSTER_ID": cluster_id}
    process = subprocess.Popen([sys.executable, "-c", FAMILY], env=environment, stdout=subprocess.PIPE, start_new_session=True)
    stack.callback(process.__exit__, None, None, None)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1) == b"x"
    assert os.read(process.stdout.fileno(), 1) == b"x"
    return process


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start_janitor(stack: ExitStack, cluster_id: str, *remove: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploy.janitor", "--cluster-id", cluster_id]
    for path in remove:
        command += ["--remove", str(path)]
    janitor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stack.callback(janitor.__exit__, None, None, None)
    stack.callback(janitor.kill)
    return janitor


def wait_until_deaf(process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60.0
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
        if all(ignored >> (number - 1) & 1 for number in DEAF_TO):
            return
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_end_of_the_pipe_ends_the_cluster_and_spares_the_neighbour(stack: ExitStack, tmp_path: Path) -> None:
    ours, theirs = uuid.uuid4().hex, uuid.uuid4().hex
    for _ in range(3):
        start_family(stack, ours)
    start_family(stack, theirs)
    folder, file, kept = tmp_path / "folder", tmp_path / "state.json", tmp_path / "kept"
    (folder / "sub").mkdir(parents=True)
    for path in (file, kept, folder / "sub" / "socket"):
        path.write_text("x")
    janitor = start_janitor(stack, ours, folder, file, tmp_path / "never-was")
    assert len(members(ours)) == 6
    assert janitor.stdin is not None
    janitor.stdin.close()
    assert janitor.wait(60) == 0
    assert members(ours) == []
    assert len(members(theirs)) == 2
    assert (folder.exists(), file.exists(), kept.exists()) == (False, False, True)
    # Only for the clean end of this test: the neighbour's forked child has no handle here.
    cleaner = start_janitor(stack, theirs)
    assert cleaner.stdin is not None
    cleaner.stdin.close()
    assert cleaner.wait(60) == 0


def test_while_the_launcher_lives_it_does_nothing(stack: ExitStack, tmp_path: Path) -> None:
    cluster_id = uuid.uuid4().hex
    family = start_family(stack, cluster_id)
    janitor = start_janitor(stack, cluster_id, tmp_path)
    pidfd = os.pidfd_open(janitor.pid)
    stack.callback(os.close, pidfd)
    wait_until_deaf(janitor)
    for number in DEAF_TO:
        janitor.send_signal(number)
    assert select.select([pidfd], [], [], 0.3)[0] == []
    assert family.poll() is None
    assert len(members(cluster_id)) == 2
    assert janitor.stdin is not None
    janitor.stdin.close()
    assert janitor.wait(60) == 0
    assert members(cluster_id) == []


def test_who_was_started_just_now_is_found(stack: ExitStack) -> None:
    """In the middle of an exec, when its parent goes on already, a process has no environment for a moment. Others stand in line
    for the cores, so that the moment is long; without waiting for it one in six was missed."""
    cluster_id = uuid.uuid4().hex
    for _ in range(3):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        stack.callback(busy.__exit__, None, None, None)
        stack.callback(busy.kill)
    for _ in range(200):
        started = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "PDSERVE_CLUSTER_ID": cluster_id})
        try:
            assert _bears(started.pid, cluster_id, "PDSERVE_CLUSTER_ID")
        finally:
            started.kill()
            started.wait()


def test_who_has_no_environment_is_nobodys(stack: ExitStack) -> None:
    lonely = subprocess.Popen(["/bin/sleep", "60"], env={})
    stack.callback(lonely.__exit__, None, None, None)
    stack.callback(lonely.kill)
    assert not _bears(lonely.pid, uuid.uuid4().hex, "PDSERVE_CLUSTER_ID")
