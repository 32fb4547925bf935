"""Waits until something in a folder changed: inotify, for which Python has no module of its own.

Where the kernel gives no watch (its limit is reached), a wait is cut short instead, and the folder looked at twice a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
from pathlib import Path
from types import TracebackType

_IN_MODIFY = 0x002  # of any file in the folder, one that is new or has another name by now among them
_EVENTS_BYTES = 64 * 1024
_BLIND_WAIT_S = 0.5


class FolderWatch:
    """A context. Changes since the last `wait`, or since it was entered, end the next one at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> FolderWatch:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor >= 0 and libc.inotify_add_watch(self._descriptor, os.fsencode(self._folder), _IN_MODIFY) < 0:
            self.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def wait(self, timeout_s: float, *, also: int | None = None) -> bool:
        """Returns after a change, when the descriptor `also` is readable, or after the time; whether it was one of the first."""
        waiting = [descriptor for descriptor in (self._descriptor, also) if descriptor is not None and descriptor >= 0]
        if self._descriptor < 0:
            timeout_s = min(timeout_s, _BLIND_WAIT_S)
        woken, _, _ = select.select(waiting, [], [], timeout_s)
        if self._descriptor >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self._descriptor, _EVENTS_BYTES)
        return bool(woken)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
