"""One transfer as the decode worker's hand-off sees it: wait for it, or give it up; in between, what its link reports.

    complete(seal) -> the blocks are the request's alone         let_in, arrived, alive, writer_gone   (by the receiver)
    abandon(release) -> the blocks, to be freed

`state.IncomingTransfer` decides; this gives it the facts (digests over the bytes in the pool, the clock) and draws the
consequences: timers, credit and pulses for the writer, waking who waits, counting. Credit: the writer is granted a window; what
was verified is returned to it in halves of the window, and at the end all of it, so that credit is also the receipt.

Made by `KVReceiver.open`, gone after `complete` or `abandon`. Does not know links beyond the one that was let in.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter

from common.clock import Clock
from common.errors import HandoffError, PdserveError, RequestCancelled, TicketRefused, TransferBroken
from common.types import Ticket
from kvtransfer.device import read_contents
from kvtransfer.digest import piece_digest
from kvtransfer.found import FoundPieces
from kvtransfer.lease import PULSES_PER_LEASE
from kvtransfer.native.choice import piece_kernel
from kvtransfer.native.kernel import packed_piece
from kvtransfer.region import BlockRegion
from kvtransfer.state import UNDECIDED, Arrival, HandoffState, IncomingTransfer, Seal
from kvtransfer.transports.base import PieceName, ReceiverLink, Refusal, Written

RELEASE_TRIES = 3
RELEASE_TIMEOUT_S = 2.0
_NOTHING = memoryview(b"")
_layers_of = itemgetter(1, 2)  # of a row: first layer, number of layers


@dataclass(slots=True)
class ReceiverCounters:
    """Grows only. `failures` by name of the error; `streaming_s` from a writer's admission until its end."""

    transfers_completed: int = 0
    transfers_cancelled: int = 0
    blocks: int = 0
    bytes: int = 0
    streaming_s: float = 0.0
    late_pieces: int = 0  # arrived after the end of their transfer: dropped, or written into a block in quarantine
    failures: Counter[str] = field(default_factory=Counter)
    links_refused: Counter[str] = field(default_factory=Counter)  # by the parameter that was wrong
    bytes_by_writer: Counter[str] = field(default_factory=Counter)  # verified, by the worker that wrote them


@dataclass(frozen=True, slots=True)
class PoolSide:
    """What all transfers of a receiver share."""

    region: BlockRegion
    layer_bytes: int
    window_bytes: int  # the credit that a writer starts with
    lease_s: float
    clock: Clock
    counters: ReceiverCounters
    address: int | None  # of the pool, where this process can read it
    forget: Callable[[bytes], object]  # the nonce of a transfer that has ended
    silent: Callable[[ReceiverLink], None]  # a writer on this link was not heard for the time of a lease

    @property
    def pulse_s(self) -> float:
        return self.lease_s / PULSES_PER_LEASE


