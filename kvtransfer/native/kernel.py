"""The C interface of the compiled library (`source/pieces.cpp`), and what shows that it computes what it should.

Addresses are plain numbers: whoever calls keeps the memory alive and has checked its bounds. Calls let go of the GIL.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path

from xxhash import xxh3_128_digest

from common.native_build import BuildError
from kvtransfer.digest import DIGEST_BYTES

_INTERFACE = 1
_CHECKED_SIZES = (241, 256, 257, 1023, 1024, 1025, 4096, 4097, 12_288, 65_536 + 33)

Move = tuple[int, int, int]
"""Address of the source, address of the destination, bytes."""


class PieceKernel:
    def __init__(self, path: Path) -> None:
        """Raises BuildError if this is not the library that belongs to this file."""
        try:
            library = ctypes.CDLL(str(path))
            library.pdserve_pieces_interface.restype = ctypes.c_int64
            interface = library.pdserve_pieces_interface()
            library.pdserve_pieces_least.restype = ctypes.c_uint64
            self.least_bytes: int = library.pdserve_pieces_least()
            self._copy = library.pdserve_pieces_copy
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        if interface != _INTERFACE:
            raise BuildError(f"{path} has interface {interface}, not {_INTERFACE}")
        self._copy.argtypes, self._copy.restype = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p), None

    def copy(self, moves: Sequence[Move]) -> list[bytes]:
        """Copies each, of at least `least_bytes`; xxh3-128 of what was read, in one pass. When it returns, all copies are there
        for every process."""
        table = array("Q", [number for move in moves for number in move])
        digests = ctypes.create_string_buffer(DIGEST_BYTES * len(moves))
        self._copy(table.buffer_info()[0], len(moves), ctypes.addressof(digests))
        raw = digests.raw
        return [raw[start : start + DIGEST_BYTES] for start in range(0, len(raw), DIGEST_BYTES)]


def check_kernel(path: Path) -> None:
    """Holds a freshly compiled library against xxhash. Raises BuildError."""
    kernel = PieceKernel(path)
    source, destination = bytearray(range(251)) * 300, bytearray(80_000)
    from_address, to_address = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, destination))
    aligned = -to_address % 64
    for size in _CHECKED_SIZES:
        for start, place in ((0, aligned), (3, aligned), (1, aligned + 1)):
            destination[:] = bytes(len(destination))
            (digest,) = kernel.copy([(from_address + start, to_address + place, size)])
            wanted = bytes(source[start : start + size])
            if digest != xxh3_128_digest(wanted) or destination != bytes(place) + wanted + bytes(len(destination) - place - size):
                raise BuildError(f"the library makes something else of {size} bytes")
