"""The decode worker's end of a link over shared memory: what it fetches of what a peer says, by itself and by native code."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from common.clock import SystemClock
from common.config import pdserve_home
from common.errors import DigestMismatch, HandoffError, TicketRefused, TransferBroken
from common.native_build import build_library, find_compiler
from common.types import KVLayout, WorkerRef
from kvtransfer import incoming as incoming_side
from kvtransfer.digest import piece_digest
from kvtransfer.frames import HEADER_BYTES, Frame, FrameKind, decode_header, encode_places, encode_table
from kvtransfer.incoming import Incoming
from kvtransfer.native import choice
from kvtransfer.native.kernel import PieceKernel, check_kernel
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.transports import fetching
from kvtransfer.transports.base import PeerName, PieceName
from kvtransfer.transports.fetching import FetchingLink
from kvtransfer.transports.peer_pool import PeerPool

LAYOUT = KVLayout("m", "t", 3, 1, 8, 16, "float32", True)
LAYER_BYTES = LAYOUT.block_bytes // 3
BLOCKS = 20
PATIENCE_S = 120.0
UNTOUCHED = bytes(LAYOUT.block_bytes)


def whole(block: int) -> PieceName:
    return PieceName(block, 0, 3)


class Link:
    """A receiver with a link, and what its peer says, which is made here. A prompt's block lies in the peer's block of its own
    number."""

    def __init__(self) -> None:
        self.source, self.pool = (BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS) for _ in range(2))
        self.source.buffer[:] = random.Random(1).randbytes(self.source.buffer.nbytes)
        self.receiver = KVReceiver(self.pool, LAYOUT, "d", 1, b"s" * 32, SystemClock())
        self.far, near = socket.socketpair()
        near.setblocking(False)
        self.far.setblocking(False)
        assert self.source.fd is not None
        self.peer_pool = PeerPool(self.source.fd)
        self.ended = False
        self.link = FetchingLink(
            near,
            PeerName("p", 1),
            self.receiver,
            LAYOUT,
            self.pool.address,
            self.peer_pool,
            kind="shm",
            on_end=lambda link: setattr(self, "ended", True),
        )
        self.said: list[Frame] = []

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

    async def let_in(self, *blocks: int) -> Incoming:
        incoming = self.expect(*blocks)
        await self.send(Frame(FrameKind.OPEN, incoming.ticket.nonce).encode())
        await self.until(lambda: incoming.link is not None)
        return incoming

    def ready(self, nonce: bytes, *names: PieceName, place: int | None = None) -> bytes:
        table = b""
        for block, first, number in names:
            there = block * LAYOUT.block_bytes + first * LAYER_BYTES if place is None else place
            table += encode_places([block], first, number, [there])
        return Frame(FrameKind.READY, nonce, len(names)).encode() + table

    def stated(self, nonce: bytes, *names: PieceName) -> bytes:
        table = encode_table(names, [piece_digest(self.content(name), nonce, *name) for name in names])
        return Frame(FrameKind.WRITTEN, nonce, len(names)).encode() + table

    def both(self, nonce: bytes, *names: PieceName) -> bytes:
        return self.ready(nonce, *names) + self.stated(nonce, *names)

    def content(self, name: PieceName) -> memoryview:
        return self.source.block(name.logical_block)[name.first_layer * LAYER_BYTES :][: name.num_layers * LAYER_BYTES]

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.far, data)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.001)

    async def heard(self, kind: FrameKind, nonce: bytes) -> int:
        """The amount of the next frame of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                header = await asyncio.get_running_loop().sock_recv(self.far, HEADER_BYTES)
                frame = decode_header(header, block_bytes=0)
                if (frame.kind, frame.nonce) == (kind, nonce):
                    return frame.amount

    async def end(self) -> None:
        self.link.end()
        self.far.close()
        await self.receiver.close()
        self.pool.close()
        self.source.close()


def _in_the_interpreter() -> None:
    return None


@pytest.fixture(
    params=[
        "interpreter",
        pytest.param(
            "native",
            marks=[pytest.mark.long, pytest.mark.skipif(find_compiler() is None, reason="no compiler")],
        ),
    ]
)
async def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Link]:
    def kernel() -> PieceKernel | None:
        if request.param == "interpreter":
            return None
        return PieceKernel(build_library(choice._SOURCE, pdserve_home() / "kernels", check_kernel))

    found = kernel()
    monkeypatch.setattr(fetching, "piece_kernel", lambda: found)
    monkeypatch.setattr(incoming_side, "piece_kernel", _in_the_interpreter)
    link = Link()
    yield link
    await link.end()


