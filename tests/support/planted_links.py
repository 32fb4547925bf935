"""The links and calls between workers of one process, with places where a test steps in; without a plant nothing is changed.

    prefill side   PlantedSenderLink: `write` instead of the link's own; ends and CLOSE held back; pulses swallowed
    decode side    PlantedLanding: `arriving` sees, and may spoil, what is in the pool before anybody has looked at it
    calls          PlantedPeer: `handshake`, `run` and `release` instead of the real calls; all Runs are written down

A plant gets the real thing as its first argument and decides itself when, whether and with what to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common.errors import HandoffError
from common.types import KVLayout, Ticket, WorkerRef
from common.wire import worker_pb2
from decode_worker.prefill_peer import GrpcPrefillPeer
from kvtransfer.region import BlockRegion
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

WritePlant = Callable[[SenderLink, bytes, Sequence[Piece], Callable[[], bool]], Awaitable[list[bytes]]]
Place = Callable[[PieceName], memoryview | None]
ArrivalPlant = Callable[[bytes, Sequence[Written], Place], Sequence[Written]]
CallPlant = Callable[[Callable[..., Awaitable[Any]], Any, float], Awaitable[Any]]


class Plants:
    """One per test."""

    def __init__(self) -> None:
        self.write: WritePlant | None = None
        self.arriving: ArrivalPlant | None = None
        self.handshake: CallPlant | None = None
        self.run: CallPlant | None = None
        self.release: CallPlant | None = None
        self.mute = False  # prefill workers' pulses get lost
        self.busy: set[bytes] = set()  # nonces whose CLOSE, and the end of whose link, do not happen before `let_end`
        self.runs: list[worker_pb2.PrefillRequest] = []
        self._may_end = asyncio.Event()
        self._ends: list[tuple[SenderLink, HandoffError]] = []

    def nonces_of(self, request_id: str) -> list[bytes]:
        """One per attempt that got as far as a Run."""
        return [run.ticket.nonce for run in self.runs if run.request.request_id == request_id]

    def let_end(self) -> None:
        self.busy.clear()
        self._may_end.set()
        ends, self._ends = self._ends, []
        for link, error in ends:
            link.drop(error)

    async def may_close(self, nonce: bytes) -> None:
        if nonce in self.busy:
            await self._may_end.wait()

    async def may_end(self) -> None:
        if self.busy:
            await self._may_end.wait()

    def end(self, link: SenderLink, error: HandoffError) -> None:
        if self.busy:
            self._ends.append((link, error))
        else:
            link.drop(error)


class PlantedTransport:
    def __init__(self, inner: Transport, plants: Plants) -> None:
        self._inner = inner
        self._plants = plants

    def can_serve(self, region: BlockRegion) -> bool:
        return self._inner.can_serve(region)

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        return await self._inner.listen(PlantedLanding(landing, self._plants), credentials, region, layout, host)

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
        return PlantedSenderLink(link, self._plants)


class PlantedSenderLink:
    def __init__(self, inner: SenderLink, plants: Plants) -> None:
        self._inner = inner
        self._plants = plants

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def lost(self) -> HandoffError | None:
        return self._inner.lost

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        await self._inner.open_writer(nonce, news)

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        if self._plants.write is not None:
            return await self._plants.write(self._inner, nonce, pieces, stop)
        return await self._inner.write(nonce, pieces, stop)

    def pulse(self, nonce: bytes) -> None:
        if not self._plants.mute:
            self._inner.pulse(nonce)

    async def close_writer(self, nonce: bytes) -> None:
        await self._plants.may_close(nonce)
        await self._inner.close_writer(nonce)

    def drop(self, error: HandoffError) -> None:
        self._plants.end(self._inner, error)

    async def close(self) -> None:
        await self._plants.may_end()
        await self._inner.close()


class PlantedLanding:
    def __init__(self, inner: Landing, plants: Plants) -> None:
        self._inner = inner
        self._plants = plants

    def admit(self, peer: PeerName) -> str | None:
        return self._inner.admit(peer)

    def link_refused(self, error: HandoffError) -> None:
        self._inner.link_refused(error)

    def writer_opened(self, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        return self._inner.writer_opened(link, nonce)

    def ticket_of(self, link: ReceiverLink, nonce: bytes) -> Ticket | None:
        """None where what arrives may be spoiled in `pieces_written`: nobody looks before."""
        return self._inner.ticket_of(link, nonce) if self._plants.arriving is None else None

    def destination(self, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        return self._inner.destination(link, nonce, name)

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        if self._plants.arriving is not None:
            written = self._plants.arriving(nonce, written, lambda name: self._inner.destination(link, nonce, name))
        if written:
            self._inner.pieces_written(link, nonce, written)

    def writer_alive(self, link: ReceiverLink, nonce: bytes) -> None:
        self._inner.writer_alive(link, nonce)

    def writer_closed(self, link: ReceiverLink, nonce: bytes) -> None:
        self._inner.writer_closed(link, nonce)

    def link_lost(self, link: ReceiverLink) -> None:
        self._inner.link_lost(link)


class PlantedPeer:
    """A `PrefillPeer`."""

    def __init__(self, ref: WorkerRef, cluster_token: str, plants: Plants) -> None:
        self._inner = GrpcPrefillPeer(ref, cluster_token)
        self._plants = plants

    async def handshake(self, message: worker_pb2.HandshakeRequest, timeout_s: float) -> worker_pb2.HandshakeReply:
        return await self._call(self._plants.handshake, self._inner.handshake, message, timeout_s)

    async def run(self, message: worker_pb2.PrefillRequest, timeout_s: float) -> worker_pb2.PrefillReply:
        self._plants.runs.append(message)
        return await self._call(self._plants.run, self._inner.run, message, timeout_s)

    async def release(self, message: worker_pb2.ReleaseRequest, timeout_s: float) -> worker_pb2.ReleaseReply:
        return await self._call(self._plants.release, self._inner.release, message, timeout_s)

    async def push_probe(self, message: worker_pb2.PushProbeRequest, timeout_s: float) -> worker_pb2.PushProbeReply:
        return await self._inner.push_probe(message, timeout_s)

    async def close(self) -> None:
        await self._inner.close()

    @staticmethod
    async def _call(plant: CallPlant | None, call: Callable[..., Awaitable[Any]], message: Any, timeout_s: float) -> Any:
        return await (call(message, timeout_s) if plant is None else plant(call, message, timeout_s))


class Spoiler:
    """Wipes one block of a request's first transfer, in every layer that arrives."""

    def __init__(self, plants: Plants, request_id: str, logical_block: int) -> None:
        self._plants, self._request_id, self._logical_block = plants, request_id, logical_block
        self.spoiled = 0
        plants.arriving = self

    def __call__(self, nonce: bytes, written: Sequence[Written], place: Place) -> Sequence[Written]:
        if self._plants.nonces_of(self._request_id)[:1] == [nonce]:
            for item in written:
                content = place(item.name) if item.name.logical_block == self._logical_block else None
                if content is not None:
                    content[:] = bytes(len(content))
                    self.spoiled += 1
        return written
