"""Log files: one per process in a folder per run, bounded in size.

    <folder>/<process>.jsonl       the newest lines; appended to
    <folder>/<process>.1.jsonl     those before, once the first file was half of what is allowed

A restarted process goes on with the file of the one before it. A line is written at once and whole: nothing is lost when the
process is killed, and processes of one name do not mix. A disk that is full costs lines, never a request.

This module does not know what a line says (`common.logs`) nor who reads it (`deploy.logs`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from pathlib import Path

SUFFIX = ".jsonl"
_OLD = ".1"
_SLASH = "+"  # no process has one in its name


def file_of(folder: Path, process: str) -> Path:
    """`process` without its incarnation, for the file is that of all of them."""
    return folder / f"{process.partition('#')[0].replace('/', _SLASH)}{SUFFIX}"


def process_of(path: Path) -> str:
    return path.name.removesuffix(SUFFIX).removesuffix(_OLD).replace(_SLASH, "/")


def older(path: Path) -> Path:
    """Where the lines are that were in `path` before it began anew."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}{_OLD}{SUFFIX}")


def is_older(path: Path) -> bool:
    return path.name.endswith(f"{_OLD}{SUFFIX}")


class LogFile:
    """For the life of the process, and for any of its threads. What cannot be written is dropped."""

    def __init__(self, folder: Path, process: str, *, max_bytes: int) -> None:
        """Raises OSError if the file cannot be made."""
        self._path = file_of(folder, process)
        self._half_bytes = max(1, max_bytes // 2)
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._descriptor = -1
        self._open()

    def write(self, line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        with self._lock, contextlib.suppress(OSError):
            if os.fstat(self._descriptor).st_size + len(data) > self._half_bytes:
                self._begin_anew()
            os.write(self._descriptor, data)

    def catch_crashes(self) -> None:
        """From now on the stacks of a process that crashes in native code end in this file, as plain text."""
        faulthandler.enable(self._descriptor)

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _begin_anew(self) -> None:
        # Another process of the same name may have done so already; then its file is ours as well.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                os.replace(self._path, older(self._path))
        self._open()

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._descriptor < 0:
            self._descriptor = descriptor
        else:
            # The number stays: whoever was given it, such as the handler of crashes, writes to the new file.
            os.dup2(descriptor, self._descriptor, inheritable=False)
            os.close(descriptor)
