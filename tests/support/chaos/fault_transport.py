"""A decorator around any transport that takes the link's steps one by one, and does wrong where a plan says so.

    prefill side   FaultSenderLink around the link: fails, drops, doubles, reorders, delays, lies in the account, writes late;
                   shm: offers pieces at places where others lie, as if their blocks had been given to somebody else meanwhile
    decode side    FaultLanding around the landing: bytes that are in the pool change before anybody looked at them

What is planted on the decode side is what a bad cable, a bad copy or a race would leave there, on links whose bytes no proxy can
touch (shm, nixl) as well as on tcp. Native code fetches and looks at once: it does not get the transfers of which something is to
be spoiled in between, and all others. The decorator never changes a source before its digest was taken: that would be another
prompt's KV with a true digest, which is the engine's business and not the transfer's.

A decode worker may also be told that it cannot fence its writers (`FaultPlan.fences`), as where they write into its pool by
themselves: then it has to ask them to stop, and to wait until they have.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import HandoffError, TransferBroken
from common.types import KVLayout, Ticket
from kvtransfer.found import FoundPieces
from kvtransfer.frames import PLACE_BYTES
from kvtransfer.region import BlockRegion
from kvtransfer.spans import Columns
from kvtransfer.transports.base import (
    Landing,
    LinkCredentials,
    Listener,
    PeerName,
    Piece,
    PieceName,
    ReceiverLink,
    Refusal,
    SenderLink,
    Transport,
    WriterNews,
    Written,
)
from kvtransfer.transports.offer import Offer
from support.chaos.steps import AT_PIECES, Breakpoint, PrefillStep

DELAY_S = 0.05
LATE_LIMIT_S = 5.0
_PLACE_BYTES_ALONE = 8  # of a descriptor of READY, its end: the rest is the piece's name


class TransportFault(enum.Enum):
    FAIL = "write fails"
    FAIL_AFTER = "write fails half-way"
    LINK_DROPPED = "link dropped in a write"
    PIECE_DROPPED = "piece silently dropped"
    PIECE_TWICE = "piece written twice"
    REORDERED = "pieces in reverse order"
    DELAYED = "write delayed"
    SEAL_LIES = "wrong digest in the seal"
    WRITTEN_LATE = "written after everybody gave up"
    MISPLACED = "offered where others lie"
    FLIPPED = "byte flipped in the pool"
    SWAPPED = "two pieces swapped in the pool"
    TORN = "half of a piece not yet in the pool"
    FRAME_LIES = "wrong digest with the piece"


ON_ARRIVAL = frozenset({TransportFault.FLIPPED, TransportFault.SWAPPED, TransportFault.TORN, TransportFault.FRAME_LIES})
CORRUPTING = ON_ARRIVAL | {TransportFault.SEAL_LIES, TransportFault.PIECE_DROPPED, TransportFault.MISPLACED}
"""After one of these a transfer must not be used."""
OF_OFFERS = frozenset({TransportFault.MISPLACED})
"""They exist only where the decode worker fetches out of the prefill worker's pool: shm, and blocks that are not cut anew."""


def faults_over(kind: str, *, cut_anew: bool = False) -> list[TransportFault]:
    offered = kind == "shm" and not cut_anew
    return [fault for fault in TransportFault if offered or fault not in OF_OFFERS]


class FaultPlan:
    """One per worker process: what is done to which share of the transfers."""

    def __init__(self, *, fences: bool = True) -> None:
        """`fences`: whether this worker, if it is a decode worker, can shut out the writers of links that allow it."""
        self.fences = fences
        self._fault: TransportFault | None = None
        self._share = 0.0
        self._chance = random.Random(0)
        self._decided: dict[bytes, bool] = {}
        self._injected: dict[bytes, TransportFault] = {}

    def load(self, command: dict[str, Any]) -> None:
        self._fault = None if command["fault"] is None else TransportFault(command["fault"])
        self._share = command.get("share", 1.0)
        self._chance = random.Random(command.get("seed", 0))
        self._decided.clear()

    def wants(self, nonce: bytes, among: frozenset[TransportFault] | None = None) -> TransportFault | None:
        """What is to be done to this transfer; asked as often as there is an occasion, done at the first."""
        if self._fault is None or (among is not None and self._fault not in among) or nonce in self._injected:
            return None
        if nonce not in self._decided:
            self._decided[nonce] = self._chance.random() < self._share
        return self._fault if self._decided[nonce] else None

    def done(self, nonce: bytes, fault: TransportFault) -> None:
        self._injected[nonce] = fault

    def take(self) -> list[list[str]]:
        taken = [[nonce.hex(), fault.value] for nonce, fault in self._injected.items()]
        self._injected.clear()
        return taken


