from __future__ import annotations

import mmap
import os

import pytest

from common.errors import StartupError
from kvtransfer.region import BlockRegion


def test_blocks_are_slices_of_the_buffer() -> None:
    region = BlockRegion(memoryview(bytearray(range(12))), block_bytes=4, num_blocks=3)
    assert bytes(region.block(1)) == bytes([4, 5, 6, 7])
    region.block(2)[:] = b"abcd"
    assert bytes(region.buffer[8:]) == b"abcd"


@pytest.mark.parametrize("index", [-1, 3, 1 << 40])
def test_no_block_outside_the_region(index: int) -> None:
    with pytest.raises(IndexError):
        BlockRegion(memoryview(bytearray(12)), block_bytes=4, num_blocks=3).block(index)


@pytest.mark.parametrize(
    ("buffer", "block_bytes", "num_blocks"),
    [
        (memoryview(bytearray(12)), 5, 3),
        (memoryview(bytearray(12)), 0, 0),
        (memoryview(bytes(12)), 4, 3),
        (memoryview(bytearray(24))[::2], 4, 3),
    ],
)
def test_memory_that_does_not_fit_is_refused(buffer: memoryview, block_bytes: int, num_blocks: int) -> None:
    with pytest.raises(StartupError):
        BlockRegion(buffer, block_bytes, num_blocks)


def test_shared_memory_is_shared_nameless_and_cannot_be_resized() -> None:
    before = set(os.listdir("/dev/shm"))
    region = BlockRegion.create_shared(block_bytes=4096, num_blocks=2)
    assert region.fd is not None
    assert not os.get_inheritable(region.fd)
    with mmap.mmap(region.fd, 8192) as other:
        other[4096:4100] = b"here"
        assert bytes(region.block(1)[:4]) == b"here"
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    assert set(os.listdir("/dev/shm")) == before
    region.close()
    region.close()


def test_closing_spares_whoever_still_looks() -> None:
    region = BlockRegion.create_shared(block_bytes=4096, num_blocks=1)
    view = memoryview(region.buffer)
    region.close()
    view[:2] = b"ok"
    assert region.fd is None


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        BlockRegion.create_shared(block_bytes=4096, num_blocks=1).close()
    assert len(os.listdir("/proc/self/fd")) == before
