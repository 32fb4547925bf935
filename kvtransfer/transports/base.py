"""The two ends of a data link, whatever carries it.

    decode worker                                            prefill worker
    transport.listen(landing, ...) -> Listener               transport.connect(address, ...) -> SenderLink
      per link, in the order of the link:                      open_writer(nonce)      until granted, nothing is written
        landing.writer_opened  -> None or a Refusal            write(nonce, pieces)    bytes and digests, in order
        landing.destination    -> where a block may go         close_writer(nonce)     nothing more under this nonce
        landing.block_written                                  close()
        landing.writer_closed
      landing.link_lost, exactly once, last

The guarantee about late writers, which is all that quarantine rests on: after `link_lost` nothing more arrives from that link in
the pool. Where `ReceiverLink.fences_locally` is true, nothing arrives either once `destination` has returned None: the bytes
pass through this process, which asks before each read. Where it is false the peer writes by itself, and only its CLOSE
(`writer_closed`) or the end of the link says that it has stopped.

All methods run on the event loop of their side. Landing's methods are plain calls and do not block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import HandoffError
from kvtransfer.frames import Refusal
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


@dataclass(frozen=True, slots=True)
class Piece:
    """One block to write. `source` must not change until the write has returned."""

    logical_block: int
    destination_block: int
    source: memoryview


class ReceiverLink(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def peer(self) -> PeerName: ...

    @property
    def fences_locally(self) -> bool: ...


class Landing(Protocol):
    """What the decode side does with what its links report."""

    def admit(self, peer: PeerName) -> str | None:
        """May a worker that proved to be `peer` have a link? Else the reason. Asked after authentication."""
        ...

    def link_refused(self, error: HandoffError) -> None:
        """Somebody connected and was not let in."""
        ...

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> Refusal | None: ...

    def destination(self, link: ReceiverLink, nonce: bytes, logical_block: int) -> memoryview | None:
        """Where the block may be written now; None = nowhere, drop it. Asked again before each piece is read."""
        ...

    def block_written(
        self, link: ReceiverLink, nonce: bytes, logical_block: int, digest: bytes, dropped: memoryview | None
    ) -> None:
        """A block is complete: in the pool, or in `dropped` if its bytes had nowhere to go."""
        ...

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None: ...

    def link_lost(self, link: ReceiverLink) -> None: ...


class Listener(Protocol):
    @property
    def address(self) -> str: ...

    async def close(self) -> None:
        """Takes no new links and ends those there are; each has reported `link_lost` when this returns."""
        ...


class SenderLink(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def lost(self) -> HandoffError | None:
        """Why the link is gone, or None while it stands. A link never comes back; connect a new one."""
        ...

    async def open_writer(self, nonce: bytes) -> None:
        """Asks to be let in. Raises TicketRefused if not, TransferBroken if the link goes."""
        ...

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        """Writes in order and returns the digests; fewer than `pieces` if `stop` said so in between. When it has returned or
        raised, the sources are not read any more and nothing of these pieces is still being written by this side. Not to be
        cancelled: ask through `stop`, or `drop` the link."""
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

    async def listen(self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, host: str) -> Listener: ...

    async def connect(
        self, address: str, credentials: LinkCredentials, peer: PeerName, *, pool_blocks: int, block_bytes: int
    ) -> SenderLink:
        """Raises HandshakeRefused if the peer is not `peer`, or does not let us in; TransferBroken if it cannot be reached."""
        ...
