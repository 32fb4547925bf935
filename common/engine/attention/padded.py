"""Attention for one row of each of many sequences, in a shape that does not depend on how long they are.

Every row gathers its whole block table and masks what is beyond its length, which is a tensor: nothing comes to the host, so the
step can be captured. It reads as much as the widest table; where lengths differ much a kernel that stops at each row's own is
better, and this is what there is where no such kernel is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.engine.kv_pool import KVPool


class PaddedAttention:
    reads_whole_tables = True

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan_rows(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> PaddedPlan:
        return PaddedPlan(self._pool, self._num_heads, block_tables, lengths)


class PaddedPlan:
    def __init__(self, pool: KVPool, num_heads: int, block_tables: torch.Tensor, lengths: torch.Tensor) -> None:
        self._pool = pool
        self._num_heads = num_heads
        self._lengths = lengths[:, None]
        self._gather_index = pool.gather_index(block_tables)
        self._keys = torch.arange(block_tables.shape[1] * pool.layout.block_tokens, device=block_tables.device)
        self._masks: dict[int, torch.Tensor] = {}  # by window

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        mask = self._masks.get(window)
        if mask is None:
            seen = self._keys < self._lengths
            if window:
                seen &= self._keys >= self._lengths - window
            mask = self._masks[window] = seen[:, None, None]
        keys, values = self._pool.gather(layer, self._gather_index)
        grouped = queries.view(len(queries), self._pool.layout.num_kv_heads, -1, queries.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(queries.shape)
