"""The life of the blocks of one transfer, on the side that owns them. Sans-IO: told what happened, says what follows.

    RESERVED --offer--> OFFERED --writer_opened--> STREAMING --sealed--> SEALED --(all there, equal, closed)--> VERIFIED
        |                  |  \\____________(no blocks to move)____________^                                       |
        |                  |                          |                    |                                   activate
        +---------+--------+--------------------------+--------------------+-----------------------+               v
                  | cancel, poison, expire                                                                     ACTIVE
                  v
        CANCELLED | POISONED --(no writer open)--> DRAINED --take_back--> FREE

Every destination block has two owners: the request, and, from `writer_opened` to `writer_closed`, the writer. Only when both have
let go is a block FREE. In ACTIVE the writer is gone and the request is the sole owner; from there on the engine's block
manager keeps the books, unless the request is cancelled before it took the blocks over.

What counts as complete is a set, never a number: exactly the ticket's logical blocks, each verified here, each with the digest
that the seal states. A block is verified when pieces that were each verified cover its layers, none of them twice; of a ticket
for a part of each block, the layers of that part, and no others may be written.

The prefill worker has a lease from the offer until its account is known: OPEN, then whatever is `heard` of the writer, CLOSE and
the seal must each come before it ends, or the transfer is poisoned. Nothing here knows sockets, memory or tasks; time comes from
the injected clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from common.clock import Clock
from common.errors import (
    DigestMismatch,
    HandoffError,
    IllegalTransition,
    SealMismatch,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
)
from common.types import Ticket
from kvtransfer.digest import block_digest_of
from kvtransfer.lease import LEASE_S, Lease
from kvtransfer.part import mask_of
from kvtransfer.transports.base import PieceName


class HandoffState(enum.Enum):
    RESERVED = "reserved"  # the blocks are set aside, nobody was told
    OFFERED = "offered"  # the ticket is out, no writer has been let in
    STREAMING = "streaming"  # one writer may write
    SEALED = "sealed"  # the writer's account is known
    VERIFIED = "verified"  # everything arrived, everything is equal, the writer is gone
    ACTIVE = "active"  # the request computes with the blocks
    POISONED = "poisoned"  # failed; a writer may still be at it
    CANCELLED = "cancelled"  # not wanted any more; a writer may still be at it
    DRAINED = "drained"  # failed or cancelled, and no writer can touch the blocks
    FREE = "free"  # the owner of the pool has taken the blocks back


_Piece = tuple[int, int, bytes]  # first layer, number of layers, digest
_ENDINGS = {HandoffState.POISONED, HandoffState.CANCELLED}
TRANSITIONS: dict[HandoffState, frozenset[HandoffState]] = {
    HandoffState.RESERVED: frozenset({HandoffState.OFFERED, *_ENDINGS}),
    HandoffState.OFFERED: frozenset({HandoffState.STREAMING, HandoffState.SEALED, *_ENDINGS}),
    HandoffState.STREAMING: frozenset({HandoffState.SEALED, *_ENDINGS}),
    HandoffState.SEALED: frozenset({HandoffState.VERIFIED, *_ENDINGS}),
    HandoffState.VERIFIED: frozenset({HandoffState.ACTIVE, *_ENDINGS}),
    HandoffState.ACTIVE: frozenset({HandoffState.CANCELLED}),  # only before the request has made use of the blocks
    HandoffState.POISONED: frozenset({HandoffState.DRAINED}),
    HandoffState.CANCELLED: frozenset({HandoffState.DRAINED}),
    HandoffState.DRAINED: frozenset({HandoffState.FREE}),
    HandoffState.FREE: frozenset(),
}
RECEIVING = frozenset({HandoffState.STREAMING, HandoffState.SEALED})
UNDECIDED = frozenset({HandoffState.RESERVED, HandoffState.OFFERED, *RECEIVING})


class Arrival(enum.Enum):
    """What an arrived piece turned out to be."""

    VERIFIED = "verified"
    DUPLICATE = "duplicate"  # the same piece with the same digest again: no effect
    LATE = "late"  # nobody waits for it any more: no effect
    REFUSED = "refused"  # it poisoned the transfer


@dataclass(frozen=True, slots=True)
class Seal:
    """The writer's account of a whole transfer. Travels beside the data, as the reply to Run."""

    nonce: bytes
    num_tokens: int  # the prompt that was computed, as the prefill worker counted it
    digests: Mapping[int, bytes]  # logical block -> digest of what was sent


