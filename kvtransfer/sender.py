"""The prefill worker's end: links to decode workers, and the transfers it was given tickets for.

    connect(peer, offers)  once per incarnation of a decode worker; lost links are connected anew when they are needed
    open(ticket) -> Outgoing -- push, push ... -- finish() -> TransferAccount      everything was written
                             \\-- abort(), or release([nonce]) by the other side    nothing more will be written

Each Outgoing has a task of its own (the pump) that asks to be let in, writes what was pushed, in order, and says CLOSE, whatever
happens. Callers wait for the pump, they do not drive it: cancelling a caller never leaves a write half done. The source blocks of
a push must stay as they are until `finish` or `abort` has returned.

Does not know what is in the blocks, who frees the sources, or how control messages travel.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.clock import Clock
from common.errors import (
    HandoffError,
    HandshakeRefused,
    IllegalTransition,
    SealMismatch,
    StartupError,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
)
from common.types import KVLayout, Ticket
from kvtransfer.region import BlockRegion
from kvtransfer.ticket import verify
from kvtransfer.transports import create_transport
from kvtransfer.transports.base import LinkCredentials, PeerName, Piece, SenderLink, TransportOffer

BATCH_BYTES = 4 * 1024 * 1024  # written per trip to the lane; an abort takes effect between blocks
MAX_QUEUED_BYTES = 64 * 1024 * 1024  # per transfer; `push` waits above it
ABORT_TIMEOUT_S = 2.0  # a write that does not stop by then loses its link
REMEMBERED_NONCES = 65_536


@dataclass(frozen=True, slots=True)
class TransferAccount:
    """What was written: goes into the seal. `transfer_s` is the time during which something was being written."""

    digests: Mapping[int, bytes]  # logical block -> digest
    bytes: int
    transfer_s: float


@dataclass(slots=True)
class _Peer:
    """A decode worker that introduced itself, and the link to it."""

    name: PeerName
    offers: tuple[TransportOffer, ...]
    pool_blocks: int
    link: SenderLink | None = None
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)


class KVSender:
    """One per prefill worker. Lives on one event loop; `close` once, at the end."""

    def __init__(
        self, region: BlockRegion, layout: KVLayout, worker_id: str, incarnation: int, secret: bytes, clock: Clock
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise StartupError(f"the pool has blocks of {region.block_bytes} bytes, the layout of {layout.block_bytes} bytes")
        self._region = region
        self._layout = layout
        self._name = PeerName(worker_id, incarnation)
        self._secret = secret
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._outgoing: dict[bytes, Outgoing] = {}
        self._spent: OrderedDict[bytes, None] = OrderedDict()  # seen or released: never accepted (again)
        self._retiring: set[asyncio.Task[None]] = set()
        self._closed = False

    async def connect(
        self, peer_worker_id: str, peer_incarnation: int, offers: Sequence[TransportOffer], peer_pool_blocks: int
    ) -> str:
        """Connects to the first offer that works and returns its kind; at once if there is a link to this incarnation already.
        A later incarnation replaces an earlier one. Raises HandshakeRefused or TransferBroken."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        name = PeerName(peer_worker_id, peer_incarnation)
        known = self._peers.get(peer_worker_id)
        if known is not None and known.name.incarnation > peer_incarnation:
            raise HandshakeRefused(f"incarnation {known.name.incarnation} of {peer_worker_id} is known", param="incarnation")
        if known is None or known.name != name:
            if known is not None:
                self._retire(known, TransferBroken("a later incarnation of the decode worker took over"))
            self._peers[peer_worker_id] = known = _Peer(name, tuple(offers), peer_pool_blocks)
        elif known.link is None or known.link.lost is not None:
            known.offers, known.pool_blocks = tuple(offers), peer_pool_blocks
        return (await self._link_to(known)).kind

    def open(self, ticket: Ticket) -> Outgoing:
        """Accepts a ticket, once. Raises TicketRefused with the reason; the decode worker's own refusal (stale, cancelled,
        expired) comes out of the first `push` or `finish` that waits for it."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        peer = self._peers.get(ticket.decode_worker_id)
        if peer is None:
            raise TicketRefused("no handshake with the decode worker of this ticket", param="decode_worker_id")
        verify(
            ticket,
            self._secret,
            layout=self._layout,
            prefill_worker_id=self._name.worker_id,
            prefill_incarnation=self._name.incarnation,
            decode_worker_id=peer.name.worker_id,
            decode_incarnation=peer.name.incarnation,
            pool_blocks=peer.pool_blocks,
        )
        if ticket.nonce in self._spent:
            raise TicketRefused("the ticket was used or released before", param="nonce")
        self._spend(ticket.nonce)
        outgoing = Outgoing(self, ticket, peer)
        self._outgoing[ticket.nonce] = outgoing
        return outgoing

    async def release(self, nonces: Iterable[bytes]) -> None:
        """When it returns nothing more is written under these nonces, ever; also under ones that have not been seen yet."""
        nonces = tuple(nonces)
        for nonce in nonces:
            self._spend(nonce)
        open_ones = [self._outgoing[nonce] for nonce in nonces if nonce in self._outgoing]
        await asyncio.gather(*(outgoing.abort() for outgoing in open_ones))

    @property
    def num_open(self) -> int:
        """Transfers that may still write, and so read their source blocks."""
        return len(self._outgoing)

    async def close(self) -> None:
        """Aborts what is open and ends all links. Idempotent."""
        self._closed = True
        await asyncio.gather(*(outgoing.abort() for outgoing in tuple(self._outgoing.values())))
        for peer in self._peers.values():
            self._retire(peer, TransferBroken("this worker's KV transfer was closed"))
        self._peers.clear()
        if self._retiring:
            await asyncio.wait(self._retiring)

    # -- by Outgoing --------------------------------------------------------------------------------------------------

    async def enter(self, outgoing: Outgoing) -> SenderLink:
        """A link over which the ticket's decode worker has let us in."""
        link = await self._link_to(outgoing.peer)
        outgoing.entering(link)
        await link.open_writer(outgoing.ticket.nonce)
        return link

    def piece(self, ticket: Ticket, logical_block: int, source_block: int) -> Piece:
        index = logical_block - ticket.first_block
        if not 0 <= index < len(ticket.blocks):
            raise TicketRefused(f"logical block {logical_block} is not in the ticket", param="logical_block")
        return Piece(logical_block, ticket.blocks[index], self._region.block(source_block))

    def forget(self, outgoing: Outgoing) -> None:
        self._outgoing.pop(outgoing.ticket.nonce, None)

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    # -- within -------------------------------------------------------------------------------------------------------

    async def _link_to(self, peer: _Peer) -> SenderLink:
        async with peer.connecting:
            if self._closed or self._peers.get(peer.name.worker_id) is not peer:
                raise TransferBroken("there is no link to this incarnation of the decode worker any more")
            if peer.link is not None:
                if peer.link.lost is None:
                    return peer.link
                await peer.link.close()
                peer.link = None
            link = await self._first_that_works(peer)
            if self._closed or self._peers.get(peer.name.worker_id) is not peer:
                await link.close()
                raise TransferBroken("there is no link to this incarnation of the decode worker any more")
            peer.link = link
            return link

    async def _first_that_works(self, peer: _Peer) -> SenderLink:
        credentials = LinkCredentials(self._name, self._layout.fingerprint, self._secret)
        failures: list[HandoffError] = [HandshakeRefused("the decode worker offers no transport", param="transports")]
        for offer in peer.offers:
            try:
                return await create_transport(offer.kind).connect(
                    offer.address,
                    credentials,
                    peer.name,
                    pool_blocks=peer.pool_blocks,
                    block_bytes=self._layout.block_bytes,
                )
            except HandoffError as failure:  # a kind unknown here, or out of reach (shm from another host): try the next
                failures.append(failure)
        refusals = (failure for failure in failures if isinstance(failure, HandshakeRefused) and failure.param != "transports")
        raise next(refusals, failures[-1])

    def _retire(self, peer: _Peer, error: HandoffError) -> None:
        link, peer.link = peer.link, None
        if link is not None:
            link.drop(error)
            task = asyncio.get_running_loop().create_task(link.close(), name="kv-link-retire")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _spend(self, nonce: bytes) -> None:
        """Bounded memory: should a nonce fall out of it, the decode worker still refuses what it did not grant."""
        self._spent[nonce] = None
        self._spent.move_to_end(nonce)
        while len(self._spent) > REMEMBERED_NONCES:
            self._spent.popitem(last=False)


