"""A batch of pieces that lie in our pool, offered to a peer that has it mapped: where they are, then what they are.

    READY(names, places), up to `MAX_PIECES` -> the peer fetches ...
                                             -> digests -> WRITTEN(names, digests), WRITTEN, ... of the same pieces, in order
    READY of the next ones ...

Made on the event loop, written in the link's lane, once; the first READY (`opening`) may leave ahead of that. What digests are
taken of is put together only when the peer has something to do. Does not know when it has fetched what it was offered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

from kvtransfer.digest import piece_digest
from kvtransfer.frames import MAX_PIECES, PLACE_BYTES, Frame, FrameKind, encode_table
from kvtransfer.native.choice import piece_kernel
from kvtransfer.native.kernel import PIECE_BYTES
from kvtransfer.native.writing import write_natively
from kvtransfer.spans import Columns
from kvtransfer.transports.base import Piece
from kvtransfer.transports.sending import Send, SocketSend

STATED_BYTES = 4 * 1024 * 1024  # by one frame: to fetch so much takes longer than to digest it


class Offer:
    def __init__(self, nonce: bytes, pieces: Sequence[Piece], columns: Columns, pool_address: int) -> None:
        """`columns` are of `pieces`, of which there is one at least."""
        self._nonce = nonce
        self._pieces = pieces
        self._columns = columns
        self._sizes_bytes = columns.sizes_bytes
        self._placed = columns.placed(pool_address)
        kernel = piece_kernel()
        self._kernel = kernel if kernel is not None and min(self._sizes_bytes) >= kernel.least_bytes else None

    @property
    def opening(self) -> bytes:
        """What is said first, and may be said ahead of `write`."""
        return self._ready(0)

    def write(self, send: Send, stop: Callable[[], bool], said_bytes: int = 0) -> list[bytes]:
        """The digests of what was stated, until done or told to stop. Blocking. Raises TransferBroken. `said_bytes`: of the
        opening; its rest is sent whatever `stop` says, for what comes next on the wire must begin with a frame."""
        digests: list[bytes] = []
        for first in range(0, len(self._pieces), MAX_PIECES):
            if stop() and not said_bytes:
                break
            end = min(first + MAX_PIECES, len(self._pieces))
            ready, said_bytes = self._ready(first)[said_bytes:], 0
            if ready:
                send([ready])
            digests += self._state(first, end, send, stop)
            if len(digests) < end:
                break  # what is ready and was not stated must not be followed by more
        return digests

    def _ready(self, first: int) -> bytes:
        end = min(first + MAX_PIECES, len(self._pieces))
        return Frame(FrameKind.READY, self._nonce, end - first).encode() + self._placed[first * PLACE_BYTES : end * PLACE_BYTES]

    @cached_property
    def _packed(self) -> bytes:
        return self._columns.packed()

    def _state(self, first: int, end: int, send: Send, stop: Callable[[], bool]) -> list[bytes]:
        ends = _statements(end - first, self._sizes_bytes[first])
        if self._kernel is not None and isinstance(send, SocketSend):
            packed, sizes_bytes = self._packed[first * PIECE_BYTES : end * PIECE_BYTES], self._sizes_bytes[first:end]
            return write_natively(self._kernel, send, FrameKind.WRITTEN, self._nonce, packed, sizes_bytes, ends, stop)
        digests: list[bytes] = []
        for frame_end in ends:
            if stop():
                break
            pieces = self._pieces[first + len(digests) : first + frame_end]
            own = [piece_digest(source, self._nonce, *name) for name, _, source in pieces]
            table = encode_table([name for name, _, _ in pieces], own)
            send([Frame(FrameKind.WRITTEN, self._nonce, len(pieces)).encode() + table])
            digests += own
        return digests


@lru_cache(maxsize=256)
def _statements(num_pieces: int, piece_bytes: int) -> tuple[int, ...]:
    """Before which of so many pieces a frame ends that states them, the last one's included."""
    pieces = max(STATED_BYTES // piece_bytes, 1)
    return (*range(pieces, num_pieces, pieces), num_pieces)
