"""Servers that are up and not measured: how busy they may be, and when they have come to rest.

What a server does between requests is its own affair, but what it still does after its last answer is taken from whoever is
measured next: vllm's worker goes on spinning for a second, which cost pdserve a third of a run. So a run waits for all others to
come to rest, and tells what they used meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from benchmarks.comparison.processes import processor_s

MOST_IDLE_CORES = 0.15  # of each: twice what one uses while nobody asks it anything, and far from what one that spins uses
_LOOK_S, _TIMEOUT_S = 0.25, 20.0


async def at_rest(pids: Sequence[int], *, timeout_s: float = _TIMEOUT_S) -> None:
    """Until these and their descendants are idle; or for as long as is worth waiting, and then the run itself will tell."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while loop.time() < deadline_s:
        before, began_s = used_s(pids), loop.time()
        await asyncio.sleep(_LOOK_S)  # foreign processes tell nobody what they do
        if busiest_cores(before, used_s(pids), loop.time() - began_s) <= MOST_IDLE_CORES:
            return


def used_s(pids: Sequence[int]) -> dict[int, float]:
    """By each of these and its descendants, since they began."""
    return {pid: processor_s([pid]) for pid in pids}


def busiest_cores(before: Mapping[int, float], after: Mapping[int, float], elapsed_s: float) -> float:
    """What the busiest of them used meanwhile."""
    return max((after[pid] - before[pid] for pid in before), default=0.0) / elapsed_s
