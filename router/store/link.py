"""One connection to Redis that many callers share: commands go out in the order of the calls, and so the answers come back.

    open -> run (a sender and a receiver, until one of them fails) -> close

A caller that stops waiting leaves the connection as it is: its answer is read and thrown away when it comes. So no request
opens a connection, and a Redis that hangs for a moment costs none. When an answer is overdue for `stall_s`, or the
connection breaks, `run` raises ConnectionError and every caller gets it; a link is not opened twice.

The commands of one call are sent together, with nobody else's between them: MULTI ... EXEC may be a call. It does not know
what the commands mean.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

Command = tuple[bytes | str | int, ...]
Reply = Any
"""Bytes, an int, None, a list of replies, or a `redis.exceptions.ResponseError` for a command that was refused."""

_MAX_PENDING = 4096


@dataclass(slots=True)
class _Call:
    commands: Sequence[Command]
    answer: asyncio.Future[list[Reply]] = field(repr=False)
    replies: list[Reply] = field(default_factory=list)


class Link:
    def __init__(self, connection: AbstractConnection, *, stall_s: float) -> None:
        self._connection = connection
        self._stall_s = stall_s
        self._unsent: list[_Call] = []
        self._pending: deque[_Call] = deque()  # sent or about to be, and not fully answered
        self._wake_sender = asyncio.Event()
        self._wake_receiver = asyncio.Event()
        self._is_broken = False

    async def open(self, timeout_s: float) -> None:
        """Raises ConnectionError."""
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.connect()
        except (RedisError, OSError, TimeoutError) as error:
            raise ConnectionError(str(error) or "no connection in time") from error

    async def run(self) -> None:
        """Serves calls. Ends by cancellation, or with ConnectionError."""
        try:
            await together(self._send(), self._receive())
        finally:
            self._is_broken = True
            for call in self._pending:
                call.answer.set_exception(ConnectionError("the connection to the store is lost"))
                call.answer.exception()  # nobody may be waiting for it
            self._pending.clear()

    async def close(self) -> None:
        self._is_broken = True
        await self._connection.disconnect(nowait=True)

    def call(self, commands: Sequence[Command]) -> asyncio.Future[list[Reply]]:
        """One reply for each command, or ConnectionError when the link ends. To be waited for with `answer_within` alone."""
        answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        if self._is_broken or len(self._pending) >= _MAX_PENDING:
            answer.set_exception(ConnectionError("the connection to the store is lost or far behind"))
            answer.exception()
            return answer
        call = _Call(commands, answer)
        self._unsent.append(call)
        self._pending.append(call)
        self._wake_sender.set()
        self._wake_receiver.set()
        return answer

    async def _send(self) -> None:
        from redis.exceptions import RedisError

        while True:
            await self._wake_sender.wait()
            self._wake_sender.clear()
            calls, self._unsent = self._unsent, []
            commands = [command for call in calls for command in call.commands]
            if not self._connection.is_connected:  # the library would silently connect again, to who knows what
                raise ConnectionError("the connection was closed")
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
            except (RedisError, OSError) as error:
                raise ConnectionError(str(error) or "nothing can be sent") from error

    async def _receive(self) -> None:
        from redis.exceptions import RedisError, ResponseError

        while True:
            while not self._pending:
                self._wake_receiver.clear()
                await self._wake_receiver.wait()
            call = self._pending[0]
            reply: Reply
            try:
                async with asyncio.timeout(self._stall_s):
                    reply = await self._connection.read_response(disable_decoding=True, timeout=math.inf)
            except ResponseError as error:
                reply = error
            except (RedisError, OSError) as error:
                raise ConnectionError(str(error) or "no answer in time") from error
            call.replies.append(reply)
            if len(call.replies) == len(call.commands):
                self._pending.popleft()
                call.answer.set_result(call.replies)


async def answer_within(answer: asyncio.Future[list[Reply]], timeout_s: float) -> list[Reply]:
    """Raises TimeoutError or ConnectionError. The link goes on either way."""
    await asyncio.wait((answer,), timeout=timeout_s)
    for _ in range(3):
        # After a pause of the event loop the timer may come before an answer that has long been here to be read.
        if answer.done():
            return answer.result()
        await asyncio.sleep(0)
    if answer.done():
        return answer.result()
    raise TimeoutError("no answer from the store in time")


async def together(*works: Coroutine[Any, Any, None]) -> None:
    """Runs them until one ends, then ends the others; raises what the first one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        errors = {task: task.exception() for task in tasks if not task.cancelled()}
    for task in done:
        error = errors.get(task)
        if error is not None:
            raise error
