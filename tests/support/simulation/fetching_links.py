"""Both ends of a simulated link whose receiver fetches, as over shared memory.

    LendingSenderLink      READY: where pieces lie; STATED: their digests; what does not lie in its memory it sends
    FetchingReceiverLink   copies what is ready out of the sender's memory, in halves, and asks before each; TAKEN; reports

A sender of this kind never writes into the other's memory. Its own is read by the other process, whatever it does meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvtransfer.transports.base import Piece, PieceName, Written
from support.simulation.network import Point
from support.simulation.receiver_links import WireReceiverLink
from support.simulation.sender_links import COPY_S, MAX_GROUP, WireSenderLink

FETCH_S = 300e-6  # at most, for all that was ready together
MAX_READY = 2 * MAX_GROUP


class Ready(NamedTuple):
    """Where a piece lies in its sender's memory."""

    name: PieceName
    offset_bytes: int
    size_bytes: int


class LendingSenderLink(WireSenderLink):
    """Its sources are read by the other end: until it says that it has taken them, or for as long as it likes once their transfer
    was given up. What is read too late does not have its digest."""

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        digests = await super().write(nonce, pieces, stop)
        news = self._news.get(nonce)
        if news is not None and self._holds(pieces):
            news.lent(len(digests))
        return digests

    def _holds(self, pieces: Sequence[Piece]) -> bool:
        return all([self._memory.holds(piece.source) for piece in pieces])

    async def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        if not self._holds(pieces):
            return await super()._write(nonce, pieces, stop)
        digests: list[bytes] = []
        while len(digests) < len(pieces) and not stop():
            together = pieces[len(digests) : len(digests) + self._network.random.randint(1, MAX_READY)]
            self._check()
            ready = [Ready(piece.name, self._memory.offset_of(piece.source), piece.source.nbytes) for piece in together]
            self._say(self._remote.ready, *self._in_disorder("ready", (nonce, ready)))
            self._network.point(Point.READY_SENT, self.loop)
            stated = await self._state(nonce, together, stop)
            digests += stated
            if len(stated) < len(together):
                break  # what is ready and was not stated must not be followed by more
        return digests

    async def _state(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        network, random = self._network, self._network.random
        digests: list[bytes] = []
        while len(digests) < len(pieces):
            group = pieces[len(digests) : len(digests) + random.randint(1, MAX_GROUP)]
            await asyncio.sleep(COPY_S * random.random())
            if stop():
                break
            own = [self._digest(piece, nonce) for piece in group]
            self._check()
            network.point(Point.PIECES_WRITTEN, self.loop)
            statements = [(piece.name, digest) for piece, digest in zip(group, own, strict=True)]
            self._say(self._remote.stated, *self._in_disorder("stated", (nonce, statements)))
            digests += own
        return digests

    def taken(self, nonce: bytes, num_pieces: int) -> None:
        news = self._news.get(nonce)
        if news is not None:
            news.renewed()
            news.taken(num_pieces)

    # -- for the other end --------------------------------------------------------------------------------------------

    def lying_at(self, piece: Ready) -> memoryview:
        """Read by the other process, whatever this one does meanwhile, and when it is dead too."""
        return self._memory.view[piece.offset_bytes : piece.offset_bytes + piece.size_bytes]

    def check_fetched(self, nonce: bytes, piece: Ready) -> None:
        """Before bytes are read: after a transfer has finished none may be; while it goes on they must be the right ones; once it
        was given up they may be any."""
        witness, source = self._network.witness, self.lying_at(piece)
        if (nonce, self._remote.loop.name) in witness.sealed:
            block = self._memory.block_at(source)
            self._network.complain(f"{self._memory.name}: block {block} is fetched by a transfer that has finished")
        elif self.loop.alive and self.lost is None and self.may_write(nonce):
            self._source(Piece(piece.name, 0, source), nonce)
        elif self._differs(nonce, piece.name, source):
            witness.stale_fetches += 1


class FetchingReceiverLink(WireReceiverLink):
    """While it fetches, frames wait: they are looked at in order."""

    _fetched_for = b""  # the writer of these
    _fetching: asyncio.TimerHandle | None = None
    _over = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._fetched: deque[tuple[PieceName, memoryview | None]] = deque()  # and not stated yet; with its bytes if dropped

    def receive(self, handle: Callable[..., None], *arguments: Any) -> None:
        self._waiting.append((handle, arguments))
        self._look()

    def _look(self) -> None:
        while self._waiting and self._fetching is None and not self._over:
            handle, arguments = self._waiting.popleft()
            handle(*arguments)

    def ready(self, nonce: bytes, pieces: Sequence[Ready]) -> None:
        """The first halves are fetched at once, the others sooner or later."""
        self._fetched.clear()
        self._fetched_for = nonce
        wanted = [piece for piece in pieces if self._fetch(nonce, piece, 0, piece.size_bytes // 2)]
        self.network.point(Point.HALF_FETCHED, self.loop)
        random = self.network.random
        if random.random() < 0.5:
            self._fetch_rest(nonce, pieces, wanted)
        else:
            self._fetching = self.loop.call_later(FETCH_S * random.random(), self._fetch_later, nonce, pieces, wanted)

    def _fetch_later(self, nonce: bytes, pieces: Sequence[Ready], wanted: Sequence[Ready]) -> None:
        self._fetching = None
        self._fetch_rest(nonce, pieces, wanted)
        self._look()

    def _fetch_rest(self, nonce: bytes, pieces: Sequence[Ready], wanted: Sequence[Ready]) -> None:
        assert self.sender is not None
        for piece in pieces:
            here = piece in wanted and self._fetch(nonce, piece, piece.size_bytes // 2, piece.size_bytes)
            self._fetched.append((piece.name, None if here else self.sender.lying_at(piece)))
        self._wire.send(self.loop, self.sender.taken, nonce, len(pieces))

    def _fetch(self, nonce: bytes, piece: Ready, start: int, end: int) -> bool:
        """Copies some bytes, unless nobody wants them any more."""
        place = self._landing.destination(self, nonce, piece.name)
        if place is None:
            return False
        assert self.sender is not None
        network = self.network
        self._check_write(place, nonce)
        self.sender.check_fetched(nonce, piece)
        if network.chance(network.disorder.skipped):
            network.time.tell("network", f"a piece of block {piece.name.logical_block} is not fetched")
            return True
        place[start:end] = self.sender.lying_at(piece)[start:end]
        if end == piece.size_bytes and network.chance(network.disorder.flipped):
            network.time.tell("network", f"a byte of block {piece.name.logical_block} is flipped")
            place[network.random.randrange(end)] ^= 0x10
        return True

    def stated(self, nonce: bytes, statements: Sequence[tuple[PieceName, bytes]]) -> None:
        """Digests of what was ready, in order; who states others breaks the rules, and is hung up on."""
        fetched = [self._fetched.popleft() for _ in statements if self._fetched]
        if self._fetched_for != nonce or [name for name, _ in fetched] != [name for name, _ in statements]:
            self._tell("others are stated than were ready by", nonce)
            self.end()
            return
        written = [Written(name, digest, dropped) for (name, digest), (_, dropped) in zip(statements, fetched, strict=True)]
        self._landing.pieces_written(self, nonce, written)

    def _ended(self) -> None:
        if self._over:
            return
        self._over = True
        self._waiting.clear()
        if self._fetching is not None:
            self._fetching.cancel()
        super()._ended()
