"""What the compiled library fetches by itself: what it puts where, what it reports, and what it leaves to whoever reads frames.
The digests that it should find are worked out here by xxhash."""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import pdserve_home
from common.native_build import COMPILERS, build_library, find_compiler
from common.types import KVLayout, Ticket
from kvtransfer.digest import piece_digest
from kvtransfer.frames import (
    HEADER_BYTES,
    MAX_PIECES,
    MAX_TABLE_BYTES,
    Frame,
    FrameKind,
    decode_header,
    encode_places,
    encode_table,
)
from kvtransfer.native import choice, following
from kvtransfer.native.following import Following, PoolPlaces
from kvtransfer.native.kernel import Fetched, PieceKernel, check_kernel
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import PieceName, Written

pytestmark = [
    pytest.mark.long,  # a compiler runs
    pytest.mark.skipif(find_compiler() is None, reason=f"none of {', '.join(COMPILERS)}"),
]
LAYOUT = KVLayout("m", "t", 3, 1, 8, 16, "float32", True)
LAYER_BYTES = LAYOUT.block_bytes // 3
BLOCKS = 20
UNTOUCHED = bytes(LAYOUT.block_bytes)


@pytest.fixture(scope="module")
def kernel() -> PieceKernel:
    path: Path = build_library(choice._SOURCE, pdserve_home() / "kernels", check_kernel)
    return PieceKernel(path)


def ticket_for(nonce: bytes, blocks: tuple[int, ...], first_block: int = 0, part: tuple[int, ...] = ()) -> Ticket:
    num_tokens = 16 * (first_block + len(blocks))
    return Ticket(nonce, "r", 0, "d", 1, "p", 1, first_block, blocks, num_tokens, LAYOUT.fingerprint, 60.0, part)


def layers_of(block: memoryview, name: PieceName) -> memoryview:
    return block[name.first_layer * LAYER_BYTES : (name.first_layer + name.num_layers) * LAYER_BYTES]


@dataclass
class Followed:
    nonce: bytes
    pieces: list[Written]
    left: bytes
    drained: bool
    enough: bool = False


class Wire:
    """A socket, an inbox, the peer's pool and ours, and who follows what comes. A prompt's block lies in the peer's block of its
    own number."""

    def __init__(self, kernel: PieceKernel) -> None:
        self.source, self.pool = (BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS) for _ in range(2))
        self.source.buffer[:] = random.Random(1).randbytes(self.source.buffer.nbytes)
        self.far, self.near = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        self.inbox = memoryview(bytearray(HEADER_BYTES + MAX_TABLE_BYTES))
        there = self.source.address, self.source.buffer.nbytes
        places = PoolPlaces(self.pool.address, LAYOUT.block_bytes, LAYER_BYTES, *there, LAYOUT.num_layers)
        self.following = Following(kernel, self.near.fileno(), places, self.inbox)
        self.num_untold = 0
        self._left = (0, 0)

    def content(self, name: PieceName) -> memoryview:
        return layers_of(self.source.block(name.logical_block), name)

    def fetched(self, ticket: Ticket, name: PieceName) -> memoryview:
        return layers_of(self.pool.block(ticket.blocks[name.logical_block - ticket.first_block]), name)

    def digest(self, ticket: Ticket, name: PieceName) -> bytes:
        return piece_digest(self.content(name), ticket.nonce, *name)

    def ready(self, ticket: Ticket, *names: PieceName) -> bytes:
        table = b""
        for block, first, number in names:
            table += encode_places([block], first, number, [block * LAYOUT.block_bytes + first * LAYER_BYTES])
        return Frame(FrameKind.READY, ticket.nonce, len(names)).encode() + table

    def stated(self, ticket: Ticket, *names: PieceName) -> bytes:
        digests = [self.digest(ticket, name) for name in names]
        return Frame(FrameKind.WRITTEN, ticket.nonce, len(names)).encode() + encode_table(names, digests)

    def both(self, ticket: Ticket, *names: PieceName) -> bytes:
        return self.ready(ticket, *names) + self.stated(ticket, *names)

    def follow(self) -> Followed:
        nonce, found, num_untold, begin, end, drained, enough = self.following.follow(*self._left)
        self.num_untold += num_untold
        self._left = begin, end
        pieces = list(found)
        return Followed(nonce if pieces else b"", pieces, bytes(self.inbox[begin:end]), drained, enough)

    def passed(self, size_bytes: int) -> None:
        """Whoever reads frames has taken so much."""
        self._left = self._left[0] + size_bytes, self._left[1]

    def heard(self) -> list[tuple[bytes, int]]:
        """What the peer was told to be taken."""
        data = self.far.recv(100_000)
        frames = [decode_header(data[start : start + HEADER_BYTES], block_bytes=0) for start in range(0, len(data), HEADER_BYTES)]
        assert {frame.kind for frame in frames} == {FrameKind.TAKEN}
        return [(frame.nonce, frame.amount) for frame in frames]

    def close(self) -> None:
        self.far.close()
        self.near.close()
        self.pool.close()
        self.source.close()


