"""Announcements that the compiled library reads and looks after by itself: what it reports, and what it leaves to whoever reads
frames. The digests that it should find are worked out here by xxhash."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.clock import SystemClock
from common.config import pdserve_home
from common.errors import DigestMismatch, TicketRefused, TransferBroken
from common.native_build import COMPILERS, build_library, find_compiler
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer import incoming as incoming_side
from kvtransfer.digest import piece_digest
from kvtransfer.frames import HEADER_BYTES, MAX_TABLE_BYTES, Frame, FrameKind, encode_table
from kvtransfer.incoming import Incoming
from kvtransfer.native import choice, following
from kvtransfer.native.following import Following, PoolPlaces
from kvtransfer.native.kernel import PieceKernel, check_kernel
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.transports import receiving
from kvtransfer.transports.base import PeerName, PieceName, Written
from kvtransfer.transports.receiving import StreamReceiverLink

pytestmark = [
    pytest.mark.long,  # a compiler runs
    pytest.mark.skipif(find_compiler() is None, reason=f"none of {', '.join(COMPILERS)}"),
]
LAYOUT = KVLayout("m", "t", 3, 1, 8, 16, "float32", True)
LAYER_BYTES = LAYOUT.block_bytes // 3
BLOCKS = 20
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def kernel() -> PieceKernel:
    path: Path = build_library(choice._SOURCE, pdserve_home() / "kernels", check_kernel)
    return PieceKernel(path)


@pytest.fixture
def pool() -> Iterator[BlockRegion]:
    region = BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)
    region.buffer[:] = random.Random(1).randbytes(region.buffer.nbytes)
    yield region
    region.close()


def ticket_for(nonce: bytes, blocks: tuple[int, ...], first_block: int = 0, part: tuple[int, ...] = ()) -> Ticket:
    num_tokens = 16 * (first_block + len(blocks))
    return Ticket(nonce, "r", 0, "d", 1, "p", 1, first_block, blocks, num_tokens, LAYOUT.fingerprint, 60.0, part)


def bytes_of(pool: BlockRegion, ticket: Ticket, name: PieceName) -> memoryview:
    block = pool.block(ticket.blocks[name.logical_block - ticket.first_block])
    return block[name.first_layer * LAYER_BYTES : (name.first_layer + name.num_layers) * LAYER_BYTES]


def announced(pool: BlockRegion, ticket: Ticket, *names: PieceName) -> bytes:
    digests = [piece_digest(bytes_of(pool, ticket, name), ticket.nonce, *name) for name in names]
    return Frame(FrameKind.WRITTEN, ticket.nonce, len(names)).encode() + encode_table(names, digests)


@dataclass
class Followed:
    nonce: bytes
    pieces: list[Written]
    left: bytes
    drained: bool


class Wire:
    """A socket, an inbox, and who follows what comes."""

    def __init__(self, kernel: PieceKernel, pool: BlockRegion) -> None:
        self.far, self.near = socket.socketpair()
        self.near.setblocking(False)
        self.inbox = memoryview(bytearray(HEADER_BYTES + MAX_TABLE_BYTES))
        places = PoolPlaces(pool.address, LAYOUT.block_bytes, LAYER_BYTES, LAYOUT.num_layers)
        self.following = Following(kernel, self.near.fileno(), places, self.inbox)
        self._left = (0, 0)

    def follow(self) -> Followed:
        nonce, found, begin, end, drained = self.following.follow(*self._left)
        pieces = list(found)
        self._left = begin, end
        return Followed(nonce, pieces, bytes(self.inbox[begin:end]), drained)

    def passed(self, size_bytes: int) -> None:
        """Whoever reads frames has taken so much."""
        self._left = self._left[0] + size_bytes, self._left[1]


@pytest.fixture
def wire(kernel: PieceKernel, pool: BlockRegion) -> Iterator[Wire]:
    wire = Wire(kernel, pool)
    yield wire
    wire.far.close()
    wire.near.close()


def test_announcements_of_a_writer_are_one_report(wire: Wire, pool: BlockRegion) -> None:
    ticket = ticket_for(b"a" * 16, (3, 17, 9), first_block=5)
    names = [PieceName(5, 0, 3), PieceName(7, 0, 1), PieceName(6, 0, 3), PieceName(7, 1, 2)]
    wire.following.let_in(ticket)
    wire.far.sendall(announced(pool, ticket, *names[:1]) + announced(pool, ticket, *names[1:]))
    followed = wire.follow()
    assert (followed.nonce, followed.left) == (ticket.nonce, b"")
    digests = [piece_digest(bytes_of(pool, ticket, name), ticket.nonce, *name) for name in names]
    assert followed.pieces == [Written(name, digest, None, digest) for name, digest in zip(names, digests, strict=True)]
    assert wire.follow() == Followed(b"", [], b"", True)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_parts_that_they_come_in(wire: Wire, pool: BlockRegion, seed: int) -> None:
    chance = random.Random(seed)
    ticket = ticket_for(b"a" * 16, tuple(chance.sample(range(BLOCKS), 12)))
    wire.following.let_in(ticket)
    names = [PieceName(block, layer, 1) for block in range(12) for layer in range(3)]
    chance.shuffle(names)
    data = b"".join(announced(pool, ticket, *names[start : start + 4]) for start in range(0, len(names), 4))
    found: list[Written] = []
    while data:
        size = chance.randrange(1, 200)
        wire.far.sendall(data[:size])
        data = data[size:]
        found += wire.follow().pieces
    assert [piece.name for piece in found] == names
    assert all(piece.found == piece_digest(bytes_of(pool, ticket, piece.name), ticket.nonce, *piece.name) for piece in found)


def test_what_is_spoiled_has_another_digest(wire: Wire, pool: BlockRegion) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4, 5))
    wire.following.let_in(ticket)
    names = [PieceName(block, 0, 3) for block in range(3)]
    data = announced(pool, ticket, *names)
    pool.block(4)[1000] ^= 1
    wire.far.sendall(data)
    pieces = wire.follow().pieces
    assert [piece.found == piece.digest for piece in pieces] == [True, False, True]
    assert pieces[1].found == piece_digest(bytes_of(pool, ticket, names[1]), ticket.nonce, *names[1])


def test_a_report_is_of_one_writer(wire: Wire, pool: BlockRegion) -> None:
    """Of more than there was room for at first, and some of whom are gone."""
    tickets = [ticket_for(bytes([number]) * 16, (number,)) for number in range(BLOCKS)]
    for ticket in tickets:
        wire.following.let_in(ticket)
    for gone in (tickets[0], tickets[7], tickets[-1]):
        wire.following.forget(gone.nonce)
    wire.following.forget(b"?" * 16)
    left = [*tickets[1:7], *tickets[8:-1]]
    for ticket in left:
        wire.far.sendall(announced(pool, ticket, PieceName(0, 0, 3)))
    for ticket in left:
        followed = wire.follow()
        assert (followed.nonce, len(followed.pieces)) == (ticket.nonce, 1)
        assert followed.pieces[0].found == piece_digest(pool.block(ticket.blocks[0]), ticket.nonce, 0, 0, 3)


def spoiled(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"X"),  # no frame
        (4, struct.pack("<H", 9)),  # of another version
        (6, struct.pack("<H", FrameKind.BLOCKS)),
        (6, struct.pack("<H", FrameKind.CLOSE)),
        (8, b"?"),  # of a writer that is not known
        (24, struct.pack("<I", 0)),
        (24, struct.pack("<I", 1025)),
        (24, struct.pack("<I", 0xFFFFFFFF)),
        (28, struct.pack("<I", 1)),  # an amount
        (HEADER_BYTES, struct.pack("<I", 4)),  # before its first block
        (HEADER_BYTES, struct.pack("<I", 8)),  # behind its last one
        (HEADER_BYTES, struct.pack("<I", 0xFFFFFFFF)),
        (HEADER_BYTES + 4, struct.pack("<HH", 0, 0)),
        (HEADER_BYTES + 4, struct.pack("<HH", 2, 2)),
        (HEADER_BYTES + 4, struct.pack("<HH", 65535, 65535)),
    ],
)
def test_what_is_none_of_its_business_stays_in_the_inbox(wire: Wire, pool: BlockRegion, at: int, value: bytes) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4, 5), first_block=5)
    wire.following.let_in(ticket)
    good, bad = announced(pool, ticket, PieceName(5, 0, 3)), spoiled(announced(pool, ticket, PieceName(6, 0, 3)), at, value)
    wire.far.sendall(good + bad + good)
    assert len(wire.follow().pieces) == 1
    followed = wire.follow()
    assert (followed.pieces, followed.left) == ([], bad + good)
    assert not followed.drained
    wire.passed(len(bad))
    assert len(wire.follow().pieces) == 1


def test_a_call_is_over_after_so_many_bytes(
    wire: Wire, pool: BlockRegion, kernel: PieceKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "CALL_BYTES", 2 * LAYOUT.block_bytes)
    bounded = Wire(kernel, pool)
    ticket = ticket_for(b"a" * 16, tuple(range(5)))
    bounded.following.let_in(ticket)
    for block in range(5):
        bounded.far.sendall(announced(pool, ticket, PieceName(block, 0, 3)))
    assert [len(bounded.follow().pieces) for _ in range(3)] == [2, 2, 1]
    bounded.far.close()
    bounded.near.close()


def test_the_end_is_left_to_who_reads_frames(wire: Wire, pool: BlockRegion) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    wire.following.let_in(ticket)
    wire.far.sendall(announced(pool, ticket, PieceName(0, 0, 3)))
    wire.far.close()
    followed = wire.follow()
    assert (len(followed.pieces), followed.drained) == (1, False)
    assert wire.near.recv(1) == b""


# -- on a link ---------------------------------------------------------------------------------------------------------


class Link:
    """A receiver with a link over which frames come that are made here."""

    def __init__(self, pool: BlockRegion, credit_bytes: int) -> None:
        self.pool = pool
        self.reports_looked_at_late = 0
        self.receiver = KVReceiver(pool, LAYOUT, "d", 1, b"s" * 32, SystemClock(), credit_bytes=credit_bytes)
        self.far, near = socket.socketpair()
        near.setblocking(False)
        self.link = StreamReceiverLink(
            near,
            PeerName("p", 1),
            self.receiver,
            LAYOUT,
            kind="test",
            data_kind=FrameKind.WRITTEN,
            on_end=lambda link: None,
            pool_address=pool.address,
        )

    def expect(self, *blocks: int) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 1, ""),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=60.0,
        )

    async def send(self, *frames: bytes) -> None:
        """One frame after the other: what was opened before is let in."""
        for frame in frames:
            self.far.sendall(frame)
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        self.link.end()
        self.far.close()
        await self.receiver.close()


@pytest.fixture
async def link(pool: BlockRegion, kernel: PieceKernel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Link]:
    link = Link(pool, 32 * 1024 * 1024)

    def in_the_interpreter() -> None:
        link.reports_looked_at_late += 1

    monkeypatch.setattr(receiving, "piece_kernel", lambda: kernel)
    monkeypatch.setattr(incoming_side, "piece_kernel", in_the_interpreter)
    yield link
    await link.end()


async def settled(incoming: Incoming) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await incoming._decided.wait()


def opening(incoming: Incoming) -> bytes:
    return Frame(FrameKind.OPEN, incoming.ticket.nonce).encode()


async def test_a_link_reports_what_was_found(link: Link) -> None:
    first, second = link.expect(3, 4, 5), link.expect(6, 7)
    pieces = [PieceName(block, 0, 3) for block in range(3)]
    await link.send(opening(first), opening(second))
    await link.send(
        announced(link.pool, first.ticket, *pieces[:2])
        + announced(link.pool, second.ticket, PieceName(1, 0, 3))
        + Frame(FrameKind.PULSE, first.ticket.nonce).encode()
        + announced(link.pool, second.ticket, PieceName(0, 0, 3))
        + announced(link.pool, first.ticket, pieces[2])
    )
    async with asyncio.timeout(PATIENCE_S):
        while not (first.transfer.complete and second.transfer.complete):
            await asyncio.sleep(0.001)
    for incoming in (first, second):
        nonce, blocks = incoming.ticket.nonce, incoming.ticket.blocks
        expected = {index: piece_digest(link.pool.block(block), nonce, index, 0, 3) for index, block in enumerate(blocks)}
        assert incoming.transfer.verified == expected
    assert not link.reports_looked_at_late


async def test_a_link_poisons_what_was_spoiled(link: Link) -> None:
    incoming = link.expect(3, 4, 5)
    data = announced(link.pool, incoming.ticket, *[PieceName(block, 0, 3) for block in range(3)])
    link.pool.block(4)[1000] ^= 1
    await link.send(opening(incoming), data)
    await settled(incoming)
    assert isinstance(incoming.transfer.error, DigestMismatch)
    assert incoming.transfer.verified.keys() == {0}
    assert not link.reports_looked_at_late


async def test_a_link_is_told_what_no_ticket_is_for(link: Link) -> None:
    incoming = link.expect(3, 4)
    frame = announced(link.pool, incoming.ticket, PieceName(1, 0, 3))
    await link.send(opening(incoming), spoiled(frame, HEADER_BYTES, struct.pack("<I", 2)))
    await settled(incoming)
    assert isinstance(incoming.transfer.error, TicketRefused)


async def test_credit_is_counted_all_the_same(link: Link) -> None:
    incoming = link.expect(*range(BLOCKS))
    window = 4 * LAYOUT.block_bytes
    await link.send(opening(incoming))
    incoming._unspent_bytes = window
    await link.send(announced(link.pool, incoming.ticket, *[PieceName(block, 0, 3) for block in range(5)]))
    await settled(incoming)
    assert isinstance(incoming.transfer.error, TransferBroken)
    assert "credit" in str(incoming.transfer.error)


async def test_what_comes_after_the_end_of_a_transfer_is_late(link: Link) -> None:
    incoming = link.expect(3, 4)
    await link.send(opening(incoming))
    incoming.fail(TransferBroken("not wanted any more"))
    await link.send(announced(link.pool, incoming.ticket, PieceName(0, 0, 3)))
    async with asyncio.timeout(PATIENCE_S):
        while not link.receiver.counters.late_pieces:
            await asyncio.sleep(0.001)
    assert not incoming.transfer.verified
    await link.send(Frame(FrameKind.CLOSE, incoming.ticket.nonce).encode())
    async with asyncio.timeout(PATIENCE_S):
        await incoming.drained.wait()
