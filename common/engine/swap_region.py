"""Host memory that blocks of the KV pool are copied to and from, whole, as they are.

    pool [block]  --move out-->  region [slot]  --move in-->  pool [another block]

On a CPU the region is ordinary memory, touched only where something is kept; a block is copied as the bytes that it has in the
pool. Who has which slot is the scheduler's account. Where several processes compute as one, each has such a region for its own
pool, and `parallel.swaps` is the space that they make together. Moves are made by the thread that uses the runner, while nothing
computes in the blocks concerned.

On a GPU it is pinned memory. What comes back is queued before the step that reads it, and nobody waits: steps that are under way
go on. What goes out is waited for, since its blocks may be given to somebody who does not write through the engine's queue: to a
transfer. How long copies took is known when they are over, so the account of them may be a move late.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from common.engine.kv_pool import NULL_BLOCK, KVPool


class SwapSpace(Protocol):
    """What keeps blocks for a scheduler."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def moved_bytes(self) -> int: ...

    @property
    def moving_s(self) -> float: ...

    def measured_bytes_per_s(self) -> float:
        """Of a copy of the null block to a slot, before anything is kept."""
        ...

    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        """(slot, block) of what comes back, then (block, slot) of what goes. When it returns, what has gone is copied, and what
        comes back is there for whatever is computed next."""
        ...

    def close(self) -> None:
        """Lets go of the memory. Nothing is kept any more."""
        ...


class SwapRegion:
    """A `SwapSpace` of one process."""

    def __init__(self, pool: KVPool, num_bytes: int) -> None:
        """As many slots as fit, and one does; at most one for each block of the pool."""
        self.block_bytes = pool.layout.block_bytes
        self.num_slots = min(num_bytes // self.block_bytes, pool.num_blocks)
        self._pool = pool
        self.moved_bytes, self.moving_s = 0, 0.0
        if pool.device.type == "cpu":
            blocks = np.frombuffer(pool.buffer, dtype=np.uint8)[: pool.num_blocks * self.block_bytes]
            self._blocks = torch.from_numpy(blocks.reshape(pool.num_blocks, self.block_bytes))
            self._slots = torch.from_numpy(np.empty((self.num_slots, self.block_bytes), dtype=np.uint8))
        else:
            self._blocks = pool.tensor.view(pool.num_blocks, -1).view(torch.uint8)
            self._slots = torch.empty(self.num_slots, self.block_bytes, dtype=torch.uint8, pin_memory=True)
        self._under_way: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []  # before, behind, bytes

    def measured_bytes_per_s(self) -> float:
        seconds = 0.0
        for _ in range(2):  # the first touches the memory
            started_s = time.perf_counter()
            self._copy(self._slots, 0, self._blocks, NULL_BLOCK)
            self._wait()
            seconds = max(1e-9, time.perf_counter() - started_s)
        return self.block_bytes / seconds

    @torch.inference_mode()
    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        num_bytes = (len(brought_in) + len(put_out)) * self.block_bytes
        if self._pool.device.type == "cuda":
            self._move_on_device(brought_in, put_out, num_bytes)
            return
        started_s = time.perf_counter()
        self._copy_all(brought_in, put_out)
        self.moving_s += time.perf_counter() - started_s
        self.moved_bytes += num_bytes

    def close(self) -> None:
        """It goes with whoever has it."""

    def _move_on_device(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]], num_bytes: int) -> None:
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self._copy_all(brought_in, put_out)
        behind.record()
        self._under_way.append((before, behind, num_bytes))
        if put_out:
            behind.synchronize()
        while self._under_way and self._under_way[0][1].query():
            before, behind, num_bytes = self._under_way.pop(0)
            self.moving_s += before.elapsed_time(behind) / 1e3
            self.moved_bytes += num_bytes

    def _copy_all(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        for slot, block in brought_in:
            self._copy(self._blocks, block, self._slots, slot)
        for block, slot in put_out:
            self._copy(self._slots, slot, self._blocks, block)

    def _copy(self, to: torch.Tensor, target: int, source: torch.Tensor, index: int) -> None:
        to[target].copy_(source[index], non_blocking=True)

    def _wait(self) -> None:
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
