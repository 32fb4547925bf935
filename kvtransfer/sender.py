"""The prefill worker's end: links to decode workers, and the transfers it was given tickets for.

    connect(peer, offers)  once per incarnation of a decode worker; lost links are connected anew when they are needed
    open(ticket) -> Outgoing       once per ticket; ended by its `finish` or `abort`, or by `release([nonce])` of the other side

Does not know what is in the blocks, who frees the sources, or how control messages travel.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.clock import Clock
from common.errors import HandoffError, HandshakeRefused, StartupError, TicketRefused, TransferBroken, TransferTimeout
from common.metrics import LeaseReadings
from common.types import KVLayout, Ticket
from kvtransfer.lease import LEASE_S
from kvtransfer.outgoing import Outgoing, SourceSide, TransferAccount
from kvtransfer.recutting import Recutting, recutting_for
from kvtransfer.region import BlockRegion
from kvtransfer.ticket import verify
from kvtransfer.transports import TRANSPORTS, create_transport
from kvtransfer.transports.base import LinkCredentials, PeerName, SenderLink, Transport, TransportOffer
from kvtransfer.window import PeerWindow, Run

__all__ = ["KVSender", "Outgoing", "TransferAccount"]

REMEMBERED_NONCES = 65_536


@dataclass(slots=True)
class _Peer:
    """A decode worker that introduced itself, and the link to it."""

    name: PeerName
    offers: tuple[TransportOffer, ...]
    pool_blocks: int
    layout: KVLayout
    recutting: Recutting | None  # its blocks are not as ours
    window: PeerWindow | None  # they hold other layers than ours
    link: SenderLink | None = None
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)


class KVSender:
    """One per prefill worker. Lives on one event loop; `close` once, at the end."""

    def __init__(
        self,
        region: BlockRegion,
        layout: KVLayout,
        worker_id: str,
        incarnation: int,
        secret: bytes,
        clock: Clock,
        *,
        lease_s: float = LEASE_S,
        transports: Mapping[str, Callable[[], Transport]] = TRANSPORTS,
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise StartupError(f"the pool has blocks of {region.block_bytes} bytes, the layout of {layout.block_bytes} bytes")
        self._layout = layout
        self._name = PeerName(worker_id, incarnation)
        self._secret = secret
        self._transports = transports
        self._peers: dict[str, _Peer] = {}
        self._outgoing: dict[bytes, Outgoing] = {}
        self._spent: OrderedDict[bytes, None] = OrderedDict()  # seen or released: never accepted (again)
        self._retiring: set[asyncio.Task[None]] = set()
        self._closed = False
        self._num_expired = 0
        self._side = SourceSide(
            region=region,
            num_layers=layout.num_layers,
            clock=clock,
            lease_s=lease_s,
            forget=lambda nonce: self._outgoing.pop(nonce, None),
            expired=self._count_expired,
            silent=self._link_silent,
        )

    async def connect(
        self,
        peer_worker_id: str,
        peer_incarnation: int,
        offers: Sequence[TransportOffer],
        peer_pool_blocks: int,
        peer_layout: KVLayout | None = None,
        runs: Sequence[Run] = (),
    ) -> str:
        """Connects to the first offer that works and returns its kind; at once if there is a link to this incarnation already.
        A later incarnation replaces an earlier one. `peer_layout` None = as ours. `runs` say which layers of its blocks are which
        of ours; none = the same ones. Raises HandshakeRefused or TransferBroken."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        layout = peer_layout or self._layout
        window = PeerWindow(layout, tuple(runs)) if runs else None
        recutting = recutting_for(self._side.region, self._layout, layout, window)
        name = PeerName(peer_worker_id, peer_incarnation)
        known = self._peers.get(peer_worker_id)
        if known is not None and known.name.incarnation > peer_incarnation:
            raise HandshakeRefused(f"incarnation {known.name.incarnation} of {peer_worker_id} is known", param="incarnation")
        if known is None or known.name != name:
            if known is not None:
                self._retire(known, TransferBroken("a later incarnation of the decode worker took over"))
            self._peers[peer_worker_id] = known = _Peer(name, tuple(offers), peer_pool_blocks, layout, recutting, window)
        elif (known.layout, known.window) != (layout, window):
            raise HandshakeRefused("this incarnation of the decode worker had another layout before", param="layout")
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
            layout=peer.layout,
            prefill_worker_id=self._name.worker_id,
            prefill_incarnation=self._name.incarnation,
            decode_worker_id=peer.name.worker_id,
            decode_incarnation=peer.name.incarnation,
            pool_blocks=peer.pool_blocks,
        )
        if ticket.nonce in self._spent:
            raise TicketRefused("the ticket was used or released before", param="nonce")
        self._spend(ticket.nonce)
        outgoing = Outgoing(ticket, self._side, lambda outgoing: self._enter(outgoing, peer), peer.recutting, peer.window)
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

    def leases(self) -> LeaseReadings:
        """From any thread."""
        opened_s = [outgoing.opened_s for outgoing in tuple(self._outgoing.values())]
        oldest_s = self._side.clock.monotonic_s() - min(opened_s) if opened_s else 0.0
        return LeaseReadings(open=len(opened_s), expired=self._num_expired, oldest_s=oldest_s)

    async def close(self) -> None:
        """Aborts what is open and ends all links. Idempotent."""
        self._closed = True
        await asyncio.gather(*(outgoing.abort() for outgoing in tuple(self._outgoing.values())))
        for peer in self._peers.values():
            self._retire(peer, TransferBroken("this worker's KV transfer was closed"))
        self._peers.clear()
        if self._retiring:
            await asyncio.wait(self._retiring)

    def _count_expired(self) -> None:
        self._num_expired += 1

    # -- within -------------------------------------------------------------------------------------------------------

    async def _enter(self, outgoing: Outgoing, peer: _Peer) -> SenderLink:
        """A link over which the ticket's decode worker has let us in."""
        link = await self._link_to(peer)
        outgoing.entering(link)
        await link.open_writer(outgoing.ticket.nonce, outgoing)
        return link

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
        credentials = LinkCredentials(self._name, peer.layout.fingerprint, self._secret)
        failures: list[HandoffError] = [HandshakeRefused("the decode worker offers no transport", param="transports")]
        for offer in peer.offers:
            try:
                return await create_transport(offer.kind, self._transports).connect(
                    offer.address,
                    credentials,
                    peer.name,
                    pool_blocks=peer.pool_blocks,
                    layout=peer.layout,
                    source=self._side.region,
                )
            except HandoffError as failure:  # a kind unknown here, or out of reach (shm from another host): try the next
                failures.append(failure)
        refusals = (failure for failure in failures if isinstance(failure, HandshakeRefused) and failure.param != "transports")
        raise next(refusals, failures[-1])

    def _link_silent(self, link: SenderLink) -> None:
        """Unless other transfers hear the decode worker over it, the link is dead, and must not be the next ones' link."""
        if not any(outgoing.hears(link) for outgoing in self._outgoing.values()):
            link.drop(TransferTimeout("the decode worker is not heard any more over this link"))

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
