"""Pieces that the decode worker reads by itself after they were written: who waits for it, and who does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from common.clock import SystemClock
from common.errors import HandoffError, TransferBroken, TransferTimeout
from kvtransfer.digest import piece_digest
from kvtransfer.transports.base import Piece, WriterNews
from support.outgoing_transfers import LAYOUT, PATIENCE_S, outgoing_over


class LendingLink:
    """What is written is lent at once; the test takes it."""

    kind = "lending"
    lost: HandoffError | None = None

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick  # the other side is through before `write` is
        self.news: WriterNews | None = None
        self.written = asyncio.Event()
        self.closed = asyncio.Event()

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        self.news = news
        news.credited(8 * LAYOUT.block_bytes)

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        assert self.news is not None
        await asyncio.sleep(0)
        if self.quick:
            self.news.taken(len(pieces))
        self.news.lent(len(pieces))
        self.written.set()
        return [piece_digest(piece.source, nonce, *piece.name) for piece in pieces]

    def pulse(self, nonce: bytes) -> None:
        """Nobody listens."""

    async def close_writer(self, nonce: bytes) -> None:
        self.closed.set()

    def drop(self, error: HandoffError) -> None:
        self.lost = error

    async def close(self) -> None:
        """Nothing to end."""


async def test_finish_waits_until_all_was_taken() -> None:
    link = LendingLink(quick=False)
    outgoing = outgoing_over(link)
    await outgoing.push([(0, 0)])
    await asyncio.wait_for(link.written.wait(), PATIENCE_S)
    await outgoing.push([(1, 1)])
    finishing = asyncio.create_task(outgoing.finish())
    for _ in range(2):
        await asyncio.wait({finishing}, timeout=0.05)
        assert not finishing.done(), "sources that are read count as free"
        assert not link.closed.is_set()
        outgoing.taken(1)
    account = await asyncio.wait_for(finishing, PATIENCE_S)
    assert account.digests.keys() == {0, 1}
    assert link.closed.is_set()


async def test_a_peer_that_is_quicker_than_the_write_is_not_waited_for() -> None:
    outgoing = outgoing_over(LendingLink(quick=True))
    await outgoing.push([(0, 0), (1, 1)])
    assert (await asyncio.wait_for(outgoing.finish(), PATIENCE_S)).digests.keys() == {0, 1}


async def test_an_abort_does_not_wait_for_who_reads() -> None:
    """Whatever it reads from now on does not have the digest that it was told."""
    link = LendingLink(quick=False)
    outgoing = outgoing_over(link)
    await outgoing.push([(0, 0)])
    await asyncio.wait_for(link.written.wait(), PATIENCE_S)
    await asyncio.wait_for(outgoing.abort(), PATIENCE_S)
    assert link.closed.is_set()


@pytest.mark.parametrize("end", ["lease", "ticket's time"])
async def test_a_peer_that_takes_nothing_is_waited_for_no_longer_than_it_is_heard(end: str) -> None:
    link = LendingLink(quick=False)
    outgoing = outgoing_over(link, lease_s=0.05 if end == "lease" else PATIENCE_S, ttl_s=0.05 if end != "lease" else PATIENCE_S)
    await outgoing.push([(0, 0), (1, 1)])
    with pytest.raises(TransferTimeout):
        await asyncio.wait_for(outgoing.finish(), PATIENCE_S)
    assert link.closed.is_set()


async def test_a_link_that_is_lost_ends_the_wait() -> None:
    link = LendingLink(quick=False)
    outgoing = outgoing_over(link, lease_s=0.4)
    await outgoing.push([(0, 0), (1, 1)])
    finishing = asyncio.create_task(outgoing.finish())
    await asyncio.wait_for(link.written.wait(), PATIENCE_S)
    link.lost = TransferBroken("gone")
    with pytest.raises(TransferBroken, match="gone"):
        await asyncio.wait_for(finishing, PATIENCE_S)


async def test_the_time_of_a_transfer_is_that_in_which_something_moves() -> None:
    """Being fetched counts, waiting for the next push does not."""
    link = LendingLink(quick=False)
    outgoing = outgoing_over(link)
    clock = SystemClock()
    began_s = clock.monotonic_s()
    await outgoing.push([(0, 0)])
    await asyncio.wait_for(link.written.wait(), PATIENCE_S)
    await asyncio.sleep(0.05)
    outgoing.taken(1)
    moved_s = clock.monotonic_s() - began_s
    await asyncio.sleep(0.3)
    link.quick = True
    began_s = clock.monotonic_s()
    await outgoing.push([(1, 1)])
    account = await asyncio.wait_for(outgoing.finish(), PATIENCE_S)
    assert 0.05 <= account.transfer_s <= moved_s + clock.monotonic_s() - began_s