async def failure_of(incoming: Incoming) -> HandoffError:
    async with asyncio.timeout(PATIENCE_S):
        return await incoming.wait_failed()


async def test_two_transfers_are_fetched_side_by_side(link: Link) -> None:
    first, second = await link.let_in(3, 4, 5), await link.let_in(6, 7)
    a, b = first.ticket.nonce, second.ticket.nonce
    await link.send(
        link.both(a, whole(0), whole(1))
        + link.both(b, whole(1))
        + Frame(FrameKind.PULSE, a).encode()
        + link.ready(b, whole(0))
        + Frame(FrameKind.PULSE, a).encode()
        + link.stated(b, whole(0))
        + link.ready(a, PieceName(2, 0, 1), PieceName(2, 1, 2))
        + link.stated(a, PieceName(2, 0, 1))
        + link.stated(a, PieceName(2, 1, 2))
    )
    await link.until(lambda: first.transfer.complete and second.transfer.complete)
    for incoming in (first, second):
        for logical, block in enumerate(incoming.ticket.blocks):
            assert link.pool.block(block) == link.source.block(logical)
    assert second.transfer.verified == {index: piece_digest(link.source.block(index), b, index, 0, 3) for index in range(2)}
    assert bytes(link.pool.block(8)) == UNTOUCHED
    assert link.receiver.counters.blocks == 5


async def test_what_was_fetched_is_said_to_be_taken_before_it_is_stated(link: Link) -> None:
    nonce = (await link.let_in(3, 4, 5)).ticket.nonce
    await link.send(link.ready(nonce, whole(0), whole(2)))
    assert await link.heard(FrameKind.TAKEN, nonce) == 2


async def test_a_source_that_changed_is_a_mismatch(link: Link) -> None:
    incoming = await link.let_in(3, 4, 5)
    data = link.both(incoming.ticket.nonce, *map(whole, range(3)))
    link.source.block(1)[1000] ^= 1
    await link.send(data)
    assert isinstance(await failure_of(incoming), DigestMismatch)
    assert incoming.transfer.verified.keys() == {0}


async def test_a_block_that_no_ticket_is_for_is_refused(link: Link) -> None:
    incoming = await link.let_in(3, 4)
    await link.send(link.both(incoming.ticket.nonce, whole(2)))
    assert isinstance(await failure_of(incoming), TicketRefused)
    assert all(bytes(link.pool.block(block)) == UNTOUCHED for block in range(BLOCKS))


async def test_credit_is_counted(link: Link) -> None:
    incoming = await link.let_in(*range(BLOCKS))
    incoming._unspent_bytes = 4 * LAYOUT.block_bytes
    await link.send(link.both(incoming.ticket.nonce, *map(whole, range(5))))
    error = await failure_of(incoming)
    assert isinstance(error, TransferBroken)
    assert "credit" in error.message


@pytest.mark.parametrize("ready_before", [True, False])
async def test_nothing_is_fetched_for_who_was_given_up(link: Link, ready_before: bool) -> None:
    """Whose blocks are somebody else's by then. It is told all the same that its sources are not read."""
    incoming = await link.let_in(3, 4)
    nonce = incoming.ticket.nonce
    if ready_before:
        await link.send(link.ready(nonce, whole(0)))
        assert await link.heard(FrameKind.TAKEN, nonce) == 1

    async def release() -> None:
        pytest.fail("it was fenced")

    async with asyncio.timeout(PATIENCE_S):
        assert await incoming.abandon(release) == (3, 4)
    following = await link.let_in(3, 4)
    link.pool.block(3)[:] = link.pool.block(4)[:] = UNTOUCHED
    await link.send((link.stated(nonce, whole(0)) if ready_before else b"") + link.both(nonce, whole(1)))
    assert await link.heard(FrameKind.TAKEN, nonce) == 1
    await link.until(lambda: link.receiver.counters.late_pieces == 1 + ready_before)
    assert bytes(link.pool.block(3)) == bytes(link.pool.block(4)) == UNTOUCHED
    await link.send(Frame(FrameKind.CLOSE, nonce).encode() + link.both(following.ticket.nonce, whole(0), whole(1)))
    await link.until(lambda: following.transfer.complete)


async def test_who_was_never_let_in_reaches_nothing(link: Link) -> None:
    incoming = link.expect(3, 4)
    await link.send(link.both(incoming.ticket.nonce, whole(0)) + link.both(b"?" * 16, whole(0)))
    await link.until(lambda: link.receiver.counters.late_pieces == 2)
    assert all(bytes(link.pool.block(block)) == UNTOUCHED for block in range(BLOCKS))
    assert not incoming.transfer.verified


