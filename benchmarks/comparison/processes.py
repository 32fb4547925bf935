"""What the kernel says of processes: who descends from whom, and how much of the machine's time went where.

    before = Glance.now(roots)   ... a run ...   Glance.now(roots).since(before) -> Busy(mine, others, stolen), in cores

`others` is what ran on this machine and is neither below one of the roots nor this process: the reason not to believe a figure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Busy:
    """Mean cores in use."""

    mine: float
    others: float
    stolen: float  # by other guests of the host


@dataclass(frozen=True, slots=True)
class Glance:
    at_s: float
    all_s: float
    stolen_s: float
    mine_s: float

    @classmethod
    def now(cls, roots: Iterable[int]) -> Glance:
        user, nice, system, _, _, interrupt, soft_interrupt, stolen = machine_ticks((_PROC / "stat").read_text())
        busy = user + nice + system + interrupt + soft_interrupt
        mine_s = processor_s(roots) + _ticks_of(os.getpid()) / _TICKS_PER_S
        return cls(time.perf_counter(), busy / _TICKS_PER_S, stolen / _TICKS_PER_S, mine_s)

    def since(self, before: Glance) -> Busy:
        seconds = max(self.at_s - before.at_s, 1e-9)
        mine = (self.mine_s - before.mine_s) / seconds
        return Busy(mine, max(0.0, (self.all_s - before.all_s) / seconds - mine), (self.stolen_s - before.stolen_s) / seconds)


def machine_ticks(stat: str) -> list[int]:
    """The first eight columns of /proc/stat's first line."""
    return [int(column) for column in stat.splitlines()[0].split()[1:9]]


def descendants(roots: Iterable[int]) -> list[int]:
    """The roots and all that they and theirs started, as far as it lives."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _fields_of(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def processor_s(roots: Iterable[int]) -> float:
    """Time on cores of these and all below them, so far."""
    return sum(_ticks_of(pid) for pid in descendants(roots)) / _TICKS_PER_S


def _ticks_of(pid: int) -> int:
    """Of the process and of its children that have ended."""
    fields = _fields_of(pid)
    return 0 if fields is None else sum(int(column) for column in fields[11:15])


def _fields_of(pid: int) -> list[str] | None:
    """What stands behind the name in its stat file (state first); None if it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
