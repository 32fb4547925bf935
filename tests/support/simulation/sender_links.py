"""The prefill side's ends of simulated data links: what `data_links` says of the three flavours, as far as it happens there.

    SimSenderLink           one lane, as the real one: OPEN, batches, PULSE and CLOSE one after the other
    MappingSenderLink       writes into the other's memory, and says so
    WireSenderLink          sends pieces

A job in the lane runs on when whoever waited for it was cancelled. The end of a link whose sender writes by itself arrives only
after that has stopped.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common.errors import HandoffError, TransferBroken
from kvtransfer.digest import piece_digest
from kvtransfer.gather import gather_piece
from kvtransfer.reshard import Side
from kvtransfer.transports.base import Piece, PieceName, Refusal, WriterNews, Written
from support.simulation.network import Network, Point, Wire
from support.simulation.oracle import KV
from support.simulation.pool import Memory
from support.simulation.receiver_links import SimReceiverLink
from support.simulation.virtual_loop import ProcessLoop, running_process

STALL_TIMEOUT_S = 10.0
COPY_S = 300e-6  # at most, for a group of pieces
MAX_GROUP = 3
MAX_ON_THE_WAY = 4  # frames of a wire that the receiver has not read: then the sender waits
GONE = "the link to the decode worker went away"


class SimSenderLink(ABC):
    def __init__(self, kind: str, network: Network, loop: ProcessLoop, wire: Wire, remote: SimReceiverLink) -> None:
        self.kind = kind
        self.loop = loop
        self.lost: HandoffError | None = None
        self._network = network
        self._wire = wire
        self._remote: Any = remote  # of the kind that belongs to this one
        self._memory: Memory = loop.host.memory  # the sources
        self._jobs: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()
        self._lane: asyncio.Task[None] | None = None
        self._asking: dict[bytes, tuple[asyncio.Future[None], WriterNews]] = {}
        self._news: dict[bytes, WriterNews] = {}
        self._pulsing: dict[bytes, None] = {}
        self._opened: dict[bytes, None] = {}  # writers that may be let in over there
        self._room: asyncio.Future[None] | None = None  # that a write waits for
        self._ending: asyncio.Task[None] | None = None
        self._repeats: dict[str, tuple[Any, ...]] = {}  # by kind: a frame to be sent again, in place of the next one
        loop.host.sender_links[self] = None
        wire.on_end_a = lambda: self.drop(TransferBroken(GONE))
        if wire.ended_a:
            self.drop(TransferBroken(GONE))

    # -- SenderLink ---------------------------------------------------------------------------------------------------

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        granted: asyncio.Future[None] = self.loop.create_future()
        self._asking[nonce] = granted, news

        async def send() -> None:
            self._check()
            self._tell("OPEN", nonce)
            self._opened[nonce] = None
            self._network.point(Point.OPEN_SENT, self.loop)
            self._say(self._remote.opened, self, nonce, news)

        try:
            await self._in_lane(send)
            await granted
        finally:
            self._asking.pop(nonce, None)
            if granted.done() and not granted.cancelled():
                granted.exception()

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        digests: list[bytes] = await self._in_lane(lambda: self._write(nonce, pieces, lambda: stop() or self.lost is not None))
        return digests

    @abstractmethod
    async def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        """In the lane."""

    def pulse(self, nonce: bytes) -> None:
        if self.lost is not None or nonce in self._pulsing:
            return
        self._pulsing[nonce] = None

        async def send() -> None:
            self._check()
            self._say(self._remote.alive, nonce)

        job = self._start_in_lane(send)

        def sent(job: asyncio.Future[Any]) -> None:
            self._pulsing.pop(nonce, None)
            if not job.cancelled():
                job.exception()

        job.add_done_callback(sent)

    async def close_writer(self, nonce: bytes) -> None:
        self._news.pop(nonce, None)

        async def send() -> None:
            self._check()
            self._tell("CLOSE", nonce)
            self._leave(nonce)
            self._say(self._remote.closed, nonce)
            self._network.point(Point.CLOSE_SENT, self.loop)

        if self.lost is None:
            try:
                await self._in_lane(send)
            except TransferBroken:
                return

    def drop(self, error: HandoffError) -> None:
        if self.lost is not None:
            return
        self._network.time.tell(self.loop.name, f"{self.kind} link is dropped: {error.message}")
        self.lost = error
        self._news.clear()
        self._more_room()
        for granted, _ in self._asking.values():
            if not granted.done():
                granted.set_exception(error)
        self._ending = self.loop.create_task(self._end(), name="sim-link-end")

    async def close(self) -> None:
        self.drop(TransferBroken("the link was closed"))
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self) -> None:
        if self._lane is not None:
            await asyncio.wait({self._lane})
        self.leave_all()
        self._wire.close(self.loop)
        self.loop.host.sender_links.pop(self, None)

    def uses(self, wire: Wire) -> bool:
        return self._wire is wire

    def lose(self) -> None:
        self.drop(TransferBroken(GONE))

    def leave_all(self) -> None:
        """Nothing is written by this end any more: its process is dead, or it has unmapped the pool."""
        for nonce in tuple(self._opened):
            self._leave(nonce)

    def may_write(self, nonce: bytes) -> bool:
        return nonce in self._opened

    def _leave(self, nonce: bytes) -> None:
        self._opened.pop(nonce, None)
        self._remote.memory.writer_leaves(nonce)

    # -- the lane -----------------------------------------------------------------------------------------------------

    async def _in_lane(self, job: Callable[[], Awaitable[Any]]) -> Any:
        self._check()
        return await asyncio.shield(self._start_in_lane(job))

    def _start_in_lane(self, job: Callable[[], Awaitable[Any]]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.loop.create_future()
        self._jobs.append((job, future))
        if self._lane is None or self._lane.done():
            self._lane = self.loop.create_task(self._run_lane(), name="sim-lane")
        return future

    async def _run_lane(self) -> None:
        while self._jobs:
            job, future = self._jobs.popleft()
            try:
                result = await job()
            except HandoffError as error:
                future.set_exception(error)
                future.exception()  # whoever asked may be gone
                self.drop(error)
            else:
                future.set_result(result)

    def _check(self) -> None:
        if self.lost is not None:
            raise TransferBroken(self.lost.message)

    # -- what is sent -------------------------------------------------------------------------------------------------

    def _say(self, handle: Callable[..., None], *arguments: Any) -> None:
        self._wire.send(self.loop, self._remote.receive, handle, *arguments)

    def _in_disorder(self, kind: str, frame: tuple[Any, ...]) -> tuple[Any, ...]:
        """The frame, or an earlier one of its kind once more in its place."""
        repeated = self._repeats.pop(kind, None)
        if repeated is not None:
            self._network.time.tell("network", f"what was {kind} is said again instead of the next")
            return repeated
        if self._network.chance(self._network.disorder.repeated):
            self._repeats[kind] = frame
        return frame

    def _digest(self, piece: Piece, nonce: bytes) -> bytes:
        return piece_digest(self._source(piece, nonce), nonce, *piece.name)

    def _source(self, piece: Piece, nonce: bytes) -> memoryview:
        """What is read, after a look at whether it may be, and whether it is what the ticket's prompt has there. (Of what was
        made of blocks that are cut otherwise, `watched_gather` has looked at the sources.)"""
        if self._memory.holds(piece.source):
            self._memory.check_sent(self._memory.block_at(piece.source))
        if self._differs(nonce, piece.name, piece.source):
            self._network.complain(f"{self.loop.name} sends logical block {piece.name.logical_block} with other bytes in it")
        return piece.source

    def _differs(self, nonce: bytes, name: PieceName, source: memoryview) -> bool:
        """From what the ticket's prompt has there."""
        issued = self._network.witness.tickets.get(nonce)
        if issued is None:
            return False
        cut = self._remote.loop.host.cut
        block = cut.block_of(_expected(issued.prompt), name.logical_block)
        start = name.first_layer * (source.nbytes // name.num_layers)
        return len(block) == cut.block_bytes and block[start : start + source.nbytes] != source

    # -- news, as it arrives ------------------------------------------------------------------------------------------

    def answered(self, nonce: bytes, answer: int | Refusal) -> None:
        granted, news = self._asking.pop(nonce, (None, None))
        if isinstance(answer, Refusal):
            self._opened.pop(nonce, None)
            if granted is not None and not granted.done():
                granted.set_exception(answer.as_error())
        elif granted is not None and news is not None and not granted.done():
            self._news[nonce] = news
            news.renewed()
            news.credited(answer)
            granted.set_result(None)

    def news_for(self, nonce: bytes, credit_bytes: int) -> None:
        news = self._news.get(nonce)
        if news is not None:
            news.renewed()
            if credit_bytes:
                news.credited(credit_bytes)

    def _more_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _tell(self, text: str, nonce: bytes) -> None:
        if self._network.time.trace is not None:
            self._network.time.tell(self.loop.name, f"-> {text} {nonce.hex()[:6]} to {self._remote.loop.name}")


class MappingSenderLink(SimSenderLink):
    async def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        network, random = self._network, self._network.random
        digests: list[bytes] = []
        while len(digests) < len(pieces) and not stop():
            group = pieces[len(digests) : len(digests) + random.randint(1, MAX_GROUP)]
            first = len(digests)
            early = random.random() < 0.5
            if early:
                digests += [self._digest(piece, nonce) for piece in group]
            await asyncio.sleep(COPY_S * random.random())
            for piece in group:
                self._put(nonce, piece, 0, piece.source.nbytes // 2)
            await asyncio.sleep(COPY_S * random.random())
            for piece in group:
                self._put(nonce, piece, piece.source.nbytes // 2, piece.source.nbytes)
            if not early:
                digests += [self._digest(piece, nonce) for piece in group]
            self._check()
            network.point(Point.PIECES_WRITTEN, self.loop)
            written = [Written(piece.name, digest, None) for piece, digest in zip(group, digests[first:], strict=True)]
            self._say(self._remote.written, *self._in_disorder("written", (nonce, written)))
        return digests

    def _put(self, nonce: bytes, piece: Piece, start: int, end: int) -> None:
        """Some bytes go from our memory into the other's, which may be dead by now."""
        source = self._source(piece, nonce)
        target = self._remote.memory
        block = piece.destination_offset_bytes // target.block_bytes
        if self._remote.loop.alive:
            issued = self._network.witness.tickets.get(nonce)
            target.check_write_from_outside(block, nonce, None if issued is None else issued.generations)
        offset = piece.destination_offset_bytes
        disorder = self._network.disorder
        if self._network.chance(disorder.skipped):
            self._network.time.tell("network", f"a piece of block {piece.name.logical_block} is not written")
            return
        target.bytes[offset + start : offset + end] = source[start:end]
        if end == len(source) and self._network.chance(disorder.flipped):
            self._network.time.tell("network", f"a byte of block {piece.name.logical_block} is flipped")
            target.bytes[offset + self._network.random.randrange(end)] ^= 0x10


class WireSenderLink(SimSenderLink):
    _on_the_way = 0

    async def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        network, random, disorder = self._network, self._network.random, self._network.disorder
        digests: list[bytes] = []
        for piece in pieces:
            if stop():
                break
            digest = self._digest(piece, nonce)
            await asyncio.sleep(COPY_S / MAX_GROUP * random.random())
            self._check()
            data = bytearray(self._source(piece, nonce))
            if network.chance(disorder.flipped):
                network.time.tell("network", f"a byte of block {piece.name.logical_block} is flipped")
                data[random.randrange(len(data))] ^= 0x10
            digests.append(digest)
            if network.chance(disorder.skipped):
                network.time.tell("network", f"a piece of block {piece.name.logical_block} is lost")
                continue
            network.point(Point.PIECES_WRITTEN, self.loop)
            frame = self._in_disorder("sent", (nonce, piece.name, digest, bytes(data)))
            self._send_frame(*frame, cut=random.randrange(1, len(frame[3])))
            self._on_the_way += 1
            if self._on_the_way >= MAX_ON_THE_WAY:
                await self._wait_for_room()
        return digests

    def _send_frame(self, nonce: bytes, name: PieceName, digest: bytes, data: bytes, *, cut: int) -> None:
        for start, part in ((0, data[:cut]), (cut, data[cut:])):
            self._say(self._remote.part, nonce, name, digest, len(data), start, part)

    async def _wait_for_room(self) -> None:
        self._room = self.loop.create_future()
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S):
                await self._room
        except TimeoutError as error:
            raise TransferBroken("the peer took nothing for too long") from error
        self._check()

    def frame_read(self) -> None:
        self._on_the_way -= 1
        self._more_room()


@functools.lru_cache(maxsize=64)
def _expected(prompt: tuple[int, ...]) -> KV:
    return KV(prompt)


def watched_gather(source: Side, pool: memoryview, *arguments: Any, **options: Any) -> memoryview:
    """Blocks that are cut anew are read by a thread, which is looked at here."""
    memory: Memory = running_process().host.memory
    for block in source.table.blocks:
        memory.check_sent(block)
    return gather_piece(source, pool, *arguments, **options)
