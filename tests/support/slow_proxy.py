"""A TCP proxy in front of a Unix socket that delays what comes back, as long as it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class SlowProxy:
    port: int = 0
    delay_s: float = 0.0
    connections: int = 0


@asynccontextmanager
async def slow_proxy(socket: str) -> AsyncIterator[SlowProxy]:
    proxy = SlowProxy()
    handlers: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool) -> None:
        while data := await reader.read(65_536):
            if delayed:
                await asyncio.sleep(proxy.delay_s)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        proxy.connections += 1
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(socket)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(copy(reader, server_writer, delayed=False), copy(server_reader, writer, delayed=True))
        except (OSError, asyncio.CancelledError):
            return
        finally:
            server_writer.close()
            writer.close()
            handlers.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        if handlers:
            await asyncio.wait(handlers)
        await server.wait_closed()
