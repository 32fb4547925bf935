"""Ranks that are forked from a process which has imported what they need: torch takes each of them seconds otherwise.

    test process --- order, descriptors --->  zygote  --- fork --->  rank (the program, arguments and descriptors of the order)
                 <------ pid, pidfd --------
                 ------- reap ------------->

`forked_ranks` has groups use it in place of `subprocess.Popen`; what they say is to be started, and how they watch and end it,
stays theirs. What differs is the parent, whose end a rank would not survive: it is the zygote, and that ends with the test
process. How a rank is really started, and what becomes of it when its worker is killed, other tests look at.

The zygote starts with the first rank. It has one thread, or it refuses to work: only so is a fork a clean copy.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 131_072
MAX_DESCRIPTORS = 64
IMPORTED = ("common.engine.loader", "decode_worker.rank_process", "prefill_worker.rank_process")
_TESTS = Path(__file__).resolve().parents[1]


class ForkedRank:
    """As much of a `subprocess.Popen` as a group uses."""

    def __init__(self, zygote: Zygote, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._pidfd: int | None = pidfd

    def send_signal(self, number: int) -> None:
        if self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout: float | None = None) -> None:
        if self._pidfd is None:
            return
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        os.close(self._pidfd)
        self._pidfd = None
        self._zygote.reap(self.pid)


class Zygote:
    """Used from any thread. `close` ends it, and the kernel every rank that is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # an order and its answer belong together
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(self, command: Sequence[str], *, stdin: int, pass_fds: Sequence[int], env: Mapping[str, str]) -> ForkedRank:
        """Called as `subprocess.Popen` is, with `python -m program --control N --parent PID`."""
        program, arguments = command[2], list(command[3:])
        assert command[:2] == [sys.executable, "-m"]
        assert stdin == subprocess.DEVNULL
        with self._lock:
            if self._process is None:
                self._start()
            assert self._process is not None
            arguments[arguments.index("--parent") + 1] = str(self._process.pid)
            order = {"program": program, "arguments": arguments, "numbers": list(pass_fds), "environment": dict(env)}
            answer, (pidfd,) = self._ask(order, pass_fds)
        return ForkedRank(self, answer["pid"], pidfd)

    def reap(self, pid: int) -> None:
        with self._lock:
            self._ask({"reap": pid}, [])

    def close(self) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(ANSWER_TIMEOUT_S)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.forked_ranks", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS)))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket.settimeout(START_TIMEOUT_S)
        hello = json.loads(self._socket.recv(MAX_MESSAGE_BYTES))
        assert hello == {"threads": 1}
        self._socket.settimeout(ANSWER_TIMEOUT_S)

    def _ask(self, order: Mapping[str, object], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        assert self._socket is not None
        socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
        data, received, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        return json.loads(data), received


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Within it, other ranks of this process's workers are forked."""
    zygote = Zygote()
    with pytest.MonkeyPatch.context() as patch:
        shim = SimpleNamespace(Popen=zygote.fork, TimeoutExpired=subprocess.TimeoutExpired, DEVNULL=subprocess.DEVNULL)
        patch.setattr("common.engine.parallel.group.subprocess", shim)
        yield
    zygote.close()


# -- the zygote --------------------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    orders = socket.socket(fileno=fd)
    orders.send(json.dumps({"threads": len(os.listdir("/proc/self/task"))}).encode())
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not data:
            return
        order = json.loads(data)
        if "reap" in order:
            os.waitpid(order["reap"], 0)
            orders.send(b"{}")
            continue
        pid = os.fork()
        if pid == 0:
            orders.close()
            _become(order, descriptors)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(orders, [json.dumps({"pid": pid}).encode()], [pidfd])
        for descriptor in (pidfd, *descriptors):
            os.close(descriptor)


def _become(order: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """The rank. Descriptors get the numbers that they have in the process which asked."""
    numbers = order["numbers"]
    beyond = max(numbers) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, beyond) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["program"], *order["arguments"]]
    code = 1
    try:
        runpy.run_module(order["program"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
