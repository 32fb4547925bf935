"""Data links between simulated workers, behind the real `kvtransfer.transports.base`: two flavours of them.

| kind | a piece                                              | after the decode side has given up                   |
|------|------------------------------------------------------|------------------------------------------------------|
| shm  | the sender writes it into the pool itself, in halves | may still arrive, until CLOSE or the end of the link |
| tcp  | travels in parts; the receiver asks where they go    | goes nowhere, at once                                |

The sender's end has one lane, as the real one: OPEN, batches, PULSE and CLOSE one after the other, and a job runs on when whoever
waited for it was cancelled. Proofs of identity and their judgement are the real ones. A link is broken by the network (tcp) or by
its sender (shm); the end of an shm link arrives only after the sender has stopped writing.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common.errors import HandoffError, TransferBroken
from common.types import KVLayout
from kvtransfer.digest import piece_digest
from kvtransfer.gather import gather_piece
from kvtransfer.region import BlockRegion
from kvtransfer.reshard import Side
from kvtransfer.transports import authentication
from kvtransfer.transports.authentication import CHALLENGE_BYTES, LINK_VERSION, Hello, Verdict, prefill_proof, refusal
from kvtransfer.transports.base import (
    Landing,
    LinkCredentials,
    Listener,
    PeerName,
    Piece,
    PieceName,
    Refusal,
    SenderLink,
    Transport,
    WriterNews,
    Written,
)
from support.simulation.network import Network, Point, Wire
from support.simulation.oracle import KV
from support.simulation.pool import Memory
from support.simulation.virtual_loop import ProcessLoop

AUTHENTICATION_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 10.0
COPY_S = 300e-6  # at most, for a group of pieces
MAX_GROUP = 3
MAX_ON_THE_WAY = 4  # frames of a tcp link that the receiver has not read: then the sender waits
GONE = "the link to the decode worker went away"


def _process() -> ProcessLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ProcessLoop)
    return loop


class SimTransport:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def can_serve(self, region: BlockRegion) -> bool:
        return True

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        loop = _process()
        listener = SimListener(self.kind, loop, landing, credentials)
        loop.host.network.data_listeners[listener.address] = listener
        return listener

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
        loop = _process()
        network: Network = loop.host.network
        challenge = bytes(CHALLENGE_BYTES)
        hello = Hello(LINK_VERSION, credentials.name, peer, credentials.layout_fingerprint, bytes(CHALLENGE_BYTES))
        proof = prefill_proof(credentials.secret, hello.encode(), challenge)
        listener = network.data_listeners.get(address)
        if listener is None:
            await asyncio.sleep(network.delay_s())
            raise TransferBroken("no decode worker listens at the offered address")
        wire = Wire(network, loop, listener.loop, pinged=False, local=self.kind == "shm")
        verdict: asyncio.Future[Verdict | SimReceiverLink] = loop.create_future()

        def answered(answer: Verdict | SimReceiverLink) -> None:
            if not verdict.done():
                verdict.set_result(answer)

        def ended() -> None:
            if not verdict.done():
                verdict.set_exception(TransferBroken(GONE))

        wire.on_end_a = ended
        wire.send(loop, lambda: wire.send(listener.loop, answered, listener.judge(hello, challenge, proof, wire)))
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                answer = await verdict
        except TimeoutError as error:
            wire.close(loop)
            raise TransferBroken("the decode worker did not answer in time") from error
        except BaseException:
            wire.close(loop)
            raise
        if isinstance(answer, Verdict):
            wire.close(loop)
            raise refusal(answer)
        return SimSenderLink(self.kind, network, loop, wire, answer)


class SimListener:
    def __init__(self, kind: str, loop: ProcessLoop, landing: Landing, credentials: LinkCredentials) -> None:
        self.loop = loop
        self.address = f"{kind}://{loop.host.data_address}"
        self._kind = kind
        self._landing = landing
        self._credentials = credentials
        self._links: dict[SimReceiverLink, None] = {}

    def judge(self, hello: Hello, challenge: bytes, proof: bytes, wire: Wire) -> Verdict | SimReceiverLink:
        verdict = Verdict.NOT_AUTHENTIC
        if proof == prefill_proof(self._credentials.secret, hello.encode(), challenge):
            verdict = authentication.judge(hello, self._credentials, self._landing.admit)
        if verdict is not Verdict.WELCOME:
            self._landing.link_refused(refusal(verdict))
            return verdict
        link = SimReceiverLink(self._kind, hello.own, self.loop, wire, self._landing, self._forget)
        self._links[link] = None
        return link

    def _forget(self, link: SimReceiverLink) -> None:
        self._links.pop(link, None)

    async def close(self) -> None:
        self.loop.host.network.data_listeners.pop(self.address, None)
        for link in tuple(self._links):
            link.end()


class SimReceiverLink:
    def __init__(
        self,
        kind: str,
        peer: PeerName,
        loop: ProcessLoop,
        wire: Wire,
        landing: Landing,
        forget: Callable[[SimReceiverLink], None],
    ) -> None:
        self.kind = kind
        self.peer = peer
        self.fences_locally = kind == "tcp"
        self.loop = loop
        self.network: Network = loop.host.network
        self.memory: Memory = loop.host.memory
        self.sender: SimSenderLink | None = None
        self._wire = wire
        self._landing = landing
        self._forget = forget
        self._dropping = False
        self._condemned = False  # hung up on: its frames are not looked at any more
        self._scratch = bytearray()
        wire.on_end_b = self._ended

    # -- ReceiverLink -------------------------------------------------------------------------------------------------

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        self._say(nonce, size_bytes)

    def pulse(self, nonce: bytes) -> None:
        self._say(nonce, 0)

    def hang_up(self) -> None:
        """A sender that writes by itself is only told; that it has stopped, the end of the link says."""
        if self.fences_locally:
            self.end()
        elif not self._condemned:
            self._condemned = True
            self.network.time.tell(self.loop.name, f"{self.kind} link from {self.peer.worker_id} is hung up on")
            if self.sender is not None:
                self._wire.send(self.loop, self.sender.lose)

    def _say(self, nonce: bytes, credit_bytes: int) -> None:
        if self.sender is not None and not self._condemned:
            self._wire.send(self.loop, self.sender.news_for, nonce, credit_bytes)

    # -- frames, as they arrive ---------------------------------------------------------------------------------------

    def opened(self, sender: SimSenderLink, nonce: bytes, news: WriterNews) -> None:
        if self._condemned:
            return
        self.sender = sender
        answer = self._landing.writer_opened(self, nonce)
        granted = not isinstance(answer, Refusal)
        self._tell("GRANT" if granted else f"REFUSE {answer!r}", nonce)
        if granted:
            self.network.point(Point.GRANTED, self.loop)
            self._check_grant(sender, nonce, news)
            if not self.fences_locally and sender.may_write(nonce):
                issued = self.network.witness.tickets.get(nonce)
                self.memory.writer_enters(nonce, issued.ticket.blocks if issued is not None else ())
        self._wire.send(self.loop, sender.answered, nonce, answer)

    def written(self, nonce: bytes, pieces: list[Written]) -> None:
        if not self._condemned:
            self._landing.pieces_written(self, nonce, pieces)

    def part(self, nonce: bytes, name: PieceName, digest: bytes, size_bytes: int, start: int, data: bytes) -> None:
        """Some of a piece's bytes, of a tcp link."""
        if start == 0:
            self._dropping = False
            self._scratch = bytearray(size_bytes)
        place = None if self._dropping else self._landing.destination(self, nonce, name)
        if place is None:
            self._dropping = True
            self._scratch[start : start + len(data)] = data
        else:
            issued = self.network.witness.tickets.get(nonce)
            self.memory.check_write_from_outside(
                self.memory.block_at(place), nonce, None if issued is None else issued.generations
            )
            place[start : start + len(data)] = data
        if start + len(data) == size_bytes:
            dropped = memoryview(self._scratch) if self._dropping else None
            self._landing.pieces_written(self, nonce, [Written(name, digest, dropped)])
            if self.sender is not None:
                self._wire.send(self.loop, self.sender.taken)
        else:
            self._landing.writer_alive(self, nonce)

    def alive(self, nonce: bytes) -> None:
        if not self._condemned:
            self._landing.writer_alive(self, nonce)

    def closed(self, nonce: bytes) -> None:
        if self._condemned:
            return
        self._tell("CLOSE", nonce)
        self._landing.writer_closed(self, nonce)

    def end(self) -> None:
        self._wire.close(self.loop)
        self._ended()

    def _ended(self) -> None:
        self.network.time.tell(self.loop.name, f"{self.kind} link from {self.peer.worker_id}#{self.peer.incarnation} is lost")
        self._landing.link_lost(self)
        self._forget(self)

    def _check_grant(self, sender: SimSenderLink, nonce: bytes, news: WriterNews) -> None:
        """Nobody but the two incarnations of whom a ticket speaks may use it."""
        ticket = getattr(news, "ticket", None)
        if ticket is None:
            return
        ours, theirs = self.loop.host.ref, sender.loop.host.ref
        if (ticket.decode_worker_id, ticket.decode_incarnation) != (ours.worker_id, ours.incarnation):
            self.network.complain(f"{self.loop.name} lets a writer in whose ticket is of incarnation {ticket.decode_incarnation}")
        if (ticket.prefill_worker_id, ticket.prefill_incarnation) != (theirs.worker_id, theirs.incarnation):
            self.network.complain(f"{self.loop.name} lets in another writer than the one of the ticket")

    def _tell(self, text: str, nonce: bytes) -> None:
        if self.network.time.trace is not None:
            self.network.time.tell(self.loop.name, f"{text} {nonce.hex()[:6]}")


