"""Writes a batch over a socket with the compiled library: each call takes some frames from their pieces to the wire.

The interpreter is asked between calls whether the batch is still wanted; a call is over after `CALL_BYTES`, or soon after the
socket has kept it waiting. What is in a frame, and where pieces are copied to, is the caller's affair.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from kvtransfer.frames import Frame, FrameKind
from kvtransfer.native.kernel import Outcome, Outlet, PieceKernel, packed_piece
from kvtransfer.transports.base import Piece

_address_of, _byte_of = ctypes.addressof, ctypes.c_char.from_buffer
CALL_BYTES = 4 * 1024 * 1024


class NativeSend(Protocol):
    """A socket that the library may write to."""

    @property
    def outlet(self) -> Outlet: ...

    def check(self, outcome: Outcome) -> None:
        """Raises TransferBroken if a write cannot go on after it."""
        ...


def can_write(kernel: PieceKernel, pieces: Sequence[Piece]) -> bool:
    return min([piece.source.nbytes for piece in pieces]) >= kernel.least_bytes


def write_natively(
    kernel: PieceKernel,
    send: NativeSend,
    kind: FrameKind,
    nonce: bytes,
    pieces: Sequence[Piece],
    ends: Sequence[int],
    stop: Callable[[], bool],
    place_of: Callable[[Piece], int],
) -> list[bytes]:
    """Frames of `kind`, the first with the pieces before `ends[0]`, and so on; each is copied to the address `place_of` it, or
    with 0 sent after its frame's table. The digests of what was written until done or told to stop."""
    header, with_payload = Frame(kind, nonce).encode(), kind is FrameKind.BLOCKS
    ends_bytes = [0, *accumulate([piece.source.nbytes for piece in pieces])]
    digests: list[bytes] = []
    while (first := len(digests)) < len(pieces) and not stop():
        frame = bisect_right(ends, first)
        last = bisect_left(ends_bytes, ends_bytes[first] + CALL_BYTES, first)  # pieces before it are enough for a call
        frames = ends[frame : bisect_left(ends, last) + 1]
        packed = [
            packed_piece(address_of(piece.source), place_of(piece), piece.source.nbytes, *piece.name)
            for piece in pieces[first : frames[-1]]
        ]
        written, outcome = kernel.write(
            packed, [end - first for end in frames], send.outlet, nonce, header, with_payload=with_payload
        )
        digests += written
        send.check(outcome)
    return digests


def address_of(view: memoryview) -> int:
    return _address_of(_byte_of(view))