class Incoming:
    """Ended by exactly one of `complete` and `abandon`."""

    def __init__(self, transfer: IncomingTransfer, side: PoolSide) -> None:
        self.transfer = transfer
        self.link: ReceiverLink | None = None  # the one over which the writer was let in
        self.drained = asyncio.Event()  # failed or cancelled, and no writer can touch the blocks
        self.opened_s = side.clock.monotonic_s()
        self.transport = ""  # kind of that link; stays when the link is gone
        self._side = side
        self._first_block, self._blocks = transfer.ticket.first_block, transfer.ticket.blocks
        self._pool, self._block_bytes, self._layer_bytes = side.region.buffer, side.region.block_bytes, side.layer_bytes
        self._admitted_s = 0.0
        self._unspent_bytes = 0  # of what the writer was granted
        self._unreturned_bytes = 0  # verified, and not yet granted again
        self._decided = asyncio.Event()  # verified, failed or cancelled
        self._failure: asyncio.Future[HandoffError] = asyncio.get_running_loop().create_future()
        self._counted_failure = False
        self._expiry: asyncio.TimerHandle | None = None
        self._pulse: asyncio.TimerHandle | None = None
        transfer.offer()
        self._watch_time()

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
        self._side.counters.transfers_completed += 1
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

    def let_in(self, link: ReceiverLink) -> int | Refusal:
        try:
            self.transfer.writer_opened()
        except TicketRefused:
            return Refusal.EXPIRED if self.transfer.ticket_expired else Refusal.SPENT
        self.link = link
        self.transport = link.kind
        self._admitted_s = self._side.clock.monotonic_s()
        self._unspent_bytes = self._side.window_bytes
        self._watch_time()  # a lease runs from now on
        self._pulse = asyncio.get_running_loop().call_later(self._side.pulse_s, self._say_alive)
        return self._side.window_bytes

    def place_of(self, name: PieceName) -> memoryview | None:
        block = self.transfer.wants(name)
        return None if block is None else self._bytes_of(block, name)

    def arrived(self, written: Sequence[Written]) -> None:
        transfer, counters = self.transfer, self._side.counters
        blocks_before = len(transfer.verified)
        transfer.heard(self._side.clock.monotonic_s())
        verified_layers = repeated_layers = refused_layers = 0
        rows, found = self._rows_of(written)
        for (first_layer, num_layers), run in groupby(rows, _layers_of):
            blocks, _, _, digests = zip(*run, strict=True)
            its_found = digests if found is None else tuple(islice(found, len(digests)))
            if its_found == digests and transfer.pieces_arrived(blocks, first_layer, num_layers, digests):
                verified_layers += num_layers * len(blocks)
                continue
            for block, digest, its in zip(blocks, digests, its_found, strict=True):
                if not transfer.receiving:
                    counters.late_pieces += 1
                    continue
                arrival = transfer.piece_arrived(PieceName(block, first_layer, num_layers), digest, its == digest)
                if arrival is Arrival.VERIFIED:
                    verified_layers += num_layers
                elif arrival is Arrival.DUPLICATE:
                    repeated_layers += num_layers
                else:
                    refused_layers += num_layers
        verified_bytes = verified_layers * self._layer_bytes
        counters.blocks += len(transfer.verified) - blocks_before
        counters.bytes += verified_bytes
        counters.bytes_by_writer[self.ticket.prefill_worker_id] += verified_bytes
        self._unspent_bytes -= (verified_layers + repeated_layers + refused_layers) * self._layer_bytes
        self._unreturned_bytes += verified_bytes + repeated_layers * self._layer_bytes
        if self._unspent_bytes < 0:
            transfer.poison(TransferBroken("the writer wrote more than it had credit for"))
        self._return_credit()
        self._settle()

    def alive(self) -> None:
        self.transfer.heard(self._side.clock.monotonic_s())

    def writer_gone(self) -> None:
        if self.transfer.writer_open:
            self._side.counters.streaming_s += self._side.clock.monotonic_s() - self._admitted_s
        self.transfer.writer_closed()
        self.link = None
        self._settle()

    def fail(self, error: HandoffError) -> None:
        self.transfer.poison(error)
        self._settle()

    # -- within -------------------------------------------------------------------------------------------------------

    def _rows_of(self, written: Sequence[Written]) -> tuple[Sequence[tuple[int, int, int, bytes]], Iterator[bytes] | None]:
        """Logical block, first layer, number of layers and stated digest of each; and the digests that their bytes have, as their
        link has found them, or here and now. None = those that were stated."""
        if isinstance(written, FoundPieces) and written.as_stated:
            return written.rows(), None
        return [(*name, stated) for name, stated, _, _ in written], iter(self._digests_of(written))

    def _digests_of(self, written: Sequence[Written]) -> Iterable[bytes]:
        """By one native call, where all lie in the pool and none is known."""
        known = [found for _, _, _, found in written if found is not None]
        if len(known) == len(written):
            return known
        nonce, kernel = self.ticket.nonce, piece_kernel()
        if kernel is not None and self._layer_bytes >= kernel.least_bytes:
            packed = self._packed(written)
            if packed:
                return kernel.digests(packed, nonce)
        contents = [self._content(name) if dropped is None else dropped for name, _, dropped, _ in written]
        if self._side.region.on_device:
            read_contents(contents)
        return (piece_digest(content, nonce, *name) for (name, *_), content in zip(written, contents, strict=True))

    def _packed(self, written: Sequence[Written]) -> list[bytes]:
        """Where each of these pieces lies; nothing if one of them does not lie in one of the ticket's blocks."""
        packed: list[bytes] = []
        pool_address, blocks, first_block = self._side.address, self._blocks, self._first_block
        block_bytes, layer_bytes = self._block_bytes, self._layer_bytes
        for name, _, dropped, _ in written:
            logical_block, first_layer, num_layers = name
            index, start_bytes, piece_bytes = logical_block - first_block, first_layer * layer_bytes, num_layers * layer_bytes
            if pool_address is None or dropped is not None or not 0 <= index < len(blocks):
                return []
            if start_bytes < 0 or piece_bytes <= 0 or start_bytes + piece_bytes > block_bytes:
                return []
            address = pool_address + blocks[index] * block_bytes + start_bytes
            packed.append(packed_piece(address, 0, piece_bytes, logical_block, first_layer, num_layers))
        return packed

    def _content(self, name: PieceName) -> memoryview:
        """Where a piece is that was put into the pool; nothing if it has no business there."""
        index = name.logical_block - self._first_block
        return self._bytes_of(self._blocks[index], name) if 0 <= index < len(self._blocks) else _NOTHING

    def _bytes_of(self, block: int, name: PieceName) -> memoryview:
        start_bytes = block * self._block_bytes + name.first_layer * self._layer_bytes
        return self._pool[start_bytes : start_bytes + name.num_layers * self._layer_bytes]

    def _return_credit(self) -> None:
        due = self._unreturned_bytes * 2 >= self._side.window_bytes or (self._unreturned_bytes > 0 and self.transfer.complete)
        if due and self.link is not None and self.transfer.receiving:
            size_bytes, self._unreturned_bytes = self._unreturned_bytes, 0
            self._unspent_bytes += size_bytes
            self.link.credit(self.ticket.nonce, size_bytes)

    def _settle(self) -> None:
        """After every event: draws the consequences of the state that the transfer is in now."""
        transfer = self.transfer
        if transfer.state in UNDECIDED:
            return
        self._stop_timers()
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
                self._side.counters.transfers_cancelled += 1
            else:
                self._failure.set_result(transfer.error)
                self._side.counters.failures[transfer.error.code] += 1

    def _watch_time(self) -> None:
        """Now, and whenever the next deadline may have come: a sign of life meanwhile has moved it."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        now_s = self._side.clock.monotonic_s()
        silent_link = self.link if self.transfer.silent(now_s) else None
        self.transfer.expire(now_s)
        self._settle()
        if silent_link is not None:
            self._side.silent(silent_link)
        if self.transfer.expires_s is not None:
            self._expiry = asyncio.get_running_loop().call_later(self.transfer.expires_s - now_s, self._watch_time)

    def _say_alive(self) -> None:
        if self.link is not None and self.transfer.receiving:
            self._pulse = asyncio.get_running_loop().call_later(self._side.pulse_s, self._say_alive)
            self.link.pulse(self.ticket.nonce)

    def _stop_timers(self) -> None:
        for timer in (self._expiry, self._pulse):
            if timer is not None:
                timer.cancel()
        self._expiry = self._pulse = None

    def _end(self) -> None:
        self.link = None
        self._side.forget(self.ticket.nonce)
