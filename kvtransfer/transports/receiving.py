"""The decode worker's end of a link over a socket, shared by all that have one: reads frames and reports.

    frames: OPEN ... BLOCKS|WRITTEN ... CLOSE ... -> end of the link -> landing.link_lost

A link reads on the event loop: header, table of pieces, and then straight into the places that the landing names, several pieces
with one system call. It asks anew before each read: once the landing says "nowhere", what is still on the wire goes to scratch.
Where no payload comes over the socket, all frames that are there are read at once; else a header and as long a table as the last
one was, and what turns out to be payload is copied to its place. At most `READS_PER_WAKEUP` reads happen, and pieces of about
`BYTES_PER_WAKEUP` are looked at, before others get their turn. A peer that breaks the rules is hung up on. If it writes into
the pool by itself (cuda_ipc), it is only told so, and the link counts as lost when it has hung up in turn: before that it may
still be writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from collections.abc import Callable

from common.errors import TransferBroken
from common.types import KVLayout
from kvtransfer.frames import HEADER_BYTES, MAX_TABLE_BYTES, Frame, FrameKind, decode_header, decode_table
from kvtransfer.layout import layer_bytes as pool_layer_bytes
from kvtransfer.transports.base import Landing, PeerName, Refusal, Written

READS_PER_WAKEUP = 4
BYTES_PER_WAKEUP = 4 * 1024 * 1024  # announced by the frames that are looked at in one turn
MAX_PLACES_PER_READ = 64
MIN_READ_BYTES, MAX_READ_BYTES = 64 * 1024, 1024 * 1024  # places are asked for in proportion to what a read brought last
WORTH_WAKING_BYTES = 512 * 1024


class Part(enum.Enum):
    """What comes next on the wire."""

    HEADER = "header"
    TABLE = "table"
    PAYLOAD = "payload"
    REMAINS = "remains"  # of a peer that broke the rules: read for its end only


_FRAMED = (Part.HEADER, Part.TABLE)


class StreamReceiverLink:
    def __init__(
        self,
        sock: socket.socket,
        peer: PeerName,
        landing: Landing,
        layout: KVLayout,
        *,
        kind: str,
        data_kind: FrameKind,  # BLOCKS: payload comes over the socket; WRITTEN: the peer writes into the pool
        on_end: Callable[[StreamReceiverLink], None],
        layer_bytes: int | None = None,  # on the wire; None = as in the pool
    ) -> None:
        self.kind = kind
        self.peer = peer
        self.fences_locally = data_kind is FrameKind.BLOCKS
        self._sock = sock
        self._landing = landing
        self._layout = layout
        self._layer_bytes = layer_bytes or pool_layer_bytes(layout)
        self._data_kinds = frozenset({data_kind})
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._part = Part.HEADER
        self._inbox = memoryview(bytearray(HEADER_BYTES + MAX_TABLE_BYTES))
        self._begin = self._end = 0  # of what was read there and not looked at: a part of a header or a table, or more
        self._reads_ahead_bytes = len(self._inbox) if data_kind is FrameKind.WRITTEN else HEADER_BYTES
        self._allowance_bytes = 0  # that may still be announced before others get their turn
        self._frame = Frame(FrameKind.CLOSE, b"")  # whose table or payload is being read
        self._pieces: list[Written] = []  # of that payload
        self._next = 0  # the piece that is being read
        self._into_piece = 0  # so many of its bytes were read
        self._scratch: memoryview | None = None
        self._dropping = False  # a part of that piece is in scratch
        self._payload_left_bytes = 0
        self._read_bytes = MIN_READ_BYTES
        self._enough_bytes = 1  # for the kernel to wake us
        self._ended = False
        self._loop.add_reader(sock, self._readable)

    def end(self) -> None:
        """Hangs up and reports the link as lost. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._landing.link_lost(self)
        self._on_end(self)

    # -- ReceiverLink -------------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        if not self._ended:
            self._condemn()

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        self._say(Frame(FrameKind.CREDIT, nonce, amount=size_bytes))

    def pulse(self, nonce: bytes) -> None:
        self._say(Frame(FrameKind.PULSE, nonce))

    def _say(self, frame: Frame) -> None:
        if self._ended or self._part is Part.REMAINS:
            return
        data = frame.encode()
        try:
            sent = self._sock.send(data)
        except OSError:
            sent = 0
        if sent != len(data):  # it does not even read what is said to it
            self._condemn()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._ended:
            return
        self._begin_turn()
        self._handle_frames()  # that were left to this turn
        for _ in range(READS_PER_WAKEUP):
            if self._ended or self._has_more or not self._read_once():
                break
        if self._ended:
            return
        if self._has_more:
            self._loop.call_soon(self._readable)
        else:
            self._wait_for_enough()

    def _begin_turn(self) -> None:
        self._allowance_bytes = BYTES_PER_WAKEUP

    def _note_looked_at(self, size_bytes: int) -> None:
        self._allowance_bytes -= size_bytes

    @property
    def _turn_is_over(self) -> bool:
        return self._allowance_bytes <= 0

    def _read_once(self) -> bool:
        """One receive; False when the socket has no more for now, or for ever."""
        try:
            if self._part is Part.PAYLOAD:
                received, whole = self._sock.recvmsg_into(self._places())[0], False
            else:
                target = self._target()
                received = self._sock.recv_into(target)
                whole = received < len(target)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            received = 0
        if received == 0:
            self.end()
            return False
        if self._part is Part.PAYLOAD:
            self._read_bytes = min(max(2 * received, MIN_READ_BYTES), MAX_READ_BYTES)
            self._payload_received(received)
        elif self._part is not Part.REMAINS:
            self._end += received
            self._handle_frames()
        return not whole

    def _wait_for_enough(self) -> None:
        """In the middle of a payload it is not worth while to wake up for a single packet; but what is left must wake us."""
        enough_bytes = 1
        if self._part is Part.PAYLOAD:
            enough_bytes = min(self._payload_left_bytes, WORTH_WAKING_BYTES)
        if enough_bytes != self._enough_bytes:
            self._enough_bytes = enough_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough_bytes)

    def _target(self) -> memoryview:
        """For the rest of a header or a table, and for what may come behind it."""
        if self._part is Part.REMAINS:
            return self._inbox
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin + self._part_bytes > len(self._inbox):
            left = bytes(self._inbox[self._begin : self._end])
            self._inbox[: len(left)] = left
            self._begin, self._end = 0, len(left)
        return self._inbox[self._end : self._begin + max(self._part_bytes, self._reads_ahead_bytes)]

    @property
    def _part_bytes(self) -> int:
        return HEADER_BYTES if self._part is Part.HEADER else self._frame.table_bytes

    @property
    def _has_more(self) -> bool:
        """A whole header or table is there and was not looked at."""
        return self._part in _FRAMED and self._end - self._begin >= self._part_bytes

    def _handle_frames(self) -> None:
        while not self._ended and self._has_more and not self._turn_is_over:
            self._handle_part()

    def _handle_part(self) -> None:
        """A header or a table, and what was read behind it of a payload."""
        part = self._inbox[self._begin : self._begin + self._part_bytes]
        self._begin += len(part)
        try:
            if self._part is Part.HEADER:
                self._header_received(decode_header(part, block_bytes=self._layout.block_bytes))
            else:
                self._part = Part.HEADER
                self._tabled(part)
            while self._part is Part.PAYLOAD and self._begin < self._end:
                self._take_payload()
        except TransferBroken:
            self._condemn()

    def _header_received(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.OPEN:
                answer = self._landing.writer_opened(self, frame.nonce)
                kind = FrameKind.REFUSE if isinstance(answer, Refusal) else FrameKind.GRANT
                self._say(Frame(kind, frame.nonce, amount=answer))
            case FrameKind.CLOSE:
                self._landing.writer_closed(self, frame.nonce)
            case FrameKind.PULSE:
                self._landing.writer_alive(self, frame.nonce)
            case kind if kind in self._data_kinds:
                self._frame = frame
                self._part = Part.TABLE
            case _:
                raise TransferBroken(f"a {frame.kind.name} frame does not belong on a {self.kind} link")

    def _tabled(self, part: memoryview) -> None:
        """The table of the frame is here."""
        self._table_received(decode_table(self._frame, part, self._layout.num_layers, self._layer_bytes))

    def _table_received(self, pieces: list[Written]) -> None:
        if self._frame.kind is FrameKind.BLOCKS:
            self._part = Part.PAYLOAD
            self._pieces = pieces
            self._next = self._into_piece = 0
            self._payload_left_bytes = self._frame.amount
            self._dropping = False
            self._reads_ahead_bytes = HEADER_BYTES + self._frame.table_bytes
        else:
            self._note_looked_at(sum([name.num_layers for name, *_ in pieces]) * self._layer_bytes)
            self._landing.pieces_written(self, self._frame.nonce, pieces)

    # -- payload ------------------------------------------------------------------------------------------------------

    def _places(self) -> list[memoryview]:
        """Where the next bytes go: to the places of pieces in turn, as far as a read may bring; to scratch alone."""
        places: list[memoryview] = []
        ahead_bytes = -self._into_piece
        for name, *_ in self._pieces[self._next : self._next + MAX_PLACES_PER_READ]:
            place = None if self._dropping else self._landing.destination(self, self._frame.nonce, name)
            if place is None:
                if not places:
                    self._dropping = True
                    places.append(self._scratch_for(name.num_layers * self._layer_bytes))
                break
            places.append(place)
            ahead_bytes += place.nbytes
            if ahead_bytes >= self._read_bytes:
                break
        if self._into_piece:
            places[0] = places[0][self._into_piece :]
        return places

    def _scratch_for(self, size_bytes: int) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(self._layout.block_bytes))
        return self._scratch[:size_bytes]

    def _take_payload(self) -> None:
        """What was read behind a table."""
        place = self._places()[0]
        size_bytes = min(place.nbytes, self._end - self._begin)
        place[:size_bytes] = self._inbox[self._begin : self._begin + size_bytes]
        self._begin += size_bytes
        self._payload_received(size_bytes)

    def _payload_received(self, size_bytes: int) -> None:
        nonce = self._frame.nonce
        self._payload_left_bytes -= size_bytes
        self._into_piece += size_bytes
        written: list[Written] = []
        while self._next < len(self._pieces):
            piece = self._pieces[self._next]
            piece_bytes = piece.name.num_layers * self._layer_bytes
            if self._into_piece < piece_bytes:
                break
            self._into_piece -= piece_bytes
            self._next += 1
            written.append(piece._replace(dropped=self._scratch_for(piece_bytes)) if self._dropping else piece)
            self._dropping = False
        self._end_of_piece()
        if written:
            self._landing.pieces_written(self, nonce, written)
        else:
            self._landing.writer_alive(self, nonce)

    def _end_of_piece(self) -> None:
        if self._next == len(self._pieces):
            self._part = Part.HEADER
            self._pieces = []

    def _condemn(self) -> None:
        if self.fences_locally:
            self.end()
            return
        self._part = Part.REMAINS
        with contextlib.suppress(OSError):  # already gone: the next read says so
            self._sock.shutdown(socket.SHUT_WR)
