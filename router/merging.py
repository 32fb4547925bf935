"""Several streams of events as one: the rests of an answer whose choices go on separately."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from common.errors import PdserveError
from common.rpc import cancel_and_wait

_QUEUED_EVENTS = 64  # while the client is slow

Event = TypeVar("Event")


async def merged(sources: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """The events of all, as they come. The first failure ends all; so does closing this."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield event
        return
    queue: asyncio.Queue[Event | PdserveError | None] = asyncio.Queue(maxsize=_QUEUED_EVENTS)

    async def pump(source: AsyncGenerator[Event, None]) -> None:
        async with aclosing(source) as events:
            try:
                async for event in events:
                    await queue.put(event)
                await queue.put(None)
            except PdserveError as error:
                await queue.put(error)

    tasks = [asyncio.create_task(pump(source), name="rest of an answer") for source in sources]
    try:
        left = len(tasks)
        while left:
            news = await queue.get()
            if isinstance(news, PdserveError):
                raise news
            if news is None:
                left -= 1
            else:
                yield news
    finally:
        for task in tasks:
            await cancel_and_wait(task)
