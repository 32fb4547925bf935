"""How many threads a computation takes: all cores while nobody else on this host computes, a fair part of them otherwise.

    with cores.computing(rows) as threads: ...      one call of the native kernels: a step, or a layer of a long one

A prefill and a decode worker on few cores are seldom busy at the same time, and then either should have all of them; when both
are, threads that wait for each other's cores at every barrier are slower than one thread each. So workers of one host tell each
other, in a page of shared memory, that they compute. Each has a place in it, held by a lock that ends with its process. A place
says when its last computation began and ended; who ended a moment ago is taken for busy still, for between two steps there is
only a moment. A process that died within a computation is forgotten after a while, or when its place is taken again.

A short computation, such as a step of decoding, may leave one core free: whoever carries its tokens to their clients needs one in
those very milliseconds. Whether it is over sooner that way is tried out (`spare_core`), while nobody else computes: then it would
have but a part of the cores anyway.

Results do not depend on the number of threads. One thread uses an object of these.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from common.engine.spare_core import SpareCore
from common.errors import StartupError

PLACES = 64
_WORDS = 2  # of a place, int64: nanoseconds of the system's monotonic clock at which it began and ended
_SIZE_BYTES = PLACES * _WORDS * 8
_LONG_ROWS = 64  # at least; what is shorter is over in a few milliseconds
_LINGER_NS = 10_000_000
_FORGET_NS = 5_000_000_000
_LOCK = struct.Struct("hhqqi")  # struct flock


class Cores(Protocol):
    @property
    def most(self) -> int:
        """Threads that a computation may take at any time."""
        ...

    def computing(self, num_rows: int) -> AbstractContextManager[int]:
        """Surrounds a computation of so many rows and says how many threads it takes."""
        ...


class OwnCores:
    """Always the same: what somebody has decided beforehand."""

    def __init__(self, threads: int) -> None:
        self.most = threads

    @contextmanager
    def computing(self, num_rows: int) -> Iterator[int]:
        yield self.most


class SharedCores:
    """The cores of this host, with whoever opens the same file."""

    def __init__(self, path: Path, cores: int, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Blocking. Raises StartupError if the file cannot be opened or has no place left."""
        self.most = cores
        self._now_ns = now_ns
        self._spare = SpareCore(now_ns=now_ns)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, _SIZE_BYTES)
            self._page = memoryview(mmap.mmap(self._file, _SIZE_BYTES)).cast("q")
        except OSError as error:
            raise StartupError(f"cannot share cores over {path}: {error.strerror}") from error
        self._place = _WORDS * self._take_place()
        self._page[self._place] = self._page[self._place + 1] = 0
        weakref.finalize(self, os.close, self._file)

    def _take_place(self) -> int:
        for place in range(PLACES):
            try:
                # NOTE: a lock of the open file, not of the process, which may have two engines.
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
                return place
            except BlockingIOError:
                continue
        os.close(self._file)
        raise StartupError(f"more than {PLACES} engines share the cores of this host")

    @contextmanager
    def computing(self, num_rows: int) -> Iterator[int]:
        now_ns = self._now_ns()
        self._page[self._place] = now_ns
        busy = self._num_busy(now_ns)
        try:
            if num_rows >= _LONG_ROWS or self.most == 1:
                yield max(1, self.most // busy)
            elif busy > 1:
                yield max(1, (self.most - 1) // busy)
            else:
                with self._spare.computing(num_rows) as leaves_one:
                    yield self.most - leaves_one
        finally:
            self._page[self._place + 1] = self._now_ns()

    def _num_busy(self, now_ns: int) -> int:
        """Those who compute, and this one."""
        words = self._page.tolist()
        return 1 + sum(
            now_ns - began < _FORGET_NS if began > ended else now_ns - ended < _LINGER_NS
            for place, (began, ended) in enumerate(zip(words[::_WORDS], words[1::_WORDS], strict=True))
            if began and _WORDS * place != self._place
        )
