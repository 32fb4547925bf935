"""The model's EARLY_SOURCE_END and FINISH_UNTAKEN on the real prefill side: who may still read a transfer's sources keeps them.

Whatever ends a transfer, the write under way does. What was lent does until it is taken, if the transfer is to be finished; if it
was given up, nobody waits: what is fetched of it later is in no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from common.errors import HandoffError
from kvtransfer.digest import piece_digest
from kvtransfer.outgoing import Outgoing
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import Piece, WriterNews
from support.outgoing_transfers import BLOCKS, LAYOUT, PATIENCE_S, outgoing_over, sources

SOON_S = 0.2  # long enough for a write to begin


class SlowLink:
    """Writes one batch, when it is allowed to. Dropping it ends nothing: the write under way is a memcpy."""

    kind = "slow"
    lost: HandoffError | None = None

    def __init__(self) -> None:
        self.news: WriterNews | None = None
        self.steps: list[str] = []
        self.written: list[bytes] = []
        self.write_began, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        self.news = news
        news.credited(BLOCKS * LAYOUT.block_bytes)

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        self.steps.append("begin")
        self.write_began.set()
        await self.may_go_on.wait()
        self.written += [bytes(piece.source) for piece in pieces]
        self.steps.append("done")
        return [piece_digest(piece.source, nonce, *piece.name) for piece in pieces]

    def pulse(self, nonce: bytes) -> None:
        """Nobody listens."""

    async def close_writer(self, nonce: bytes) -> None:
        self.steps.append("close")

    def drop(self, error: HandoffError) -> None:
        self.steps.append("drop")

    async def close(self) -> None:
        self.steps.append("link closed")


class LendingLink(SlowLink):
    """Its writes are done at once; who was written to has yet to fetch what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on.set()

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        digests = await super().write(nonce, pieces, stop)
        assert self.news is not None
        self.news.lent(len(digests))
        return digests


async def push_until_it_fails(outgoing: Outgoing) -> None:
    while True:
        await outgoing.push([])
        await asyncio.sleep(0.01)


def transfer_over(link: SlowLink, region: BlockRegion, forgotten: list[bytes], end: str = "") -> Outgoing:
    """`end`: what is over soon."""
    times_s = {"lease": {"lease_s": SOON_S}, "ticket's time": {"ttl_s": SOON_S}}.get(end, {})
    return outgoing_over(link, region, forget=forgotten.append, **times_s)


@pytest.mark.parametrize("end", ["abort", "ticket's time", "lease"])
async def test_sources_are_free_when_the_write_under_way_is_done(end: str) -> None:
    region, link = sources(), SlowLink()
    forgotten: list[bytes] = []
    outgoing = transfer_over(link, region, forgotten, end)
    nonce = outgoing.ticket.nonce
    await outgoing.push([(0, 1), (1, 0)])
    async with asyncio.timeout(PATIENCE_S):
        await link.write_began.wait()
    if end != "abort":
        with pytest.raises(HandoffError):
            await asyncio.wait_for(push_until_it_fails(outgoing), PATIENCE_S)
    giving_back = asyncio.create_task(outgoing.abort())
    await asyncio.sleep(0.05)
    assert not giving_back.done(), "the sources count as free while they are being read"
    assert not forgotten
    link.may_go_on.set()
    await asyncio.wait_for(giving_back, PATIENCE_S)
    region.buffer[:] = b"t" * region.buffer.nbytes  # the next prompt's
    await asyncio.sleep(0)
    assert set(b"".join(link.written)) == set(b"s")
    assert [step for step in link.steps if step != "drop"] == ["begin", "done", "close"]
    assert forgotten == [nonce]


async def test_sources_of_a_finished_transfer_are_free_when_all_of_them_were_taken() -> None:
    link = LendingLink()
    forgotten: list[bytes] = []
    outgoing = transfer_over(link, sources(), forgotten)
    await outgoing.push([(0, 1), (1, 0)])
    finishing = asyncio.create_task(outgoing.finish())
    async with asyncio.timeout(PATIENCE_S):
        await link.write_began.wait()
    assert link.news is not None
    for _ in range(BLOCKS):
        await asyncio.sleep(0.05)
        assert not finishing.done(), "the sources count as free while they are being fetched"
        assert link.steps == ["begin", "done"]
        link.news.taken(1)
    account = await asyncio.wait_for(finishing, PATIENCE_S)
    assert set(account.digests) == set(range(BLOCKS))
    assert link.steps == ["begin", "done", "close"]
    assert forgotten == [outgoing.ticket.nonce]


@pytest.mark.parametrize("end", ["abort", "ticket's time", "lease"])
async def test_who_gives_up_does_not_wait_for_what_nobody_takes(end: str) -> None:
    link = LendingLink()
    forgotten: list[bytes] = []
    outgoing = transfer_over(link, sources(), forgotten, end)
    await outgoing.push([(0, 1), (1, 0)])
    async with asyncio.timeout(PATIENCE_S):
        await link.write_began.wait()
    if end == "abort":
        await asyncio.wait_for(outgoing.abort(), PATIENCE_S)
    with pytest.raises(HandoffError):
        await asyncio.wait_for(outgoing.finish(), PATIENCE_S)
    assert [step for step in link.steps if step != "drop"] == ["begin", "done", "close"]
    assert forgotten == [outgoing.ticket.nonce]
