"""A process that has imported everything a worker needs and does nothing but fork workers, each in some ten milliseconds.

    test process --- order, two sockets --->  zygote  --- fork --->  worker (a process of its own, with one pipe to the test)
                 <---------- pid ----------
                 ---------- reap ---------->          waits for a worker that was killed or has ended

The zygote has one thread, no event loop and no gRPC core: only so is a fork a clean copy. It says so once, when it is ready, and
refuses to work if it is not so. Workers die with it, and it dies with the test process: nothing stays behind, whatever is killed.

This module is both sides: `Zygote` is the test process's handle, `main` the process itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from common.errors import ClusterError

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 20.0
MAX_MESSAGE_BYTES = 65_536
_PR_SET_PDEATHSIG = 1
_TESTS = Path(__file__).resolve().parents[2]


class Zygote:
    """Made once, used from any thread; `close` ends it and every worker that it made."""

    def __init__(self, log: Path) -> None:
        """`log` gets what zygote and workers write to stderr."""
        self._lock = threading.Lock()  # an order and its answer belong together
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS))),
        }
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.chaos.zygote", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        theirs.close()
        self._socket = ours
        ours.settimeout(START_TIMEOUT_S)
        hello = self._receive()
        if hello.get("threads") != 1:
            self.close()
            raise ClusterError(f"the zygote is not clean: {hello}")
        ours.settimeout(ANSWER_TIMEOUT_S)

    def fork(self, order: dict[str, Any], control: socket.socket, halts: socket.socket) -> int:
        """A new worker; returns its pid. The sockets are the worker's ends; the caller closes its copies."""
        message = json.dumps({"fork": order}).encode()
        with self._lock:
            socket.send_fds(self._socket, [message], [control.fileno(), halts.fileno()])
            pid: int = self._receive()["pid"]
        return pid

    def reap(self, pid: int) -> int:
        """Buries a worker that has ended, or is just ending; its exit code, negative for a signal."""
        with self._lock:
            self._socket.send(json.dumps({"reap": pid}).encode())
            code: int = self._receive()["code"]
        return code

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(ANSWER_TIMEOUT_S)

    def _receive(self) -> dict[str, Any]:
        data = self._socket.recv(MAX_MESSAGE_BYTES)
        if not data:
            raise ClusterError("the zygote has ended")
        found: dict[str, Any] = json.loads(data)
        return found


def main(fd: int) -> None:
    """The zygote."""
    from support.chaos import worker_process

    _die_with_parent()
    orders = socket.socket(fileno=fd)
    orders.send(json.dumps({"threads": len(os.listdir("/proc/self/task"))}).encode())
    workers: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, MAX_MESSAGE_BYTES, 2)
        if not data:
            break
        message = json.loads(data)
        if "reap" in message:
            _, status = os.waitpid(message["reap"], 0)
            workers.discard(message["reap"])
            orders.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
            continue
        pid = os.fork()
        if pid == 0:
            orders.close()
            _die_with_parent()
            control, halts = (socket.socket(fileno=descriptor) for descriptor in descriptors)
            worker_process.run(message["fork"], control, halts)
            sys.stderr.flush()
            os._exit(0)
        workers.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps({"pid": pid}).encode())
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
