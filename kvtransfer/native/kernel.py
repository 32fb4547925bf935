"""The C interface of the compiled library (`source/pieces.cpp`), and what shows that it computes what it should.

    copy       contents of pieces that are copied
    digests    digests of pieces that lie where they lie
    write      a batch from end to end: digested, framed and sent, a frame at a time
    follow     the other end of it over shared memory: what is ready is copied and digested, and what was stated is compared

Addresses are plain numbers: whoever calls keeps the memory alive and has checked its bounds. Calls let go of the GIL.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_128_digest

from common.native_build import BuildError
from kvtransfer.digest import DIGEST_BYTES, binding_of, piece_digest

_INTERFACE = 5
_CHECKED_NONCE = bytes(range(200, 216))
_CHECKED_SIZES = (241, 256, 257, 1023, 1024, 1025, 4096, 4097, 12_288, 65_536 + 33)
NAME_BYTES = 8
DESCRIPTOR_BYTES = NAME_BYTES + DIGEST_BYTES
_BYTES_PER_BUFFER = 16
_MOST_PIECES = 1024  # of a frame: MOST of `source/pieces.cpp`

_PIECE = struct.Struct("<QQQIHH")
_NAME = struct.Struct("<IHH")
_WORD = struct.Struct("<Q")
PIECE_BYTES = _PIECE.size
packed_piece = _PIECE.pack
"""A piece, as all calls take it: address of the source, address of the destination (0: it stays where it is), bytes, and its
name: logical block, first layer, number of layers. Raises struct.error for what has no room."""


def packed_pieces(
    sources: Sequence[int],
    size_bytes: int,
    logical_blocks: Sequence[int],
    first_layer: int,
    num_layers: int,
) -> bytes:
    """The same layers of many blocks, which stay where they are: `packed_piece` of each, by columns, of which a piece has four of
    64 bits. Raises OverflowError or struct.error for what has no room."""
    columns = array("Q", bytes(PIECE_BYTES * len(logical_blocks)))
    columns[0::4] = array("Q", sources)
    columns[2::4] = array("Q", (size_bytes,)) * len(logical_blocks)
    (layers,) = _WORD.unpack(_NAME.pack(0, first_layer, num_layers))
    columns[3::4] = array("Q", [layers + block for block in array("I", logical_blocks)])
    return columns.tobytes()


class Outcome(enum.IntEnum):
    """How a write ended."""

    DONE = 0
    WAITED = 1  # for so long that it is time to ask whether it is still wanted
    WOKEN = 2
    STALLED = 3
    BROKEN = 4


class Outlet(NamedTuple):
    """The socket of a write, and the event that wakes one who waits for it."""

    socket: int
    wake: int
    stall_ms: int
    patience_ms: int


_pack_link = struct.Struct("=iiII32s28sI").pack  # the outlet, a header, what digests are bound to, and whether payload follows


class WriterEntry(ctypes.Structure):
    """A writer that was let in, as `follow` knows it: `blocks` is the address of its ticket's blocks, 32 bits each, `here` that
    of a byte for each layer of each of them."""

    _fields_ = (
        ("header", ctypes.c_uint8 * 32),  # of a READY without pieces
        ("binding", ctypes.c_uint8 * 28),
        ("first_block", ctypes.c_uint32),
        ("num_blocks", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("blocks", ctypes.c_uint64),
        ("left_bytes", ctypes.c_uint64),  # of which it has not said yet that they are ready
        ("here", ctypes.c_uint64),  # 1: was fetched, or is not this writer's
    )


class FollowedPool(ctypes.Structure):
    """Where pieces go, the peer's pool that they lie in, the socket that they are announced on, and when a call is over."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("block_bytes", ctypes.c_uint64),
        ("layer_bytes", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("source_bytes", ctypes.c_uint64),
        ("num_layers", ctypes.c_uint32),
        ("socket", ctypes.c_int32),
        ("most_bytes", ctypes.c_uint64),
        ("most_pieces", ctypes.c_uint32),
        ("patience_us", ctypes.c_uint32),
    )


