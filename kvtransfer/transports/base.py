"""The two ends of a data link, whatever carries it.

    decode worker                                            prefill worker
    transport.listen(landing, ...) -> Listener               transport.connect(address, ...) -> SenderLink
      per link, in the order of the link:                      open_writer(nonce, news)  until granted, nothing is written
        landing.writer_opened  -> first credit, or a Refusal
        landing.destination    -> where a piece may go         write(nonce, pieces)      bytes and digests, in order
        landing.pieces_written
        landing.writer_alive                                   pulse(nonce)              "I am still here"
        landing.writer_closed                                  close_writer(nonce)       nothing more under this nonce
      landing.link_lost, exactly once, last                    close()
    link.credit(nonce, bytes)  --------------------------->    news.credited
    link.pulse(nonce)          --------------------------->    news.renewed
    pieces that it has fetched --------------------------->    news.taken                where it reads the sources by itself

What travels are pieces: some layers of one logical block, next to each other in memory. The pieces of a block are disjoint and
together cover it. How much may be on its way is the receiver's decision: a writer spends credit as it writes and gets it back for
what was verified. A link does not count credit, it carries the news; who writes without credit is a bug of the caller's.

The guarantee about late writers, which is all that quarantine rests on: after `link_lost` nothing more arrives from that link in
the pool. Where `ReceiverLink.fences_locally` is true, nothing arrives either once `destination` has returned None: the bytes
pass through this process, which asks before each read. Where it is false the peer writes by itself, and only its CLOSE
(`writer_closed`) or the end of the link says that it has stopped.

All methods run on the event loop of their side. Landing's methods and WriterNews' are plain calls and do not block.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from common.errors import HandoffError, TicketRefused
from common.types import KVLayout, Ticket
from kvtransfer.region import BlockRegion


@dataclass(frozen=True, slots=True)
class TransportOffer:
    """One way to reach a decode worker's pool. Written by it, carried by the handshake."""

    kind: str
    address: str


@dataclass(frozen=True, slots=True)
class PeerName:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class LinkCredentials:
    """Who we are on a data link, and what lets us prove it."""

    name: PeerName
    layout_fingerprint: bytes
    secret: bytes = field(repr=False)


class PieceName(NamedTuple):
    """Which part of a prompt's KV: the layers [first_layer, first_layer + num_layers) of one logical block."""

    logical_block: int
    first_layer: int
    num_layers: int


class Piece(NamedTuple):
    """What to write where. `source` has the bytes of the named layers and must not change until the write has returned, or, of
    pieces that were `lent`, until they were `taken`."""

    name: PieceName
    destination_offset_bytes: int  # into the pool
    source: memoryview


class Written(NamedTuple):
    """A piece that arrived, with the digest that its writer states."""

    name: PieceName
    digest: bytes
    dropped: memoryview | None  # None: it is in the pool; else its bytes, which had nowhere to go
    found: bytes | None = None  # the digest that its bytes have here, where the link has looked


class Refusal(enum.IntEnum):
    """Why a writer was not let in."""

    UNKNOWN = 1  # never minted here, or long over
    NOT_YOURS = 2  # minted for another worker or another incarnation of this one
    SPENT = 3  # admitted a writer before, or cancelled
    EXPIRED = 4

    def as_error(self) -> TicketRefused:
        return TicketRefused(f"the decode worker refused the ticket: {self.name.lower().replace('_', ' ')}", param="nonce")


class ReceiverLink(Protocol):
    """What the decode side may do with a link to one prefill worker."""

    @property
    def kind(self) -> str: ...

    @property
    def peer(self) -> PeerName: ...

    @property
    def fences_locally(self) -> bool: ...

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        """Lets the writer write that much more. Does not wait: a link that cannot take it is hung up on."""
        ...

    def pulse(self, nonce: bytes) -> None:
        """Tells the writer that its transfer is still wanted. Does not wait either."""
        ...

    def hang_up(self) -> None:
        """The peer is not heard any more over this link: ends it, or, if the peer writes into the pool by itself, tells it to."""
        ...


