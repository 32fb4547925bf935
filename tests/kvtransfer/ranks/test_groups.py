"""Groups of ranks hand over to each other: real senders and receivers over real sockets, each rank's in a thread of its own, with
orders as a rank in another process gets them. Pools of a device are those of `support.device_pools`.

The oracle deals single elements to ranks by plain loops. Processes are killed in `tests/workers/test_ranks.py`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from common.clock import SystemClock
from common.config import pdserve_home
from common.errors import HandoffError, RequestCancelled, SealMismatch, TicketRefused, TransferBroken
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.native.choice import prepare
from kvtransfer.ranks.beside import serve
from kvtransfer.ranks.orders import RankOrders
from kvtransfer.ranks.parts import Degrees, Pair, rank_name
from kvtransfer.ranks.rank_end import Introduction, ListenOrder, RankEnd
from kvtransfer.ranks.rank_receivers import GroupIncoming, RankReceivers
from kvtransfer.ranks.rank_senders import GroupOutgoing, PeerGroup, RankSenders
from kvtransfer.region import BlockRegion
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from support.device_pools import VisibleRegion

LAYOUT = KVLayout("model", "tokenizer", 3, 3, 4, 4, "float32", True)  # 3 layers on 2 stages, 3 heads on 2 shards
UNITS = 9
UNIT_BYTES = LAYOUT.block_bytes // UNITS
SECRET = derive_secret("token")
BLOCKS = 16
LEASE_S = 60.0  # never what ends anything here
PATIENCE_S = 120.0


class Group:
    """The ranks of one worker: rank 0 here, the others in threads, each with a pool of what it owns."""

    def __init__(self, degrees: Degrees, layout: KVLayout = LAYOUT, *, on_device: bool = False) -> None:
        self.degrees = degrees
        self.layout = layout
        self.unit_bytes = layout.block_bytes // UNITS
        make = VisibleRegion if on_device else BlockRegion.create_shared
        self.regions = [make(len(units_of_rank(rank, degrees)) * self.unit_bytes, BLOCKS) for rank in range(degrees.num_ranks)]
        self.ends: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        for region in self.regions[1:]:
            mine, theirs = socket.socketpair()
            self.threads.append(threading.Thread(target=serve, args=(theirs, region)))
            self.ends.append(mine)
        for thread in self.threads:
            thread.start()
        self.ranks = [
            RankEnd(self.regions[0], SystemClock()),
            *(RankOrders(end, rank) for rank, end in enumerate(self.ends, 1)),
        ]

    def fill(self, seed: int) -> None:
        numbers = random.Random(seed)
        for region in self.regions:
            region.buffer[:] = numbers.randbytes(region.buffer.nbytes)

    def block(self, index: int) -> bytes:
        """The whole block, put together unit by unit."""
        found = []
        for unit in range(UNITS):
            rank = owner(unit, self.degrees)
            place = units_of_rank(rank, self.degrees).index(unit) * self.unit_bytes
            found.append(bytes(self.regions[rank].block(index)[place : place + self.unit_bytes]))
        return b"".join(found)

    def contents(self) -> list[bytes]:
        return [self.block(index) for index in range(BLOCKS)]

    def lose(self, rank: int) -> None:
        """As far as rank 0 and the rank's peers see it: its sockets end."""
        self.ends[rank - 1].shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        for end in self.ends:
            end.close()
        for thread in self.threads:
            await asyncio.to_thread(thread.join)
        self.regions[0].close()  # theirs they close themselves


class Workers:
    def __init__(self, giving: Degrees, taking: Degrees, source_layout: KVLayout = LAYOUT, *, on_device: bool = False) -> None:
        clock = SystemClock()
        self.taking = taking
        self.giving = giving
        self.here, self.there = Group(giving, source_layout, on_device=on_device), Group(taking, on_device=on_device)
        self.here.fill(7)
        self.senders = RankSenders(self.here.ranks, giving, Introduction("p", 5, SECRET, source_layout, LEASE_S), clock)
        self.receivers = RankReceivers(self.there.ranks, taking, Introduction("d", 3, SECRET, LAYOUT, LEASE_S), clock)

    async def connect(self, kind: str) -> None:
        offers = await self.receivers.start(ListenOrder((kind,), "127.0.0.1", False))
        peer = PeerGroup("d", 3, self.taking, tuple(map(tuple, offers)), BLOCKS, LAYOUT)
        assert await self.senders.connect(peer) == kind

    async def offer(self, blocks: Sequence[int], num_tokens: int) -> GroupIncoming:
        incoming = self.receivers.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 5, "unused"),
            giving=self.giving,
            first_block=0,
            blocks=blocks,
            num_tokens=num_tokens,
            ttl_s=PATIENCE_S,
        )
        await incoming.expect()
        return incoming

    async def abandon(self, incoming: GroupIncoming) -> tuple[int, ...]:
        return await incoming.abandon(lambda: self.senders.release([ticket.nonce for ticket in incoming.tickets]))


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """Ranks have it compiled beside what they do, and a compiler that is at work has descriptors, which are counted below."""
    prepare(pdserve_home() / "kernels", lambda _: None)