@pytest.fixture
def wire(kernel: PieceKernel) -> Iterator[Wire]:
    wire = Wire(kernel)
    yield wire
    wire.close()


def test_a_whole_frame_has_room() -> None:
    """Of pieces that were fetched, as of those that a peer may announce."""
    assert ctypes.sizeof(Fetched) == HEADER_BYTES + 2 * 4 + MAX_PIECES * (8 + 16)


def test_what_is_ready_is_fetched_and_what_was_stated_is_one_report(wire: Wire) -> None:
    ticket = ticket_for(b"a" * 16, (3, 17, 9), first_block=5)
    names = [PieceName(5, 0, 3), PieceName(7, 0, 1), PieceName(6, 0, 3), PieceName(7, 1, 2)]
    wire.following.let_in(ticket)
    wire.far.sendall(wire.ready(ticket, *names) + wire.stated(ticket, *names[:1]) + wire.stated(ticket, *names[1:]))
    followed = wire.follow()
    assert (followed.nonce, followed.left) == (ticket.nonce, b"")
    digests = [wire.digest(ticket, name) for name in names]
    assert followed.pieces == [Written(name, digest, None, digest) for name, digest in zip(names, digests, strict=True)]
    assert all(wire.fetched(ticket, name) == wire.content(name) for name in names)
    assert all(bytes(wire.pool.block(block)) == UNTOUCHED for block in set(range(BLOCKS)) - set(ticket.blocks))
    assert (wire.heard(), wire.num_untold) == ([(ticket.nonce, 4)], 0)
    assert wire.follow() == Followed(b"", [], b"", True)


def test_what_was_not_stated_is_not_reported_and_may_be_later(wire: Wire) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    names = [PieceName(0, 0, 3), PieceName(1, 0, 3)]
    wire.following.let_in(ticket)
    wire.far.sendall(wire.ready(ticket, *names))
    assert wire.follow() == Followed(b"", [], b"", True)
    assert wire.heard() == [(ticket.nonce, 2)], "it was read, whatever becomes of it"
    for name in names:
        wire.far.sendall(wire.stated(ticket, name))
        assert [piece.name for piece in wire.follow().pieces] == [name]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_parts_that_they_come_in(wire: Wire, seed: int) -> None:
    chance = random.Random(seed)
    ticket = ticket_for(b"a" * 16, tuple(chance.sample(range(BLOCKS), 12)))
    wire.following.let_in(ticket)
    names = [PieceName(block, layer, 1) for block in range(12) for layer in range(3)]
    chance.shuffle(names)
    data = b"".join(wire.both(ticket, *names[start : start + 4]) for start in range(0, len(names), 4))
    found: list[Written] = []
    while data:
        size = chance.randrange(1, 200)
        wire.far.sendall(data[:size])
        data = data[size:]
        found += wire.follow().pieces
    assert [piece.name for piece in found] == names
    assert all(piece.found == piece.digest == wire.digest(ticket, piece.name) for piece in found)
    assert all(wire.fetched(ticket, name) == wire.content(name) for name in names)


def test_what_was_changed_before_it_was_fetched_has_another_digest(wire: Wire) -> None:
    """A source that its owner gave up too early."""
    ticket = ticket_for(b"a" * 16, (3, 4, 5))
    wire.following.let_in(ticket)
    names = [PieceName(block, 0, 3) for block in range(3)]
    data = wire.both(ticket, *names)
    wire.source.block(1)[1000] ^= 1
    wire.far.sendall(data)
    pieces = wire.follow().pieces
    assert [piece.found == piece.digest for piece in pieces] == [True, False, True]
    assert pieces[1].found == piece_digest(wire.fetched(ticket, names[1]), ticket.nonce, *names[1])


