"""What one rank does of a hand-off: the ordinary sender or receiver, over the rank's pool, under the rank's own name.

    send_as -> connect ... admit -> push, push ... finish | abort         release, at any time
    receive_as -> offers ... expect -> complete(seal) | abandon           wait_failed, meanwhile
    close: neither any more, until the next `send_as` or `receive_as`

Orders come from rank 0: of its own process, or through `orders`. A nonce names what an order is about. It does not know of other
ranks, nor why it is given an order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.clock import Clock
from common.errors import TicketRefused, TransferBroken
from common.types import KVLayout, Ticket
from kvtransfer.outgoing import Outgoing, TransferAccount
from kvtransfer.ranks.parts import Degrees, in_units, rank_name, window_of
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.transports.base import TransportOffer
from kvtransfer.window import Run


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who a rank is to its peers, or a worker."""

    worker_id: str
    incarnation: int
    secret: bytes = field(repr=False)
    layout: KVLayout  # of a rank's blocks, as rows of units; of the worker's, as the engine has it
    lease_s: float


def introductions(own: Introduction, degrees: Degrees) -> list[Introduction]:
    """Of each rank, from that of the worker."""
    return [
        replace(own, worker_id=rank_name(own.worker_id, rank), layout=in_units(window_of(own.layout, degrees, rank)))
        for rank in range(degrees.num_ranks)
    ]


@dataclass(frozen=True, slots=True)
class ListenOrder:
    kinds: tuple[str, ...]
    host: str
    trusted_network: bool


@dataclass(frozen=True, slots=True)
class PeerRank:
    """A rank of a decode worker, to be connected to."""

    worker_id: str
    incarnation: int
    offers: tuple[TransportOffer, ...]
    pool_blocks: int
    layout: KVLayout  # of its blocks, as rows of units
    runs: tuple[Run, ...]  # what it has in common with the rank that connects


@dataclass(frozen=True, slots=True)
class PushOrder:
    """Units [first, end) of the peer's blocks `logical` are there; `blocks` are all of the prompt's here."""

    logical: range
    blocks: tuple[int, ...]
    first: int
    end: int


class SendingRank(Protocol):
    async def send_as(self, own: Introduction) -> None: ...

    async def connect(self, peer: PeerRank) -> str:
        """The kind of link. Raises HandshakeRefused or TransferBroken."""
        ...

    async def admit(self, ticket: Ticket) -> None:
        """Raises TicketRefused."""
        ...

    async def push(self, nonce: bytes, order: PushOrder) -> None: ...

    async def finish(self, nonce: bytes) -> TransferAccount: ...

    async def abort(self, nonce: bytes) -> None:
        """When it returns nothing is read or written under this nonce. Idempotent; of no effect on one that is unknown."""
        ...

    async def release(self, nonces: Sequence[bytes]) -> None: ...

    async def close(self) -> None: ...


class ReceivingRank(Protocol):
    async def receive_as(self, own: Introduction, listen: ListenOrder) -> list[TransportOffer]:
        """Raises StartupError."""
        ...

    async def expect(self, ticket: Ticket) -> None: ...

    async def wait_failed(self, nonce: bytes) -> None:
        """Raises what the transfer fails with, as soon as it fails; if it does not fail it does not return."""
        ...

    async def complete(self, nonce: bytes, seal: Seal) -> None: ...

    async def abandon(self, nonce: bytes) -> None:
        """Returns when no writer can touch what this rank's part is. At once if it is unknown or complete."""
        ...

    async def received_bytes(self) -> Mapping[str, int]:
        """Verified here since `receive_as`, by the name of the rank that wrote them."""
        ...

    async def close(self) -> None: ...


class RankEnd:
    """A `SendingRank` or a `ReceivingRank`, in the process that it is of."""

    def __init__(self, region: BlockRegion, clock: Clock) -> None:
        self._region = region
        self._clock = clock
        self._sender: KVSender | None = None
        self._receiver: KVReceiver | None = None
        self._outgoing: dict[bytes, Outgoing] = {}
        self._incoming: dict[bytes, Incoming] = {}

    # -- as a sender ---------------------------------------------------------------------------------------------------

    async def send_as(self, own: Introduction) -> None:
        self._sender = KVSender(
            self._region, own.layout, own.worker_id, own.incarnation, own.secret, self._clock, lease_s=own.lease_s
        )

    async def connect(self, peer: PeerRank) -> str:
        return await self._sending.connect(
            peer.worker_id, peer.incarnation, peer.offers, peer.pool_blocks, peer.layout, peer.runs
        )

    async def admit(self, ticket: Ticket) -> None:
        self._outgoing[ticket.nonce] = self._sending.open(ticket)

    async def push(self, nonce: bytes, order: PushOrder) -> None:
        await self._going(nonce).push_prompt(order.logical, order.blocks, (order.first, order.end))

    async def finish(self, nonce: bytes) -> TransferAccount:
        account = await self._going(nonce).finish()
        del self._outgoing[nonce]
        return account

    async def abort(self, nonce: bytes) -> None:
        outgoing = self._outgoing.get(nonce)
        if outgoing is not None:
            await outgoing.abort()
            self._outgoing.pop(nonce, None)

    async def release(self, nonces: Sequence[bytes]) -> None:
        if self._sender is not None:
            await self._sender.release(nonces)

    # -- as a receiver -------------------------------------------------------------------------------------------------

    async def receive_as(self, own: Introduction, listen: ListenOrder) -> list[TransportOffer]:
        receiver = self._receiver = KVReceiver(
            self._region, own.layout, own.worker_id, own.incarnation, own.secret, self._clock, lease_s=own.lease_s
        )
        return await receiver.start(listen.kinds, listen.host, trusted_network=listen.trusted_network)

    async def expect(self, ticket: Ticket) -> None:
        if self._receiver is None:
            raise TransferBroken("this rank receives nothing")
        self._incoming[ticket.nonce] = self._receiver.expect(ticket)

    async def wait_failed(self, nonce: bytes) -> None:
        raise await self._coming(nonce).wait_failed()

    async def complete(self, nonce: bytes, seal: Seal) -> None:
        await self._coming(nonce).complete(seal)
        del self._incoming[nonce]

    async def abandon(self, nonce: bytes) -> None:
        incoming = self._incoming.get(nonce)
        if incoming is not None:
            # Rank 0 asks the other worker to stop, once for all ranks.
            await incoming.abandon(_nobody, tries=0)
            self._incoming.pop(nonce, None)

    async def received_bytes(self) -> Mapping[str, int]:
        return {} if self._receiver is None else dict(self._receiver.counters.bytes_by_writer)

    # -- either --------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends all links: nothing is read or written any more by what goes over them."""
        sender, self._sender = self._sender, None
        receiver, self._receiver = self._receiver, None
        if sender is not None:
            await sender.close()
        if receiver is not None:
            await receiver.close()
        self._outgoing.clear()
        self._incoming.clear()

    @property
    def _sending(self) -> KVSender:
        if self._sender is None:
            raise TransferBroken("this rank sends nothing")
        return self._sender

    def _going(self, nonce: bytes) -> Outgoing:
        if nonce not in self._outgoing:
            raise TicketRefused("this rank sends nothing under this ticket", param="nonce")
        return self._outgoing[nonce]

    def _coming(self, nonce: bytes) -> Incoming:
        if nonce not in self._incoming:
            raise TicketRefused("this rank expects nothing under this ticket", param="nonce")
        return self._incoming[nonce]


async def _nobody() -> None:
    """Nobody is asked."""
