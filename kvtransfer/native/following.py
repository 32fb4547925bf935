"""Reads what the writers of one link over shared memory say, and does it, without the interpreter.

    socket  ->  READY: copied into our pool, digested, TAKEN  ->  WRITTEN: found to be what is stated?  ->  pieces, of one writer

One call goes from frame to frame as long as they are of the same writer and well formed, and name what was not fetched before.
It waits for the next one for `PATIENCE_US`, about what it costs to be woken, and is over after `CALL_BYTES`. Whatever else is on
the wire stays in the inbox for whoever reads frames: what is wrong with a frame is said there. A writer whose data was taken
there is not followed any more (`leave`): native code does not know which of its pieces were verified.

Each byte is read once: what is stored is what was digested, whatever the peer does to its memory meanwhile. Who may write what is
asked before each call (`keep`), and during one nobody can change it, for calls are made on the event loop. What was fetched and
not stated is kept for the next call; the next READY ends it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import NamedTuple

from common.types import Ticket
from kvtransfer.digest import DIGEST_BYTES, binding_of
from kvtransfer.found import FoundPieces
from kvtransfer.frames import DESCRIPTOR_BYTES, MAX_PIECES, Frame, FrameKind
from kvtransfer.native.kernel import Fetched, Followed, FollowedPool, InboxEntry, PieceKernel, WriterEntry
from kvtransfer.part import mask_of

CALL_BYTES = 16 * 1024 * 1024  # a millisecond: then others get their turn
PATIENCE_US = 100
_MOST_PIECES = 2 * MAX_PIECES  # of one call
_FIRST_ROOM = 8  # writers
_NOTHING = FoundPieces(b"", None)


class PoolPlaces(NamedTuple):
    """Where the pieces of a pool in host memory go, and the peer's pool that they lie in."""

    address: int
    block_bytes: int
    layer_bytes: int
    source_address: int
    source_bytes: int
    num_layers: int


class Caught(NamedTuple):
    """What one call brought."""

    nonce: bytes  # whose pieces they are
    pieces: FoundPieces  # fetched and stated
    num_untold: int  # fetched pieces that the writer was not told of
    begin: int  # of what is left in the inbox
    end: int
    drained: bool  # there was nothing more on the socket
    enough: bool  # there was, and is for another call


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
        self._here: list[bytearray] = []  # of each layer of their blocks, whether it was fetched or is not theirs
        self._writers = (WriterEntry * _FIRST_ROOM)()
        self._table = bytearray(DESCRIPTOR_BYTES * _MOST_PIECES)
        self._digests = bytearray(DIGEST_BYTES * _MOST_PIECES)
        self._fetched, self._followed = Fetched(), Followed()
        self._pool_at, self._inbox_at, self._fetched_at, self._followed_at = map(
            ctypes.addressof, (self._pool, self._inbox, self._fetched, self._followed)
        )
        self._results_at = tuple(ctypes.addressof(ctypes.c_char.from_buffer(room)) for room in (self._table, self._digests))

    def let_in(self, ticket: Ticket) -> None:
        """Its pieces are fetched from now on. Once for each writer: what was fetched for it before would not be known."""
        blocks, asked = array("I", ticket.blocks), mask_of(ticket.part, self._num_layers)
        barred = bytes([not asked >> layer & 1 for layer in range(self._num_layers)])  # layers that are another writer's
        here = bytearray(barred * len(blocks))
        number = len(self._nonces)
        if number == len(self._writers):
            more = (WriterEntry * (2 * number))()
            more[:number] = list(self._writers)
            self._writers = more
        entry = self._writers[number]
        entry.header[:] = Frame(FrameKind.READY, ticket.nonce).encode()
        entry.binding[:] = binding_of(ticket.nonce)
        entry.first_block = ticket.first_block
        entry.num_blocks = len(blocks)
        entry.blocks = blocks.buffer_info()[0]
        entry.left_bytes = asked.bit_count() * self._layer_bytes * len(blocks)
        entry.here = ctypes.addressof(ctypes.c_char.from_buffer(here)) if here else 0
        self._nonces.append(ticket.nonce)
        self._blocks.append(blocks)
        self._here.append(here)

    def keep(self, may_write: Callable[[bytes], bool]) -> None:
        """Forgets the writers that may not write any more."""
        for nonce in [nonce for nonce in self._nonces if not may_write(nonce)]:
            self.leave(nonce)

    def leave(self, nonce: bytes) -> None:
        """What this writer says is for others to read. No error if it is not followed."""
        if nonce not in self._nonces:
            return
        index, last = self._nonces.index(nonce), len(self._nonces) - 1
        self._writers[index] = self._writers[last]
        self._nonces[index], self._blocks[index], self._here[index] = self._nonces[last], self._blocks[last], self._here[last]
        del self._nonces[last], self._blocks[last], self._here[last]

    def drop_fetched(self) -> None:
        """What was fetched and not stated is not what lies there any more."""
        self._fetched.num_pieces = self._fetched.num_stated = 0

    def follow(self, begin: int, end: int) -> Caught:
        """Of what the inbox has between these two, and of what comes behind it on the socket."""
        inbox, followed = self._inbox, self._followed
        inbox.begin, inbox.end = begin, end
        self._follow(
            self._pool_at,
            ctypes.addressof(self._writers),
            len(self._nonces),
            self._inbox_at,
            self._fetched_at,
            *self._results_at,
            self._followed_at,
        )
        pieces = self._found() if followed.num_pieces else _NOTHING
        left = inbox.begin, inbox.end, bool(followed.drained), bool(followed.enough)
        return Caught(bytes(followed.nonce), pieces, followed.num_untold, *left)

    def _found(self) -> FoundPieces:
        number, unlike = self._followed.num_pieces, self._followed.num_unlike
        digests = bytes(self._digests[: number * DIGEST_BYTES]) if unlike else None
        return FoundPieces(bytes(self._table[: number * DESCRIPTOR_BYTES]), digests)
