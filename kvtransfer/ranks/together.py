"""Several calls at once, one for each rank: all of them, or the first that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

from common.errors import HandoffError

Result = TypeVar("Result")


async def all_of(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """What they return, in their order. When one raises the others are cancelled, and its error is raised once they have ended;
    likewise when this is cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if not tasks:
        return []
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _end(tasks)
    for task in ended:
        task.result()  # the first error is among those that had ended then
    return [task.result() for task in tasks]


async def settled(calls: Iterable[Awaitable[None]]) -> None:
    """Returns when all have ended. A HandoffError is an end: the rank is gone, and with it what it did."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not isinstance(task.exception(), HandoffError):
            task.result()


async def _end(tasks: Sequence[asyncio.Future[Result]]) -> None:
    for task in tasks:
        task.cancel()  # of no effect if it is done
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved: only the first error is anybody's affair
