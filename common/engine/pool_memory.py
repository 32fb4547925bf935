"""Where a KV pool lies: in memory that the caller gives, in memory of its own, or on a GPU.

    layout, number of blocks, device, given memory?  ->  pool, and the allocation on the device if it lies there

Whoever gives memory may let others into it: a transfer between processes. The engine does not know how.
"""

from __future__ import annotations

from typing import Protocol

import torch

from common.engine.device_memory import DeviceAllocation
from common.engine.kv_pool import KVPool
from common.types import KVLayout


class BlockMemory(Protocol):
    """Host memory for one pool (a shared region)."""

    def allocate(self, block_bytes: int, num_blocks: int) -> memoryview:
        """Called once."""
        ...


class PoolMemory(BlockMemory, Protocol):
    """That of an engine's first process."""

    @property
    def rank_program(self) -> str:
        """What its other processes are started with: see `RankGroup.start`."""
        ...


def create_pool(
    layout: KVLayout, num_blocks: int, device: torch.device, memory: BlockMemory | None
) -> tuple[KVPool, DeviceAllocation | None]:
    """Raises StartupError. On a GPU `memory` is not asked."""
    if device.type == "cuda":
        allocation = DeviceAllocation(layout.block_bytes * num_blocks, device)
        return KVPool(layout, num_blocks, device, allocation.words), allocation
    given = None if memory is None else memory.allocate(layout.block_bytes, num_blocks)
    return KVPool(layout, num_blocks, device, given), None
