"""The decode side's ends of simulated data links: what `data_links` says of the three flavours, as far as it happens there.

SimReceiverLink           OPEN, PULSE, CLOSE, the end; credit and pulses back
UnfencedReceiverLink      hears of pieces that its sender has put into the pool
WireReceiverLink          puts parts of pieces where the landing wants them
FetchingReceiverLink      besides, copies what the sender says is ready out of the sender's memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvtransfer.transports.base import Landing, PeerName, PieceName, Refusal, WriterNews, Written
from support.simulation.network import Network, Point, Wire
from support.simulation.pool import Memory
from support.simulation.virtual_loop import ProcessLoop

if TYPE_CHECKING:
    from support.simulation.sender_links import SimSenderLink


class SimReceiverLink:
    fences_locally = True

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
        self.loop = loop
        self.network: Network = loop.host.network
        self.memory: Memory = loop.host.memory
        self.sender: SimSenderLink | None = None
        self._wire = wire
        self._landing = landing
        self._forget = forget
        wire.on_end_b = lambda: self.receive(self._ended)

    # -- ReceiverLink -------------------------------------------------------------------------------------------------

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        self._say_news(nonce, size_bytes)

    def pulse(self, nonce: bytes) -> None:
        self._say_news(nonce, 0)

    def hang_up(self) -> None:
        self.end()

    def _say_news(self, nonce: bytes, credit_bytes: int) -> None:
        if self.sender is not None:
            self._wire.send(self.loop, self.sender.news_for, nonce, credit_bytes)

    # -- frames, as they arrive ---------------------------------------------------------------------------------------

    def receive(self, handle: Callable[..., None], *arguments: Any) -> None:
        """All frames, and the end of the link, come through here."""
        handle(*arguments)

    def opened(self, sender: SimSenderLink, nonce: bytes, news: WriterNews) -> None:
        self.sender = sender
        answer = self._landing.writer_opened(self, nonce)
        granted = not isinstance(answer, Refusal)
        self._tell("GRANT" if granted else f"REFUSE {answer!r}", nonce)
        if granted:
            self.network.point(Point.GRANTED, self.loop)
            self._check_grant(sender, nonce, news)
            self._granted(sender, nonce)
        self._wire.send(self.loop, sender.answered, nonce, answer)

    def _granted(self, sender: SimSenderLink, nonce: bytes) -> None:
        """It may write from now on."""

    def alive(self, nonce: bytes) -> None:
        self._landing.writer_alive(self, nonce)

    def closed(self, nonce: bytes) -> None:
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

    def _check_write(self, place: memoryview, nonce: bytes) -> None:
        issued = self.network.witness.tickets.get(nonce)
        self.memory.check_write_from_outside(self.memory.block_at(place), nonce, None if issued is None else issued.generations)

    def _tell(self, text: str, nonce: bytes) -> None:
        if self.network.time.trace is not None:
            self.network.time.tell(self.loop.name, f"{text} {nonce.hex()[:6]}")


class UnfencedReceiverLink(SimReceiverLink):
    fences_locally = False
    _condemned = False  # hung up on: its frames are not looked at any more

    def hang_up(self) -> None:
        """The sender is only told; that it has stopped, the end of the link says."""
        if not self._condemned:
            self._condemned = True
            self.network.time.tell(self.loop.name, f"{self.kind} link from {self.peer.worker_id} is hung up on")
            if self.sender is not None:
                self._wire.send(self.loop, self.sender.lose)

    def receive(self, handle: Callable[..., None], *arguments: Any) -> None:
        if not self._condemned or handle == self._ended:
            handle(*arguments)

    def written(self, nonce: bytes, pieces: list[Written]) -> None:
        self._landing.pieces_written(self, nonce, pieces)

    def _granted(self, sender: SimSenderLink, nonce: bytes) -> None:
        if sender.may_write(nonce):
            issued = self.network.witness.tickets.get(nonce)
            self.memory.writer_enters(nonce, issued.ticket.blocks if issued is not None else ())

    def _say_news(self, nonce: bytes, credit_bytes: int) -> None:
        if not self._condemned:
            super()._say_news(nonce, credit_bytes)


class WireReceiverLink(SimReceiverLink):
    _dropping = False
    _scratch = bytearray()

    def part(self, nonce: bytes, name: PieceName, digest: bytes, size_bytes: int, start: int, data: bytes) -> None:
        """Some of a piece's bytes."""
        if start == 0:
            self._dropping = False
            self._scratch = bytearray(size_bytes)
        place = None if self._dropping else self._landing.destination(self, nonce, name)
        if place is None:
            self._dropping = True
            self._scratch[start : start + len(data)] = data
        else:
            self._check_write(place, nonce)
            place[start : start + len(data)] = data
        if start + len(data) == size_bytes:
            dropped = memoryview(self._scratch) if self._dropping else None
            self._landing.pieces_written(self, nonce, [Written(name, digest, dropped)])
            if self.sender is not None:
                self._wire.send(self.loop, self.sender.frame_read)
        else:
            self._landing.writer_alive(self, nonce)
