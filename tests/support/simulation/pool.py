"""A worker's KV memory under watch: who owns which block, who may write to it, and whether somebody does who may not.

    WatchedBlocks    the real block manager; tells the memory about every change of owner
    Memory           the bytes; a generation per block, which changes with its owner; the writers from outside that can write

The rules, checked at the moment in which they are broken:
  1. a block changes its owner only when no writer from outside is able to write to it
  2. a writer writes only to blocks that still belong to the request that it was let in for
  3. the engine writes only to blocks that one sequence holds alone, and uses none that a writer from outside could change
  4. a prefill worker sends a block only while a sequence holds it; what the other end fetches by itself it fetches before the
     transfer has finished (`fetching_links`)

It judges by what physically can happen, not by what the code under test believes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from common.engine.block_manager import BlockManager


class Memory:
    def __init__(self, name: str, num_blocks: int, block_bytes: int, complain: Callable[[str], None]) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.bytes = bytearray(num_blocks * block_bytes)
        self.view = memoryview(self.bytes)
        self.generation = [0] * num_blocks
        self.writers: dict[int, bytes] = {}  # block -> nonce of the writer from outside that is able to write to it
        self.blocks: WatchedBlocks | None = None
        self._complain = complain
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))

    def block_at(self, place: memoryview) -> int:
        """The block that a part of this memory lies in."""
        return self.offset_of(place) // self.block_bytes

    def offset_of(self, place: memoryview) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(place)) - self._address

    def holds(self, place: memoryview) -> bool:
        """Whether it is a part of this memory, and no copy."""
        return 0 <= self.offset_of(place) < len(self.bytes)

    # -- owners -------------------------------------------------------------------------------------------------------

    def owner_changes(self, block: int, event: str) -> None:
        self.generation[block] += 1
        if block in self.writers:
            self._complain(f"{self.name}: block {block} is {event} while writer {self.writers[block].hex()[:6]} can write to it")

    # -- writers from outside -----------------------------------------------------------------------------------------

    def writer_enters(self, nonce: bytes, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.writers[block] = nonce

    def writer_leaves(self, nonce: bytes) -> None:
        for block in [block for block, writer in self.writers.items() if writer == nonce]:
            del self.writers[block]

    def check_write_from_outside(self, block: int, nonce: bytes, generations: dict[int, int] | None) -> None:
        if generations is None or block not in generations:
            self._complain(f"{self.name}: writer {nonce.hex()[:6]} writes to block {block}, which its ticket does not name")
        elif self.generation[block] != generations[block]:
            self._complain(
                f"{self.name}: writer {nonce.hex()[:6]} writes to block {block}, which belongs to somebody else by now"
            )

    # -- the engine, and senders --------------------------------------------------------------------------------------

    def check_engine_write(self, block: int) -> None:
        if self.blocks is not None and self.blocks.num_references(block) != 1:
            self._complain(f"{self.name}: the engine writes to block {block} of {self.blocks.num_references(block)} owners")

    def check_engine_use(self, blocks: Sequence[int]) -> None:
        if self.writers:
            for block in blocks:
                if block in self.writers:
                    self._complain(f"{self.name}: the engine computes with block {block} while a writer can write to it")

    def check_sent(self, block: int) -> None:
        if self.blocks is not None and self.blocks.num_references(block) == 0:
            self._complain(f"{self.name}: block {block} is sent after it was given back")


class WatchedBlocks(BlockManager):
    """The real one; `memory` hears of every change of owner."""

    memory: Memory

    def allocate(self, count: int) -> list[int]:
        blocks = super().allocate(count)
        for block in blocks:
            self.memory.owner_changes(block, "allocated")
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        for block in blocks:
            if not self.num_references(block):
                self.memory.owner_changes(block, "given back")

    def end_quarantine(self, blocks: Sequence[int]) -> None:
        super().end_quarantine(blocks)
        for block in blocks:
            self.memory.owner_changes(block, "taken out of quarantine")