def test_what_was_fetched_is_judged_as_it_was_fetched(wire: Wire) -> None:
    """Not as the source is later."""
    ticket = ticket_for(b"a" * 16, (3, 4))
    name = PieceName(0, 0, 3)
    wire.following.let_in(ticket)
    wire.far.sendall(wire.ready(ticket, name))
    wire.source.block(0)[0] ^= 1
    wire.follow()
    wire.source.block(0)[0] ^= 1
    wire.far.sendall(wire.stated(ticket, name))
    (piece,) = wire.follow().pieces
    assert piece.found != piece.digest


def test_a_report_is_of_one_writer(wire: Wire) -> None:
    """Of more than there was room for at first, and some of whom may not write any more."""
    tickets = [ticket_for(bytes([number]) * 16, (number,)) for number in range(BLOCKS)]
    for ticket in tickets:
        wire.following.let_in(ticket)
    gone = [tickets[0], tickets[7], tickets[-1]]
    wire.following.keep(lambda nonce: nonce not in [ticket.nonce for ticket in gone])
    left = [ticket for ticket in tickets if ticket not in gone]
    for ticket in left:
        wire.far.sendall(wire.both(ticket, PieceName(0, 0, 3)))
    for ticket in left:
        followed = wire.follow()
        assert (followed.nonce, len(followed.pieces)) == (ticket.nonce, 1)
        assert followed.pieces[0].found == piece_digest(wire.source.block(0), ticket.nonce, 0, 0, 3)
        assert wire.pool.block(ticket.blocks[0]) == wire.source.block(0)
    wire.far.sendall(wire.both(tickets[7], PieceName(0, 0, 3)))
    assert wire.follow().pieces == []
    assert bytes(wire.pool.block(7)) == UNTOUCHED


def spoiled(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"X"),  # no frame
        (4, struct.pack("<H", 9)),  # of another version
        (6, struct.pack("<H", FrameKind.BLOCKS)),
        (6, struct.pack("<H", FrameKind.CLOSE)),
        (6, struct.pack("<H", FrameKind.WRITTEN)),  # of what was not ready
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
        (HEADER_BYTES + 8, struct.pack("<Q", (BLOCKS - 1) * LAYOUT.block_bytes + 1)),  # beyond the peer's pool
        (HEADER_BYTES + 8, struct.pack("<Q", BLOCKS * LAYOUT.block_bytes)),
        (HEADER_BYTES + 8, struct.pack("<Q", 2**64 - 1)),
        (HEADER_BYTES + 8, struct.pack("<Q", 2**64 - LAYOUT.block_bytes)),
    ],
)
def test_what_is_none_of_its_business_stays_in_the_inbox(wire: Wire, at: int, value: bytes) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4, 5), first_block=5)
    wire.following.let_in(ticket)
    good = wire.both(ticket, PieceName(5, 0, 3))
    bad, after = spoiled(wire.ready(ticket, PieceName(6, 0, 3)), at, value), wire.both(ticket, PieceName(7, 0, 3))
    wire.far.sendall(good + bad + after)
    assert len(wire.follow().pieces) == 1
    followed = wire.follow()
    assert (followed.pieces, followed.left) == ([], bad + after)
    assert not followed.drained
    assert bytes(wire.pool.block(4)) == UNTOUCHED
    wire.passed(len(bad))
    assert len(wire.follow().pieces) == 1


def test_no_more_is_fetched_than_a_ticket_is_for(wire: Wire) -> None:
    """A block that is said to be ready once more is for who can ask whether it may be written again."""
    ticket = ticket_for(b"a" * 16, (3, 4))
    names = [PieceName(0, 0, 3), PieceName(1, 0, 3)]
    wire.following.let_in(ticket)
    wire.far.sendall(wire.both(ticket, *names))
    assert len(wire.follow().pieces) == 2
    wire.source.block(0)[0] ^= 1
    again = wire.both(ticket, names[0])
    wire.far.sendall(again)
    assert wire.follow() == Followed(b"", [], again, False)
    assert wire.fetched(ticket, names[0]) != wire.content(names[0])