class InboxEntry(ctypes.Structure):
    """What was read from a socket, and not looked at, lies between `begin` and `end`."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
    )


class Fetched(ctypes.Structure):
    """What was fetched last, and found to be, of which a part was stated: kept from call to call. No more than a frame has."""

    _fields_ = (
        ("header", ctypes.c_uint8 * 32),  # of a statement without pieces
        ("num_pieces", ctypes.c_uint32),
        ("num_stated", ctypes.c_uint32),
        ("names", ctypes.c_uint8 * (NAME_BYTES * _MOST_PIECES)),
        ("digests", ctypes.c_uint8 * (DIGEST_BYTES * _MOST_PIECES)),
    )


class Followed(ctypes.Structure):
    """What a call of `follow` has found, all of one writer: so many pieces that were fetched and stated, how many of them do not
    have the digest that was stated, how many fetched pieces the peer was not told of, whether the socket was empty after them,
    and whether there was more than is enough for a call."""

    _fields_ = (
        ("nonce", ctypes.c_uint8 * 16),
        ("num_pieces", ctypes.c_uint64),
        ("num_unlike", ctypes.c_uint64),
        ("num_untold", ctypes.c_uint64),
        ("drained", ctypes.c_uint32),
        ("enough", ctypes.c_uint32),
    )


class PieceKernel:
    def __init__(self, path: Path) -> None:
        """Raises BuildError if this is not the library that belongs to this file."""
        try:
            library = ctypes.CDLL(str(path))
            library.pdserve_pieces_interface.restype = ctypes.c_int64
            interface = library.pdserve_pieces_interface()
            library.pdserve_pieces_least.restype = ctypes.c_uint64
            self.least_bytes: int = library.pdserve_pieces_least()
            self._contents = library.pdserve_pieces_contents
            self._digests = library.pdserve_pieces_digests
            self._write = library.pdserve_pieces_write
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        if interface != _INTERFACE:
            raise BuildError(f"{path} has interface {interface}, not {_INTERFACE}")
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64
        self._contents.argtypes, self._contents.restype = (text, number, pointer), None
        self._digests.argtypes, self._digests.restype = (text, number, text, pointer), None
        self._write.argtypes = (text, text, pointer, number, pointer, pointer, pointer)
        self._write.restype = ctypes.c_int64
        self.follow = library.pdserve_pieces_follow
        """Takes pool, writers and their number, inbox, what was fetched; room for descriptors, digests, and what was found."""
        self.follow.argtypes = (pointer, pointer, number, pointer, pointer, pointer, pointer, pointer)
        self.follow.restype = None

    def copy(self, pieces: Sequence[bytes]) -> list[bytes]:
        """Copies each, of at least `least_bytes`; xxh3-128 of what was read, in one pass. When it returns, all copies are there
        for every process."""
        contents = ctypes.create_string_buffer(DIGEST_BYTES * len(pieces))
        self._contents(b"".join(pieces), len(pieces), ctypes.addressof(contents))
        return _parted(contents.raw, 0, DIGEST_BYTES)

    def digests(self, pieces: Sequence[bytes], nonce: bytes) -> list[bytes]:
        """As `piece_digest` of each, of at least `least_bytes`."""
        digests = ctypes.create_string_buffer(DIGEST_BYTES * len(pieces))
        self._digests(b"".join(pieces), len(pieces), binding_of(nonce), ctypes.addressof(digests))
        return _parted(digests.raw, 0, DIGEST_BYTES)

    def write(
        self, pieces: bytes, ends: Sequence[int], outlet: Outlet, nonce: bytes, header: bytes, *, with_payload: bool
    ) -> tuple[list[bytes], Outcome]:
        """Digests packed pieces of at least `least_bytes`, and sends a frame before each of the ascending `ends`, the
        last of which is their number: `header` with its own count of pieces, and amount of payload if there is any; descriptors;
        payload. Returns the digests of those whose frames were sent in full."""
        frames = array("I", ends)
        table_bytes = DESCRIPTOR_BYTES * ends[-1]
        room = ctypes.create_string_buffer(table_bytes + _BYTES_PER_BUFFER * (ends[-1] + 2))  # descriptors, then buffers to send
        written = ctypes.c_uint64(0)
        outcome = self._write(
            _pack_link(*outlet, header, binding_of(nonce), with_payload),
            pieces,
            frames.buffer_info()[0],
            len(frames),
            ctypes.addressof(room),
            ctypes.addressof(room) + table_bytes,
            ctypes.addressof(written),
        )
        return _parted(room.raw[: DESCRIPTOR_BYTES * written.value], NAME_BYTES, DESCRIPTOR_BYTES), Outcome(outcome)


def _parted(raw: bytes, first_byte: int, stride_bytes: int) -> list[bytes]:
    return [raw[start : start + DIGEST_BYTES] for start in range(first_byte, len(raw), stride_bytes)]


def check_kernel(path: Path) -> None:
    """Holds a freshly compiled library against xxhash. Raises BuildError."""
    kernel = PieceKernel(path)
    source, destination = bytearray(range(251)) * 300, bytearray(80_000)
    from_address, to_address = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, destination))
    aligned = -to_address % 64
    for size in _CHECKED_SIZES:
        for start, place in ((0, aligned), (3, aligned), (1, aligned + 1)):
            destination[:] = bytes(len(destination))
            name = (size, start, 7)
            (content,) = kernel.copy([packed_piece(from_address + start, to_address + place, size, *name)])
            (digest,) = kernel.digests([packed_piece(from_address + start, 0, size, *name)], _CHECKED_NONCE)
            wanted = bytes(source[start : start + size])
            right = content == xxh3_128_digest(wanted) and digest == piece_digest(memoryview(wanted), _CHECKED_NONCE, *name)
            if not right or destination != bytes(place) + wanted + bytes(len(destination) - place - size):
                raise BuildError(f"the library makes something else of {size} bytes")
