"""A process of this machine by pidfd: never confused with another that got the same number, and waited for without polling."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress


class ProcessWatch:
    """From `of` until `close`. Works for processes that are not our children."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @classmethod
    def of(cls, pid: int) -> ProcessWatch | None:
        """None if there is no such process. Needs a running loop."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except ProcessLookupError:
            return None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def send(self, number: signal.Signals) -> None:
        """Does nothing to a process that is gone."""
        if not self.ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether the process ended in time; None: however long it lives."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_end(self) -> None:
        # The descriptor stays readable for ever: stop listening, or the loop would spin.
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()
