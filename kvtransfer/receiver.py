"""The decode worker's end: hands out tickets for blocks of its pool, lets writers in, verifies what they write.

    open -> Incoming --(ticket travels, writer comes, blocks arrive)--> complete(seal)   the blocks are the request's alone
                     \\--(anything goes wrong, or nobody wants it)----> abandon(release) -> blocks to give back to the pool

`KVReceiver` is what links report to (`transports.base.Landing`): it finds the transfer that a frame names, checks that the frame
came over the link that was let in, recomputes the digest over the bytes in the pool, and tells the transfer's state machine
(`state.IncomingTransfer`), which decides. Reports are handled on the event loop, one block at a time.

Does not know what is in the blocks, who computes it, or how control messages travel.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from common.clock import Clock
from common.errors import (
    HandoffError,
    IllegalTransition,
    PdserveError,
    RequestCancelled,
    StartupError,
    TicketRefused,
    TransferBroken,
)
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.digest import block_digest
from kvtransfer.frames import Refusal
from kvtransfer.region import BlockRegion
from kvtransfer.state import RECEIVING, UNDECIDED, Arrival, HandoffState, IncomingTransfer, Seal
from kvtransfer.ticket import check_shape, mint
from kvtransfer.transports import create_transport
from kvtransfer.transports.base import LinkCredentials, Listener, PeerName, ReceiverLink, TransportOffer

RELEASE_TRIES = 3
RELEASE_TIMEOUT_S = 2.0


@dataclass(slots=True)
class ReceiverCounters:
    """Grows only. `failures` by name of the error; `streaming_s` from a writer's admission until its end."""

    transfers_completed: int = 0
    transfers_cancelled: int = 0
    blocks: int = 0
    bytes: int = 0
    streaming_s: float = 0.0
    late_blocks: int = 0  # arrived after the end of their transfer: dropped, or written into a block in quarantine
    failures: Counter[str] = field(default_factory=Counter)
    links_refused: Counter[str] = field(default_factory=Counter)  # by the parameter that was wrong


