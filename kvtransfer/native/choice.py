"""Whether there is a library for this machine. A process asks for it once (`prepare`); until it is there, and where it cannot be
had, pieces are copied and digested by what Python has, which is announced once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from common.native_build import BuildError, NativeSource, build_library, find_library
from kvtransfer.native.kernel import PieceKernel, check_kernel

_SOURCE = NativeSource(
    "pieces",
    Path(__file__).parent / "source",
    "pieces.cpp",
    ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared"),
)
_asking = threading.Lock()
_was_asked = False
_kernel: PieceKernel | None = None


def piece_kernel() -> PieceKernel | None:
    """The library, once there is one."""
    return _kernel


def prepare(cache: Path, announce: Callable[[str], None]) -> None:
    """Has the library ready, compiled if need be, which takes seconds. Only the first call does anything, and later ones wait for
    it; blocking."""
    global _kernel, _was_asked
    with _asking:
        if _was_asked:
            return
        _was_asked = True
        if sys.byteorder != "little":
            announce("no native copies of KV on a big-endian machine")
            return
        try:
            found = find_library(_SOURCE, cache)  # not behind whoever compiles another library there
            _kernel = PieceKernel(found or build_library(_SOURCE, cache, check_kernel))
        except BuildError as error:
            announce(f"native copies of KV cannot be had; Python's serve: {error}")
