"""Cleans up after a launcher that could not do it itself: a process of its own that outlives `pdserve up`, however that ends.

    started by the launcher with a pipe -> waits for its end of file -> kills what is left of the cluster -> removes its files

The kernel closes the pipe when the launcher dies, by SIGKILL too. After an orderly stop there is nothing left to do. What belongs
to the cluster bears its id in the environment, as every process that the launcher started and their children do; nothing else
is ever touched. It imports no more than the standard library: it has to work when everything else is broken.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_VARIABLE = "PDSERVE_CLUSTER_ID"
_PATIENCE_S = 20.0
_EXEC_S = 0.2  # that a program takes at most to get its environment, on a machine that is busy


def members(cluster_id: str, variable: str = _VARIABLE) -> list[int]:
    """Pids of all processes of this user that bear the cluster's id in `variable`, but our own."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _bears(pid, cluster_id, variable)]


def _bears(pid: int, cluster_id: str, variable: str) -> bool:
    return f"{variable}={cluster_id}".encode() in _environment_of(pid).split(b"\0")


def _environment_of(pid: int) -> bytes:
    """Nothing if it is gone, not ours to read, or has none. In the middle of an exec a process has none either, and whoever
    started it goes on by then: it is given the time to have one."""
    deadline_s = time.monotonic() + _EXEC_S
    try:
        while not (environment := Path(f"/proc/{pid}/environ").read_bytes()) and time.monotonic() < deadline_s:
            os.sched_yield()
    except OSError:  # a zombie and a thread of the kernel, too
        return b""
    return environment


def kill_all(cluster_id: str, patience_s: float = _PATIENCE_S, variable: str = _VARIABLE) -> bool:
    """Whether none is left. Looks again until two looks in a row find nobody: a process may start a child while others are
    being listed or killed."""
    deadline_s = time.monotonic() + patience_s
    while pids := members(cluster_id, variable) or members(cluster_id, variable):
        if time.monotonic() > deadline_s:
            return False
        descriptors = []
        for pid in pids:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                descriptors.append(descriptor)
                if _bears(pid, cluster_id, variable):  # the number may have been given to another process meanwhile
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        poller.poll(100)  # wakes when one is gone; what is a zombie has no environment any more
        for descriptor in descriptors:
            os.close(descriptor)
    return True


def remove_all(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.janitor")
    parser.add_argument("--cluster-id", required=True)
    parser.add_argument("--remove", type=Path, action="append", default=[], help="files and folders that go with the cluster")
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the launcher is gone
    clean = kill_all(given.cluster_id)
    remove_all(given.remove)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
