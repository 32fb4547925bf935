"""Between prefill and decode worker on the data link: passes bytes on until a plan says what goes wrong with a transfer.

    prefill worker --- hello, proof, frames ---> proxy ---> decode worker
                   <-- challenge, verdict, frames ---

It reads the link as its two ends do: authentication first, then frames, so that a fault hits what it means to hit: the table, the
payload, the header, one of two blocks. Faults that break the connection hit every transfer that is open on it; `hits` tells which
transfers were hit and how. Behind a `target` that changes (a restarted decode worker) it stays where it is.
"""

from __future__ import annotations

import asyncio
import enum
import random
import socket
import struct
from collections import Counter, deque
from dataclasses import dataclass, field

from kvtransfer.frames import DESCRIPTOR_BYTES, HEADER_BYTES, MAGIC, FrameKind

_HEADER = struct.Struct("<4sHH16sII")
_HELLO_BYTES = 90  # then two names, whose lengths stand at offset 6
_CHALLENGE_BYTES, _PROOF_BYTES, _VERDICT_BYTES = 32, 32, 49
DELAY_S = 0.08
REORDER_WAIT_S = 0.05
OLD_FRAMES_KEPT = 64
READ_LIMIT_BYTES = 1 << 20


class LinkFault(enum.Enum):
    DELAYED = "frame delayed"
    BYTES_DROPPED = "range of bytes swallowed"
    FRAME_DROPPED = "frame swallowed"
    CLOSE_DROPPED = "CLOSE swallowed"
    DUPLICATED = "frame twice"
    REORDERED = "frame after the next one"
    TRUNCATED = "frame cut off, then the end"
    PAYLOAD_FLIPPED = "byte of the payload flipped"
    TABLE_FLIPPED = "byte of the table flipped"
    HEADER_FLIPPED = "byte of the header flipped"
    SWAPPED = "two blocks swapped"
    REPLAYED = "an old frame again"
    STALE = "an old payload in a new frame"
    BLACK_HOLE = "black hole, both ways"
    BLACK_HOLE_FORWARD = "black hole towards decode"
    BLACK_HOLE_BACK = "black hole towards prefill"
    RESET = "connection reset"
    HALF_CLOSED = "half closed towards decode"
    HALF_CLOSED_BACK = "half closed towards prefill"
    GRANT_DROPPED = "GRANT swallowed"
    GRANT_TWICE = "GRANT twice"
    CREDIT_DROPPED = "credit swallowed"
    REPLY_FLIPPED = "byte of a reply flipped"
    HELLO_FLIPPED = "byte of the authentication flipped"


CORRUPTING = frozenset(
    {
        LinkFault.BYTES_DROPPED,
        LinkFault.FRAME_DROPPED,
        LinkFault.TRUNCATED,
        LinkFault.PAYLOAD_FLIPPED,
        LinkFault.TABLE_FLIPPED,
        LinkFault.HEADER_FLIPPED,
        LinkFault.SWAPPED,
        LinkFault.STALE,
    }
)
"""A transfer that this was done to must not be used."""
_FORWARD = frozenset(LinkFault) - {
    LinkFault.CLOSE_DROPPED,
    LinkFault.GRANT_DROPPED,
    LinkFault.GRANT_TWICE,
    LinkFault.CREDIT_DROPPED,
    LinkFault.REPLY_FLIPPED,
    LinkFault.HALF_CLOSED_BACK,
    LinkFault.HELLO_FLIPPED,
}
_BACKWARD = {
    LinkFault.GRANT_DROPPED: FrameKind.GRANT,
    LinkFault.GRANT_TWICE: FrameKind.GRANT,
    LinkFault.REPLY_FLIPPED: FrameKind.GRANT,
    LinkFault.HALF_CLOSED_BACK: FrameKind.GRANT,
    LinkFault.CREDIT_DROPPED: FrameKind.CREDIT,
}


class _Hung(Exception):
    """The connection is to end now."""


@dataclass(slots=True)
class _Frame:
    kind: int
    nonce: bytes
    count: int
    head: bytes  # header and table
    payload: bytes

    @property
    def data(self) -> bytes:
        return self.head + self.payload


@dataclass(eq=False, slots=True)
class _Connection:
    to_prefill: asyncio.StreamWriter
    to_decode: asyncio.StreamWriter
    open_nonces: set[bytes] = field(default_factory=set)
    held: bytes = b""
    deaf_forward: bool = False
    deaf_back: bool = False


