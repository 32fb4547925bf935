"""What lies in our pool, as it is offered to a peer: frames are taken apart by hand, digests are xxhash's."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from common.errors import TransferBroken
from kvtransfer.digest import piece_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.region import BlockRegion
from kvtransfer.spans import Span, SpanPieces, columns_of
from kvtransfer.transports import offer
from kvtransfer.transports.base import Piece, PieceName
from kvtransfer.transports.offer import Offer
from kvtransfer.transports.shm import LendingSenderLink

LAYERS, LAYER_BYTES, BLOCKS = 4, 4096, 16
BLOCK_BYTES = LAYERS * LAYER_BYTES
NONCE = b"n" * 16
PATIENCE_S = 120.0


@pytest.fixture
def source() -> Iterator[BlockRegion]:
    region = BlockRegion.create_shared(BLOCK_BYTES, BLOCKS)
    region.buffer[:] = random.Random(3).randbytes(region.buffer.nbytes)
    yield region
    region.close()


@pytest.fixture(autouse=True)
def _in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "piece_kernel", lambda: None)  # with it: `native/test_native_pieces.py`


def piece(source: BlockRegion, block: int, first: int = 0, number: int = LAYERS) -> Piece:
    content = source.block(block)[first * LAYER_BYTES : (first + number) * LAYER_BYTES]
    return Piece(PieceName(100 + block, first, number), 1 << 40, content)


class Said(NamedTuple):
    kind: int
    rows: list[tuple[PieceName, int | bytes]]  # with the place, or the digest


def taken_apart(data: bytes) -> list[Said]:
    said = []
    while data:
        magic, version, kind, nonce, count, amount = struct.unpack_from("<4sHH16sII", data)
        assert (magic, version, nonce, amount) == (b"PDKV", 3, NONCE, 0)
        form = {9: "<IHHQ", 5: "<IHH16s"}[kind]
        size = struct.calcsize(form)
        table, data = data[32 : 32 + count * size], data[32 + count * size :]
        assert len(table) == count * size
        said.append(Said(kind, [(PieceName(*row[:3]), row[3]) for row in struct.iter_unpack(form, table)]))
    return said


class Offered:
    def __init__(self, source: BlockRegion) -> None:
        self.source = source
        self.data = b""

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.data += b"".join(map(bytes, buffers))

    def write(self, pieces: Sequence[Piece], stop: Callable[[], bool] = lambda: False) -> list[bytes]:
        return Offer(NONCE, pieces, columns_of(pieces), self.source.address).write(self.send, stop)


def of_all(source: BlockRegion, pieces: Sequence[Piece]) -> list[tuple[PieceName, bytes]]:
    return [(name, piece_digest(content, NONCE, *name)) for name, _, content in pieces]


def places_of(pieces: Sequence[Piece], blocks: Sequence[int]) -> list[tuple[PieceName, int]]:
    return [
        (name, block * BLOCK_BYTES + name.first_layer * LAYER_BYTES) for (name, _, _), block in zip(pieces, blocks, strict=True)
    ]


def test_where_they_are_is_said_first_and_then_what_they_are(source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "STATED_BYTES", 3 * BLOCK_BYTES)
    offered = Offered(source)
    blocks = [7, 2, 3, 15, 0, 9, 1]
    pieces = [piece(source, block) for block in blocks]
    digests = offered.write(pieces)
    ready, *stated = taken_apart(offered.data)
    assert (ready.kind, ready.rows) == (9, places_of(pieces, blocks))
    assert [(said.kind, len(said.rows)) for said in stated] == [(5, 3), (5, 3), (5, 1)]
    assert [row for said in stated for row in said.rows] == of_all(source, pieces)
    assert digests == [digest for _, digest in of_all(source, pieces)]


def test_no_more_is_ready_than_a_frame_holds(source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was ready is stated before more is."""
    monkeypatch.setattr(offer, "MAX_PIECES", 5)
    offered = Offered(source)
    pieces = [piece(source, block, layer, 1) for layer in range(LAYERS) for block in range(3)]
    digests = offered.write(pieces)
    said = taken_apart(offered.data)
    assert [(frame.kind, len(frame.rows)) for frame in said] == [(9, 5), (5, 5), (9, 5), (5, 5), (9, 2), (5, 2)]
    assert [row for frame in said if frame.kind == 5 for row in frame.rows] == of_all(source, pieces)
    assert len(digests) == len(pieces)


