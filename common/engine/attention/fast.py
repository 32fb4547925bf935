"""Attention in whatever shape is fastest: torch's fused kernel per chunk, padded groups for single-token rows.

    rows of a step   | chunk of A ........ | chunk of B .. | C | D | E | F |
                       one call               one call        groups of similar length, one call each

Groups are by the power of two that covers a sequence's blocks: padding never more than doubles what is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.blocks import num_blocks
from common.engine.attention import Span
from common.engine.kv_pool import KVPool


class FastAttention:
    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> FastPlan:
        chunks: list[_Chunk] = []
        groups: dict[int, list[int]] = {}
        for sequence, span in enumerate(spans):
            blocks = num_blocks(span.end, self._pool.layout.block_tokens)
            if span.num_rows == 1:
                groups.setdefault(blocks.bit_length(), []).append(sequence)
            else:
                chunks.append(self._chunk(block_tables[sequence : sequence + 1, :blocks], span))
        singles = [self._singles(block_tables, [spans[i] for i in members], members) for members in groups.values()]
        return FastPlan(self._pool, self._num_heads, chunks, singles)

    def _chunk(self, block_table: torch.Tensor, span: Span) -> _Chunk:
        mask = None
        if span.start:
            mask = torch.ones(span.num_rows, span.end, dtype=torch.bool, device=self._pool.device).tril_(span.start)
        return _Chunk(span, self._pool.gather_index(block_table), mask)

    def _singles(self, block_tables: torch.Tensor, spans: list[Span], members: list[int]) -> _Singles:
        device = self._pool.device
        longest = max(span.end for span in spans)
        blocks = num_blocks(longest, self._pool.layout.block_tokens)
        mask = None
        if len(spans) > 1:
            ends = torch.tensor([span.end for span in spans], device=device)
            mask = (torch.arange(longest, device=device) < ends[:, None])[:, None, None]
        return _Singles(
            rows=torch.tensor([span.first_row for span in spans], device=device),
            gather_index=self._pool.gather_index(block_tables[torch.tensor(members, device=device), :blocks]),
            longest=longest,
            mask=mask,
        )


@dataclass(frozen=True, slots=True)
class _Chunk:
    span: Span
    gather_index: torch.Tensor
    mask: torch.Tensor | None  # None: the whole sequence, plain causal


@dataclass(frozen=True, slots=True)
class _Singles:
    rows: torch.Tensor
    gather_index: torch.Tensor
    longest: int
    mask: torch.Tensor | None


class FastPlan:
    def __init__(self, pool: KVPool, num_heads: int, chunks: list[_Chunk], singles: list[_Singles]) -> None:
        self._pool = pool
        self._num_heads = num_heads
        self._chunks = chunks
        self._singles = singles

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(queries)
        for chunk in self._chunks:
            rows = slice(chunk.span.first_row, chunk.span.first_row + chunk.span.num_rows)
            keys, values = self._pool.gather(layer, chunk.gather_index)
            end = chunk.span.end
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                enable_gqa=True,
            )
            output[rows] = attended[0].transpose(0, 1)
        for singles in self._singles:
            keys, values = self._pool.gather(layer, singles.gather_index)
            # The query heads of one KV head stand where a chunk's rows would: no key is read twice.
            grouped = queries[singles.rows].view(len(singles.rows), self._pool.layout.num_kv_heads, -1, queries.shape[-1])
            attended = F.scaled_dot_product_attention(
                grouped, keys[:, :, : singles.longest], values[:, :, : singles.longest], attn_mask=singles.mask
            )
            output[singles.rows] = attended.reshape(len(singles.rows), self._num_heads, -1)
        return output
