"""What a process does that does not answer: the kernel tells one that hangs from one that nobody lets work.

    look_at(pid) -> Look ... a moment ... look_at(pid) -> Look      what_it_did(before, after) -> Activity

A thread that is ready to run has its state R, whether it has a core or waits for one, and the time of both is counted. So on a
machine with far too much to do, a worker that would answer is seen to wait; one that was stopped, or whose threads wait for each
other, is not. It knows neither workers nor health checks (`deploy.silence`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Threads of libraries wake up now and then in a process that hangs, too.
_LEAST_SHARE = 0.2


class Activity(StrEnum):
    WORKING = "working"  # it computes, or waits for a core or a disk
    ASLEEP = "asleep"  # it waits for nothing that this machine could give
    STOPPED = "stopped"
    GONE = "gone"
    UNHEARD = "unheard"  # nobody on its host says
    UNSURE = "unheard by a busy host"  # nobody says, and who asked was kept waiting for a core himself


@dataclass(frozen=True, slots=True)
class Look:
    states: str  # a letter for each thread, as in /proc
    wanted_core_s: float  # of all threads: on a core, and waiting for one
    waited_s: float = 0.0  # the second of the two


def look_at(pid: int) -> Look | None:
    """None if there is no such process."""
    states, wanted_core_ns, waited_ns = "", 0, 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                state = (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
                on_core_ns, waiting_ns = (thread / "schedstat").read_text(encoding="ascii").split()[:2]
            except OSError:
                continue  # a thread that has just ended, or a kernel that does not count
            states += state
            wanted_core_ns += int(on_core_ns) + int(waiting_ns)
            waited_ns += int(waiting_ns)
    except OSError:
        return None
    return Look(states, wanted_core_ns / 1e9, waited_ns / 1e9)


def what_it_did(before: Look | None, after: Look | None, span_s: float) -> Activity:
    if before is None or after is None or not set(after.states) - set("ZX"):
        return Activity.GONE
    if not set(after.states) - set("TtZX"):
        return Activity.STOPPED
    if set(before.states + after.states) & set("RD") or after.wanted_core_s - before.wanted_core_s >= _LEAST_SHARE * span_s:
        return Activity.WORKING
    return Activity.ASLEEP


def was_kept_waiting(before: Look | None, after: Look | None, span_s: float) -> bool:
    """Whether it lacked cores. Who does cannot tell a host that is gone from one that is as busy as its own."""
    return before is not None and after is not None and after.waited_s - before.waited_s >= _LEAST_SHARE * span_s


async def observe(pid: int, span_s: float) -> Activity:
    before = look_at(pid)
    await asyncio.sleep(span_s)
    return what_it_did(before, look_at(pid), span_s)
