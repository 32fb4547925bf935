"""All ranks of a decode worker as one receiver: rank 0's view.

    start -> offers of every rank
    open -> GroupIncoming, tickets for each two ranks that share something --expect--> the ranks let their writers in
              complete(seals): every rank has verified its part        abandon(release): the last writer of any rank is gone

Blocks are the worker's again when nobody can write to any part of them. A rank that was lost says nothing about its writers: then
they stay where they are, and the worker, which has lost a rank, ends.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence

from common.clock import Clock
from common.errors import HandoffError, PdserveError, SealMismatch, TransferBroken, TransferTimeout
from common.metrics import LeaseReadings
from common.types import Ticket, WorkerRef
from kvtransfer.incoming import RELEASE_TIMEOUT_S, RELEASE_TRIES
from kvtransfer.ranks.parts import Degrees, Pair, in_units, parts_of, rank_name, window_of
from kvtransfer.ranks.rank_end import Introduction, ListenOrder, ReceivingRank, introductions
from kvtransfer.ranks.together import all_of, settled
from kvtransfer.state import Seal
from kvtransfer.ticket import mint
from kvtransfer.transports.base import TransportOffer
from kvtransfer.window import part_of


class RankReceivers:
    """One per decode worker, for as long as it serves."""

    def __init__(
        self,
        ranks: Sequence[ReceivingRank],
        degrees: Degrees,
        own: Introduction,
        clock: Clock,
        *,
        draw_nonce: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`ranks` by number; `own` introduces the worker."""
        self.degrees = degrees
        self._ranks = ranks
        self._layout = own.layout
        self._own = own
        self._clock = clock
        self._draw_nonce = draw_nonce
        self._open: set[GroupIncoming] = set()
        self._num_expired = 0
        self._starting: asyncio.Task[list[list[TransportOffer]]] | None = None
        self._closed = False

    async def start(self, listen: ListenOrder) -> list[list[TransportOffer]]:
        """The offers of each rank; may be asked for again. Raises StartupError, or TransferBroken if a rank is gone."""
        if self._starting is None or (self._starting.done() and (self._starting.cancelled() or self._starting.exception())):
            self._starting = asyncio.get_running_loop().create_task(self._start(listen), name="kv-ranks-start")
        return await asyncio.shield(self._starting)

    def open(
        self,
        *,
        request_id: str,
        attempt: int,
        prefill: WorkerRef,
        giving: Degrees,
        first_block: int,
        blocks: Sequence[int],
        num_tokens: int,
        ttl_s: float,
    ) -> GroupIncoming:
        """Tickets for the ranks of `prefill`. Nobody is let in before `expect`. Raises TicketRefused, HandshakeRefused."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        tickets = {
            pair: mint(
                secret=self._own.secret,
                layout=in_units(window_of(self._layout, self.degrees, pair.taker)),
                request_id=request_id,
                attempt=attempt,
                decode_worker_id=rank_name(self._own.worker_id, pair.taker),
                decode_incarnation=self._own.incarnation,
                prefill=WorkerRef(rank_name(prefill.worker_id, pair.giver), prefill.incarnation, prefill.address),
                first_block=first_block,
                blocks=blocks,
                num_tokens=num_tokens,
                ttl_s=ttl_s,
                part=part_of(runs),
                draw_nonce=self._draw_nonce,
            )
            for pair, runs in parts_of(self._layout, giving, self.degrees).items()
        }
        incoming = GroupIncoming(tickets, self, self._clock)
        self._open.add(incoming)
        return incoming

    def rank(self, pair: Pair) -> ReceivingRank:
        return self._ranks[pair.taker]

    def ended(self, incoming: GroupIncoming) -> None:
        self._open.discard(incoming)

    def expired(self) -> None:
        self._num_expired += 1

    async def received_bytes(self) -> list[Mapping[str, int]]:
        """For each rank, what it has verified since the start, by the rank that wrote it."""
        return await all_of(rank.received_bytes() for rank in self._ranks)

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_blocks_arriving(self) -> int:
        """Blocks of those transfers that may still succeed."""
        return sum(len(incoming.ticket.blocks) for incoming in self._open if not incoming.given_up)

    def leases(self) -> LeaseReadings:
        """From any thread."""
        now_s, transfers = self._clock.monotonic_s(), tuple(self._open)
        given_up = [incoming for incoming in transfers if incoming.given_up]
        return LeaseReadings(
            open=len(transfers),
            expired=self._num_expired,
            oldest_s=_oldest_s(transfers, now_s),
            quarantined=len(given_up),
            quarantined_oldest_s=_oldest_s(given_up, now_s),
        )

    async def close(self) -> None:
        """Ends all links. Idempotent."""
        self._closed = True
        if self._starting is not None:
            await settled(rank.close() for rank in self._ranks)
        for incoming in tuple(self._open):
            incoming.closed.set()

    async def _start(self, listen: ListenOrder) -> list[list[TransportOffer]]:
        own = introductions(self._own, self.degrees)
        return await all_of(rank.receive_as(one, listen) for rank, one in zip(self._ranks, own, strict=True))


class GroupIncoming:
    """One transfer to all ranks, as the hand-off sees it. Ended by exactly one of `complete` and `abandon`."""

    def __init__(self, tickets: Mapping[Pair, Ticket], receivers: RankReceivers, clock: Clock) -> None:
        self.tickets = tuple(tickets.values())  # the first is that of both ranks 0
        self.opened_s = clock.monotonic_s()
        self.given_up = False
        self.closed = asyncio.Event()  # no link is left
        self._tickets = tickets
        self._receivers = receivers

    @property
    def ticket(self) -> Ticket:
        return self.tickets[0]

    async def expect(self) -> None:
        """From when it returns writers are let in. If it does not, `abandon` is what remains to be called."""
        await all_of(self._receivers.rank(pair).expect(ticket) for pair, ticket in self._tickets.items())

    async def complete(self, seals: Mapping[bytes, Seal]) -> None:
        """Returns when every rank has verified its part of every block against its seal, and its writer is gone: the KV may be
        used. Raises what the first of them fails with; then, and when cancelled, `abandon` remains to be called."""
        if seals.keys() != {ticket.nonce for ticket in self.tickets}:
            raise SealMismatch(f"{len(seals)} seals for {len(self.tickets)} tickets")
        try:
            await all_of(
                self._receivers.rank(pair).complete(ticket.nonce, seals[ticket.nonce]) for pair, ticket in self._tickets.items()
            )
        except TransferTimeout:
            self._receivers.expired()
            raise
        self._receivers.ended(self)

    async def wait_failed(self) -> HandoffError:
        """Returns the error as soon as the transfer fails at any rank. If it does not fail it does not return."""
        try:
            await all_of(self._receivers.rank(pair).wait_failed(ticket.nonce) for pair, ticket in self._tickets.items())
        except HandoffError as error:
            if isinstance(error, TransferTimeout):
                self._receivers.expired()
            return error
        raise TransferBroken("the ranks have nothing to wait for")

    async def abandon(
        self, release: Callable[[], Awaitable[None]], *, tries: int = RELEASE_TRIES, timeout_s: float = RELEASE_TIMEOUT_S
    ) -> tuple[int, ...]:
        """As of one process (`kvtransfer.incoming`): the blocks, once no writer of any rank can touch them. Raises TransferBroken
        if that cannot be known any more, because a rank was lost: nobody may have them."""
        self.given_up = True
        drained = asyncio.ensure_future(
            all_of(self._receivers.rank(pair).abandon(ticket.nonce) for pair, ticket in self._tickets.items())
        )
        try:
            for _ in range(tries):
                if drained.done():
                    break
                try:
                    async with asyncio.timeout(timeout_s):
                        await release()
                except (PdserveError, TimeoutError):
                    continue
                await asyncio.wait({drained}, timeout=timeout_s)
            try:
                await drained
            except TransferBroken:
                await self.closed.wait()
                raise
        finally:
            drained.cancel()
            await asyncio.wait({drained})
        self._receivers.ended(self)
        return self.ticket.blocks


def _oldest_s(transfers: Sequence[GroupIncoming], now_s: float) -> float:
    return max((now_s - incoming.opened_s for incoming in transfers), default=0.0)