@pytest.mark.parametrize(("first", "number"), [(0, 1), (2, 1), (0, 2), (1, 2), (0, 3)])
def test_layers_of_another_writer_are_not_fetched(wire: Wire, first: int, number: int) -> None:
    """Of the same blocks, as where several ranks fill them."""
    ticket = ticket_for(b"a" * 16, (3, 4), part=(1, 1))
    wire.following.let_in(ticket)
    wrong = wire.ready(ticket, PieceName(0, first, number))
    wire.far.sendall(wire.both(ticket, PieceName(1, 1, 1)) + wrong)
    assert len(wire.follow().pieces) == 1
    assert wire.follow() == Followed(b"", [], wrong, False)
    assert bytes(wire.pool.block(3)) == UNTOUCHED
    assert bytes(wire.pool.block(4)[:LAYER_BYTES]) == bytes(wire.pool.block(4)[2 * LAYER_BYTES :]) == bytes(LAYER_BYTES)
    assert wire.pool.block(4)[LAYER_BYTES : 2 * LAYER_BYTES] == wire.source.block(1)[LAYER_BYTES : 2 * LAYER_BYTES]


@pytest.mark.parametrize(
    "stated",
    [[PieceName(1, 0, 3)], [PieceName(0, 0, 3), PieceName(0, 0, 3)], [PieceName(0, 0, 2)], [PieceName(0, 0, 3)] * 3],
)
def test_other_pieces_than_were_ready_are_not_reported(wire: Wire, stated: list[PieceName]) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    wire.following.let_in(ticket)
    frame = wire.stated(ticket, *stated)
    wire.far.sendall(wire.ready(ticket, PieceName(0, 0, 3), PieceName(1, 0, 3)) + frame)
    assert wire.follow() == Followed(b"", [], frame, False)


def test_the_next_one_that_is_ready_ends_what_was_not_stated(wire: Wire) -> None:
    first, second = ticket_for(b"a" * 16, (3,)), ticket_for(b"b" * 16, (4,))
    name = PieceName(0, 0, 3)
    wire.following.let_in(first)
    wire.following.let_in(second)
    wire.far.sendall(wire.ready(first, name) + wire.both(second, name))
    wire.follow()
    assert wire.follow().nonce == second.nonce
    late = wire.stated(first, name)
    wire.far.sendall(late)
    assert wire.follow() == Followed(b"", [], late, False)


def test_what_somebody_else_fetched_is_not_taken_for_what_was_fetched_here(wire: Wire) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    name = PieceName(0, 0, 3)
    wire.following.let_in(ticket)
    wire.far.sendall(wire.ready(ticket, name))
    wire.follow()
    wire.following.drop_fetched()
    frame = wire.stated(ticket, name)
    wire.far.sendall(frame)
    assert wire.follow() == Followed(b"", [], frame, False)


def test_a_call_is_over_after_so_many_bytes(kernel: PieceKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CALL_BYTES", 2 * LAYOUT.block_bytes)
    bounded = Wire(kernel)
    ticket = ticket_for(b"a" * 16, tuple(range(5)))
    bounded.following.let_in(ticket)
    for block in range(5):
        bounded.far.sendall(bounded.both(ticket, PieceName(block, 0, 3)))
    calls = [bounded.follow() for _ in range(3)]
    assert [(len(call.pieces), call.enough) for call in calls] == [(2, True), (2, True), (1, False)]
    bounded.close()


def test_a_peer_that_reads_nothing_is_told_by_who_reads_frames(wire: Wire) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    wire.following.let_in(ticket)
    wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with contextlib.suppress(BlockingIOError):
        while True:
            wire.near.send(b"x")
    wire.far.sendall(wire.both(ticket, PieceName(0, 0, 3), PieceName(1, 0, 3)))
    assert len(wire.follow().pieces) == 2
    assert wire.num_untold == 2


def test_the_end_is_left_to_who_reads_frames(wire: Wire) -> None:
    ticket = ticket_for(b"a" * 16, (3, 4))
    wire.following.let_in(ticket)
    wire.far.sendall(wire.both(ticket, PieceName(0, 0, 3)))
    wire.far.close()
    followed = wire.follow()
    assert (len(followed.pieces), followed.drained, wire.num_untold) == (1, False, 1)
    assert wire.near.recv(1) == b""
