"""Servers that are up and not measured: how busy they may be, and when they have come to rest.

What a server does between requests is its own affair, but what it still does after its last answer is taken from whoever is
measured next: vllm's worker goes on spinning for a second, which cost pdserve a third of a run. So a run waits for all others to
come to rest, and tells what they used meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.comparison.processes import processor_s

MOST_IDLE_CORES = 0.25  # of all of them together: more than they use while nobody asks them anything
_LOOK_S, _TIMEOUT_S = 0.25, 20.0


async def at_rest(pids: Sequence[int], *, timeout_s: float = _TIMEOUT_S) -> None:
    """Until these and their descendants are idle; or for as long as is worth waiting, and then the run itself will tell."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while loop.time() < deadline_s:
        before_s, began_s = processor_s(pids), loop.time()
        await asyncio.sleep(_LOOK_S)  # foreign processes tell nobody what they do
        if processor_s(pids) - before_s <= MOST_IDLE_CORES * (loop.time() - began_s):
            return
