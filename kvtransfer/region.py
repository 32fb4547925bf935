"""A pool of equal blocks in one contiguous range of memory, as the transfer sees it.

    buffer   |  block 0  |  block 1  |  ...  |  block num_blocks - 1  |
             0      block_bytes                       num_blocks * block_bytes

The engine builds its KV tensor over `buffer` and keeps the region as long as the tensor. `create_shared` takes anonymous shared
memory: it has a descriptor to hand to a process that may map it, and no name, so that nothing is left behind by a kill.
The region does not know which blocks are in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os

from common.errors import StartupError

MADV_POPULATE_WRITE = 23
F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4


class BlockRegion:
    on_device = False  # see `kvtransfer.device`

    def __init__(self, buffer: memoryview, block_bytes: int, num_blocks: int, fd: int | None = None) -> None:
        """`fd`, if given, is a descriptor of the same memory, from offset 0; the region owns it from now on."""
        if block_bytes <= 0 or num_blocks <= 0 or buffer.nbytes != block_bytes * num_blocks:
            raise StartupError(f"a region of {buffer.nbytes} bytes does not hold {num_blocks} blocks of {block_bytes} bytes")
        if buffer.readonly or not buffer.c_contiguous:
            raise StartupError("a region needs writable, contiguous memory")
        self.buffer = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.fd = fd
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))  # of the first block, in this process
        self._mapping: mmap.mmap | None = None

    @classmethod
    def create_shared(cls, block_bytes: int, num_blocks: int, *, touch: bool = True) -> BlockRegion:
        """Zeroed memory that another process can map once it was given the descriptor. It is taken now, or at first touch."""
        size_bytes = block_bytes * num_blocks
        if size_bytes <= 0:
            raise StartupError(f"a region of {num_blocks} blocks of {block_bytes} bytes is empty")
        try:
            fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise StartupError(f"no shared memory for the KV pool: {error.strerror}") from error
        try:
            os.ftruncate(fd, size_bytes)
            # A peer maps the same file, and takes none that can shrink under its mapping: whoever reads there then dies (SIGBUS).
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
            mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(fd)
            raise StartupError(f"no shared memory for a KV pool of {size_bytes} bytes: {error.strerror}") from error
        use_huge_pages(mapping)
        if touch:
            touch_all(mapping)
        region = cls(memoryview(mapping), block_bytes, num_blocks, fd)
        region._mapping = mapping
        return region

    def block(self, index: int) -> memoryview:
        """The bytes of one block, writable. Raises IndexError outside the region."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        return self.buffer[index * self.block_bytes : (index + 1) * self.block_bytes]

    def close(self) -> None:
        """Gives up the descriptor, and the memory as soon as no tensor or view uses it any more. Idempotent."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if self._mapping is not None:
            mapping, self._mapping = self._mapping, None
            try:
                self.buffer.release()
                mapping.close()
            except BufferError:
                return  # a tensor still lives: the last reference unmaps


class PoolMemory:
    """Shared memory for an engine's KV pool, made when the engine asks for it, and given up by whoever keeps the engine.
    `touch` says whether its pages are taken at once; where only the engine writes into it they may as well come when they are
    used. `rank_program` is the module that the other ranks of the worker are started with: it knows of the transfer and of the
    engine, which do not know each other."""

    def __init__(self, *, touch: bool, rank_program: str = "") -> None:
        self._touch = touch
        self.rank_program = rank_program
        self._region: BlockRegion | None = None

    def allocate(self, block_bytes: int, num_blocks: int) -> memoryview:
        """Given to the engine, which calls it once."""
        self._region = BlockRegion.create_shared(block_bytes, num_blocks, touch=self._touch)
        return self._region.buffer

    @property
    def region(self) -> BlockRegion:
        if self._region is None:
            raise StartupError("the engine did not take the shared memory for its pool")
        return self._region

    def close(self) -> None:
        if self._region is not None:
            self._region.close()


def use_huge_pages(mapping: mmap.mmap) -> None:
    """The first touch of a 4 KiB page costs more than copying it. A kernel that has no huge pages is not asked twice."""
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)


def touch_all(mapping: mmap.mmap) -> None:
    """Maps every page for writing, so that no transfer pays for first touches. On an old kernel they are paid for one by one."""
    with contextlib.suppress(OSError):
        mapping.madvise(MADV_POPULATE_WRITE)
