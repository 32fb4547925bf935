"""The prefill worker's end of a socket link: what it puts on the wire, and what it makes of what comes back."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest

from common.errors import TicketRefused, TransferBroken
from kvtransfer.digest import piece_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.region import BlockRegion
from kvtransfer.transports import tcp
from kvtransfer.transports.base import Piece, PieceName, Refusal
from kvtransfer.transports.sending import BatchWriter, StreamSenderLink
from kvtransfer.transports.tcp import WireWriter

LAYERS = 4
BLOCK_BYTES = 64 * 1024
LAYER_BYTES = BLOCK_BYTES // LAYERS
BLOCKS = 16
NONCE, OTHER = b"n" * 16, b"o" * 16
PATIENCE_S = 120.0


class News:
    def __init__(self) -> None:
        self.heard: list[int | str] = []

    def credited(self, size_bytes: int) -> None:
        self.heard.append(size_bytes)

    def renewed(self) -> None:
        self.heard.append("renewed")

    def lent(self, num_pieces: int) -> None:
        self.heard.append(f"{num_pieces} lent")

    def taken(self, num_pieces: int) -> None:
        self.heard.append(f"{num_pieces} taken")


class Wire:
    """A link, and its far end as a bare socket."""

    def __init__(self, writer: BatchWriter) -> None:
        ours, self.far = socket.socketpair()
        ours.setblocking(False)
        self.far.settimeout(PATIENCE_S)
        self.link = StreamSenderLink(ours, "test", writer)

    async def read(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            part = await asyncio.to_thread(self.far.recv, size_bytes - len(data))
            assert part, "the link ended"
            data += part
        return data

    async def read_frame(self) -> tuple[int, bytes, list[tuple[int, int, int, bytes]], list[bytes]]:
        """Kind, nonce, table, payloads; taken apart by hand."""
        magic, version, kind, nonce, count, amount = struct.unpack("<4sHH16sII", await self.read(32))
        assert (magic, version) == (b"PDKV", 3)
        table = list(struct.iter_unpack("<IHH16s", await self.read(24 * count)))
        payloads = [await self.read(entry[2] * LAYER_BYTES) for entry in table] if kind == FrameKind.BLOCKS else []
        assert sum(map(len, payloads)) == (amount if kind == FrameKind.BLOCKS else 0)
        return kind, nonce, table, payloads

    def say(self, *frames: Frame) -> None:
        self.far.sendall(b"".join(frame.encode() for frame in frames))

    async def let_in(self, news: News, nonce: bytes = NONCE) -> None:
        opening = asyncio.create_task(self.link.open_writer(nonce, news))
        assert await self.read_frame() == (FrameKind.OPEN, nonce, [], [])
        self.say(Frame(FrameKind.GRANT, nonce, amount=1000))
        await opening

    async def end(self) -> None:
        await self.link.close()
        self.far.close()


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    monkeypatch.setattr(tcp, "piece_kernel", lambda: None)  # with it: `native/test_native_writing.py`
    wire = Wire(WireWriter())
    yield wire
    await wire.end()


@pytest.fixture
def source() -> BlockRegion:
    region = BlockRegion(memoryview(bytearray(BLOCKS * BLOCK_BYTES)), BLOCK_BYTES, BLOCKS)
    region.buffer[:] = random.Random(3).randbytes(region.buffer.nbytes)
    return region


def piece(source: BlockRegion, logical: int, place: int, first: int = 0, number: int = LAYERS) -> Piece:
    content = source.block(logical)[first * LAYER_BYTES : (first + number) * LAYER_BYTES]
    return Piece(PieceName(logical, first, number), place * BLOCK_BYTES + first * LAYER_BYTES, content)


def stop_after(answers: int) -> Callable[[], bool]:
    left = [answers]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stop


# -- replies -----------------------------------------------------------------------------------------------------------


async def test_a_grant_brings_credit_before_open_writer_returns(wire: Wire) -> None:
    news = News()
    await wire.let_in(news)
    assert news.heard == ["renewed", 1000]


async def test_news_goes_to_whom_it_concerns(wire: Wire) -> None:
    first, second = News(), News()
    await wire.let_in(first)
    await wire.let_in(second, OTHER)
    first.heard.clear()
    second.heard.clear()
    wire.say(
        Frame(FrameKind.CREDIT, NONCE, amount=5),
        Frame(FrameKind.PULSE, OTHER),
        Frame(FrameKind.CREDIT, b"x" * 16, amount=9),
        Frame(FrameKind.PULSE, b"x" * 16),
        Frame(FrameKind.GRANT, NONCE, amount=9),  # it was granted before
        Frame(FrameKind.REFUSE, b"x" * 16, amount=Refusal.SPENT),
        Frame(FrameKind.CREDIT, OTHER, amount=6),
        Frame(FrameKind.TAKEN, OTHER, amount=3),
        Frame(FrameKind.TAKEN, b"x" * 16, amount=4),
    )
    async with asyncio.timeout(PATIENCE_S):
        while "3 taken" not in second.heard:
            await asyncio.sleep(0.001)
    assert (first.heard, second.heard) == (["renewed", 5], ["renewed", "renewed", 6, "renewed", "3 taken"])
    await wire.link.close_writer(NONCE)
    wire.say(Frame(FrameKind.CREDIT, NONCE, amount=5), Frame(FrameKind.CREDIT, OTHER, amount=7))
    async with asyncio.timeout(PATIENCE_S):
        while 7 not in second.heard:
            await asyncio.sleep(0.001)
    assert first.heard == ["renewed", 5]
    assert wire.link.lost is None


@pytest.mark.parametrize("refusal", Refusal)
async def test_a_refusal_is_raised(wire: Wire, refusal: Refusal) -> None:
    opening = asyncio.create_task(wire.link.open_writer(NONCE, News()))
    await wire.read_frame()
    wire.say(Frame(FrameKind.REFUSE, NONCE, amount=refusal))
    with pytest.raises(TicketRefused):
        await opening


@pytest.mark.parametrize(
    "reply",
    [
        b"x" * 32,
        Frame(FrameKind.OPEN, NONCE).encode(),
        Frame(FrameKind.CLOSE, NONCE).encode(),
        Frame(FrameKind.WRITTEN, NONCE, 1).encode(),
        Frame(FrameKind.BLOCKS, NONCE, 1, 1).encode(),
        Frame(FrameKind.REFUSE, NONCE, amount=99).encode(),
        Frame(FrameKind.PULSE, NONCE, 1).encode(),
        Frame(FrameKind.GRANT, NONCE).encode()[:4] + b"\x01" + Frame(FrameKind.GRANT, NONCE).encode()[5:],
    ],
)
async def test_a_reply_that_breaks_the_rules_ends_the_link(wire: Wire, reply: bytes) -> None:
    opening = asyncio.create_task(wire.link.open_writer(NONCE, News()))
    await wire.read_frame()
    wire.far.sendall(reply)
    with pytest.raises(TransferBroken):
        await asyncio.wait_for(opening, PATIENCE_S)
    assert wire.link.lost is not None


async def test_pulses_wait_for_their_turn_and_do_not_pile_up(wire: Wire, source: BlockRegion) -> None:
    """Nobody reads: the lane is held up by a batch, and behind it waits one pulse for each transfer, not a hundred."""
    pieces = [piece(source, block, block) for block in range(BLOCKS)]
    writing = asyncio.create_task(wire.link.write(NONCE, pieces, lambda: False))
    await asyncio.sleep(0.05)
    for _ in range(100):
        wire.link.pulse(NONCE)
        wire.link.pulse(OTHER)
    await asyncio.sleep(0.05)
    assert not writing.done()
    arrived = 0
    while arrived < BLOCKS:
        kind, _, table, _ = await wire.read_frame()
        assert kind == FrameKind.BLOCKS
        arrived += len(table)
    assert [(await wire.read_frame())[:2] for _ in range(2)] == [(FrameKind.PULSE, NONCE), (FrameKind.PULSE, OTHER)]
    await writing
    await wire.link.close_writer(NONCE)
    assert (await wire.read_frame())[:2] == (FrameKind.CLOSE, NONCE)


async def test_a_pulse_over_a_lost_link_is_no_error(wire: Wire) -> None:
    wire.link.drop(TransferBroken("gone"))
    wire.link.pulse(NONCE)
    await wire.link.close()
    wire.link.pulse(NONCE)


# -- tcp: what is on the wire ------------------------------------------------------------------------------------------


async def test_many_pieces_travel_behind_one_table(wire: Wire, source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FRAME_BYTES", 3 * BLOCK_BYTES)
    pieces = [piece(source, 9, 1), piece(source, 2, 0, 1, 2), piece(source, 3, 7), piece(source, 4, 2), piece(source, 5, 3, 3, 1)]
    writing = asyncio.create_task(wire.link.write(NONCE, pieces, lambda: False))
    frames = [await wire.read_frame(), await wire.read_frame()]
    digests = await writing
    assert [len(table) for _, _, table, _ in frames] == [3, 2]
    tables = [entry for _, _, table, _ in frames for entry in table]
    assert tables == [(*name, digest) for (name, _, _), digest in zip(pieces, digests, strict=True)]
    assert digests == [piece_digest(source_bytes, NONCE, *name) for name, _, source_bytes in pieces]
    assert [payload for _, _, _, payloads in frames for payload in payloads] == [bytes(source) for _, _, source in pieces]


async def test_the_table_is_never_longer_than_the_receiver_allows(
    wire: Wire, source: BlockRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "MAX_PIECES", 5)
    pieces = [piece(source, block, block, layer, 1) for layer in range(3) for block in range(4)]
    writing = asyncio.create_task(wire.link.write(NONCE, pieces, lambda: False))
    assert [len((await wire.read_frame())[2]) for _ in range(3)] == [5, 5, 2]
    await writing


async def test_a_stop_takes_effect_between_frames(wire: Wire, source: BlockRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FRAME_BYTES", BLOCK_BYTES)
    pieces = [piece(source, block, block) for block in range(6)]
    writing = asyncio.create_task(wire.link.write(NONCE, pieces, stop_after(2)))
    frames = [await wire.read_frame(), await wire.read_frame()]
    assert len(await writing) == 2
    assert [table[0][0] for _, _, table, _ in frames] == [0, 1]
