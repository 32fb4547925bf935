"""The oracle: each row by itself, each token of KV fetched by its block and offset, softmax in fp64. Slow on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.engine.attention import Span
from common.engine.kv_pool import KVPool
from common.engine.rounded_rows import widen_rows


class ReferenceAttention:
    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> ReferencePlan:
        return ReferencePlan(self._pool, self._num_heads, block_tables.tolist(), spans)


class ReferencePlan:
    def __init__(self, pool: KVPool, num_heads: int, block_tables: list[list[int]], spans: Sequence[Span]) -> None:
        self._pool = pool
        self._num_heads = num_heads
        self._block_tables = block_tables
        self._spans = spans

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        layout = self._pool.layout
        group = self._num_heads // layout.num_kv_heads
        output = torch.empty_like(queries)
        for table, span in zip(self._block_tables, self._spans, strict=True):
            tokens = [
                self._pool.tensor[table[position // layout.block_tokens], layer, :, :, position % layout.block_tokens]
                for position in range(span.end)
            ]
            rows = torch.stack(tokens)
            if layout.is_rounded:
                rows = widen_rows(rows, layout.head_dim, torch.float32)
            keys, values = rows.double().unbind(2)  # [tokens, kv_heads, head_dim]
            for row in range(span.num_rows):
                end = span.start + row + 1
                seen = slice(max(0, end - window) if window else 0, end)
                for head in range(self._num_heads):
                    query = queries[span.first_row + row, head].double()
                    scores = keys[seen, head // group] @ query / layout.head_dim**0.5
                    attended = torch.softmax(scores, dim=0) @ values[seen, head // group]
                    output[span.first_row + row, head] = attended.to(output.dtype)
        return output
