"""Has the pages of a mapping there before somebody needs them, beside whoever uses it already.

    mapped -> a thread asks for one slice after the other -> all there
                \\______________________________________-> ended early, within a slice

The first touch of a page costs about as much as copying it, and a pool has many: mapping all of them at once would hold up the
request that opened the link by half a second. Pages that are written before their turn came are taken by that write.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import threading

MADV_POPULATE_WRITE = 23
_SLICE_BYTES = 4 * 1024 * 1024
_madvise = ctypes.CDLL(ctypes.util.find_library("c")).madvise  # lets go of the GIL, which `mmap.madvise` keeps
_madvise.argtypes, _madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int


class FirstTouch:
    def __init__(self, address: int, size_bytes: int) -> None:
        """`address` begins a page; the memory stays mapped until `end` has returned."""
        self._address = address
        self._size_bytes = size_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="kv-first-touch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Idempotent; waits for the slice that is under way."""
        self._ended.set()
        self._thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, be it because this kernel cannot do it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _touch(self) -> None:
        for offset_bytes in range(0, self._size_bytes, _SLICE_BYTES):
            size_bytes = min(_SLICE_BYTES, self._size_bytes - offset_bytes)
            if self._ended.is_set() or _madvise(self._address + offset_bytes, size_bytes, MADV_POPULATE_WRITE):
                return  # an old kernel, or no memory: first touches are paid for one by one
