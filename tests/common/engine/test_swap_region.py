"""Blocks in the swap region, byte by byte."""

from __future__ import annotations

import torch

from common.engine.kv_pool import KVPool
from common.engine.swap_region import SwapRegion
from common.types import KVLayout

LAYOUT = KVLayout("m", "t", 2, 2, 4, 4, "float32", False)


def test_blocks_go_and_come_back_elsewhere() -> None:
    pool = KVPool(LAYOUT, 6, torch.device("cpu"))
    pool.tensor[1:].copy_(torch.randn(5, *pool.tensor.shape[1:]))
    before = pool.tensor.clone()
    region = SwapRegion(pool, 3 * LAYOUT.block_bytes + 5)
    assert region.num_slots == 3
    assert region.measured_bytes_per_s() > 0
    region.move([], [(1, 2), (4, 0)])
    pool.tensor[1:].fill_(float("nan"))
    region.move([(2, 5), (0, 1)], [])
    assert torch.equal(pool.tensor[5], before[1])
    assert torch.equal(pool.tensor[1], before[4])
    assert pool.tensor[2].isnan().all()
    assert region.moved_bytes == 4 * LAYOUT.block_bytes


def test_a_slot_is_read_before_it_is_written_again() -> None:
    pool = KVPool(LAYOUT, 4, torch.device("cpu"))
    for block in range(1, 4):
        pool.tensor[block].fill_(block)
    region = SwapRegion(pool, LAYOUT.block_bytes)
    region.move([], [(1, 0)])
    region.move([(0, 3)], [(2, 0)])
    region.move([(0, 1)], [])
    assert [int(pool.tensor[block].max()) for block in (1, 2, 3)] == [2, 2, 1]


def test_there_are_no_more_slots_than_blocks() -> None:
    pool = KVPool(LAYOUT, 4, torch.device("cpu"))
    assert SwapRegion(pool, 100 * LAYOUT.block_bytes).num_slots == 4
