"""The launcher's hold on its janitor (`deploy.janitor`): started before anything else, again when it ends, let go of at the end.

start -> (killed -> start)* -> let_go: it sees the end of its pipe, does what is left to do, and ends
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.cluster_state import started_at
from deploy.ray_environment import CLUSTER_ID_VARIABLE


class JanitorProcess:
    def __init__(self, cluster_id: str, files: Sequence[Path], lock: int) -> None:
        """`files` and folders go with the cluster. It keeps the `lock` until everything is clean."""
        self.files = tuple(files)
        self._command = [sys.executable, "-m", "deploy.janitor", "--cluster-id", cluster_id]
        for path in files:
            self._command += ["--remove", str(path)]
        self._lock = lock
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key != CLUSTER_ID_VARIABLE}
        self._close_pipe()
        # A session of its own: the terminal's Ctrl-C is not for it.
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, env=environment, start_new_session=True, pass_fds=[self._lock]
        )
        return self.process

    @property
    def identity(self) -> tuple[int, int]:
        """Pid, and when it was started."""
        pid = self.process.pid if self.process else 0
        return pid, started_at(pid) or 0

    def let_go(self, timeout_s: float) -> None:
        self._close_pipe()
        if self.process is not None:
            self.process.wait(timeout_s)

    def _close_pipe(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
