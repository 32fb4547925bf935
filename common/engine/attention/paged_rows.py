"""Attention of one row of each of many sequences by the kernel that splits KV, in a shape that can be captured.

The kernel's grid is fixed by the number of rows and by how long sequences may become; how long each is, it reads on the device,
and
programs that have nothing to read end at once. KV is cut into as many parts as fill the GPU with that many rows, whatever their
lengths: few rows are split much, many not at all.
"""

from __future__ import annotations

import torch

from common.engine.kv_pool import KVPool
from common.engine.triton_kernels.attention_split import attend_split
from common.engine.triton_kernels.configurations import num_splits, tiling


class PagedRowsAttention:
    reads_whole_tables = False

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        layout = pool.layout
        self.pool = pool
        self.tiling = tiling("split", pool.tensor.dtype, layout.head_dim, num_heads // layout.num_kv_heads)

    def plan_rows(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> PagedRowsPlan:
        return PagedRowsPlan(self, block_tables, lengths)


class PagedRowsPlan:
    def __init__(self, attention: PagedRowsAttention, block_tables: torch.Tensor, lengths: torch.Tensor) -> None:
        self._attention = attention
        self._block_tables = block_tables
        layout = attention.pool.layout
        rows = torch.arange(len(lengths), device=lengths.device)
        # First row, tokens, position of the first, row of the tables: a tile for each row.
        self._tiles = torch.stack((rows, torch.ones_like(rows), lengths - 1, rows), dim=1).int()
        most_tokens = block_tables.shape[1] * layout.block_tokens
        self._num_splits = num_splits(len(lengths) * layout.num_kv_heads, most_tokens, attention.tiling.kv_tile)

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        queries = queries.contiguous()
        output = torch.empty_like(queries)
        attend_split(
            queries,
            self._attention.pool,
            layer,
            self._block_tables,
            self._tiles,
            output,
            tiling=self._attention.tiling,
            most_tokens=1,
            num_splits=self._num_splits,
            split_tokens=0,
            window=window,
        )
        return output