def test_a_span_is_offered_as_its_pieces_are(source: BlockRegion) -> None:
    span = Span(1, 2, 2 * LAYER_BYTES, [100, 101], [5 * BLOCK_BYTES + LAYER_BYTES, LAYER_BYTES], [0, 0])
    by_span, by_piece = Offered(source), Offered(source)
    by_span.write(SpanPieces(source, [span]))
    pieces = [
        piece(source, 5, 1, 2)._replace(name=PieceName(100, 1, 2)),
        piece(source, 0, 1, 2)._replace(name=PieceName(101, 1, 2)),
    ]
    by_piece.write(pieces)
    assert by_span.data == by_piece.data != b""


def test_a_stop_takes_effect_between_statements(source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "STATED_BYTES", BLOCK_BYTES)
    offered = Offered(source)
    left = iter([False, False, False, True])
    digests = offered.write([piece(source, block) for block in range(6)], lambda: next(left))
    said = taken_apart(offered.data)
    assert [frame.kind for frame in said] == [9, 5, 5]
    assert digests == [row[1] for frame in said[1:] for row in frame.rows]


def test_nothing_more_is_ready_after_a_stop(source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "MAX_PIECES", 2)
    offered = Offered(source)
    left = iter([False, True])
    assert offered.write([piece(source, block) for block in range(6)], lambda: next(left)) == []
    assert [frame.kind for frame in taken_apart(offered.data)] == [9]


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("said", ["nothing", "a byte", "half", "all but a byte", "all"])
def test_of_what_was_said_ahead_the_rest_follows_whatever_happened_meanwhile(
    source: BlockRegion, monkeypatch: pytest.MonkeyPatch, said: str, stopped: bool
) -> None:
    """Half a frame that nobody ends would make nonsense of all that comes behind it, of other transfers' as well."""
    monkeypatch.setattr(offer, "MAX_PIECES", 4)
    pieces = [piece(source, block) for block in range(6)]
    made, offered = Offer(NONCE, pieces, columns_of(pieces), source.address), Offered(source)
    size = len(made.opening)
    said_bytes = {"nothing": 0, "a byte": 1, "half": size // 2, "all but a byte": size - 1, "all": size}[said]
    offered.data = made.opening[:said_bytes]
    digests = made.write(offered.send, lambda: stopped, said_bytes)
    if stopped:
        assert digests == []
        assert [frame.kind for frame in taken_apart(offered.data)] == ([] if said == "nothing" else [9])
    else:
        assert [(frame.kind, len(frame.rows)) for frame in taken_apart(offered.data)] == [(9, 4), (5, 4), (9, 2), (5, 2)]
        assert digests == [digest for _, digest in of_all(source, pieces)]


def test_a_send_that_fails_ends_it(source: BlockRegion) -> None:
    def fail(buffers: object) -> None:
        raise TransferBroken("gone")

    pieces = [piece(source, 0)]
    with pytest.raises(TransferBroken):
        Offer(NONCE, pieces, columns_of(pieces), source.address).write(fail, lambda: False)


# -- on a link ---------------------------------------------------------------------------------------------------------


class News:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def credited(self, size_bytes: int) -> None:
        """Of no interest here."""

    def renewed(self) -> None:
        """Likewise."""

    def lent(self, num_pieces: int) -> None:
        self.heard.append(f"{num_pieces} lent")

    def taken(self, num_pieces: int) -> None:
        self.heard.append(f"{num_pieces} taken")


class Wire:
    def __init__(self, source: BlockRegion) -> None:
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.far.setblocking(False)
        self.link = LendingSenderLink(near, source)

    async def read(self, size_bytes: int) -> bytes:
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < size_bytes:
                data += await asyncio.get_running_loop().sock_recv(self.far, size_bytes - len(data))
        return data

    async def let_in(self, news: News) -> None:
        opening = asyncio.create_task(self.link.open_writer(NONCE, news))
        await self.read(32)
        self.far.send(Frame(FrameKind.GRANT, NONCE, amount=1 << 30).encode())
        async with asyncio.timeout(PATIENCE_S):
            await opening


@pytest.fixture
async def wire(source: BlockRegion) -> AsyncIterator[Wire]:
    wire = Wire(source)
    yield wire
    await wire.link.close()
    wire.far.close()


async def test_what_is_written_is_lent_until_it_was_taken(wire: Wire, source: BlockRegion) -> None:
    news = News()
    await wire.let_in(news)
    pieces = [piece(source, block) for block in range(3)]
    digests = await wire.link.write(NONCE, pieces, lambda: False)
    assert digests == [digest for _, digest in of_all(source, pieces)]
    assert news.heard == ["3 lent"]
    said = taken_apart(await wire.read(2 * 32 + 3 * 16 + 3 * 24))
    assert [frame.kind for frame in said] == [9, 5]
    wire.far.send(Frame(FrameKind.TAKEN, NONCE, amount=3).encode())
    async with asyncio.timeout(PATIENCE_S):
        while len(news.heard) < 2:
            await asyncio.sleep(0.001)
    assert news.heard == ["3 lent", "3 taken"]


async def test_what_is_ready_is_said_ahead_of_the_lane_only_while_it_has_nothing_to_do(wire: Wire, source: BlockRegion) -> None:
    await wire.let_in(News())
    sent: list[int] = []
    write = Offer.write

    def noted(self: Offer, send: Any, stop: Any, said_bytes: int = 0) -> list[bytes]:
        sent.append(said_bytes)
        return write(self, send, stop, said_bytes)

    frames_bytes = 2 * 32 + 3 * 16 + 3 * 24
    pieces = [piece(source, block) for block in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offer, "write", noted)
        await wire.link.write(NONCE, pieces, lambda: False)
        may_go_on = threading.Event()
        busy = wire.link._lane.start(lambda: may_go_on.wait(PATIENCE_S))
        writing = asyncio.create_task(wire.link.write(NONCE, pieces, lambda: False))
        await asyncio.sleep(0)
        assert await wire.read(frames_bytes)
        with pytest.raises(BlockingIOError):
            wire.far.recv(1)  # somebody else's frame may be half-way out
        may_go_on.set()
        await asyncio.gather(busy, writing)
    assert sent == [32 + 3 * 16, 0]
    assert [frame.kind for frame in taken_apart(await wire.read(frames_bytes))] == [9, 5]


async def test_what_there_is_no_room_for_is_said_by_the_lane(wire: Wire, source: BlockRegion) -> None:
    """The peer does not read: a part of what is ready may be in the socket, and the rest comes when there is room."""
    await wire.let_in(News())
    wire.link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    pieces = [piece(source, block, layer, 1) for block in range(BLOCKS) for layer in range(LAYERS)]
    every = [wire.link.write(NONCE, pieces, lambda: False) for _ in range(40)]
    reading = asyncio.create_task(wire.read(40 * (2 * 32 + len(pieces) * (16 + 24))))
    for write in every:
        await asyncio.sleep(0)
        await write
    said = taken_apart(await reading)
    assert [frame.kind for frame in said] == [9, 5] * 40
    assert [row for frame in said[1::2] for row in frame.rows] == of_all(source, pieces) * 40


async def test_what_was_made_for_the_peer_goes_over_the_socket_and_is_not_lent(wire: Wire, source: BlockRegion) -> None:
    news = News()
    await wire.let_in(news)
    made = memoryview(bytearray(random.Random(5).randbytes(BLOCK_BYTES)))
    for pieces in ([Piece(PieceName(4, 0, LAYERS), 0, made)], [Piece(PieceName(4, 0, LAYERS), 0, made), piece(source, 2)]):
        await wire.link.write(NONCE, pieces, lambda: False)
        payload_bytes = len(pieces) * BLOCK_BYTES
        data = await wire.read(32 + 24 * len(pieces) + payload_bytes)
        assert struct.unpack_from("<H", data, 6) == (FrameKind.BLOCKS,)
        assert data[-payload_bytes:] == b"".join(bytes(sent.source) for sent in pieces)
    assert news.heard == []


async def test_nothing_to_write_is_nothing(wire: Wire) -> None:
    await wire.let_in(News())
    assert await wire.link.write(NONCE, [], lambda: False) == []