async def test_verified_bytes_are_not_written_again(link: Link) -> None:
    incoming = await link.let_in(3, 4)
    nonce = incoming.ticket.nonce
    await link.send(link.both(nonce, whole(0), whole(1)))
    await link.until(lambda: incoming.transfer.complete)
    before = bytes(link.pool.block(3))
    link.source.block(0)[7] ^= 1
    await link.send(link.both(nonce, whole(0)))
    assert isinstance(await failure_of(incoming), DigestMismatch)
    assert bytes(link.pool.block(3)) == before


async def test_what_is_stated_is_held_against_what_was_fetched_last(link: Link) -> None:
    """The same block is ready twice, with other bytes the second time; what is stated was true of the first."""
    incoming = await link.let_in(3, 4)
    nonce = incoming.ticket.nonce
    stated = link.stated(nonce, whole(0))
    await link.send(link.ready(nonce, whole(0), whole(1)))
    assert await link.heard(FrameKind.TAKEN, nonce) == 2
    link.source.block(0)[7] ^= 1
    await link.send(link.ready(nonce, whole(0)) + stated)
    assert isinstance(await failure_of(incoming), DigestMismatch)


async def test_what_comes_twice_and_is_the_same_is_no_matter(link: Link) -> None:
    incoming = await link.let_in(3, 4)
    nonce = incoming.ticket.nonce
    await link.send(link.both(nonce, whole(0)) + link.both(nonce, whole(0)) + link.both(nonce, whole(1)))
    await link.until(lambda: incoming.transfer.complete)


async def test_pieces_may_come_as_payload_between(link: Link) -> None:
    incoming = await link.let_in(3, 4, 5)
    nonce = incoming.ticket.nonce
    made = random.Random(2).randbytes(LAYOUT.block_bytes)
    table = encode_table([whole(1)], [piece_digest(memoryview(made), nonce, *whole(1))])
    payload = Frame(FrameKind.BLOCKS, nonce, 1, len(made)).encode() + table + made
    await link.send(link.both(nonce, whole(0)) + payload + link.both(nonce, whole(2)))
    await link.until(lambda: incoming.transfer.complete)
    assert bytes(link.pool.block(4)) == made
    assert link.pool.block(5) == link.source.block(2)


BROKEN: dict[str, Callable[[Link, bytes], bytes]] = {
    "a place at the pool's end": lambda link, nonce: link.ready(nonce, whole(0), place=link.source.buffer.nbytes),
    "a place that reaches over it": lambda link, nonce: link.ready(
        nonce, whole(0), place=link.source.buffer.nbytes - LAYOUT.block_bytes + 1
    ),
    "a place beyond all memory": lambda link, nonce: link.ready(nonce, whole(0), place=2**64 - 1),
    "stated, and never ready": lambda link, nonce: link.stated(nonce, whole(0)),
    "another one is stated": lambda link, nonce: link.ready(nonce, whole(0)) + link.stated(nonce, whole(1)),
    "more is stated": lambda link, nonce: link.ready(nonce, whole(0)) + link.stated(nonce, whole(0), whole(1)),
    "in another order": lambda link, nonce: link.ready(nonce, whole(0), whole(1)) + link.stated(nonce, whole(1), whole(0)),
    "stated twice": lambda link, nonce: link.both(nonce, whole(0)) + link.stated(nonce, whole(0)),
    "stated by another one": lambda link, nonce: link.ready(nonce, whole(0)) + link.stated(b"?" * 16, whole(0)),
    "layers that no block has": lambda link, nonce: link.ready(nonce, PieceName(0, 2, 2)),
    "no pieces": lambda link, nonce: Frame(FrameKind.READY, nonce).encode(),
    "what a decode worker says": lambda link, nonce: Frame(FrameKind.TAKEN, nonce, amount=1).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_peer_that_breaks_the_rules_loses_its_link(link: Link, name: str) -> None:
    incoming = await link.let_in(3, 4)
    await link.send(BROKEN[name](link, incoming.ticket.nonce))
    assert isinstance(await failure_of(incoming), TransferBroken)
    await link.until(lambda: link.ended)
    assert all(bytes(link.pool.block(block)) == UNTOUCHED for block in range(BLOCKS) if block not in (3, 4))
    with pytest.raises(ValueError, match="released"):
        link.peer_pool.bytes[0]
