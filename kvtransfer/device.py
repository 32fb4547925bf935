"""A pool in a device's memory, as the transfer sees it: ranges of bytes that cannot be read here, and who can work on them.

    DeviceMemory    of this process: reads sums of ranges, opens what another process on this host gives a handle of
    PeerMemory      of another process, opened: is written to from ours
    DeviceView      a range of ours; stands where a memoryview of a pool in host memory would: it is cut, and has a length

How bytes move on a device is the engine's business (`common.engine.device_memory`), which this knows as a protocol. A view's
digest is over sums that the device computed over all its bytes; those of many views are best read at once (`read_contents`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from common.errors import StartupError
from kvtransfer.region import BlockRegion, PoolMemory

Range = tuple[int, int]
"""Offset and size, in bytes; both are multiples of a layer of a block."""


class PeerMemory(Protocol):
    def write(self, copies: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Copies (offset here, offset there, bytes) of our memory into the peer's, all of them; returns when they are there, with
        the contents of each as they were read. The device does other work meanwhile. Raises TransferBroken."""
        ...

    def close(self) -> None:
        """Lets go of the peer's memory; nothing is written any more."""
        ...


class DeviceMemory(Protocol):
    @property
    def size_bytes(self) -> int: ...

    def handle(self) -> bytes:
        """With which a process on this host can open the memory, if it has the same device."""
        ...

    def contents(self, ranges: Sequence[Range]) -> list[bytes]:
        """The lane sums of each range: bytes that depend on every bit of it, and are the same in every process."""
        ...

    def open_peer(self, handle: bytes, size_bytes: int) -> PeerMemory:
        """Raises TransferBroken if there is no such memory within reach."""
        ...


class DeviceView:
    __slots__ = ("_content", "_memory", "nbytes", "offset_bytes")

    def __init__(self, memory: DeviceMemory, offset_bytes: int, nbytes: int) -> None:
        self._memory = memory
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes
        self._content: bytes | None = None

    def __getitem__(self, part: slice) -> DeviceView:
        if not isinstance(part, slice):
            raise TypeError("bytes on a device cannot be read here")
        start, end, _ = part.indices(self.nbytes)
        return DeviceView(self._memory, self.offset_bytes + start, max(0, end - start))

    def __len__(self) -> int:
        return self.nbytes

    def content(self) -> bytes:
        """What a digest is over; as it is now, or was when `read_contents` read it."""
        content, self._content = self._content, None
        return content if content is not None else self._memory.contents([(self.offset_bytes, self.nbytes)])[0]


class DeviceRegion(BlockRegion):
    """A pool of equal blocks on a device. `buffer` is a `DeviceView`."""

    on_device = True

    def __init__(self, memory: DeviceMemory, block_bytes: int, num_blocks: int) -> None:
        """`memory` may be larger than the blocks: what is behind them is not transferred."""
        if block_bytes <= 0 or num_blocks <= 0 or memory.size_bytes < block_bytes * num_blocks:
            raise StartupError(f"{memory.size_bytes} bytes do not hold {num_blocks} blocks of {block_bytes} bytes")
        # Whoever cuts pieces out of a pool needs no more of a memoryview than a DeviceView has; whoever reads bytes asks
        # `can_serve` first, and finds no descriptor, or `on_device`.
        self.buffer = cast(memoryview, DeviceView(memory, 0, block_bytes * num_blocks))
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.fd = None
        self.device = memory
        self._mapping = None

    def close(self) -> None:
        """The engine owns the memory."""


def region_of(pool: memoryview | DeviceMemory, block_bytes: int) -> BlockRegion:
    """All whole blocks of a pool, wherever it is."""
    if isinstance(pool, memoryview):
        return BlockRegion(pool, block_bytes, pool.nbytes // block_bytes)
    return DeviceRegion(pool, block_bytes, pool.size_bytes // block_bytes)


def region_of_pool(memory: PoolMemory, device_memory: DeviceMemory | None, block_bytes: int) -> BlockRegion:
    """Where the engine's KV pool lies; on a GPU the engine brings the memory itself. Raises StartupError."""
    return memory.region if device_memory is None else region_of(device_memory, block_bytes)


def read_contents(views: Sequence[object]) -> None:
    """Reads those that are on a device at once; each view's next `content` is as it was now."""
    on_device = [view for view in views if isinstance(view, DeviceView) and view.nbytes]
    if on_device:
        memory = on_device[0]._memory
        contents = memory.contents([(view.offset_bytes, view.nbytes) for view in on_device])
        for view, content in zip(on_device, contents, strict=True):
            view._content = content