@asynccontextmanager
async def running(giving: Degrees, taking: Degrees, kind: str, source_layout: KVLayout = LAYOUT) -> AsyncIterator[Workers]:
    descriptors = len(os.listdir("/proc/self/fd"))
    workers = Workers(giving, taking, source_layout, on_device=kind == "cuda_ipc")
    try:
        async with asyncio.timeout(PATIENCE_S):
            await workers.connect(kind)
            yield workers
    finally:
        await workers.senders.close()
        await workers.receivers.close()
        await workers.here.close()
        await workers.there.close()
    await asyncio.sleep(0)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def owner(unit: int, degrees: Degrees) -> int:
    """Of three layers and three heads, as one would deal them by hand."""
    layer, head = divmod(unit, 3)
    stage = {1: 0, 2: (0, 0, 1)[layer], 3: layer}[degrees.pipeline_parallel]
    shard = {1: 0, 2: (0, 0, 1)[head], 3: head}[degrees.tensor_parallel]
    return stage * degrees.tensor_parallel + shard


def units_of_rank(rank: int, degrees: Degrees) -> list[int]:
    return [unit for unit in range(UNITS) if owner(unit, degrees) == rank]


def bytes_by_pair(num_blocks: int, giving: Degrees, taking: Degrees) -> Counter[Pair]:
    found: Counter[Pair] = Counter()
    for unit in range(UNITS):
        found[Pair(owner(unit, giving), owner(unit, taking))] += num_blocks * UNIT_BYTES
    return found


async def push(outgoing: GroupOutgoing, blocks: Sequence[int]) -> None:
    """In groups of layers, the last block later."""
    for layers in ((0, 2), (2, 3)):
        await outgoing.push_prompt(range(len(blocks) - 1), blocks, layers)
    await outgoing.push_prompt(range(len(blocks) - 1, len(blocks)), blocks)


async def push_rest(outgoing: GroupOutgoing) -> None:
    await outgoing.push_prompt(range(1, 2), (9, 2))
    await outgoing.finish()


async def seals(incoming: GroupIncoming, outgoing: GroupOutgoing) -> dict[bytes, Seal]:
    account = await outgoing.finish()
    return {nonce: Seal(nonce, incoming.ticket.num_tokens, digests) for nonce, digests in account.digests.items()}


@pytest.mark.parametrize(
    ("giving", "taking", "kind"),
    [
        ((1, 2), (2, 1), "tcp"),
        ((2, 1), (1, 2), "shm"),
        ((2, 1), (1, 1), "tcp"),
        ((1, 1), (2, 1), "shm"),
        ((3, 1), (2, 2), "shm"),
        ((2, 2), (3, 1), "tcp"),
        ((2, 2), (3, 1), "nixl"),
        ((1, 2), (2, 1), "nixl"),
        ((2, 2), (2, 1), "cuda_ipc"),
        ((1, 1), (3, 2), "cuda_ipc"),
    ],
    ids=str,
)
async def test_each_rank_gives_what_it_owns_to_the_ranks_that_want_it(
    giving: tuple[int, int], taking: tuple[int, int], kind: str
) -> None:
    if kind == "nixl":
        pytest.importorskip("nixl_cu13")
    here, there = Degrees(*giving), Degrees(*taking)
    sources, destinations = (9, 2, 5), (4, 11, 3)
    async with running(here, there, kind) as workers:
        before = workers.there.contents()
        incoming = await workers.offer(destinations, 10)
        outgoing = await workers.senders.open(incoming.tickets)
        await push(outgoing, sources)
        account = await outgoing.finish()
        await incoming.complete({nonce: Seal(nonce, 10, digests) for nonce, digests in account.digests.items()})
        for block in range(BLOCKS):
            given = block in destinations
            expected = workers.here.block(sources[destinations.index(block)]) if given else before[block]
            assert workers.there.block(block) == expected
        by_hand = bytes_by_pair(3, here, there)
        assert workers.senders.written_bytes == by_hand
        assert account.bytes == sum(by_hand.values())
        received = await workers.receivers.received_bytes()
        assert {
            Pair(giver, taker): size
            for taker, by_name in enumerate(received)
            for giver in range(here.num_ranks)
            if (size := by_name.get(rank_name("p", giver), 0))
        } == by_hand
        assert sum(received[0].values()) == sum(size for pair, size in by_hand.items() if pair.taker == 0)
        assert (workers.receivers.num_open, workers.senders.leases().open) == (0, 0)