class SimSenderLink:
    def __init__(self, kind: str, network: Network, loop: ProcessLoop, wire: Wire, remote: SimReceiverLink) -> None:
        self.kind = kind
        self.loop = loop
        self.lost: HandoffError | None = None
        self._network = network
        self._wire = wire
        self._remote = remote
        self._memory: Memory = loop.host.memory  # the sources
        self._jobs: deque[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = deque()
        self._lane: asyncio.Task[None] | None = None
        self._asking: dict[bytes, tuple[asyncio.Future[None], WriterNews]] = {}
        self._news: dict[bytes, WriterNews] = {}
        self._pulsing: dict[bytes, None] = {}
        self._opened: dict[bytes, None] = {}  # writers that may be let in over there
        self._on_the_way = 0
        self._room: asyncio.Future[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._repeat: tuple[bytes, list[Written]] | None = None  # to be announced again, in place of the next ones
        self._repeat_frame: tuple[bytes, PieceName, bytes, bytes] | None = None
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
            self._wire.send(self.loop, self._remote.opened, self, nonce, news)

        try:
            await self._in_lane(send)
            await granted
        finally:
            self._asking.pop(nonce, None)
            if granted.done() and not granted.cancelled():
                granted.exception()

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        work = self._write_by_itself if self.kind == "shm" else self._write_over_wire
        digests: list[bytes] = await self._in_lane(lambda: work(nonce, pieces, lambda: stop() or self.lost is not None))
        return digests

    def pulse(self, nonce: bytes) -> None:
        if self.lost is not None or nonce in self._pulsing:
            return
        self._pulsing[nonce] = None

        async def send() -> None:
            self._check()
            self._wire.send(self.loop, self._remote.alive, nonce)

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
            self._wire.send(self.loop, self._remote.closed, nonce)
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
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
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

    # -- writing ------------------------------------------------------------------------------------------------------

    async def _write_by_itself(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
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
            self._announce(
                nonce, [Written(piece.name, digest, None) for piece, digest in zip(group, digests[first:], strict=True)]
            )
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

    def _announce(self, nonce: bytes, written: list[Written]) -> None:
        if self._repeat is not None:
            repeated, self._repeat = self._repeat, None
            self._network.time.tell("network", "an announcement is repeated instead of the next one")
            self._wire.send(self.loop, self._remote.written, *repeated)
            return
        if self._network.chance(self._network.disorder.repeated):
            self._repeat = nonce, written
        self._wire.send(self.loop, self._remote.written, nonce, written)

    async def _write_over_wire(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
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
            frame = (nonce, piece.name, digest, bytes(data))
            if self._repeat_frame is not None:
                frame, self._repeat_frame = self._repeat_frame, None
                network.time.tell("network", "a frame is repeated instead of the next one")
            elif network.chance(disorder.repeated):
                self._repeat_frame = frame
            self._send_frame(*frame, cut=random.randrange(1, len(frame[3])))
            self._on_the_way += 1
            if self._on_the_way >= MAX_ON_THE_WAY:
                await self._wait_for_room()
        return digests

    def _send_frame(self, nonce: bytes, name: PieceName, digest: bytes, data: bytes, *, cut: int) -> None:
        for start, part in ((0, data[:cut]), (cut, data[cut:])):
            self._wire.send(self.loop, self._remote.part, nonce, name, digest, len(data), start, part)

    async def _wait_for_room(self) -> None:
        self._room = self.loop.create_future()
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S):
                await self._room
        except TimeoutError as error:
            raise TransferBroken("the peer took nothing for too long") from error
        self._check()

    def _digest(self, piece: Piece, nonce: bytes) -> bytes:
        return piece_digest(self._source(piece, nonce), nonce, *piece.name)

    def _source(self, piece: Piece, nonce: bytes) -> memoryview:
        """What is read, after a look at whether it may be, and whether it is what the ticket's prompt has there. (Of what was
        made of blocks that are cut otherwise, `watched_gather` has looked at the sources.)"""
        if self._memory.holds(piece.source):
            self._memory.check_sent(self._memory.block_at(piece.source))
        issued = self._network.witness.tickets.get(nonce)
        if issued is not None:
            cut = self._remote.loop.host.cut
            block = cut.block_of(_expected(issued.prompt), piece.name.logical_block)
            layer_bytes = piece.source.nbytes // piece.name.num_layers
            start = piece.name.first_layer * layer_bytes
            if len(block) == cut.block_bytes and block[start : start + piece.source.nbytes] != piece.source:
                self._network.complain(f"{self.loop.name} sends logical block {piece.name.logical_block} with other bytes in it")
        return piece.source

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

    def taken(self) -> None:
        self._on_the_way -= 1
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _tell(self, text: str, nonce: bytes) -> None:
        if self._network.time.trace is not None:
            self._network.time.tell(self.loop.name, f"-> {text} {nonce.hex()[:6]} to {self._remote.loop.name}")


@functools.lru_cache(maxsize=64)
def _expected(prompt: tuple[int, ...]) -> KV:
    return KV(prompt)


def watched_gather(source: Side, pool: memoryview, *arguments: Any, **options: Any) -> memoryview:
    """Blocks that are cut anew are read by a thread, which is looked at here."""
    memory: Memory = _process().host.memory
    for block in source.table.blocks:
        memory.check_sent(block)
    return gather_piece(source, pool, *arguments, **options)


def _shm() -> Transport:
    return SimTransport("shm")


def _tcp() -> Transport:
    return SimTransport("tcp")


SIM_TRANSPORTS: dict[str, Callable[[], Transport]] = {"shm": _shm, "tcp": _tcp}
