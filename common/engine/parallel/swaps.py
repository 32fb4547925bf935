"""Swap space of a group: each rank keeps what its own window of a block holds, in slots that have the same numbers on all ranks.

    rank 0   move(slots in, blocks out)  -->  every rank copies its part  -->  all have said so

It ends when all have: what has gone may be overwritten by anybody, on any rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from common.engine.kv_pool import NULL_BLOCK
from common.types import KVLayout


class MovesBlocks(Protocol):
    """Of `Conductor`, what is used here."""

    def make_swap_region(self, num_slots: int) -> None: ...

    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None: ...


class GroupSwapRegion:
    """A `SwapSpace`. Figures are of whole blocks."""

    def __init__(self, group: MovesBlocks, settle: Callable[[], None], layout: KVLayout, num_blocks: int, num_bytes: int) -> None:
        """`settle` returns when no step that was launched is computed any more."""
        self.block_bytes = layout.block_bytes
        self.num_slots = min(num_bytes // self.block_bytes, num_blocks)
        self.moved_bytes, self.moving_s = 0, 0.0
        self._group = group
        self._settle = settle
        group.make_swap_region(self.num_slots)

    def measured_bytes_per_s(self) -> float:
        seconds = 0.0
        for _ in range(2):  # the first touches the memory
            started_s = time.perf_counter()
            self._group.move((), ((NULL_BLOCK, 0),))
            seconds = max(1e-9, time.perf_counter() - started_s)
        return self.block_bytes / seconds

    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        self._settle()
        started_s = time.perf_counter()
        self._group.move(brought_in, put_out)
        self.moving_s += time.perf_counter() - started_s
        self.moved_bytes += (len(brought_in) + len(put_out)) * self.block_bytes

    def close(self) -> None:
        self._settle()
        self._group.make_swap_region(0)