class KVReceiver:
    """One per decode worker. Lives on one event loop; `start` and `close` once each."""

    def __init__(
        self, region: BlockRegion, layout: KVLayout, worker_id: str, incarnation: int, secret: bytes, clock: Clock
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise StartupError(f"the pool has blocks of {region.block_bytes} bytes, the layout of {layout.block_bytes} bytes")
        self.counters = ReceiverCounters()
        self._region = region
        self._layout = layout
        self._name = PeerName(worker_id, incarnation)
        self._secret = secret
        self._clock = clock
        self._listeners: list[Listener] = []
        self._incoming: dict[bytes, Incoming] = {}
        self._latest_incarnations: dict[str, int] = {}
        self._closed = False

    async def start(self, kinds: Sequence[str], host: str, *, trusted_network: bool = False) -> list[TransportOffer]:
        """Opens an endpoint for each kind that this pool's memory can serve; returns the offers in the order of `kinds`.
        A host off loopback needs the caller's word (`trusted_network`): the links are authenticated, not encrypted."""
        if not trusted_network and not _is_loopback(host):
            raise StartupError(f"KV transfer listens on {host} only if the network is trusted", param="host")
        credentials = LinkCredentials(self._name, self._layout.fingerprint, self._secret)
        offers = []
        for kind in kinds:
            transport = create_transport(kind)
            if transport.can_serve(self._region):
                listener = await transport.listen(self, credentials, self._region, host)
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
        )
        check_shape(ticket, pool_blocks=self._region.num_blocks, block_tokens=self._layout.block_tokens)
        taken = {block for incoming in self._incoming.values() for block in incoming.ticket.blocks}.intersection(blocks)
        if taken:
            raise IllegalTransition(f"block {min(taken)} is offered again while a writer may still write to it")
        incoming = Incoming(self, IncomingTransfer(ticket, self._clock), self._clock)
        self._incoming[ticket.nonce] = incoming
        return incoming

    @property
    def num_open(self) -> int:
        """Transfers whose blocks may still be written to, or that nobody has ended yet."""
        return len(self._incoming)

    @property
    def num_quarantined(self) -> int:
        """Those of `num_open` that have failed or been cancelled while their writer may still write."""
        return sum(incoming.state in (HandoffState.POISONED, HandoffState.CANCELLED) for incoming in self._incoming.values())

    async def close(self) -> None:
        """Ends all links and fails what is open. Idempotent. The pool must not be used afterwards: a process that has it mapped
        may still write."""
        self._closed = True
        for incoming in tuple(self._incoming.values()):
            incoming.fail(TransferBroken("this worker's KV transfer was closed"))
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()

    def forget(self, incoming: Incoming) -> None:
        """By an Incoming that has ended: its nonce is unknown from now on."""
        self._incoming.pop(incoming.ticket.nonce, None)

    # -- Landing: what links report ------------------------------------------------------------------------------------

    def admit(self, peer: PeerName) -> str | None:
        latest = self._latest_incarnations.get(peer.worker_id, peer.incarnation)
        if peer.incarnation < latest:
            return f"incarnation {latest} of this worker was here before"
        self._latest_incarnations[peer.worker_id] = peer.incarnation
        return None

    def link_refused(self, error: HandoffError) -> None:
        self.counters.links_refused[error.param or error.code] += 1

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> Refusal | None:
        incoming = self._incoming.get(nonce)
        if incoming is None:
            return Refusal.UNKNOWN
        ticket = incoming.ticket
        if (ticket.prefill_worker_id, ticket.prefill_incarnation) != (link.peer.worker_id, link.peer.incarnation):
            return Refusal.NOT_YOURS
        return incoming.let_in(link)

    def destination(self, link: ReceiverLink, nonce: bytes, logical_block: int) -> memoryview | None:
        incoming = self._written_over(link, nonce)
        block = None if incoming is None else incoming.transfer.wants(logical_block)
        return None if block is None else self._region.block(block)

    def block_written(
        self, link: ReceiverLink, nonce: bytes, logical_block: int, digest: bytes, dropped: memoryview | None
    ) -> None:
        incoming = self._written_over(link, nonce)
        if incoming is None:
            self.counters.late_blocks += 1
            return
        incoming.arrived(logical_block, digest, dropped, self._region)

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None:
        incoming = self._written_over(link, nonce)
        if incoming is not None:
            incoming.writer_gone()

    def link_lost(self, link: ReceiverLink) -> None:
        for incoming in tuple(self._incoming.values()):
            if incoming.link is link:
                incoming.writer_gone()

    def _written_over(self, link: ReceiverLink, nonce: bytes) -> Incoming | None:
        incoming = self._incoming.get(nonce)
        return incoming if incoming is not None and incoming.link is link else None