class _Phase(enum.Enum):
    PUSHING = "pushing"  # takes pushes
    FINISHING = "finishing"  # no more pushes; writes what is queued
    STOPPING = "stopping"  # aborted or failed; nothing new is written
    ENDED = "ended"  # the pump is through: nothing is written any more


class Outgoing:
    """One transfer as the prefill worker's hand-off sees it. Made by `KVSender.open`; ended by `finish` or `abort`."""

    def __init__(self, sender: KVSender, ticket: Ticket, peer: _Peer) -> None:
        self.ticket = ticket
        self.peer = peer
        self._sender = sender
        self._phase = _Phase.PUSHING
        self._error: HandoffError | None = None
        self._queue: deque[Piece] = deque()
        self._queued_bytes = 0
        self._pushed: set[int] = set()
        self._digests: dict[int, bytes] = {}
        self._bytes = 0
        self._transfer_s = 0.0
        self._link: SenderLink | None = None
        self._changed = asyncio.Event()  # for the pump: something was pushed, or the phase changed
        self._room = asyncio.Event()  # for push: the queue is short, or nothing more will be written
        self._room.set()
        self._entering: asyncio.Task[SenderLink] | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(ticket.ttl_s, self._expire)
        self._pump = loop.create_task(self._run(), name="kv-pump")

    async def push(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Queues (logical block, source block) pairs; waits while too much is queued. Raises TicketRefused for a block that is
        not in the ticket or was pushed before, and whatever the transfer has failed with."""
        self._raise_if_over()
        if not blocks:
            return
        if self._phase is not _Phase.PUSHING:
            raise IllegalTransition(f"push while {self._phase.value}")
        pieces = [self._sender.piece(self.ticket, logical, source) for logical, source in blocks]
        logical_blocks = [piece.logical_block for piece in pieces]
        if len(set(logical_blocks)) != len(logical_blocks) or not self._pushed.isdisjoint(logical_blocks):
            raise TicketRefused("a logical block was pushed twice", param="logical_block")
        self._pushed.update(logical_blocks)
        self._queue.extend(pieces)
        self._queued_bytes += sum(piece.source.nbytes for piece in pieces)
        self._changed.set()
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._room.clear()
            await self._room.wait()
            self._raise_if_over()

    async def finish(self) -> TransferAccount:
        """Returns when everything was written and CLOSE was said. Raises what the transfer has failed with, and SealMismatch if
        blocks of the ticket were never pushed. When cancelled, call `abort` (or `finish` again)."""
        self._raise_if_over()
        missing = len(self.ticket.blocks) - len(self._pushed)
        if missing:
            self._fail(SealMismatch(f"{missing} of the ticket's {len(self.ticket.blocks)} blocks were not pushed"))
        elif self._phase is _Phase.PUSHING:
            self._phase = _Phase.FINISHING
            self._changed.set()
        await asyncio.wait({self._pump})
        self._raise_if_over()
        self._pump.result()  # a bug in the pump is raised here
        return TransferAccount(dict(self._digests), self._bytes, self._transfer_s)

    async def abort(self) -> None:
        """Returns when nothing more is written or read under this ticket. No effect after `finish`. Idempotent; when cancelled,
        the abort goes on by itself."""
        if self._phase is not _Phase.ENDED:
            self._fail(TransferBroken("the transfer was aborted"))
            _, pending = await asyncio.wait({self._pump}, timeout=ABORT_TIMEOUT_S)
            if pending and self._link is not None:
                self._link.drop(TransferBroken("the decode worker did not take a block in time to stop cleanly"))
            await asyncio.wait({self._pump})

    def entering(self, link: SenderLink) -> None:
        self._link = link

    # -- the pump -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            if self.ticket.blocks:
                await self._write_all()
        except HandoffError as error:
            self._fail(error)
        finally:
            self._timer.cancel()
            if self._link is not None:
                await self._link.close_writer(self.ticket.nonce)
            self._phase = _Phase.ENDED
            self._queue.clear()
            self._room.set()
            self._sender.forget(self)

    async def _write_all(self) -> None:
        if self._stopping():
            return
        # `_fail` cancels the wait for admission, which may be long; a write is never cancelled, it is asked to stop.
        self._entering = asyncio.create_task(self._sender.enter(self), name="kv-enter")
        await asyncio.wait({self._entering})
        if self._entering.cancelled():
            return
        link = self._entering.result()
        while True:
            batch = self._next_batch()
            if batch:
                started_s = self._sender.now_s()
                digests = await link.write(self.ticket.nonce, batch, self._stopping)
                self._transfer_s += self._sender.now_s() - started_s
                for piece, digest in zip(batch, digests, strict=False):
                    self._digests[piece.logical_block] = digest
                    self._bytes += piece.source.nbytes
                if len(digests) < len(batch) and not self._stopping():
                    raise TransferBroken("the link to the decode worker went away")
            if self._stopping() or (self._phase is _Phase.FINISHING and not self._queue):
                return
            if not self._queue:
                self._changed.clear()
                await self._changed.wait()  # bounded by the ticket's time

    def _next_batch(self) -> list[Piece]:
        batch: list[Piece] = []
        size_bytes = 0
        while self._queue and size_bytes < BATCH_BYTES and not self._stopping():
            piece = self._queue.popleft()
            batch.append(piece)
            size_bytes += piece.source.nbytes
        self._queued_bytes -= size_bytes
        if self._queued_bytes <= MAX_QUEUED_BYTES:
            self._room.set()
        return batch

    def _stopping(self) -> bool:
        return self._phase is _Phase.STOPPING

    def _expire(self) -> None:
        self._fail(TransferTimeout(f"the ticket's {self.ticket.ttl_s:g} s are over"))

    def _fail(self, error: HandoffError) -> None:
        if self._phase in (_Phase.PUSHING, _Phase.FINISHING):
            self._error = error
            self._phase = _Phase.STOPPING
            self._changed.set()
            self._room.set()
            if self._entering is not None:
                self._entering.cancel()

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error
