"""One small actor on every other host that has workers: it sees how their processes are, and ends those that do not hear Ray.

    outlive(pid, started)          returns when the process is gone: sooner than Ray says so
    observe(pid, span_s)           what the process does
    end(pid, started) -> (the process ends by itself within the patience | SIGKILL) -> True: it is gone

Ray calls an actor dead as soon as it decided to kill it, while a stopped or hung process lives on, with its memory and its ports.
On the manager's own host the manager holds a pidfd itself; elsewhere this actor does. It lives as long as the manager.
"""

from __future__ import annotations

import signal

from deploy.activity import Activity, observe
from deploy.cluster_state import started_at
from deploy.process_watch import ProcessWatch

_END_TIMEOUT_S = 30.0


class NodeKeeper:
    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    def __repr__(self) -> str:
        return f"keeper {self._node_id[:8]}"

    async def outlive(self, pid: int, started: int) -> None:
        watch = ProcessWatch.of(pid)
        if watch is None:
            return
        try:
            if started_at(pid) == started:
                await watch.wait(None)
        finally:
            watch.close()

    async def observe(self, pid: int, span_s: float) -> Activity:
        return await observe(pid, span_s)

    async def end(self, pid: int, started: int, patience_s: float) -> bool:
        """Whether the process is gone. `started` tells it from another that got its number."""
        watch = ProcessWatch.of(pid)
        if watch is None:
            return True
        try:
            if started_at(pid) != started or await watch.wait(patience_s):
                return True
            watch.send(signal.SIGKILL)
            return await watch.wait(_END_TIMEOUT_S)
        finally:
            watch.close()