class Incoming:
    """One transfer as the decode worker's hand-off sees it. Made by `KVReceiver.open`; ended by `complete` or `abandon`."""

    def __init__(self, receiver: KVReceiver, transfer: IncomingTransfer, clock: Clock) -> None:
        self.transfer = transfer
        self.link: ReceiverLink | None = None  # the one over which the writer was let in
        self.drained = asyncio.Event()  # failed or cancelled, and no writer can touch the blocks
        self.transport = ""  # kind of that link; stays when the link is gone
        self._receiver = receiver
        self._clock = clock
        self._admitted_s = 0.0
        self._decided = asyncio.Event()  # verified, failed or cancelled
        self._failure: asyncio.Future[HandoffError] = asyncio.get_running_loop().create_future()
        self._counted_failure = False
        self._timer: asyncio.TimerHandle | None = None
        transfer.offer()
        self._watch_deadline()

    @property
    def ticket(self) -> Ticket:
        return self.transfer.ticket

    @property
    def state(self) -> HandoffState:
        return self.transfer.state

    @property
    def num_blocks(self) -> int:
        """Blocks verified so far."""
        return len(self.transfer.verified)

    # -- by the hand-off ----------------------------------------------------------------------------------------------

    async def complete(self, seal: Seal) -> None:
        """Returns when every block of the ticket is in the pool, verified against `seal`, and its writer is gone: the KV may be
        used. Raises SealMismatch, DigestMismatch, TicketRefused, TransferBroken, TransferTimeout, and RequestCancelled if
        `abandon` was called meanwhile. After any of these, and when cancelled, `abandon` is what remains to be called."""
        try:
            self.transfer.sealed(seal)
        finally:
            self._settle()
        await self._decided.wait()  # bounded by the ticket's time
        if self.transfer.error is not None:
            raise self.transfer.error
        if self.transfer.state is not HandoffState.VERIFIED:
            raise RequestCancelled("the transfer was abandoned")
        self.transfer.activate()
        self._receiver.counters.transfers_completed += 1
        self._end()

    async def wait_failed(self) -> HandoffError:
        """Returns the error as soon as the transfer fails, so that Run can be cancelled. If it does not fail it does not return:
        race it against Run, and cancel the loser."""
        return await asyncio.shield(self._failure)

    async def abandon(
        self, release: Callable[[], Awaitable[None]], *, tries: int = RELEASE_TRIES, timeout_s: float = RELEASE_TIMEOUT_S
    ) -> tuple[int, ...]:
        """Gives up. Returns the pool's blocks once no writer can touch them; call it in a task of its own. After `complete` it is
        right only if nobody has made use of the blocks.

        If the writer cannot be shut out from here, `release` (which asks the prefill worker to stop; its errors are its own
        affair) is called up to `tries` times, each at most `timeout_s`. Its answer is a courtesy: what counts is the link. After
        that the blocks stay in quarantine until the writer's link ends, however long that takes. When cancelled, call it again.
        """
        self.transfer.cancel()
        self._settle()
        for _ in range(tries):
            if self.drained.is_set():
                break
            try:
                async with asyncio.timeout(timeout_s):
                    await release()
            except (PdserveError, TimeoutError):
                continue
            try:
                async with asyncio.timeout(timeout_s):
                    await self.drained.wait()
            except TimeoutError:
                continue
        await self.drained.wait()
        blocks = self.transfer.take_back()
        self._end()
        return blocks

    # -- by the receiver ----------------------------------------------------------------------------------------------

    def let_in(self, link: ReceiverLink) -> Refusal | None:
        expired = self.transfer.deadline_s is not None and self._clock.monotonic_s() >= self.transfer.deadline_s
        try:
            self.transfer.writer_opened()
        except TicketRefused:
            return Refusal.EXPIRED if expired else Refusal.SPENT
        self.link = link
        self.transport = link.kind
        self._admitted_s = self._clock.monotonic_s()
        return None

    def arrived(self, logical_block: int, digest: bytes, dropped: memoryview | None, region: BlockRegion) -> None:
        counters = self._receiver.counters
        if self.state not in RECEIVING:
            counters.late_blocks += 1
            return
        index = logical_block - self.ticket.first_block
        known = 0 <= index < len(self.ticket.blocks)
        ok = False
        if known:
            content = dropped if dropped is not None else region.block(self.ticket.blocks[index])
            ok = block_digest(content, self.ticket.nonce, logical_block) == digest
        if self.transfer.block_arrived(logical_block, digest, ok) is Arrival.VERIFIED:
            counters.blocks += 1
            counters.bytes += region.block_bytes
        self._settle()

    def writer_gone(self) -> None:
        if self.transfer.writer_open:
            self._receiver.counters.streaming_s += self._clock.monotonic_s() - self._admitted_s
        self.transfer.writer_closed()
        self.link = None
        self._settle()

    def fail(self, error: HandoffError) -> None:
        self.transfer.poison(error)
        self._settle()

    # -- within -------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """After every event: draws the consequences of the state that the transfer is in now."""
        transfer = self.transfer
        if transfer.state in UNDECIDED:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (
            transfer.state in (HandoffState.POISONED, HandoffState.CANCELLED)
            and self.link is not None
            and self.link.fences_locally
        ):
            self.writer_gone()  # from here on the link finds no destination: nobody can write
            return
        self._decided.set()
        if transfer.drained:
            self.drained.set()
        if not self._counted_failure and transfer.state not in (HandoffState.VERIFIED, HandoffState.ACTIVE):
            self._counted_failure = True
            if transfer.error is None:
                self._receiver.counters.transfers_cancelled += 1
            else:
                self._failure.set_result(transfer.error)
                self._receiver.counters.failures[transfer.error.code] += 1

    def _watch_deadline(self) -> None:
        if self.transfer.deadline_s is None or self.state not in UNDECIDED:
            return
        now_s = self._clock.monotonic_s()
        self.transfer.expire(now_s)
        self._settle()
        if self.state in UNDECIDED:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.transfer.deadline_s - now_s, self._watch_deadline)

    def _end(self) -> None:
        self.link = None
        self._receiver.forget(self)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