class TcpFaultProxy:
    """Lives from `start` to `close`. `load` changes what goes wrong from now on."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.address = ""
        self.hits: dict[bytes, LinkFault] = {}
        self.corrupted: set[bytes] = set()  # those of `hits` whose content was changed or lost
        self.frames: Counter[str] = Counter()
        self._fault: LinkFault | None = None
        self._share = 0.0
        self._chance = random.Random(0)
        self._occasion: dict[bytes, int] = {}  # how many occasions to let pass; negative: this transfer is spared
        self._old: deque[_Frame] = deque(maxlen=OLD_FRAMES_KEPT)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def load(self, fault: LinkFault | None, *, share: float = 1.0, seed: int = 0) -> None:
        self._fault, self._share, self._chance = fault, share, random.Random(seed)
        self._occasion.clear()

    def take_hits(self) -> tuple[dict[bytes, LinkFault], set[bytes]]:
        taken, self.hits, self.corrupted = (self.hits, self.corrupted), {}, set()
        return taken

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=READ_LIMIT_BYTES)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    def break_all(self) -> None:
        """Ends all connections, e.g. those that a black hole has swallowed."""
        for connection in tuple(self._connections):
            _abort(connection)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.break_all()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- a connection --------------------------------------------------------------------------------------------------

    async def _accepted(self, from_prefill: asyncio.StreamReader, to_prefill: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self.target.rpartition(":")
        try:
            from_decode, to_decode = await asyncio.open_connection(host, int(port), limit=READ_LIMIT_BYTES)
        except OSError:
            to_prefill.close()
            return
        for writer in (to_prefill, to_decode):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(to_prefill, to_decode)
        self._connections.add(connection)
        ways = [
            asyncio.ensure_future(self._forward(from_prefill, to_decode, connection)),
            asyncio.ensure_future(self._back(from_decode, to_prefill, connection)),
        ]
        try:
            await asyncio.wait(ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            self._connections.discard(connection)
            for writer in (to_prefill, to_decode):
                writer.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection) -> None:
        try:
            hello = await source.readexactly(_HELLO_BYTES)
            own, wanted = struct.unpack_from("<HH", hello, 6)
            hello += await source.readexactly(own + wanted)
            if self._fault is LinkFault.HELLO_FLIPPED and self._chance.random() < 0.7:
                self.frames["authentication"] += 1
                hello = _flip(hello, self._chance.randrange(len(hello)))
            await _send(sink, hello)
            await _send(sink, await source.readexactly(_PROOF_BYTES))
            while True:
                frame = await _read_frame(source)
                self.frames[FrameKind(frame.kind).name] += 1
                if frame.kind == FrameKind.OPEN:
                    connection.open_nonces.add(frame.nonce)
                elif frame.kind == FrameKind.CLOSE:
                    connection.open_nonces.discard(frame.nonce)
                data = frame.data
                if frame.kind == FrameKind.BLOCKS:
                    data = await self._spoil(frame, sink, connection)
                    self._old.append(frame)
                elif frame.kind == FrameKind.CLOSE and self._wants(frame.nonce, {LinkFault.CLOSE_DROPPED}):
                    self.hits[frame.nonce] = LinkFault.CLOSE_DROPPED
                    data = b""
                if connection.deaf_forward:
                    continue
                await _send(sink, data)
                if connection.held and frame.kind != FrameKind.BLOCKS:
                    held, connection.held = connection.held, b""
                    await _send(sink, held)
        except (asyncio.IncompleteReadError, ConnectionError):
            await _end(sink, connection.held)
        except _Hung:
            _abort(connection)

    async def _back(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection) -> None:
        try:
            await _send(sink, await source.readexactly(_CHALLENGE_BYTES))
            await _send(sink, await source.readexactly(_VERDICT_BYTES))
            while True:
                frame = await _read_frame(source)
                self.frames[FrameKind(frame.kind).name] += 1
                data = frame.data
                fault = self._fault
                if fault in _BACKWARD and _BACKWARD[fault] == frame.kind and self._wants(frame.nonce, {fault}):
                    self.hits[frame.nonce] = fault
                    match fault:
                        case LinkFault.GRANT_DROPPED | LinkFault.CREDIT_DROPPED:
                            data = b""
                        case LinkFault.GRANT_TWICE:
                            data = 2 * data
                        case LinkFault.REPLY_FLIPPED:
                            data = _flip(data, self._chance.randrange(len(data)))
                        case _:
                            self._hit_all(connection, fault)
                            await _end(sink, b"")
                            connection.deaf_back = True
                if not connection.deaf_back:
                    await _send(sink, data)
        except (asyncio.IncompleteReadError, ConnectionError):
            await _end(sink, b"")

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _wants(self, nonce: bytes, among: set[LinkFault] | frozenset[LinkFault]) -> LinkFault | None:
        if self._fault not in among or nonce in self.hits:
            return None
        if nonce not in self._occasion:
            hit = self._chance.random() < self._share
            self._occasion[nonce] = self._chance.choice((0, 0, 0, 1, 2)) if hit else -1
        if self._occasion[nonce] < 0:
            return None
        self._occasion[nonce] -= 1
        return self._fault if self._occasion[nonce] < 0 else None

    def _hit(self, nonce: bytes, fault: LinkFault) -> None:
        self.hits[nonce] = fault
        if fault in CORRUPTING:
            self.corrupted.add(nonce)

    def _hit_all(self, connection: _Connection, fault: LinkFault) -> None:
        for nonce in connection.open_nonces:
            self.hits.setdefault(nonce, fault)

    async def _spoil(self, frame: _Frame, sink: asyncio.StreamWriter, connection: _Connection) -> bytes:
        """What is to be sent in place of the frame."""
        fault = self._wants(frame.nonce, _FORWARD)
        if fault is None:
            return frame.data
        chance = self._chance
        payload = frame.payload
        spoiled = frame.data
        match fault:
            case LinkFault.DELAYED:
                await asyncio.sleep(DELAY_S)
            case LinkFault.BYTES_DROPPED:
                start = chance.randrange(len(payload) - 1)
                cut = payload[:start] + payload[start + chance.randrange(1, len(payload) - start) :]
                spoiled = frame.head + cut
                self._hit_all(connection, fault)  # nothing behind it is where it should be
            case LinkFault.FRAME_DROPPED:
                spoiled = b""
            case LinkFault.DUPLICATED:
                spoiled = 2 * spoiled
            case LinkFault.REORDERED:
                held, connection.held = connection.held, spoiled
                spoiled = held
            case LinkFault.TRUNCATED:
                self._hit_all(connection, fault)
                self._hit(frame.nonce, fault)
                await _send(sink, spoiled[: chance.randrange(1, len(spoiled))])
                await _end(sink, b"")
                connection.deaf_forward = True
            case LinkFault.PAYLOAD_FLIPPED:
                spoiled = frame.head + _flip(payload, chance.randrange(len(payload)))
            case LinkFault.TABLE_FLIPPED:
                spoiled = _flip(spoiled, HEADER_BYTES + chance.randrange(frame.count * DESCRIPTOR_BYTES))
                self._hit_all(connection, fault)  # a table that adds up no more ends the link
            case LinkFault.HEADER_FLIPPED:
                spoiled = _flip(spoiled, chance.randrange(HEADER_BYTES))
                self._hit_all(connection, fault)
            case LinkFault.SWAPPED:
                parts = _equal_parts(payload, frame.count)
                parts[0], parts[-1] = parts[-1], parts[0]
                if b"".join(parts) == payload:
                    return spoiled
                spoiled = frame.head + b"".join(parts)
            case LinkFault.REPLAYED:
                if not self._old:
                    return spoiled
                spoiled = chance.choice(self._old).data + spoiled
            case LinkFault.STALE:
                # Frames differ in size by what shared a step: an old one lies over as much of this one as both have.
                overlaid = (old.payload[: len(payload)] + payload[len(old.payload) :] for old in self._old)
                differing = [stale for stale in overlaid if stale != payload]
                if not differing:
                    self._occasion[frame.nonce] = 0  # nothing is old yet: the transfer's next frame
                    return spoiled
                spoiled = frame.head + chance.choice(differing)
            case LinkFault.BLACK_HOLE | LinkFault.BLACK_HOLE_FORWARD | LinkFault.BLACK_HOLE_BACK:
                self._hit_all(connection, fault)
                connection.deaf_forward = fault is not LinkFault.BLACK_HOLE_BACK
                connection.deaf_back = fault is not LinkFault.BLACK_HOLE_FORWARD
            case LinkFault.RESET:
                self._hit_all(connection, fault)
                raise _Hung
            case LinkFault.HALF_CLOSED:
                self._hit_all(connection, fault)
                await _end(sink, b"")
                connection.deaf_forward = True
            case _:
                raise AssertionError(fault)
        self._hit(frame.nonce, fault)
        return spoiled


async def _read_frame(source: asyncio.StreamReader) -> _Frame:
    header = await source.readexactly(HEADER_BYTES)
    magic, _, kind, nonce, count, amount = _HEADER.unpack(header)
    assert magic == MAGIC, "the proxy does not understand this link any more"
    table = await source.readexactly(count * DESCRIPTOR_BYTES)
    payload = await source.readexactly(amount) if kind == FrameKind.BLOCKS else b""
    return _Frame(kind, nonce, count, header + table, payload)


async def _send(sink: asyncio.StreamWriter, data: bytes) -> None:
    sink.write(data)
    await sink.drain()


async def _end(sink: asyncio.StreamWriter, last: bytes) -> None:
    try:
        if last:
            sink.write(last)
        if sink.can_write_eof() and not sink.is_closing():
            sink.write_eof()
            await sink.drain()
    except (ConnectionError, OSError):
        return


def _abort(connection: _Connection) -> None:
    """RST to both sides, not FIN."""
    for writer in (connection.to_prefill, connection.to_decode):
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x20]) + data[position + 1 :]


def _equal_parts(payload: bytes, count: int) -> list[bytes]:
    """Pieces of one frame as the proxy sees them; a single one in two halves."""
    number = max(2, count)
    size = len(payload) // number
    return [payload[index * size : (index + 1) * size] for index in range(number - 1)] + [payload[(number - 1) * size :]]
