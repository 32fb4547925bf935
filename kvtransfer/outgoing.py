"""One transfer as the prefill worker's hand-off sees it: push what was computed, then finish or abort.

    push, push ... -- finish() -> TransferAccount      everything was written (`push_prompt`: for a peer with other blocks)
                  \\-- abort()                          nothing more will be written

A task of its own (the pump) asks to be let in, writes what was pushed, in order, and says CLOSE, whatever happens. Callers wait
for the pump, they do not drive it: cancelling a caller never leaves a write half done. The source blocks of a push must stay as
they are until `finish` or `abort` has returned: where the decode side fetches them by itself, it has done so then, or whatever it
fetches later does not have the digest that it was told.

The pump writes one bounded batch at a time, and only what it has credit for; it waits for credit outside the link, so that others
have the link meanwhile. The transfer ends by itself when the ticket's time is over, or when the decode worker has given no sign
of this transfer for the time of a lease. A write that does not stop soon after the transfer has failed loses its link.

Does not know peers and how they are connected; `Enter` brings a link on which the writer was let in.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from common.clock import Clock
from common.errors import (
    HandoffError,
    IllegalTransition,
    SealMismatch,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
)
from common.types import Ticket
from kvtransfer.digest import block_digest_of
from kvtransfer.lease import PULSES_PER_LEASE, Lease
from kvtransfer.pushes import Pushes
from kvtransfer.recutting import Cut, Made, Recutting
from kvtransfer.region import BlockRegion
from kvtransfer.spans import Span, SpanPieces, columns_of
from kvtransfer.transports.base import Piece, SenderLink
from kvtransfer.window import PeerWindow

BATCH_BYTES = 32 * 1024 * 1024  # written per turn on the link
MAX_QUEUED_BYTES = 64 * 1024 * 1024  # per transfer; `push` waits above it
STOP_GRACE_S = 0.8  # a failed transfer's write ends by then, or its link does


@dataclass(frozen=True, slots=True)
class TransferAccount:
    """What was written: goes into the seal. `transfer_s` is the time during which something was being written or fetched."""

    digests: Mapping[int, bytes]  # logical block -> digest
    bytes: int
    transfer_s: float


@dataclass(frozen=True, slots=True)
class SourceSide:
    """What all transfers of a sender share."""

    region: BlockRegion
    num_layers: int  # of our blocks
    clock: Clock
    lease_s: float
    forget: Callable[[bytes], object]  # the nonce of a transfer that has ended
    expired: Callable[[], None]  # a transfer's time is over, its ticket's or its lease's
    silent: Callable[[SenderLink], None]  # over this link the decode worker was not heard for the time of a lease


class _Phase(enum.Enum):
    PUSHING = "pushing"  # takes pushes
    FINISHING = "finishing"  # no more pushes; writes what is queued, and waits until what was lent is fetched
    STOPPING = "stopping"  # aborted or failed; nothing new is written
    ENDED = "ended"  # the pump is through: nothing is written any more


Enter = Callable[["Outgoing"], Awaitable[SenderLink]]


class Outgoing:
    """Made by `KVSender.open`; ended by `finish` or `abort`. To its link it is the `WriterNews`."""

    def __init__(
        self,
        ticket: Ticket,
        side: SourceSide,
        enter: Enter,
        recutting: Recutting | None = None,
        window: PeerWindow | None = None,
    ) -> None:
        """`recutting`: the peer's blocks are not as ours. `window`: they hold other layers; pushes bear their numbers."""
        self.ticket = ticket
        self.opened_s = side.clock.monotonic_s()
        self._side = side
        self._enter = enter
        self._recutting = recutting
        self._pushes = Pushes(ticket, side.region, side.num_layers, window)
        self._phase = _Phase.PUSHING
        self._error: HandoffError | None = None
        self._queue: deque[Span | Cut] = deque()
        self._queued_bytes = 0
        self._credit_bytes = 0
        self._digests: dict[int, list[tuple[int, int, bytes]]] = {}  # logical block -> first layer, number of layers, digest
        self._bytes = 0
        self._num_lent = 0  # pieces that the decode side has yet to fetch; below zero for a moment if it is quick
        self._transfer_s = 0.0
        self._writing = False
        self._moving_since_s: float | None = None
        self._link: SenderLink | None = None
        self._changed = asyncio.Event()  # for the pump: a push, credit, or another phase
        self._room = asyncio.Event()  # for push: the queue is short, or nothing more will be written
        self._room.set()
        self._entering: asyncio.Future[SenderLink] | None = None
        self._heard_s: float | None = None  # when the decode worker last said anything about this transfer
        self._lease = Lease(side.lease_s, side.clock.monotonic_s())
        loop = asyncio.get_running_loop()
        self._timers = {
            self._expire: loop.call_later(ticket.ttl_s, self._expire),
            self._check_lease: loop.call_later(side.lease_s, self._check_lease),
        }
        self._pump = loop.create_task(self._run(), name="kv-pump")

    # -- by the hand-off ----------------------------------------------------------------------------------------------

    async def push(self, blocks: Sequence[tuple[int, int]], layers: tuple[int, int] | None = None) -> None:
        """Queues (logical block, source block) pairs, of each the layers from `layers[0]` up to, not including, `layers[1]`, or
        all, as far as the ticket is for them; waits while too much is queued. Raises TicketRefused for a block that is not in the
        ticket and for layers that are not in a block or were pushed before, and whatever the transfer has failed with."""
        if self._recutting is not None:
            raise IllegalTransition("the peer's blocks are not as ours: they have to be made")
        if self._may_push(blocks):
            await self._push(self._pushes.spans(blocks, *(layers or (0, self._pushes.num_layers))))

    async def push_prompt(self, logical: range, blocks: Sequence[int], layers: tuple[int, int] | None = None) -> None:
        """As `push`, of blocks that are made of ours: `logical` are the peer's, `blocks` all of the prompt's here, in order. May
        be used for any peer."""
        if self._may_push(logical):
            first, end = layers or (0, self._pushes.num_layers)
            if self._recutting is None:
                if logical.stop > len(blocks):
                    raise TicketRefused(f"the prompt's blocks do not hold all of block {logical.stop - 1}", param="logical_block")
                await self._push(self._pushes.spans([(number, blocks[number]) for number in logical], first, end))
            else:
                await self._push(self._pushes.cuts(self._recutting, logical, blocks, first, end))

    @property
    def block_tokens(self) -> int | None:
        """Of the peer's blocks; None = as ours."""
        return None if self._recutting is None else self._recutting.layout.block_tokens

    async def finish(self) -> TransferAccount:
        """Returns when everything was written and CLOSE was said. Raises what the transfer has failed with, and SealMismatch if
        blocks of the ticket were not pushed, or not all of their layers. When cancelled, call `abort` (or `finish` again)."""
        self._raise_if_over()
        missing = self._pushes.num_missing
        if missing:
            self._fail(SealMismatch(f"{missing} of the ticket's {len(self.ticket.blocks)} blocks were not pushed"))
        elif self._phase is _Phase.PUSHING:
            self._phase = _Phase.FINISHING
            self._changed.set()
        await asyncio.wait({self._pump})
        self._raise_if_over()
        self._pump.result()  # a bug in the pump is raised here
        digests = {logical: block_digest_of(sorted(pieces)) for logical, pieces in self._digests.items()}
        return TransferAccount(digests, self._bytes, self._transfer_s)

    async def abort(self) -> None:
        """Returns when nothing more is written or read under this ticket. No effect after `finish`. Idempotent; when cancelled,
        the abort goes on by itself."""
        self._fail(TransferBroken("the transfer was aborted"))
        await asyncio.wait({self._pump})

    # -- by the sender and the link -----------------------------------------------------------------------------------

    def entering(self, link: SenderLink) -> None:
        self._link = link

    def credited(self, size_bytes: int) -> None:
        self._heard_s = self._side.clock.monotonic_s()
        self._credit_bytes += size_bytes
        self._changed.set()

    def lent(self, num_pieces: int) -> None:
        self._num_lent += num_pieces

    def taken(self, num_pieces: int) -> None:
        self._num_lent -= num_pieces
        if not self._writing:
            self._note_moving(False)
        self._changed.set()

    def renewed(self) -> None:
        self._heard_s = self._side.clock.monotonic_s()
        self._lease.renew(self._heard_s)

    def hears(self, link: SenderLink) -> bool:
        """Whether the decode worker was heard over this link within the time of a lease."""
        if self._link is not link or self._heard_s is None:
            return False
        return self._side.clock.monotonic_s() - self._heard_s < self._side.lease_s

    # -- the pump -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            if self.ticket.blocks:
                await self._write_all()
        except HandoffError as error:
            self._fail(error)
        finally:
            if self._link is not None:
                await self._link.close_writer(self.ticket.nonce)
            self._phase = _Phase.ENDED
            for timer in self._timers.values():
                timer.cancel()
            self._queue.clear()
            self._room.set()
            self._side.forget(self.ticket.nonce)

    async def _write_all(self) -> None:
        if self._stopping():
            return
        # `_fail` cancels the wait for admission, which may be long; a write is never cancelled, it is asked to stop.
        self._entering = asyncio.ensure_future(self._enter(self))
        await asyncio.wait({self._entering})
        if self._entering.cancelled():
            return
        link = self._entering.result()
        self._say_alive()
        while True:
            batch = self._next_batch()
            if batch:
                self._note_moving(True)
                if self._recutting is None:
                    spans = [span for span in batch if isinstance(span, Span)]
                    await self._write(link, SpanPieces(self._side.region, spans))
                else:
                    await self._write_cut(link, self._recutting, batch)
                self._note_moving(False)
            if self._stopping() or self._is_through():
                return
            if not self._can_write():
                self._changed.clear()
                await self._changed.wait()  # bounded by the lease and by the ticket's time

    def _note_moving(self, writing: bool) -> None:
        """A write begins, or ended, or something was taken: time counts while something is being written or fetched."""
        if writing and self._moving_since_s is None:
            self._moving_since_s = self._side.clock.monotonic_s()
        elif not writing and self._num_lent <= 0 and self._moving_since_s is not None:
            self._transfer_s += self._side.clock.monotonic_s() - self._moving_since_s
            self._moving_since_s = None
        self._writing = writing

    def _is_through(self) -> bool:
        return self._phase is _Phase.FINISHING and not self._queue and self._num_lent <= 0

    async def _write_cut(self, link: SenderLink, recutting: Recutting, batch: Sequence[Span | Cut]) -> None:
        """This batch, and those that there is credit for behind it: each is made while the one before it is written. When it has
        returned or raised, no source is read any more."""
        making = self._start_making(recutting, batch)
        try:
            while making is not None:
                made = await making
                making = None if self._stopping() else self._start_making(recutting, self._next_batch())
                try:
                    await self._write(link, made.pieces)
                finally:
                    recutting.give_back(made)
        finally:
            if making is not None:
                await self._let_end(recutting, making)

    def _start_making(self, recutting: Recutting, batch: Sequence[Span | Cut]) -> asyncio.Task[Made] | None:
        cuts = [cut for cut in batch if isinstance(cut, Cut)]
        return asyncio.create_task(recutting.make(cuts, self.ticket.num_tokens), name="kv-cut") if cuts else None

    async def _let_end(self, recutting: Recutting, making: asyncio.Task[Made]) -> None:
        """What is being made is not wanted any more."""
        await asyncio.wait({making})
        if not making.cancelled() and making.exception() is None:
            recutting.give_back(making.result())

    async def _write(self, link: SenderLink, pieces: Sequence[Piece]) -> None:
        digests = await link.write(self.ticket.nonce, pieces, self._stopping)
        columns, written = columns_of(pieces), self._digests
        for (logical_block, first_layer, num_layers), digest in zip(columns.names(), digests, strict=False):
            written.setdefault(logical_block, []).append((first_layer, num_layers, digest))
        self._bytes += sum(columns.sizes_bytes[: len(digests)])
        if len(digests) < len(pieces) and not self._stopping():
            raise TransferBroken("the link to the decode worker went away")

    def _can_write(self) -> bool:
        return bool(self._queue) and _piece_bytes(self._queue[0]) <= self._credit_bytes

    def _next_batch(self) -> list[Span | Cut]:
        batch: list[Span | Cut] = []
        size_bytes = 0
        largest_bytes = BATCH_BYTES if self._recutting is None else self._recutting.staging_bytes
        queue, most_bytes = self._queue, min(largest_bytes, self._credit_bytes)
        if self._queued_bytes <= most_bytes:  # as a rule
            batch, size_bytes = list(queue), self._queued_bytes
            queue.clear()
        while queue and size_bytes + _piece_bytes(queue[0]) <= most_bytes:
            batch.append(self._taken((most_bytes - size_bytes) // _piece_bytes(queue[0])))
            size_bytes += batch[-1].size_bytes
        if not batch and self._can_write():  # a piece that is larger than a batch goes by itself
            batch.append(self._taken(1))
            size_bytes = batch[0].size_bytes
        self._credit_bytes -= size_bytes
        self._queued_bytes -= size_bytes
        if self._queued_bytes <= MAX_QUEUED_BYTES:
            self._room.set()
        return batch

    def _taken(self, num_pieces: int) -> Span | Cut:
        """What is first in the queue, of a span no more than so many pieces."""
        first = self._queue.popleft()
        if isinstance(first, Cut) or len(first.logical_blocks) <= num_pieces:
            return first
        first, rest = first.parted(num_pieces)
        self._queue.appendleft(rest)
        return first

    # -- within -------------------------------------------------------------------------------------------------------

    def _may_push(self, blocks: Sequence[object]) -> bool:
        self._raise_if_over()
        if blocks and self._phase is not _Phase.PUSHING:
            raise IllegalTransition(f"push while {self._phase.value}")
        return bool(blocks)

    async def _push(self, queued: Sequence[Span | Cut]) -> None:
        for item in queued:
            self._queued_bytes += item.size_bytes
            last = self._queue[-1] if self._queue else None
            joined = last.joined(item) if isinstance(item, Span) and isinstance(last, Span) else None
            if joined is None:
                self._queue.append(item)
            else:
                self._queue[-1] = joined
        self._changed.set()
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._room.clear()
            await self._room.wait()
            self._raise_if_over()

    def _stopping(self) -> bool:
        return self._phase is _Phase.STOPPING

    def _say_alive(self) -> None:
        if self._link is not None and self._link.lost is not None:
            self._fail(self._link.lost)  # an idle transfer hears of it so
        elif self._link is not None:
            self._link.pulse(self.ticket.nonce)
            self._later(self._side.lease_s / PULSES_PER_LEASE, self._say_alive)

    def _check_lease(self) -> None:
        left_s = self._lease.ends_s - self._side.clock.monotonic_s()
        if left_s > 0:
            self._later(left_s, self._check_lease)
        else:
            self._fail(TransferTimeout(f"the decode worker gave no sign of life for {self._side.lease_s:g} s"))
            if self._link is not None:
                self._side.silent(self._link)

    def _expire(self) -> None:
        self._fail(TransferTimeout(f"the ticket's {self.ticket.ttl_s:g} s are over"))

    def _fail(self, error: HandoffError) -> None:
        if self._phase in (_Phase.PUSHING, _Phase.FINISHING):
            self._error = error
            self._phase = _Phase.STOPPING
            if isinstance(error, TransferTimeout):
                self._side.expired()
            self._changed.set()
            self._room.set()
            self._later(STOP_GRACE_S, self._stop_by_force)
            if self._entering is not None:
                self._entering.cancel()

    def _stop_by_force(self) -> None:
        if self._link is not None:
            self._link.drop(TransferBroken("the decode worker did not take what was sent in time to stop cleanly"))

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._timers[action] = asyncio.get_running_loop().call_later(delay_s, action)

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error


def _piece_bytes(queued: Span | Cut) -> int:
    """Of one piece of it; each is as large."""
    return queued.piece_bytes if isinstance(queued, Span) else queued.size_bytes
