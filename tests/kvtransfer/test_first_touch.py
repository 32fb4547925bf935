"""Pages of a mapping that are taken ahead, counted by the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.first_touch import FirstTouch

SIZE_BYTES = 24 * 1024 * 1024 + 8192


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """Of a file that has no pages yet."""
    fd = os.memfd_create("first touch")
    os.ftruncate(fd, SIZE_BYTES)
    mapping = mmap.mmap(fd, SIZE_BYTES)
    os.close(fd)
    yield mapping
    mapping.close()


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def mapped_bytes(address: int) -> int:
    """What of the mapping at `address` has pages in this process."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*?^Rss: +([0-9]+) kB", smaps, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) * 1024


def test_all_pages_are_there_in_the_end(memory: mmap.mmap) -> None:
    address = address_of(memory)
    assert mapped_bytes(address) == 0
    touch = FirstTouch(address, SIZE_BYTES)
    assert touch.wait(30.0)
    assert mapped_bytes(address) == SIZE_BYTES
    touch.end()


def test_what_is_written_meanwhile_stays(memory: mmap.mmap) -> None:
    touch = FirstTouch(address_of(memory), SIZE_BYTES)
    places = range(0, SIZE_BYTES, 4096)
    for place in reversed(places):
        memory[place] = place // 4096 % 251 + 1
    assert touch.wait(30.0)
    touch.end()
    assert all(memory[place] == place // 4096 % 251 + 1 for place in places)


def test_it_ends_early_and_touches_nothing_afterwards(memory: mmap.mmap) -> None:
    address = address_of(memory)
    touch = FirstTouch(address, SIZE_BYTES)
    touch.end()
    by_then = mapped_bytes(address)
    touch.end()
    assert touch.wait(0.0)
    assert mapped_bytes(address) == by_then


def test_memory_that_cannot_be_touched_ends_it() -> None:
    touch = FirstTouch(mmap.PAGESIZE, SIZE_BYTES)  # nothing is mapped there
    assert touch.wait(30.0)
    touch.end()
