"""The decode worker's end of a socket link, fed with bytes: whatever the pieces that they come in, and whatever they say."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from common.errors import HandoffError
from common.types import KVLayout, Ticket
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.transports import receiving
from kvtransfer.transports.base import PeerName, PieceName, ReceiverLink, Refusal, Written
from kvtransfer.transports.receiving import MAX_PLACES_PER_READ, StreamReceiverLink

LAYOUT = KVLayout("model", "tokenizer", 4, 2, 32, 16, "float32", True)
LAYER_BYTES = LAYOUT.block_bytes // 4
BLOCKS = 16
NONCE, OTHER = b"n" * 16, b"o" * 16
PATIENCE_S = 120.0


@dataclass
class Notes:
    """A landing that takes what is within its blocks, and writes down what it is told."""

    pool: bytearray = field(default_factory=lambda: bytearray(BLOCKS * LAYOUT.block_bytes))
    fenced: bool = False
    asked: int = 0
    fence_after: int | None = None  # so many questions
    opened: list[bytes] = field(default_factory=list)
    written: list[tuple[bytes, PieceName, bytes, bytes | None]] = field(default_factory=list)
    alive: list[bytes] = field(default_factory=list)
    closed: list[bytes] = field(default_factory=list)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def admit(self, peer: PeerName) -> str | None:
        return None

    def link_refused(self, error: HandoffError) -> None:
        raise AssertionError

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        self.opened.append(nonce)
        return 12345 if nonce == NONCE else Refusal.NOT_YOURS

    def ticket_of(self, link: ReceiverLink, nonce: bytes) -> Ticket | None:
        return None

    def destination(self, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        self.asked += 1
        self.fenced = self.fenced or (self.fence_after is not None and self.asked > self.fence_after)
        if self.fenced or name.logical_block >= BLOCKS:
            return None
        start = name.logical_block * LAYOUT.block_bytes + name.first_layer * LAYER_BYTES
        return memoryview(self.pool)[start : start + name.num_layers * LAYER_BYTES]

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        for name, digest, dropped, _ in written:
            self.written.append((nonce, name, digest, None if dropped is None else bytes(dropped)))

    def writer_alive(self, link: ReceiverLink, nonce: bytes) -> None:
        self.alive.append(nonce)

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None:
        self.closed.append(nonce)

    def link_lost(self, link: ReceiverLink) -> None:
        assert not self.lost.is_set(), "told twice"
        self.lost.set()


class Door:
    def __init__(self, data_kind: FrameKind) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE_S)
        theirs.setblocking(False)
        self.notes = Notes()
        self.link = StreamReceiverLink(
            theirs, PeerName("p", 1), self.notes, LAYOUT, kind="test", data_kind=data_kind, on_end=lambda link: None
        )

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            await asyncio.to_thread(self.sock.sendall, part)

    async def sent_and_read(self, *parts: bytes) -> Notes:
        """All was read when the CLOSE behind it was."""
        closed = len(self.notes.closed)
        await self.send(*parts, Frame(FrameKind.CLOSE, NONCE).encode())
        async with asyncio.timeout(PATIENCE_S):
            while len(self.notes.closed) == closed:
                await asyncio.sleep(0.001)
        return self.notes

    async def end(self) -> None:
        self.link.end()
        self.sock.close()


@pytest.fixture
async def wire() -> AsyncIterator[Door]:
    door = Door(FrameKind.BLOCKS)
    yield door
    await door.end()


@pytest.fixture
async def mapped() -> AsyncIterator[Door]:
    door = Door(FrameKind.WRITTEN)
    yield door
    await door.end()


def digest_of(name: PieceName) -> bytes:
    return bytes([name.logical_block % 256, name.first_layer, name.num_layers, 7]) * 4


def bytes_of(name: PieceName) -> bytes:
    return random.Random(repr(tuple(name))).randbytes(name.num_layers * LAYER_BYTES)


def blocks_frame(names: Sequence[PieceName], nonce: bytes = NONCE) -> bytes:
    payload = b"".join(map(bytes_of, names))
    table = encode_table(names, map(digest_of, names))
    return Frame(FrameKind.BLOCKS, nonce, len(names), len(payload)).encode() + table + payload


def cut_at_random(data: bytes, chance: random.Random) -> Iterator[bytes]:
    while data:
        size = chance.choice([1, 3, 31, 33, 1000, 5000, LAYER_BYTES, LAYOUT.block_bytes, len(data)])
        yield data[:size]
        data = data[size:]


SOME = [PieceName(block, first, number) for block in range(6) for first, number in ((0, 1), (1, 3))]


@pytest.mark.parametrize("seed", range(6))
async def test_pieces_land_in_their_places_however_the_bytes_come(wire: Door, seed: int) -> None:
    chance = random.Random(seed)
    names = chance.sample(SOME, len(SOME))
    frames = [names[:1], names[1:6], names[6:7], names[7:]]  # behind a long table payload is read with the next, short one
    notes = await wire.sent_and_read(*cut_at_random(b"".join(map(blocks_frame, frames)), chance))
    expected = bytearray(len(notes.pool))
    for name in names:
        start = name.logical_block * LAYOUT.block_bytes + name.first_layer * LAYER_BYTES
        expected[start : start + name.num_layers * LAYER_BYTES] = bytes_of(name)
    assert notes.pool == expected
    assert notes.written == [(NONCE, name, digest_of(name), None) for name in names]


async def test_more_pieces_than_one_read_may_name(wire: Door) -> None:
    names = [PieceName(block, layer, 1) for layer in range(4) for block in range(BLOCKS)]
    names = names[: MAX_PLACES_PER_READ - 1] * 3
    notes = await wire.sent_and_read(blocks_frame(names))
    assert [name for _, name, _, _ in notes.written] == names


async def test_what_has_no_place_goes_to_scratch_and_is_reported_with_its_bytes(wire: Door) -> None:
    names = [PieceName(0, 0, 4), PieceName(BLOCKS, 0, 4), PieceName(1, 0, 1), PieceName(BLOCKS + 1, 1, 2), PieceName(1, 1, 3)]
    notes = await wire.sent_and_read(blocks_frame(names))
    assert [(name, dropped) for _, name, _, dropped in notes.written] == [
        (name, bytes_of(name) if name.logical_block >= BLOCKS else None) for name in names
    ]
    assert bytes(notes.pool[: 2 * LAYOUT.block_bytes]) == bytes_of(names[0]) + bytes_of(names[2]) + bytes_of(names[4])
    assert notes.pool[2 * LAYOUT.block_bytes :] == bytes((BLOCKS - 2) * LAYOUT.block_bytes)


@pytest.mark.parametrize("questions", range(0, 12, 2))
async def test_after_the_fence_nothing_lands_not_even_the_rest_of_a_piece(wire: Door, questions: int) -> None:
    """The landing is asked before each read. What was read before it said "nowhere" is there, and not a byte more."""
    wire.notes.fence_after = questions
    frame = blocks_frame(SOME)
    notes = wire.notes
    at_the_fence: bytes | None = None
    for part in cut_at_random(frame, random.Random(questions)):
        before = bytes(notes.pool)
        await wire.send(part)
        await asyncio.sleep(0.002)
        if notes.fenced and at_the_fence is None:
            at_the_fence = bytes(notes.pool)
            assert len(before) == len(at_the_fence)
    await wire.sent_and_read()
    assert at_the_fence is not None
    assert bytes(notes.pool) == at_the_fence
    assert len(notes.written) == len(SOME)  # they are reported all the same


async def test_a_part_of_a_piece_is_a_sign_of_life(wire: Door) -> None:
    frame = blocks_frame([PieceName(0, 0, 4)], OTHER)
    await wire.send(frame[:-1000])
    async with asyncio.timeout(PATIENCE_S):
        while OTHER not in wire.notes.alive:
            await asyncio.sleep(0.001)
    assert wire.notes.written == []
    await wire.sent_and_read(frame[-1000:])
    assert len(wire.notes.written) == 1


async def test_pulses_are_passed_on(wire: Door) -> None:
    notes = await wire.sent_and_read(Frame(FrameKind.PULSE, NONCE).encode(), Frame(FrameKind.PULSE, OTHER).encode())
    assert notes.alive == [NONCE, OTHER]


async def test_who_asks_is_told(wire: Door) -> None:
    await wire.sent_and_read(Frame(FrameKind.OPEN, NONCE).encode(), Frame(FrameKind.OPEN, OTHER).encode())
    wire.link.credit(NONCE, 77)
    wire.link.pulse(NONCE)
    expected = [
        Frame(FrameKind.GRANT, NONCE, amount=12345),
        Frame(FrameKind.REFUSE, OTHER, amount=Refusal.NOT_YOURS),
        Frame(FrameKind.CREDIT, NONCE, amount=77),
        Frame(FrameKind.PULSE, NONCE),
    ]
    assert wire.sock.recv(10_000) == b"".join(frame.encode() for frame in expected)


async def test_pieces_that_are_in_the_pool_are_reported_together(mapped: Door) -> None:
    table = encode_table(SOME, map(digest_of, SOME))
    frame = Frame(FrameKind.WRITTEN, NONCE, len(SOME)).encode() + table
    notes = await mapped.sent_and_read(*cut_at_random(frame, random.Random(1)))
    assert notes.written == [(NONCE, name, digest_of(name), None) for name in SOME]
    assert notes.asked == 0


async def test_many_announcements_at_once_do_not_keep_the_loop(mapped: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "BYTES_PER_WAKEUP", 1)
    frames = [Frame(FrameKind.WRITTEN, NONCE, 1).encode() + encode_table([name], [digest_of(name)]) for name in SOME]
    mapped.sock.sendall(b"".join([*frames, Frame(FrameKind.CLOSE, NONCE).encode()]))
    seen = [0]
    async with asyncio.timeout(PATIENCE_S):
        while not mapped.notes.closed:
            await asyncio.sleep(0)
            seen.append(len(mapped.notes.written))
    assert [name for _, name, _, _ in mapped.notes.written] == SOME
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 2  # a turn of its own, and one behind it


def table_of(*names: PieceName) -> bytes:
    return encode_table(names, [bytes(16)] * len(names))


def forged(frame: Frame, *, magic: bytes = b"PDKV", version: int = 2, kind: int | None = None) -> bytes:
    header = bytearray(frame.encode())
    header[0:4] = magic
    header[4:6] = version.to_bytes(2, "little")
    header[6:8] = (frame.kind if kind is None else kind).to_bytes(2, "little")
    return bytes(header)


ONE = Frame(FrameKind.BLOCKS, NONCE, 1, LAYOUT.block_bytes)
FORGERIES = {
    "magic": forged(ONE, magic=b"PDKW"),
    "earlier version": forged(ONE, version=1),
    "later version": forged(ONE, version=4),
    "kind 0": forged(ONE, kind=0),
    "unknown kind": forged(ONE, kind=11),
    "not from a prefill worker": forged(Frame(FrameKind.CREDIT, NONCE, amount=1)),
    "no pieces": Frame(FrameKind.BLOCKS, NONCE, 0, LAYOUT.block_bytes).encode(),
    "too many pieces": Frame(FrameKind.BLOCKS, NONCE, MAX_PIECES + 1, LAYOUT.block_bytes).encode(),
    "far too many pieces": Frame(FrameKind.BLOCKS, NONCE, 2**32 - 1, 2**32 - 1).encode(),
    "too much payload": Frame(FrameKind.BLOCKS, NONCE, 1, 2**32 - 1).encode(),
    "less than the table says": Frame(FrameKind.BLOCKS, NONCE, 1, LAYER_BYTES).encode() + table_of(PieceName(0, 0, 4)),
    "more than the table says": ONE.encode() + table_of(PieceName(0, 0, 1)),
    "layers outside": ONE.encode() + table_of(PieceName(0, 1, 4)),
    "no layers": ONE.encode() + table_of(PieceName(0, 0, 0)),
    "another transport's frame": Frame(FrameKind.WRITTEN, NONCE, 1).encode() + table_of(PieceName(0, 0, 4)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_frame_ends_the_link_before_anything_is_read(wire: Door, forgery: str) -> None:
    good = blocks_frame([PieceName(3, 0, 4)])
    await wire.send(good, FORGERIES[forgery])
    async with asyncio.timeout(PATIENCE_S):
        await wire.notes.lost.wait()
    assert [name for _, name, _, _ in wire.notes.written] == [PieceName(3, 0, 4)]  # what came before is not taken back
    assert wire.link._scratch is None
    assert bytes(wire.notes.pool[: 3 * LAYOUT.block_bytes]) == bytes(3 * LAYOUT.block_bytes)


@pytest.mark.parametrize("forgery", ["magic", "too many pieces", "unknown kind"])
async def test_a_writer_that_cannot_be_fenced_is_only_told_and_its_end_is_awaited(mapped: Door, forgery: str) -> None:
    await mapped.send(FORGERIES[forgery])
    assert await asyncio.to_thread(mapped.sock.recv, 1) == b""  # told
    await mapped.send(Frame(FrameKind.WRITTEN, NONCE, 1).encode() + table_of(PieceName(0, 0, 4)))
    await asyncio.sleep(0.02)
    assert not mapped.notes.lost.is_set()
    assert mapped.notes.written == []  # it is not listened to any more
    mapped.sock.close()
    async with asyncio.timeout(PATIENCE_S):
        await mapped.notes.lost.wait()


@pytest.mark.parametrize("kept_bytes", [1, 31, 32, 40, 56, 57, 1000, LAYOUT.block_bytes])
async def test_a_frame_that_is_cut_off_reports_nothing(wire: Door, kept_bytes: int) -> None:
    await wire.send(blocks_frame([PieceName(0, 0, 4)])[:kept_bytes])
    wire.sock.close()
    async with asyncio.timeout(PATIENCE_S):
        await wire.notes.lost.wait()
    assert wire.notes.written == []


async def test_a_peer_that_does_not_read_what_it_is_told_is_hung_up_on(wire: Door) -> None:
    for _ in range(1_000_000):
        wire.link.credit(NONCE, 1)
        if wire.notes.lost.is_set():
            break
    assert wire.notes.lost.is_set()
    wire.link.credit(NONCE, 1)  # no harm any more
    wire.link.pulse(NONCE)
