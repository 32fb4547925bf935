"""What is written in one turn of the loop is one write, and nothing is lost, late or out of order."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from router.one_write import HttpProtocol, OneWrite


class Wire(asyncio.Transport):
    """Writes down what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def test_the_parts_of_one_turn_are_one_write() -> None:
    wire = Wire()
    transport = OneWrite(wire, asyncio.get_running_loop())
    transport.write(b"head ")
    transport.write(bytearray(b"body"))
    assert wire.written == []
    await asyncio.sleep(0)
    assert wire.written == [b"head body"]
    transport.write(b"more")
    await asyncio.sleep(0)
    assert wire.written == [b"head body", b"more"]


async def test_what_was_written_goes_out_before_the_end() -> None:
    wire = Wire()
    transport = OneWrite(wire, asyncio.get_running_loop())
    transport.write(b"last words")
    transport.close()
    assert (wire.written, wire.closed, transport.is_closing()) == ([b"last words"], True, True)
    await asyncio.sleep(0)
    assert wire.written == [b"last words"]


async def test_nothing_is_written_to_who_has_gone() -> None:
    gone, aborted = Wire(), Wire()
    for wire in (gone, aborted):
        transport = OneWrite(wire, asyncio.get_running_loop())
        transport.write(b"nobody hears it")
        if wire is aborted:
            transport.abort()
        wire.closed = True
    await asyncio.sleep(0)
    assert gone.written == aborted.written == []
    assert aborted.aborted


async def test_much_is_not_kept() -> None:
    wire = Wire()
    transport = OneWrite(wire, asyncio.get_running_loop())
    pieces = [bytes([number]) * 30_000 for number in range(5)]
    for piece in pieces:
        transport.write(piece)
    assert sum(map(len, wire.written)) >= 60_000
    await asyncio.sleep(0)
    assert b"".join(wire.written) == b"".join(pieces)


async def test_an_answer_is_one_write_and_a_stream_one_for_each_turn() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3 if scope["path"] == "/stream" else 1):
            await send({"type": "http.response.body", "body": b"part %d;" % number, "more_body": True})
            if scope["path"] == "/stream":
                await asyncio.sleep(0.001)
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http=HttpProtocol, lifespan="off", log_config=None)
    config.load()
    for path, parts in (("/", 1), ("/stream", 3)):
        protocol, wire = HttpProtocol(config=config, server_state=ServerState(), app_state={}), Wire()
        protocol.connection_made(wire)
        protocol.data_received(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        async with asyncio.timeout(60):
            while not b"".join(wire.written).endswith(b"\r\n0\r\n\r\n"):
                await asyncio.sleep(0.001)
        assert wire.written[0].startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"part 0;" in wire.written[0]
        assert len(wire.written) == (1 if parts == 1 else 4)
        protocol.connection_lost(None)
