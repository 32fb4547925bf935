"""Pools that pass for a device's: in shared memory, behind the interface that a GPU's memory has, and visible to tests.

A handle is the path of a descriptor, so that other processes can open it while its owner lives. A view of such a pool can be read
and written like a memoryview; the code under test has no business doing so, and a test of its own sees that a plain view refuses.
Where there is a GPU, `VisibleRegion` is over its memory.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch

from common.engine.lane_sums import lane_sums
from common.errors import TransferBroken
from kvtransfer.device import DeviceRegion, DeviceView
from kvtransfer.region import BlockRegion


class HostMemory:
    """A `DeviceMemory`."""

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        self.shared = BlockRegion.create_shared(block_bytes, num_blocks)
        self.size_bytes = self.shared.buffer.nbytes
        self.num_content_calls = 0
        self.writes: list[list[tuple[int, int, int]]] = []
        self.go_on = threading.Event()  # cleared: a write waits before it copies, as one does whose process was stopped
        self.go_on.set()
        self.open_peers = 0

    def handle(self) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self.shared.fd}".encode()

    def contents(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.num_content_calls += 1
        return self.sums(None, [(offset, offset, size) for offset, size in ranges])

    def sums(self, destination: mmap.mmap | None, copies: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """What one launch does: copies, if there is a destination, and sums."""
        found = []
        for source, place, size in copies:
            content = self.shared.buffer[source : source + size]
            if destination is not None:
                destination[place : place + size] = bytes(content)
            found.append(lane_sums(content).tobytes())
        return found

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        return bytes(self.shared.buffer[offset_bytes : offset_bytes + size_bytes])

    def write(self, offset_bytes: int, data: bytes) -> None:
        self.shared.buffer[offset_bytes : offset_bytes + len(data)] = data

    def close(self) -> None:
        self.shared.close()

    def open_peer(self, handle: bytes, size_bytes: int) -> HostPeer:
        try:
            fd = os.open(handle.decode(), os.O_RDWR)
        except OSError as error:
            raise TransferBroken("the decode worker's pool is on another GPU") from error
        try:
            return HostPeer(self, mmap.mmap(fd, size_bytes))
        finally:
            os.close(fd)


class HostPeer:
    def __init__(self, own: HostMemory, mapping: mmap.mmap) -> None:
        self._own = own
        self._mapping = mapping
        own.open_peers += 1

    def write(self, copies: Sequence[tuple[int, int, int]]) -> list[bytes]:
        self._own.writes.append(list(copies))
        if not self._own.go_on.wait(60):
            raise TransferBroken("the test did not let the write go on")
        return self._own.sums(self._mapping, copies)

    def close(self) -> None:
        self._mapping.close()
        self._own.open_peers -= 1


class GpuMemory:
    """The engine's own, with what a test reads and writes. Both ends of a link may be in one process here."""

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        from common.engine.device_memory import DeviceAllocation

        self._own = DeviceAllocation(block_bytes * num_blocks, torch.device("cuda", 0))
        self.size_bytes = self._own.size_bytes
        self.handle, self.contents, self.open_peer = self._own.handle, self._own.contents, self._own.open_peer
        self._bytes = self._own.words.view(torch.uint8)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        data: bytes = self._bytes[offset_bytes : offset_bytes + size_bytes].cpu().numpy().tobytes()
        return data

    def write(self, offset_bytes: int, data: bytes) -> None:
        self._bytes[offset_bytes : offset_bytes + len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        torch.cuda.synchronize()

    def close(self) -> None:
        """The test's process ends soon."""


class VisibleView(DeviceView):
    def __getitem__(self, part: slice | int) -> VisibleView | int:  # type: ignore[override]
        memory = cast(HostMemory, self._memory)
        if isinstance(part, int):
            if not 0 <= part < self.nbytes:
                raise IndexError(part)
            return memory.read(self.offset_bytes + part, 1)[0]
        cut = super().__getitem__(part)
        return VisibleView(memory, cut.offset_bytes, cut.nbytes)

    def __setitem__(self, part: slice | int, value: object) -> None:
        place = slice(part, part + 1) if isinstance(part, int) else part
        start, end, _ = place.indices(self.nbytes)
        data = bytes([value]) if isinstance(value, int) else bytes(value)  # type: ignore[call-overload]
        if len(data) != end - start:
            raise ValueError(f"{len(data)} bytes do not fit into {end - start}")
        cast(HostMemory, self._memory).write(self.offset_bytes + start, data)

    def __bytes__(self) -> bytes:
        return cast(HostMemory, self._memory).read(self.offset_bytes, self.nbytes)


class VisibleRegion(DeviceRegion):
    def __init__(self, block_bytes: int, num_blocks: int, num_layers: int = 0) -> None:
        """With `num_layers`, on a GPU if there is one."""
        self.memory: Any = HostMemory(block_bytes, num_blocks)
        if num_layers and torch.cuda.is_available():
            self.memory.close()
            self.memory = GpuMemory(block_bytes, num_blocks)
        super().__init__(self.memory, block_bytes, num_blocks)
        self.buffer = cast(memoryview, VisibleView(self.memory, 0, block_bytes * num_blocks))

    def close(self) -> None:
        self.memory.close()