class FaultTransport:
    def __init__(self, inner: Transport, plan: FaultPlan, breakpoint_: Breakpoint, requests: dict[bytes, str]) -> None:
        self._inner = inner
        self._plan = plan
        self._breakpoint = breakpoint_
        self._requests = requests

    def can_serve(self, region: BlockRegion) -> bool:
        return self._inner.can_serve(region)

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        planted = FaultLanding(landing, self._plan, self._breakpoint)
        return await self._inner.listen(planted, credentials, region, layout, host)

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
        link = await self._inner.connect(address, credentials, peer, pool_blocks=pool_blocks, layout=layout, source=source)
        return FaultSenderLink(link, self._plan, self._breakpoint, self._requests)


class FaultSenderLink:
    def __init__(self, inner: SenderLink, plan: FaultPlan, breakpoint_: Breakpoint, requests: dict[bytes, str]) -> None:
        self._inner = inner
        self._plan = plan
        self._breakpoint = breakpoint_
        self._requests = requests

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def lost(self) -> HandoffError | None:
        return self._inner.lost

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        await self._inner.open_writer(nonce, news)
        self._reached(PrefillStep.GRANTED, nonce)

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        self._reached(PrefillStep.BEFORE_FIRST_WRITE, nonce)
        if self._breakpoint.awaits(PrefillStep.MID_WRITE):
            half = (len(pieces) + 1) // 2
            digests = await self._inner.write(nonce, pieces[:half], stop)
            self._reached(PrefillStep.MID_WRITE, nonce)
            if len(digests) == half < len(pieces):
                digests += await self._inner.write(nonce, pieces[half:], stop)
            return digests
        fault = self._plan.wants(nonce)
        if fault is None or fault in ON_ARRIVAL | OF_OFFERS:
            digests = await self._inner.write(nonce, pieces, stop)
        else:
            digests = await self._write_wrongly(fault, nonce, pieces, stop)
        self._reached(PrefillStep.AFTER_FIRST_WRITE, nonce)
        return digests

    def pulse(self, nonce: bytes) -> None:
        self._inner.pulse(nonce)

    async def close_writer(self, nonce: bytes) -> None:
        self._reached(PrefillStep.BEFORE_CLOSE, nonce)
        await self._inner.close_writer(nonce)
        self._reached(PrefillStep.AFTER_CLOSE, nonce)

    def drop(self, error: HandoffError) -> None:
        self._inner.drop(error)

    async def close(self) -> None:
        await self._inner.close()

    def _reached(self, step: PrefillStep, nonce: bytes) -> None:
        self._breakpoint.reached(step, self._requests.get(nonce))

    async def _write_wrongly(
        self, fault: TransportFault, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]
    ) -> list[bytes]:
        self._plan.done(nonce, fault)
        write = self._inner.write
        half = len(pieces) // 2
        match fault:
            case TransportFault.FAIL:
                raise TransferBroken("planted: the write failed")
            case TransportFault.FAIL_AFTER:
                await write(nonce, pieces[:half], stop)
                raise TransferBroken("planted: the write failed half-way")
            case TransportFault.LINK_DROPPED:
                digests = await write(nonce, pieces[:half], stop)
                self._inner.drop(TransferBroken("planted: the link went away"))
                return digests
            case TransportFault.PIECE_DROPPED:
                digests = await write(nonce, pieces[1:], stop)
                return [b"\0" * 16, *digests]
            case TransportFault.PIECE_TWICE:
                await write(nonce, pieces[:1], stop)
                return await write(nonce, pieces, stop)
            case TransportFault.REORDERED:
                digests = await write(nonce, pieces[::-1], stop)
                return digests[::-1] if len(digests) == len(pieces) else []
            case TransportFault.DELAYED:
                await asyncio.sleep(DELAY_S)
                return await write(nonce, pieces, stop)
            case TransportFault.SEAL_LIES:
                digests = await write(nonce, pieces, stop)
                return [bytes(byte ^ 0xFF for byte in digests[0]), *digests[1:]] if digests else []
            case TransportFault.WRITTEN_LATE:
                async with asyncio.timeout(LATE_LIMIT_S):
                    while not stop():
                        await asyncio.sleep(0.005)
                await asyncio.sleep(DELAY_S)  # whoever gets the blocks next, if anybody does, has had time to fill them
                return await write(nonce, pieces, lambda: False)
            case _:
                raise AssertionError(fault)


