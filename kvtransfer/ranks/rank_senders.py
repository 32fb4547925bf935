"""All ranks of a prefill worker as one sender: rank 0's view.

    connect(peer, its ranks' offers)  each rank to those of the peer's ranks that it shares something with
    open(tickets) -> GroupOutgoing    one ticket for each two ranks; ended by `finish` or `abort`, or by `release(nonces)`

    push_prompt --> to every rank that has some of these layers, and a ticket for them --> each writes what is its own
    finish      --> all of them are through, or all are aborted

Not a byte of KV passes here. It does not know what other ranks are but through `rank_end.SendingRank`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.clock import Clock
from common.errors import HandshakeRefused, TicketRefused, TransferBroken
from common.metrics import LeaseReadings
from common.types import KVLayout, Ticket
from kvtransfer.part import runs_within
from kvtransfer.ranks.parts import Degrees, Pair, Parts, in_units, parts_of, rank_name, units_of, window_of
from kvtransfer.ranks.rank_end import Introduction, PeerRank, PushOrder, SendingRank, introductions
from kvtransfer.ranks.together import all_of, settled
from kvtransfer.reshard import check_reshardable
from kvtransfer.transports.base import TransportOffer
from kvtransfer.window import part_of


@dataclass(frozen=True, slots=True)
class PeerGroup:
    """A decode worker, as it introduced itself."""

    worker_id: str
    incarnation: int
    degrees: Degrees
    offers: tuple[tuple[TransportOffer, ...], ...]  # by rank
    pool_blocks: int
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class GroupAccount:
    """What was written: goes into the seals."""

    digests: Mapping[bytes, Mapping[int, bytes]]  # nonce -> logical block -> digest
    bytes: int
    transfer_s: float  # of the rank that wrote longest


class RankSenders:
    """One per prefill worker, for as long as it serves."""

    def __init__(self, ranks: Sequence[SendingRank], degrees: Degrees, own: Introduction, clock: Clock) -> None:
        """`ranks` by number; `own` introduces the worker."""
        self._ranks = ranks
        self._degrees = degrees
        self._layout = own.layout
        self._own = own
        self._clock = clock
        self._started: asyncio.Task[None] | None = None
        self._peers: dict[str, tuple[PeerGroup, Parts]] = {}
        self._open: set[GroupOutgoing] = set()
        self._closed = False
        self.written_bytes: Counter[Pair] = Counter()  # of transfers that were finished; grows only

    async def connect(self, peer: PeerGroup) -> str:
        """The kind of the link between both ranks 0. Raises HandshakeRefused or TransferBroken; what was linked stays linked, and
        is found again by the next try."""
        check_reshardable(self._layout, peer.layout)
        parts = parts_of(peer.layout, self._degrees, peer.degrees)
        if len(peer.offers) != peer.degrees.num_ranks:
            raise HandshakeRefused(f"offers of {len(peer.offers)} ranks where there are {peer.degrees.num_ranks}", param="ranks")
        await self._start()
        kinds = await all_of(
            self._ranks[pair.giver].connect(
                PeerRank(
                    rank_name(peer.worker_id, pair.taker),
                    peer.incarnation,
                    peer.offers[pair.taker],
                    peer.pool_blocks,
                    in_units(window_of(peer.layout, peer.degrees, pair.taker)),
                    runs,
                )
            )
            for pair, runs in parts.items()
        )
        self._peers[peer.worker_id] = peer, parts
        return kinds[0]

    async def open(self, tickets: Sequence[Ticket]) -> GroupOutgoing:
        """Accepts the tickets of one prompt, once. Raises TicketRefused unless there is one for each two ranks that share
        something, for what they share."""
        first = tickets[0]
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        known = self._peers.get(first.decode_worker_id)
        if known is None:
            raise TicketRefused("no handshake with the decode worker of this ticket", param="decode_worker_id")
        peer, parts = known
        outgoing = GroupOutgoing(_by_pair(tickets, parts, self._own.worker_id, peer), self, peer, self._layout, self._clock)
        self._open.add(outgoing)
        try:
            await outgoing.admit()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(outgoing.abort()))
            raise
        return outgoing

    async def release(self, nonces: Sequence[bytes]) -> None:
        """When it returns no rank writes anything more under these nonces, ever."""
        if self._started is not None:
            await all_of(rank.release(nonces) for rank in self._ranks)

    def rank(self, pair: Pair) -> SendingRank:
        return self._ranks[pair.giver]

    def forget(self, outgoing: GroupOutgoing) -> None:
        self._open.discard(outgoing)

    def leases(self) -> LeaseReadings:
        """From any thread."""
        opened_s = [outgoing.opened_s for outgoing in tuple(self._open)]
        return LeaseReadings(open=len(opened_s), oldest_s=self._clock.monotonic_s() - min(opened_s) if opened_s else 0.0)

    async def close(self) -> None:
        """Ends all links. Idempotent."""
        self._closed = True
        await settled(outgoing.abort() for outgoing in tuple(self._open))
        if self._started is not None:
            await settled(rank.close() for rank in self._ranks)

    async def _start(self) -> None:
        if self._started is None or (self._started.done() and (self._started.cancelled() or self._started.exception())):
            self._started = asyncio.get_running_loop().create_task(self._introduce_all(), name="kv-ranks-start")
        await asyncio.shield(self._started)

    async def _introduce_all(self) -> None:
        own = introductions(self._own, self._degrees)
        await all_of(rank.send_as(one) for rank, one in zip(self._ranks, own, strict=True))


class GroupOutgoing:
    """The outgoing KV of one prompt. Ended by `finish` or `abort`."""

    def __init__(
        self, tickets: Mapping[Pair, Ticket], senders: RankSenders, peer: PeerGroup, layout: KVLayout, clock: Clock
    ) -> None:
        self.ticket = next(iter(tickets.values()))  # of both ranks 0
        self.opened_s = clock.monotonic_s()
        self._tickets = tickets
        self._senders = senders
        self._peer = peer
        self._block_tokens = None if peer.layout.block_tokens == layout.block_tokens else peer.layout.block_tokens

    async def admit(self) -> None:
        await all_of(self._senders.rank(pair).admit(ticket) for pair, ticket in self._tickets.items())

    async def push_prompt(self, logical: range, blocks: Sequence[int], layers: tuple[int, int] | None = None) -> None:
        """As `kvtransfer.outgoing.Outgoing`; layers are the model's."""
        orders = []
        for pair, ticket in self._tickets.items():
            first, end = units_of(self._peer.layout, self._peer.degrees, pair.taker, layers or (0, self._peer.layout.num_layers))
            if any(runs_within(ticket.part, first, end)):
                orders.append((pair, ticket.nonce, PushOrder(logical, tuple(blocks), first, end)))
        await all_of(self._senders.rank(pair).push(nonce, order) for pair, nonce, order in orders)

    @property
    def block_tokens(self) -> int | None:
        """Of the peer's blocks; None = as ours."""
        return self._block_tokens

    async def finish(self) -> GroupAccount:
        """Returns when every rank has written all and said so. Raises what the first of them failed with, after which `abort` is
        what remains to be called."""
        accounts = await all_of(self._senders.rank(pair).finish(ticket.nonce) for pair, ticket in self._tickets.items())
        self._senders.forget(self)
        for pair, account in zip(self._tickets, accounts, strict=True):
            self._senders.written_bytes[pair] += account.bytes
        return GroupAccount(
            {ticket.nonce: account.digests for ticket, account in zip(self._tickets.values(), accounts, strict=True)},
            sum(account.bytes for account in accounts),
            max(account.transfer_s for account in accounts),
        )

    async def abort(self) -> None:
        """Returns when no rank reads or writes anything more under these tickets; a rank that is gone does not. No effect after
        `finish`. Idempotent."""
        await settled(self._senders.rank(pair).abort(ticket.nonce) for pair, ticket in self._tickets.items())
        self._senders.forget(self)


def _by_pair(tickets: Sequence[Ticket], parts: Parts, own_id: str, peer: PeerGroup) -> dict[Pair, Ticket]:
    """The tickets in the order of `parts`. What else is wrong with one its rank finds (`kvtransfer.ticket.verify`)."""
    first = tickets[0]
    for ticket in tickets:
        for name in ("request_id", "attempt", "first_block", "blocks", "num_tokens"):
            if getattr(ticket, name) != getattr(first, name):
                raise TicketRefused(f"the tickets of one prompt differ in {name}", param=name)
    named = {(ticket.prefill_worker_id, ticket.decode_worker_id): ticket for ticket in tickets}
    wanted = {(rank_name(own_id, pair.giver), rank_name(peer.worker_id, pair.taker)): pair for pair in parts}
    if named.keys() != wanted.keys() or len(named) != len(tickets):
        raise TicketRefused(f"{len(tickets)} tickets are not those of the {len(wanted)} pairs of ranks", param="part")
    for names, pair in wanted.items():
        if named[names].part != part_of(parts[pair]):
            raise TicketRefused(f"ranks {pair.giver} and {pair.taker} share another part of a block", param="part")
    return {pair: named[names] for names, pair in wanted.items()}