@pytest.mark.parametrize(
    ("giving", "taking"),
    [(Degrees(2, 1), Degrees(1, 2)), (Degrees(1, 2), Degrees(3, 1)), (Degrees(2, 2), Degrees(2, 1))],
    ids=str,
)
async def test_blocks_that_are_cut_otherwise_are_made_by_each_rank(giving: Degrees, taking: Degrees) -> None:
    """Blocks of 3 tokens there, of 4 here."""
    source_layout = replace(LAYOUT, block_tokens=3, exact=False, model_digest="model")
    there = replace(LAYOUT, exact=False)
    workers = Workers(giving, taking, source_layout)
    workers.receivers = RankReceivers(workers.there.ranks, taking, Introduction("d", 3, SECRET, there, LEASE_S), SystemClock())
    try:
        async with asyncio.timeout(PATIENCE_S):
            offers = await workers.receivers.start(ListenOrder(("tcp",), "127.0.0.1", False))
            await workers.senders.connect(PeerGroup("d", 3, taking, tuple(map(tuple, offers)), BLOCKS, there))
            incoming = await workers.offer((4, 11, 3), 10)
            outgoing = await workers.senders.open(incoming.tickets)
            assert outgoing.block_tokens == 4
            sources = (9, 2, 5, 0)
            await outgoing.push_prompt(range(3), sources)
            await incoming.complete(await seals(incoming, outgoing))
            row_bytes = 4 * 4
            made, given = workers.there.contents(), workers.here.contents()
            for token in range(10):
                for run in range(18):  # (layer, head, K or V)
                    source, place = (run * 3 + token % 3) * row_bytes, (run * 4 + token % 4) * row_bytes
                    found = made[(4, 11, 3)[token // 4]][place : place + row_bytes]
                    assert found == given[sources[token // 3]][source : source + row_bytes]
    finally:
        await workers.senders.close()
        await workers.receivers.close()
        await workers.here.close()
        await workers.there.close()


async def test_one_rank_that_fails_fails_all_and_frees_nothing_early() -> None:
    """A rank of the prefill worker is gone in the middle; the decode worker's ranks end as one, and blocks come back once."""
    async with running(Degrees(1, 2), Degrees(2, 1), "shm") as workers:
        incoming = await workers.offer((4, 11), 8)
        outgoing = await workers.senders.open(incoming.tickets)
        await outgoing.push_prompt(range(1), (9, 2), (0, 3))
        workers.here.lose(1)
        assert isinstance(await incoming.wait_failed(), TransferBroken)
        with pytest.raises(HandoffError):
            await outgoing.finish()
        await outgoing.abort()
        assert await workers.abandon(incoming) == (4, 11)
        assert (workers.receivers.num_open, workers.senders.leases().open) == (0, 0)


async def test_blocks_whose_rank_was_lost_are_nobodys() -> None:
    async with running(Degrees(1, 2), Degrees(2, 1), "tcp") as workers:
        incoming = await workers.offer((4, 11), 8)
        outgoing = await workers.senders.open(incoming.tickets)
        await outgoing.push_prompt(range(1), (9, 2), (0, 3))
        workers.there.lose(1)
        assert isinstance(await incoming.wait_failed(), TransferBroken)
        giving_up = asyncio.ensure_future(workers.abandon(incoming))
        with pytest.raises(HandoffError):
            await push_rest(outgoing)
        await outgoing.abort()
        assert workers.senders.leases().open == 0
        assert not giving_up.done()
        assert workers.receivers.leases().quarantined == 1
        await workers.receivers.close()
        with pytest.raises(TransferBroken):
            await giving_up


async def test_an_abandoned_transfer_is_over_for_all_ranks() -> None:
    async with running(Degrees(2, 1), Degrees(1, 2), "shm") as workers:
        incoming = await workers.offer((4, 11), 8)
        outgoing = await workers.senders.open(incoming.tickets)
        await outgoing.push_prompt(range(1), (9, 2))
        assert incoming.tickets[0].part != ()
        assert await workers.abandon(incoming) == (4, 11)
        after = workers.there.contents()
        with pytest.raises(HandoffError):
            await push_rest(outgoing)
        await outgoing.abort()
        assert workers.there.contents() == after
        with pytest.raises(TicketRefused):
            await workers.senders.open(incoming.tickets)  # good once
        again = await workers.offer((4, 11), 8)
        outgoing = await workers.senders.open(again.tickets)
        await push(outgoing, (9, 2))
        await again.complete(await seals(again, outgoing))


async def test_seals_are_of_all_tickets_and_each_of_its_own() -> None:
    async with running(Degrees(1, 2), Degrees(1, 1), "tcp") as workers:
        incoming = await workers.offer((4, 11), 8)
        outgoing = await workers.senders.open(incoming.tickets)
        await push(outgoing, (9, 2))
        right = await seals(incoming, outgoing)
        first, second = (ticket.nonce for ticket in incoming.tickets)
        with pytest.raises(SealMismatch):
            await incoming.complete({first: right[first]})
        swapped = {first: replace(right[first], digests=right[second].digests), second: right[second]}
        with pytest.raises(SealMismatch):
            await incoming.complete(swapped)
        assert await workers.abandon(incoming) == (4, 11)


async def test_tickets_that_are_not_those_of_the_pairs_are_refused() -> None:
    async with running(Degrees(1, 2), Degrees(2, 1), "tcp") as workers:
        incoming = await workers.offer((4, 11), 8)
        tickets = list(incoming.tickets)

        async def param_of(wrong: Sequence[Ticket]) -> str | None:
            with pytest.raises(TicketRefused) as refused:
                await workers.senders.open(wrong)
            assert workers.senders.leases().open == 0
            return refused.value.param

        assert await param_of(tickets[:-1]) == "part"
        assert await param_of([*tickets, tickets[0]]) == "part"
        assert await param_of([replace(tickets[0], part=(0, 6)), *tickets[1:]]) == "part"
        assert await param_of([replace(tickets[0], blocks=(4, 12)), *tickets[1:]]) == "blocks"
        assert await param_of([replace(ticket, blocks=(4, 12)) for ticket in tickets]) == "mac"
        assert await param_of([replace(ticket, decode_worker_id="d2") for ticket in tickets]) == "decode_worker_id"
        assert await workers.abandon(incoming) == (4, 11)


async def test_a_closed_worker_leaves_its_ranks_to_the_next() -> None:
    """As when a worker changes its role and keeps its processes."""
    async with running(Degrees(1, 2), Degrees(2, 1), "tcp") as workers:
        incoming = await workers.offer((4, 11), 8)
        assert incoming.ticket.decode_worker_id == "d"
        await workers.senders.close()
        await workers.receivers.close()
        with pytest.raises(TransferBroken):
            await workers.senders.open(incoming.tickets)
        for group in (workers.here, workers.there):
            group.ranks = [group.ranks[0], *(RankOrders(end, rank) for rank, end in enumerate(group.ends, 1))]
        own = Introduction("p2", 1, SECRET, LAYOUT, LEASE_S)
        workers.senders = RankSenders(workers.there.ranks, Degrees(2, 1), own, SystemClock())
        own = Introduction("d2", 1, SECRET, LAYOUT, LEASE_S)
        workers.receivers = RankReceivers(workers.here.ranks, Degrees(1, 2), own, SystemClock())
        offers = await workers.receivers.start(ListenOrder(("shm",), "127.0.0.1", False))
        await workers.senders.connect(PeerGroup("d2", 1, Degrees(1, 2), tuple(map(tuple, offers)), BLOCKS, LAYOUT))
        incoming = workers.receivers.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p2", 1, ""),
            giving=Degrees(2, 1),
            first_block=0,
            blocks=(7, 8),
            num_tokens=8,
            ttl_s=PATIENCE_S,
        )
        await incoming.expect()
        outgoing = await workers.senders.open(incoming.tickets)
        await push(outgoing, (1, 2))
        await incoming.complete(await seals(incoming, outgoing))
        assert workers.here.block(7) == workers.there.block(1)


async def test_waiting_for_a_failure_ends_when_nobody_waits() -> None:
    async with running(Degrees(1, 2), Degrees(2, 1), "tcp") as workers:
        incoming = await workers.offer((4, 11), 8)
        waiting = asyncio.ensure_future(incoming.wait_failed())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        completing = asyncio.ensure_future(
            incoming.complete({ticket.nonce: Seal(ticket.nonce, 9, {}) for ticket in incoming.tickets})
        )
        with pytest.raises((SealMismatch, RequestCancelled)):
            await completing
        assert await workers.abandon(incoming) == (4, 11)