class FaultLanding:
    def __init__(self, inner: Landing, plan: FaultPlan, breakpoint_: Breakpoint) -> None:
        self._inner = inner
        self._plan = plan
        self._breakpoint = breakpoint_

    def admit(self, peer: PeerName) -> str | None:
        return self._inner.admit(peer)

    def link_refused(self, error: HandoffError) -> None:
        self._inner.link_refused(error)

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        if not self._plan.fences:
            link.fences_locally = False  # type: ignore[misc]
        return self._inner.writer_opened(link, nonce)

    def ticket_of(self, link: ReceiverLink, nonce: bytes) -> Ticket | None:
        """None where what arrives is spoiled in `pieces_written`, or a step between pieces is waited for: nobody looks before."""
        if self._plan.wants(nonce, ON_ARRIVAL) is not None or any(map(self._breakpoint.awaits, AT_PIECES)):
            return None
        return self._inner.ticket_of(link, nonce)

    def destination(self, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        return self._inner.destination(link, nonce, name)

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        fault = self._plan.wants(nonce, ON_ARRIVAL)
        if fault is not None and not isinstance(written, FoundPieces):  # those were looked at
            written = self._spoil(fault, link, nonce, written)
        self._inner.pieces_written(link, nonce, written)

    def writer_alive(self, link: ReceiverLink, nonce: bytes) -> None:
        self._inner.writer_alive(link, nonce)

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None:
        self._inner.writer_closed(link, nonce)

    def link_lost(self, link: ReceiverLink) -> None:
        self._inner.link_lost(link)

    def _spoil(self, fault: TransportFault, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> Sequence[Written]:
        places = [
            place
            for item in written
            if item.dropped is None and (place := self._inner.destination(link, nonce, item.name)) is not None
        ]
        if not places:
            return written
        first = places[0]
        match fault:
            case TransportFault.FLIPPED:
                first[len(first) // 2] ^= 0x10
            case TransportFault.TORN:
                first[len(first) // 2 :] = bytes(len(first) - len(first) // 2)
            case TransportFault.SWAPPED if len(places) > 1 and len(places[1]) == len(first):
                other = places[1]
                first[:], other[:] = bytes(other), bytes(first)
            case TransportFault.FRAME_LIES:
                item = written[0]
                written = [item._replace(digest=bytes(byte ^ 0xFF for byte in item.digest)), *written[1:]]
            case _:
                return written  # no two pieces to swap: the next occasion may have them
        self._plan.done(nonce, fault)
        return written


def misplace_offers(plan: FaultPlan) -> None:
    """In a prefill worker's process, before the worker is made."""
    make = Offer.__init__

    def made(offer: Offer, nonce: bytes, pieces: Sequence[Piece], columns: Columns, pool_address: int) -> None:
        make(offer, nonce, pieces, columns, pool_address)
        fault = plan.wants(nonce, OF_OFFERS)
        if fault is not None and len(pieces) > 1:
            offer._placed = _exchanged(offer._placed)
            plan.done(nonce, fault)

    Offer.__init__ = made  # type: ignore[method-assign]


def _exchanged(placed: bytes) -> bytes:
    """The places of the first two pieces of READY's table, which stand at the ends of their descriptors, one for the other."""
    first, second = placed[:PLACE_BYTES], placed[PLACE_BYTES : 2 * PLACE_BYTES]
    name_bytes = PLACE_BYTES - _PLACE_BYTES_ALONE
    exchanged = first[:name_bytes] + second[name_bytes:] + second[:name_bytes] + first[name_bytes:]
    return exchanged + placed[2 * PLACE_BYTES :]