class IncomingTransfer:
    def __init__(self, ticket: Ticket, clock: Clock, *, num_layers: int, lease_s: float = LEASE_S) -> None:
        self.ticket = ticket
        self.state = HandoffState.RESERVED
        self.expected = frozenset(range(ticket.first_block, ticket.first_block + len(ticket.blocks)))
        self.verified: dict[int, bytes] = {}  # logical block -> digest, once all its layers are there
        self.seal: Seal | None = None
        self.error: HandoffError | None = None  # why it was poisoned
        self.receiving = False  # what arrives counts, if a writer is open
        self.writer_open = False
        self._deadline_s: float | None = None  # the ticket's
        self._lease: Lease | None = None
        self._pieces: dict[int, list[_Piece]] = {}  # logical block -> of those that are verified
        self._layers_here: dict[int, int] = {}  # logical block -> a bit for each layer that is verified
        self._num_layers = num_layers
        self._all_layers = mask_of(ticket.part, num_layers)  # that the ticket is for
        self._lease_s = lease_s
        self._clock = clock

    # -- what the owner of the blocks does ----------------------------------------------------------------------------

    def offer(self) -> None:
        """The ticket is about to leave; its time runs from here."""
        self._move(HandoffState.OFFERED)
        now_s = self._clock.monotonic_s()
        self._deadline_s = now_s + self.ticket.ttl_s
        self._lease = Lease(self._lease_s, now_s)

    def sealed(self, seal: Seal) -> None:
        """The writer's account arrived. A wrong one poisons and raises SealMismatch; repeating the same one has no effect."""
        if self.error is not None:
            raise self.error
        if self.seal is not None:
            if self.seal != seal:
                raise self._fail(SealMismatch("two different seals for one transfer"))
            return
        if self.state not in (HandoffState.OFFERED, HandoffState.STREAMING):
            raise IllegalTransition(f"sealed in {self.state.name}")
        complaint = self._complaint_about(seal)
        if complaint is not None:
            raise self._fail(SealMismatch(complaint))
        self.seal = seal
        self._move(HandoffState.SEALED)
        self._verify_if_complete()

    def activate(self) -> None:
        self._move(HandoffState.ACTIVE)

    def cancel(self) -> None:
        """The request is not wanted any more. No effect if the transfer has already failed or been cancelled."""
        if self.state in (HandoffState.POISONED, HandoffState.CANCELLED, HandoffState.DRAINED, HandoffState.FREE):
            return
        self._move(HandoffState.CANCELLED)
        self._drain_if_alone()

    def take_back(self) -> tuple[int, ...]:
        """The pool's blocks, once; legal only when no writer can touch them."""
        self._move(HandoffState.FREE)
        return self.ticket.blocks

    # -- what the link reports ----------------------------------------------------------------------------------------

    def writer_opened(self) -> None:
        """A writer asks to be let in. Raises TicketRefused unless it is the first and in time."""
        if self.state is not HandoffState.OFFERED:
            raise TicketRefused(f"the ticket is {self.state.value}: a nonce admits one writer, once", param="nonce")
        now_s = self._clock.monotonic_s()
        if self._deadline_s is None or now_s >= self._deadline_s:
            raise TicketRefused("the ticket has expired", param="ttl_s")
        self._move(HandoffState.STREAMING)
        self.writer_open = True
        self.heard(now_s)

    def wants(self, name: PieceName) -> int | None:
        """The pool block in which the piece may be written now, if any."""
        if not self.receiving or not self.writer_open:
            return None
        logical_block = name.logical_block
        layers = self._layers(name.first_layer, name.num_layers)
        if logical_block not in self.expected or not layers or self._layers_here.get(logical_block, 0) & layers:
            return None
        return self.ticket.blocks[logical_block - self.ticket.first_block]

    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        """A piece was written whose sender states `digest`; `ok` says whether its bytes have that digest here."""
        if not self.receiving or not self.writer_open:
            return Arrival.LATE
        logical_block, first_layer, num_layers = name
        if logical_block not in self.expected:
            return self._refuse(TicketRefused(f"logical block {logical_block} is not in the ticket", param="logical_block"))
        layers = self._layers(first_layer, num_layers)
        if not layers:
            return self._refuse(TicketRefused(f"a piece of {num_layers} layers from {first_layer}", param="num_layers"))
        if not ok:
            return self._refuse(DigestMismatch(f"the bytes of logical block {logical_block} are not what was sent"))
        here = self._layers_here.get(logical_block, 0)
        if here & layers:
            if (first_layer, num_layers, digest) in self._pieces[logical_block]:
                return Arrival.DUPLICATE
            return self._refuse(DigestMismatch(f"layers of logical block {logical_block} were sent twice, and differently"))
        if not self._take((logical_block,), first_layer, num_layers, (digest,), here):
            return self._refuse(SealMismatch(f"logical block {logical_block} is not the one that was sealed"))
        return Arrival.VERIFIED

    def pieces_arrived(self, logical_blocks: Sequence[int], first_layer: int, num_layers: int, digests: Sequence[bytes]) -> bool:
        """As `piece_arrived` of the same layers of each of these blocks, with bytes that have the stated digests: takes all of
        them at once if each would be VERIFIED and the blocks have the same other layers here; else none."""
        if not self.receiving or not self.writer_open:
            return False
        layers = self._layers(first_layer, num_layers)
        blocks, here = set(logical_blocks), set(map(self._layers_here.get, logical_blocks, repeat(0)))
        if not layers or len(here) != 1 or len(blocks) != len(logical_blocks) or not blocks <= self.expected:
            return False
        layers_here = here.pop()
        return not layers_here & layers and self._take(logical_blocks, first_layer, num_layers, digests, layers_here)

    def heard(self, now_s: float) -> None:
        """A sign of life of the writer."""
        if self._lease is not None:
            self._lease.renew(now_s)

    def writer_closed(self) -> None:
        """No write under this ticket can happen any more: the writer said so, or its link is gone, or it was fenced."""
        if not self.writer_open:
            return
        self.writer_open = False
        self.heard(self._clock.monotonic_s())
        if self.state in RECEIVING and not self.complete:
            missing = len(self.expected) - len(self.verified)
            text = f"the writer stopped with {missing} of {len(self.expected)} blocks missing"
            self.poison(TransferBroken(text) if self.seal is None else SealMismatch(text))
        self._verify_if_complete()
        self._drain_if_alone()

    # -- what may happen at any time ----------------------------------------------------------------------------------

    def poison(self, error: HandoffError) -> None:
        """The transfer failed. The first error stays; no effect on one that is already over."""
        if self.state in UNDECIDED or self.state is HandoffState.VERIFIED:
            self.error = error
            self._move(HandoffState.POISONED)
            self._drain_if_alone()

    def expire(self, now_s: float) -> None:
        """Poisons an undecided transfer whose ticket's time is over, or whose writer was silent for too long."""
        if self._deadline_s is not None and now_s >= self._deadline_s:
            self._time_out(f"the KV of the prompt did not arrive within {self.ticket.ttl_s:g} s")
        elif self._awaits_peer and self._lease is not None and now_s >= self._lease.ends_s:
            self._time_out(f"the prefill worker gave no sign of life for {self._lease_s:g} s")

    def silent(self, now_s: float) -> bool:
        """A writer is in, and was not heard for the time of a lease."""
        return self.writer_open and self._lease is not None and now_s >= self._lease.ends_s

    @property
    def expires_s(self) -> float | None:
        """When `expire` should be called next; None if there is nothing more to wait for."""
        if self.state not in UNDECIDED or self._deadline_s is None:
            return None
        if self._awaits_peer and self._lease is not None:
            return min(self._deadline_s, self._lease.ends_s)
        return self._deadline_s

    @property
    def ticket_expired(self) -> bool:
        return self._deadline_s is not None and self._clock.monotonic_s() >= self._deadline_s

    def overlaps(self, layers: int) -> bool:
        """Whether any of these, a bit for each, is one that its writer may write."""
        return bool(self._all_layers & layers)

    # -- what follows -------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every block of the ticket was verified here."""
        return self.verified.keys() == self.expected

    @property
    def drained(self) -> bool:
        """Failed or cancelled, and no writer can touch the blocks."""
        return self.state in (HandoffState.DRAINED, HandoffState.FREE)

    @property
    def _awaits_peer(self) -> bool:
        """The next thing to happen is the peer's: its OPEN, its writes, its CLOSE, or the seal after it. A transfer without
        blocks says nothing on the link, so it has the ticket's time."""
        return self.writer_open or (bool(self.expected) and self.state in (HandoffState.OFFERED, HandoffState.STREAMING))

    def _move(self, state: HandoffState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.state.name} -> {state.name}")
        self.state = state
        self.receiving = state in RECEIVING

    def _layers(self, first_layer: int, num_layers: int) -> int:
        """A bit for each layer of the piece; none if the ticket is for no such layers."""
        if first_layer < 0 or num_layers <= 0 or first_layer + num_layers > self._num_layers:
            return 0
        layers = ((1 << num_layers) - 1) << first_layer
        return 0 if layers & ~self._all_layers else layers

    def _take(
        self, logical_blocks: Sequence[int], first_layer: int, num_layers: int, digests: Sequence[bytes], here: int
    ) -> bool:
        """Notes pieces of different blocks, all of which have these layers `here`, and not those of the pieces. False, and
        nothing was noted, if one of the blocks is complete with it and is not what was sealed."""
        pieces = [(first_layer, num_layers, digest) for digest in digests]
        layers_then = here | self._layers(first_layer, num_layers)
        others = [self._pieces[block] for block in logical_blocks] if here else []  # of each block
        if layers_then == self._all_layers:
            block_digests = digests
            if here:
                block_digests = [block_digest_of(sorted([*its, piece])) for its, piece in zip(others, pieces, strict=True)]
            complete = dict(zip(logical_blocks, block_digests, strict=True))
            if self.seal is not None and any(self.seal.digests[block] != digest for block, digest in complete.items()):
                return False
            self.verified.update(complete)
        if here:
            for its, piece in zip(others, pieces, strict=True):
                its.append(piece)
        else:
            self._pieces.update(zip(logical_blocks, [[piece] for piece in pieces], strict=True))
        self._layers_here.update(dict.fromkeys(logical_blocks, layers_then))
        return True

    def _time_out(self, text: str) -> None:
        if self.state in UNDECIDED:
            self.poison(TransferTimeout(text))

    def _fail(self, error: HandoffError) -> HandoffError:
        self.poison(error)
        return error

    def _refuse(self, error: HandoffError) -> Arrival:
        self.poison(error)
        return Arrival.REFUSED

    def _complaint_about(self, seal: Seal) -> str | None:
        if seal.nonce != self.ticket.nonce:
            return "the seal is of another transfer"
        if seal.num_tokens != self.ticket.num_tokens:
            return f"{seal.num_tokens} tokens were computed, {self.ticket.num_tokens} were asked for"
        if seal.digests.keys() != self.expected:
            return f"the seal covers {len(seal.digests)} blocks that are not the {len(self.expected)} of the ticket"
        differing = [block for block, digest in self.verified.items() if seal.digests[block] != digest]
        if differing:
            return f"logical block {min(differing)} is not the one that was sealed"
        if self.expected and self.state is HandoffState.OFFERED:
            return "sealed, but no writer ever came"
        return None

    def _verify_if_complete(self) -> None:
        if self.state is HandoffState.SEALED and self.complete and not self.writer_open:
            self._move(HandoffState.VERIFIED)

    def _drain_if_alone(self) -> None:
        if self.state in _ENDINGS and not self.writer_open:
            self._move(HandoffState.DRAINED)
