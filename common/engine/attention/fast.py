"""Attention in whatever shape is fastest: torch's fused kernel per chunk, padded groups for single-token rows.

    rows of a step   | chunk of A ........ | chunk of B .. | C | D | E | F |
                       one call               one call        groups of similar length, one call each

Groups are by the power of two that covers the blocks that a row sees: padding never more than doubles what is gathered. A window
leaves out the blocks before it; what it takes to attend with one is prepared when a layer first asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.blocks import num_blocks
from common.engine.attention import Span
from common.engine.kv_pool import NULL_BLOCK, KVPool


class FastAttention:
    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> FastPlan:
        return FastPlan(self._pool, self._num_heads, block_tables, spans)


@dataclass(frozen=True, slots=True)
class _Chunk:
    span: Span
    gather_index: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None  # None: the whole sequence, plain causal


@dataclass(frozen=True, slots=True)
class _Singles:
    rows: torch.Tensor
    gather_index: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _View:
    """How the rows of a step see the pool through one window."""

    chunks: list[_Chunk]
    singles: list[_Singles]


class FastPlan:
    def __init__(self, pool: KVPool, num_heads: int, block_tables: torch.Tensor, spans: Sequence[Span]) -> None:
        self._pool = pool
        self._num_heads = num_heads
        self._block_tables = block_tables
        self._spans = spans
        self._longest = max((span.end for span in spans), default=0)
        self._views: dict[int, _View] = {}  # by window

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        view = self._view(window if window < self._longest else 0)
        output = torch.empty_like(queries)
        for chunk in view.chunks:
            rows = slice(chunk.span.first_row, chunk.span.first_row + chunk.span.num_rows)
            keys, values = self._pool.gather(layer, chunk.gather_index)
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],
                keys[:, :, : chunk.num_keys],
                values[:, :, : chunk.num_keys],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                enable_gqa=True,
            )
            output[rows] = attended[0].transpose(0, 1)
        for singles in view.singles:
            keys, values = self._pool.gather(layer, singles.gather_index)
            # The query heads of one KV head stand where a chunk's rows would: no key is read twice.
            grouped = queries[singles.rows].view(len(singles.rows), self._pool.layout.num_kv_heads, -1, queries.shape[-1])
            attended = F.scaled_dot_product_attention(
                grouped, keys[:, :, : singles.num_keys], values[:, :, : singles.num_keys], attn_mask=singles.mask
            )
            output[singles.rows] = attended.reshape(len(singles.rows), self._num_heads, -1)
        return output

    def _view(self, window: int) -> _View:
        view = self._views.get(window)
        if view is None:
            chunks: list[_Chunk] = []
            groups: dict[int, list[int]] = {}
            for sequence, span in enumerate(self._spans):
                if span.num_rows == 1:
                    first, end = self._blocks(span, window)
                    groups.setdefault((end - first).bit_length(), []).append(sequence)
                else:
                    chunks.append(self._chunk(sequence, span, window))
            view = self._views[window] = _View(chunks, [self._singles(members, window) for members in groups.values()])
        return view

    def _blocks(self, span: Span, window: int) -> tuple[int, int]:
        """The first block that any row of the span sees, and the end of the last."""
        block_tokens = self._pool.layout.block_tokens
        first = max(0, span.start - window + 1) // block_tokens if window else 0
        return first, num_blocks(span.end, block_tokens)

    def _chunk(self, sequence: int, span: Span, window: int) -> _Chunk:
        first, end = self._blocks(span, window)
        skipped = first * self._pool.layout.block_tokens
        num_keys = span.end - skipped
        mask = None
        if span.start or 0 < window < span.end:
            mask = torch.ones(span.num_rows, num_keys, dtype=torch.bool, device=self._pool.device)
            mask = mask.tril_(span.start - skipped)
            if window:
                mask = mask.triu_(span.start - skipped - window + 1)
        return _Chunk(span, self._pool.gather_index(self._block_tables[sequence : sequence + 1, first:end]), num_keys, mask)

    def _singles(self, members: list[int], window: int) -> _Singles:
        device, block_tokens = self._pool.device, self._pool.layout.block_tokens
        spans = [self._spans[sequence] for sequence in members]
        blocks = [self._blocks(span, window) for span in spans]
        skipped = [first * block_tokens for first, _ in blocks]
        num_keys = max(span.end - before for span, before in zip(spans, skipped, strict=True))
        mask = None
        if len(spans) > 1 or 0 < window < spans[0].end:
            ends = torch.tensor([span.end - before for span, before in zip(spans, skipped, strict=True)], device=device)[:, None]
            keys = torch.arange(num_keys, device=device)
            seen = keys < ends
            if window:
                seen &= keys >= ends - window
            mask = seen[:, None, None]
        if any(skipped):
            width = max(end - first for first, end in blocks)
            tables = self._block_tables.new_full((len(members), width), NULL_BLOCK)
            for row, (sequence, (first, end)) in enumerate(zip(members, blocks, strict=True)):
                tables[row, : end - first] = self._block_tables[sequence, first:end]
        else:
            tables = self._block_tables[torch.tensor(members, device=device), : num_blocks(num_keys, block_tokens)]
        return _Singles(
            rows=torch.tensor([span.first_row for span in spans], device=device),
            gather_index=self._pool.gather_index(tables),
            num_keys=num_keys,
            mask=mask,
        )
