"""The decode worker's end: hands out tickets for blocks of its pool, lets writers in, passes on what they write.

    open -> Incoming --(ticket travels, writer comes, pieces arrive)--> complete(seal)   the blocks are the request's alone
                     \\--(anything goes wrong, or nobody wants it)-----> abandon(release) -> blocks to give back to the pool

`KVReceiver` is what links report to (`transports.base.Landing`): it finds the transfer (`incoming.Incoming`) that a frame names
and checks that the frame came over the link that was let in. Reports are handled on the event loop.

Does not know what is in the blocks, who computes it, or how control messages travel.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.clock import Clock
from common.errors import HandoffError, IllegalTransition, StartupError, TransferBroken, TransferTimeout
from common.loopback import is_loopback
from common.metrics import LeaseReadings
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.incoming import Incoming, PoolSide, ReceiverCounters
from kvtransfer.layout import layer_bytes
from kvtransfer.lease import LEASE_S
from kvtransfer.part import mask_of
from kvtransfer.region import BlockRegion
from kvtransfer.state import HandoffState, IncomingTransfer
from kvtransfer.ticket import check_shape, mint
from kvtransfer.transports import TRANSPORTS, create_transport
from kvtransfer.transports.base import (
    LinkCredentials,
    Listener,
    PeerName,
    PieceName,
    ReceiverLink,
    Refusal,
    Transport,
    TransportOffer,
    Written,
)

__all__ = ["CREDIT_BYTES", "Incoming", "KVReceiver", "ReceiverCounters"]

_QUARANTINED = (HandoffState.POISONED, HandoffState.CANCELLED)
CREDIT_BYTES = 32 * 1024 * 1024  # what a writer may have on its way, unverified; at least four blocks


class KVReceiver:
    """One per decode worker. Lives on one event loop; `start` and `close` once each."""

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
        credit_bytes: int = CREDIT_BYTES,
        draw_nonce: Callable[[int], bytes] = secrets.token_bytes,
        transports: Mapping[str, Callable[[], Transport]] = TRANSPORTS,
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise StartupError(f"the pool has blocks of {region.block_bytes} bytes, the layout of {layout.block_bytes} bytes")
        self.counters = ReceiverCounters()
        self._region = region
        self._layout = layout
        self._name = PeerName(worker_id, incarnation)
        self._secret = secret
        self._clock = clock
        self._lease_s = lease_s
        self._draw_nonce = draw_nonce
        self._transports = transports
        self._listeners: list[Listener] = []
        self._incoming: dict[bytes, Incoming] = {}
        self._latest_incarnations: dict[str, int] = {}
        self._closed = False
        self._side = PoolSide(
            region=region,
            layer_bytes=layer_bytes(layout),
            window_bytes=max(credit_bytes, 4 * layout.block_bytes),
            lease_s=lease_s,
            clock=clock,
            counters=self.counters,
            address=None if region.on_device else region.address,
            forget=lambda nonce: self._incoming.pop(nonce, None),
            silent=self._link_silent,
        )

    async def start(self, kinds: Sequence[str], host: str, *, trusted_network: bool = False) -> list[TransportOffer]:
        """Opens an endpoint for each kind that this pool's memory can serve; returns the offers in the order of `kinds`.
        A host off loopback needs the caller's word (`trusted_network`): the links are authenticated, not encrypted."""
        if not trusted_network and not is_loopback(host):
            raise StartupError(f"KV transfer listens on {host} only if the network is trusted", param="host")
        credentials = LinkCredentials(self._name, self._layout.fingerprint, self._secret)
        offers = []
        for kind in kinds:
            transport = create_transport(kind, self._transports)
            if transport.can_serve(self._region):
                listener = await transport.listen(self, credentials, self._region, self._layout, host)
                self._listeners.append(listener)
                offers.append(TransportOffer(kind, listener.address))
        if not offers:
            raise StartupError(f"none of the transports {', '.join(kinds)} can serve this KV pool", param="transports")
        return offers

    def open(
        self,
        *,
        request_id: str,
        attempt: int,
        prefill: WorkerRef,
        first_block: int,
        blocks: Sequence[int],
        num_tokens: int,
        ttl_s: float,
    ) -> Incoming:
        """Offers `blocks` to `prefill` for the logical blocks from `first_block` to the prompt's last. `blocks` may be empty.
        Raises TicketRefused for arguments of which no ticket can be made, IllegalTransition if a block still has a writer."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        ticket = mint(
            secret=self._secret,
            layout=self._layout,
            request_id=request_id,
            attempt=attempt,
            decode_worker_id=self._name.worker_id,
            decode_incarnation=self._name.incarnation,
            prefill=prefill,
            first_block=first_block,
            blocks=blocks,
            num_tokens=num_tokens,
            ttl_s=ttl_s,
            draw_nonce=self._draw_nonce,
        )
        return self.expect(ticket)

    def expect(self, ticket: Ticket) -> Incoming:
        """As `open`, of a ticket that was minted with our secret for blocks of ours, or for a part of each."""
        if self._closed:
            raise TransferBroken("this worker's KV transfer is closed")
        check_shape(ticket, pool_blocks=self._region.num_blocks, layout=self._layout)
        layers = mask_of(ticket.part, self._layout.num_layers)
        others = (incoming for incoming in self._incoming.values() if incoming.transfer.overlaps(layers))
        taken = {block for incoming in others for block in incoming.ticket.blocks}.intersection(ticket.blocks)
        if taken:
            raise IllegalTransition(f"block {min(taken)} is offered again while a writer may still write to it")
        if ticket.nonce in self._incoming:
            raise IllegalTransition("a nonce was drawn twice")
        transfer = IncomingTransfer(ticket, self._clock, num_layers=self._layout.num_layers, lease_s=self._lease_s)
        incoming = self._incoming[ticket.nonce] = Incoming(transfer, self._side)
        return incoming

    @property
    def num_open(self) -> int:
        """Transfers whose blocks may still be written to, or that nobody has ended yet."""
        return len(self._incoming)

    @property
    def num_quarantined(self) -> int:
        """Those of `num_open` that have failed or been cancelled while their writer may still write."""
        return sum(incoming.state in _QUARANTINED for incoming in self._incoming.values())

    def leases(self) -> LeaseReadings:
        """From any thread."""
        now_s, transfers = self._clock.monotonic_s(), tuple(self._incoming.values())
        given_up = [transfer for transfer in transfers if transfer.state in _QUARANTINED]
        return LeaseReadings(
            open=len(transfers),
            expired=self.counters.failures[TransferTimeout.__name__],
            oldest_s=_oldest_s(transfers, now_s),
            quarantined=len(given_up),
            quarantined_oldest_s=_oldest_s(given_up, now_s),
        )

    @property
    def num_blocks_arriving(self) -> int:
        """Blocks of those transfers that may still succeed."""
        return sum(len(incoming.ticket.blocks) for incoming in self._incoming.values() if incoming.state not in _QUARANTINED)

    async def close(self) -> None:
        """Ends all links and fails what is open. Idempotent. The pool must not be used afterwards: a process that has it mapped
        may still write."""
        self._closed = True
        for incoming in tuple(self._incoming.values()):
            incoming.fail(TransferBroken("this worker's KV transfer was closed"))
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()

    # -- Landing: what links report ------------------------------------------------------------------------------------

    def admit(self, peer: PeerName) -> str | None:
        latest = self._latest_incarnations.get(peer.worker_id, peer.incarnation)
        if peer.incarnation < latest:
            return f"incarnation {latest} of this worker was here before"
        self._latest_incarnations[peer.worker_id] = peer.incarnation
        return None

    def link_refused(self, error: HandoffError) -> None:
        self.counters.links_refused[error.param or error.code] += 1

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        incoming = self._incoming.get(nonce)
        if incoming is None:
            return Refusal.UNKNOWN
        ticket = incoming.ticket
        if (ticket.prefill_worker_id, ticket.prefill_incarnation) != (link.peer.worker_id, link.peer.incarnation):
            return Refusal.NOT_YOURS
        return incoming.let_in(link)

    def ticket_of(self, link: ReceiverLink, nonce: bytes) -> Ticket | None:
        incoming = self._written_over(link, nonce)
        return None if incoming is None else incoming.ticket

    def destination(self, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        incoming = self._written_over(link, nonce)
        return None if incoming is None else incoming.place_of(name)

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        incoming = self._written_over(link, nonce)
        if incoming is None:
            self.counters.late_pieces += len(written)
            return
        incoming.arrived(written)

    def writer_alive(self, link: ReceiverLink, nonce: bytes) -> None:
        incoming = self._written_over(link, nonce)
        if incoming is not None:
            incoming.alive()

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None:
        incoming = self._written_over(link, nonce)
        if incoming is not None:
            incoming.writer_gone()

    def link_lost(self, link: ReceiverLink) -> None:
        for incoming in tuple(self._incoming.values()):
            if incoming.link is link:
                incoming.writer_gone()

    def _link_silent(self, link: ReceiverLink) -> None:
        """Unless other writers on it are heard, the link is dead, and must not be the next ones' link."""
        now_s = self._clock.monotonic_s()
        others = (incoming.transfer for incoming in self._incoming.values() if incoming.link is link)
        if not any(transfer.writer_open and not transfer.silent(now_s) for transfer in others):
            link.hang_up()

    def _written_over(self, link: ReceiverLink, nonce: bytes) -> Incoming | None:
        incoming = self._incoming.get(nonce)
        return incoming if incoming is not None and incoming.link is link else None


def _oldest_s(transfers: Iterable[Incoming], now_s: float) -> float:
    """The age of the oldest; 0 without any."""
    return max((now_s - transfer.opened_s for transfer in transfers), default=0.0)
