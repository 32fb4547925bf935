"""Host memory that blocks of the KV pool are copied to and from, whole, as they are.

    pool [block]  --move out-->  region [slot]  --move in-->  pool [another block]

On a CPU the region is ordinary memory, touched only where something is kept; a block is copied as the bytes that it has in the
pool, so where several processes share one pool it is one copy for all of them, made between their steps. On a GPU it is pinned
memory, and copies are waited for. Who has which slot is the scheduler's account. Moves are made by the thread that uses the
runner, while nothing computes in the blocks concerned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from common.engine.kv_pool import NULL_BLOCK, KVPool


class SwapRegion:
    def __init__(self, pool: KVPool, num_bytes: int) -> None:
        """As many slots as fit, and one does; at most one for each block of the pool."""
        self.block_bytes = pool.whole_layout.block_bytes
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

    def measured_bytes_per_s(self) -> float:
        """Of a copy of the null block to a slot, before anything is kept."""
        seconds = 0.0
        for _ in range(2):  # the first touches the memory
            started_s = time.perf_counter()
            self._copy(self._slots, 0, self._blocks, NULL_BLOCK)
            self._wait()
            seconds = max(1e-9, time.perf_counter() - started_s)
        return self.block_bytes / seconds

    @torch.inference_mode()
    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        """(slot, block) of what comes back, then (block, slot) of what goes; returns when all is copied."""
        started_s = time.perf_counter()
        for slot, block in brought_in:
            self._copy(self._blocks, block, self._slots, slot)
        for block, slot in put_out:
            self._copy(self._slots, slot, self._blocks, block)
        self._wait()
        self.moving_s += time.perf_counter() - started_s
        self.moved_bytes += (len(brought_in) + len(put_out)) * self.block_bytes

    def _copy(self, to: torch.Tensor, target: int, source: torch.Tensor, index: int) -> None:
        to[target].copy_(source[index], non_blocking=True)

    def _wait(self) -> None:
        if self._pool.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
