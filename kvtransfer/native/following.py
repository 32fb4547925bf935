"""Reads what the writers of one link over shared memory announce, and digests it while they go on, without the interpreter.

    socket  ->  WRITTEN, WRITTEN, WRITTEN ...  of one writer  ->  its pieces, each with the digest that its bytes have here

One call goes from announcement to announcement as long as they are of the same writer and well formed. It waits for the next
one for `PATIENCE_US`, about what it costs to be woken, and is over after `CALL_BYTES`. Whatever else is on the wire stays in the
inbox for whoever reads frames: what is wrong with a frame is said there.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import NamedTuple

from common.types import Ticket
from kvtransfer.digest import DIGEST_BYTES, binding_of
from kvtransfer.found import FoundPieces
from kvtransfer.frames import DESCRIPTOR_BYTES, MAX_PIECES, Frame, FrameKind
from kvtransfer.native.kernel import Followed, FollowedPool, InboxEntry, PieceKernel, WriterEntry
from kvtransfer.part import mask_of

CALL_BYTES = 16 * 1024 * 1024  # a millisecond: then others get their turn
PATIENCE_US = 100
_MOST_PIECES = 2 * MAX_PIECES  # of one call
_FIRST_ROOM = 8  # writers
_NOTHING = FoundPieces(b"", None)


class PoolPlaces(NamedTuple):
    """Where the pieces of a pool in host memory lie."""

    address: int
    block_bytes: int
    layer_bytes: int
    num_layers: int


class Caught(NamedTuple):
    """What one call brought."""

    nonce: bytes  # whose pieces they are
    pieces: FoundPieces
    begin: int  # of what is left in the inbox
    end: int
    drained: bool  # there was nothing more on the socket


class Following:
    """Of one link, whose frames are read into `inbox`."""

    def __init__(self, kernel: PieceKernel, socket: int, places: PoolPlaces, inbox: memoryview) -> None:
        self._follow = kernel.follow
        self._layer_bytes = places.layer_bytes
        self._num_layers = places.num_layers
        self._pool = FollowedPool(*places, socket, CALL_BYTES, _MOST_PIECES, PATIENCE_US)
        self._inbox = InboxEntry(ctypes.addressof(ctypes.c_char.from_buffer(inbox)), inbox.nbytes, 0, 0)
        self._kept_inbox = inbox  # its memory is read by address
        self._nonces: list[bytes] = []  # of the writers that were let in, in the order of the entries
        self._blocks: list[array[int]] = []
        self._writers = (WriterEntry * _FIRST_ROOM)()
        self._table = bytearray(DESCRIPTOR_BYTES * _MOST_PIECES)
        self._digests = bytearray(DIGEST_BYTES * _MOST_PIECES)
        self._followed = Followed()
        self._pool_at, self._inbox_at, self._followed_at = map(ctypes.addressof, (self._pool, self._inbox, self._followed))
        self._results_at = tuple(ctypes.addressof(ctypes.c_char.from_buffer(room)) for room in (self._table, self._digests))

    def let_in(self, ticket: Ticket) -> None:
        """Its pieces are digested from now on."""
        blocks = array("I", ticket.blocks)
        number = len(self._nonces)
        if number == len(self._writers):
            more = (WriterEntry * (2 * number))()
            more[:number] = list(self._writers)
            self._writers = more
        entry = self._writers[number]
        entry.header[:] = Frame(FrameKind.WRITTEN, ticket.nonce).encode()
        entry.binding[:] = binding_of(ticket.nonce)
        entry.first_block = ticket.first_block
        entry.num_blocks = len(blocks)
        entry.blocks = blocks.buffer_info()[0]
        entry.left_bytes = mask_of(ticket.part, self._num_layers).bit_count() * self._layer_bytes * len(blocks)
        self._nonces.append(ticket.nonce)
        self._blocks.append(blocks)

    def forget(self, nonce: bytes) -> None:
        """The writer is gone. No effect if it was not let in."""
        if nonce in self._nonces:
            index, last = self._nonces.index(nonce), len(self._nonces) - 1
            self._writers[index] = self._writers[last]
            self._nonces[index], self._blocks[index] = self._nonces[last], self._blocks[last]
            del self._nonces[last], self._blocks[last]

    def follow(self, begin: int, end: int) -> Caught:
        """Of what the inbox has between these two, and of what comes behind it on the socket."""
        inbox, followed = self._inbox, self._followed
        inbox.begin, inbox.end = begin, end
        self._follow(
            self._pool_at,
            ctypes.addressof(self._writers),
            len(self._nonces),
            self._inbox_at,
            *self._results_at,
            self._followed_at,
        )
        if not followed.num_pieces:
            return Caught(b"", _NOTHING, inbox.begin, inbox.end, bool(followed.drained))
        return Caught(self._nonces[followed.writer], self._found(), inbox.begin, inbox.end, bool(followed.drained))

    def _found(self) -> FoundPieces:
        number, unlike = self._followed.num_pieces, self._followed.num_unlike
        digests = bytes(self._digests[: number * DIGEST_BYTES]) if unlike else None
        return FoundPieces(bytes(self._table[: number * DESCRIPTOR_BYTES]), digests)
