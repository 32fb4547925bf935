"""Writes a batch over a socket with the compiled library: each call takes some frames from their pieces to the wire.

The interpreter is asked between calls whether the batch is still wanted; a call is over after `CALL_BYTES`, or soon after the
socket has kept it waiting. What is in a frame is the caller's affair.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from kvtransfer.frames import Frame, FrameKind
from kvtransfer.native.kernel import PIECE_BYTES, Outcome, Outlet, PieceKernel

CALL_BYTES = 16 * 1024 * 1024  # a millisecond over shared memory; the interpreter is cold after it and takes its time


class NativeSend(Protocol):
    """A socket that the library may write to."""

    @property
    def outlet(self) -> Outlet: ...

    def check(self, outcome: Outcome) -> None:
        """Raises TransferBroken if a write cannot go on after it."""
        ...


def write_natively(
    kernel: PieceKernel,
    send: NativeSend,
    kind: FrameKind,
    nonce: bytes,
    packed: bytes,
    sizes_bytes: Sequence[int],
    ends: Sequence[int],
    stop: Callable[[], bool],
) -> list[bytes]:
    """Frames of `kind`, the first with the pieces before `ends[0]`, and so on. The digests of what was written until done or told
    to stop. Pieces have at least `kernel.least_bytes`."""
    header, with_payload = Frame(kind, nonce).encode(), kind is FrameKind.BLOCKS
    digests: list[bytes] = []
    while (first := len(digests)) < len(sizes_bytes) and not stop():
        frames = _frames_of_a_call(sizes_bytes, ends, first)
        written, outcome = kernel.write(
            packed[first * PIECE_BYTES : frames[-1] * PIECE_BYTES],
            [end - first for end in frames],
            send.outlet,
            nonce,
            header,
            with_payload=with_payload,
        )
        digests += written
        send.check(outcome)
    return digests


def _frames_of_a_call(sizes_bytes: Sequence[int], ends: Sequence[int], first: int) -> Sequence[int]:
    """The ends of as many frames as are enough for one, from the piece `first` on."""
    if first == 0 and sum(sizes_bytes) <= CALL_BYTES:  # as a rule
        return ends
    ends_bytes = [0, *accumulate(sizes_bytes)]
    last = bisect_left(ends_bytes, ends_bytes[first] + CALL_BYTES, first)  # pieces before it are enough
    return ends[bisect_right(ends, first) : bisect_left(ends, last) + 1]