class Landing(Protocol):
    """What the decode side does with what its links report."""

    def admit(self, peer: PeerName) -> str | None:
        """May a worker that proved to be `peer` have a link? Else the reason. Asked after authentication."""
        ...

    def link_refused(self, error: HandoffError) -> None:
        """Somebody connected and was not let in."""
        ...

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        """May it write? The bytes that it may write at first, to be sent with the grant; or why not (told apart by type: a
        Refusal is an int as well)."""
        ...

    def ticket_of(self, link: ReceiverLink, nonce: bytes) -> Ticket | None:
        """Of a writer that was let in and may still write, for a link that puts pieces into the pool and looks at them before it
        reports them; asked anew before it does. None = one piece at a time, each at its `destination`."""
        ...

    def destination(self, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        """Where the piece may be written now; None = nowhere, drop it. Asked again before each read."""
        ...

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        """These pieces are complete: in the pool, or dropped if their bytes had nowhere to go."""
        ...

    def writer_alive(self, link: ReceiverLink, nonce: bytes) -> None:
        """A pulse, or a part of a piece. Nonces that are not known are of no interest."""
        ...

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None: ...

    def link_lost(self, link: ReceiverLink) -> None: ...


class Listener(Protocol):
    @property
    def address(self) -> str: ...

    async def close(self) -> None:
        """Takes no new links and ends those there are; each has reported `link_lost` when this returns."""
        ...


class WriterNews(Protocol):
    """What comes back over a link for one writer."""

    def credited(self, size_bytes: int) -> None:
        """That many more bytes may be written: the grant's first credit, then what was verified."""
        ...

    def lent(self, num_pieces: int) -> None:
        """So many of the pieces that were just written lie where they lay, and the decode side reads them there."""
        ...

    def taken(self, num_pieces: int) -> None:
        """So many of those are not read any more, whatever became of them. May be told before `lent` is, of the same write. Who
        gives up need not wait for it: what is read of a source that has changed does not have its digest."""
        ...

    def renewed(self) -> None:
        """The decode side lives and still wants this transfer."""
        ...


class SenderLink(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def lost(self) -> HandoffError | None:
        """Why the link is gone, or None while it stands. A link never comes back; connect a new one."""
        ...

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        """Asks to be let in. When it returns, the first credit was given to `news`, which hears of this nonce until
        `close_writer`. Raises TicketRefused if not let in, TransferBroken if the link goes."""
        ...

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        """Writes in order and returns the digests; fewer than `pieces` if `stop` said so in between. When it has returned or
        raised, the sources are not read any more, but for those that are `lent`, and nothing of these pieces is still being
        written by this side. Not to be cancelled: ask through `stop`, or `drop` the link."""
        ...

    def pulse(self, nonce: bytes) -> None:
        """Tells the decode side that this writer lives. Best effort: never blocks, never raises."""
        ...

    async def close_writer(self, nonce: bytes) -> None:
        """Promises that nothing more is written. No error if the link is gone: then that is true anyway."""
        ...

    def drop(self, error: HandoffError) -> None:
        """Ends the link at once; a write under way returns with an error soon."""
        ...

    async def close(self) -> None:
        """Ends the link; the peer's memory is unmapped before the peer can see the end. Idempotent."""
        ...


class Transport(Protocol):
    """One kind of link. Stateless; what it opens is closed through what it returns."""

    def can_serve(self, region: BlockRegion) -> bool:
        """Can a pool in this memory be written to over this kind of link?"""
        ...

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener: ...

    async def connect(
        self,
        address: str,
        credentials: LinkCredentials,
        peer: PeerName,
        *,
        pool_blocks: int,
        layout: KVLayout,
        source: BlockRegion,
    ) -> SenderLink:
        """`source` is the pool that pieces will be of. Raises HandshakeRefused if the peer is not `peer`, or does not let us in;
        TransferBroken if it cannot be reached."""
        ...
