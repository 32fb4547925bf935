"""Attention by Triton kernels that read KV where it lies in the pool: nothing is gathered, nothing is padded.

    fast    spans of a few tokens are split over KV (`attention_split`), longer ones go in tiles (`attention_prefill`)
    exact   all spans go through the split kernel, in tiles of one shape and parts that depend on positions alone

A plan is some small integers per query tile, one copy to the device for a step. In exact mode a long chunk takes several
launches, so that the scratch for its parts stays within bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from common.engine.attention import Span
from common.engine.kv_pool import KVPool
from common.engine.to_device import to_device
from common.engine.triton_kernels.attention_prefill import attend_prefill
from common.engine.triton_kernels.attention_split import attend_split
from common.engine.triton_kernels.configurations import EXACT_SPLIT_TOKENS, num_splits, tiling
from common.engine.triton_kernels.launch import padded_width

Tile = tuple[int, int, int, int]
"""First row, tokens, position of the first, sequence."""
_SHORT_TOKENS = 16
"""Spans up to this long, single tokens and guesses, are bound by the KV that they read."""
_SCRATCH_BYTES = 64 * 1024 * 1024


class PagedAttention:
    def __init__(self, pool: KVPool, num_heads: int, *, exact: bool) -> None:
        self._pool = pool
        self._num_heads = num_heads
        self._exact = exact
        layout = pool.layout
        group = num_heads // layout.num_kv_heads
        self._split = tiling("exact" if exact else "split", pool.tensor.dtype, layout.head_dim, group)
        self._prefill = tiling("prefill", pool.tensor.dtype, layout.head_dim, group)
        self._group = group

    @classmethod
    def fast(cls, pool: KVPool, num_heads: int) -> PagedAttention:
        return cls(pool, num_heads, exact=False)

    @classmethod
    def exact(cls, pool: KVPool, num_heads: int) -> PagedAttention:
        return cls(pool, num_heads, exact=True)

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> PagedPlan:
        short: list[Tile] = []
        long: list[Tile] = []
        for sequence, span in enumerate(spans):
            if self._exact or span.num_rows <= _SHORT_TOKENS:
                short += _tiles(span, sequence, self._split.tokens(self._group))
            else:
                long += _tiles(span, sequence, self._prefill.tokens(self._group))
        # The longest first: what is left at the end, when not all multiprocessors have something to do, is short.
        long.sort(key=lambda tile: -tile[2])
        return PagedPlan(self, block_tables, short, long)

    def attend_short(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, tables: torch.Tensor, part: ShortTiles, window: int
    ) -> None:
        if self._exact:
            split_tokens = EXACT_SPLIT_TOKENS
            splits = -(-part.longest_tokens // split_tokens)
        else:
            split_tokens = 0
            seen = min(part.longest_tokens, window + _SHORT_TOKENS) if window else part.longest_tokens
            splits = num_splits(len(part.tiles) * self._pool.layout.num_kv_heads, seen, self._split.kv_tile)
        attend_split(
            queries,
            self._pool,
            layer,
            tables,
            part.tiles,
            output,
            tiling=self._split,
            most_tokens=part.most_tokens,
            num_splits=splits,
            split_tokens=split_tokens,
            window=window,
        )

    def attend_long(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, tables: torch.Tensor, tiles: torch.Tensor, window: int
    ) -> None:
        attend_prefill(queries, self._pool, layer, tables, tiles, output, tiling=self._prefill, window=window)

    def in_parts(self, tiles: Sequence[Tile]) -> list[list[Tile]]:
        """Tiles in groups, whose scratch is within bounds. One group where that is not exact mode."""
        if not self._exact:
            return [list(tiles)] if tiles else []
        row_bytes = self._num_heads * (padded_width(self._pool.layout.head_dim) + 2) * 4
        groups: list[list[Tile]] = []
        rows = splits = 0
        for tile in tiles:
            tile_splits = -(-(tile[2] + tile[1]) // EXACT_SPLIT_TOKENS)
            if not groups or (rows + tile[1]) * max(splits, tile_splits) * row_bytes > _SCRATCH_BYTES:
                groups.append([])
                rows = splits = 0
            groups[-1].append(tile)
            rows, splits = rows + tile[1], max(splits, tile_splits)
        return groups

    @property
    def device(self) -> torch.device:
        return self._pool.device


class ShortTiles:
    """Tiles of one launch of the split kernel."""

    def __init__(self, tiles: Sequence[Tile], device: torch.device) -> None:
        self.most_tokens = max(tile[1] for tile in tiles)
        self.longest_tokens = max(tile[2] + tile[1] for tile in tiles)
        self.tiles = _on(device, tiles)


class PagedPlan:
    def __init__(
        self,
        backend: PagedAttention,
        block_tables: torch.Tensor,
        short: Sequence[Tile],
        long: Sequence[Tile],
    ) -> None:
        self._backend = backend
        self._block_tables = block_tables
        self._short = [ShortTiles(part, backend.device) for part in backend.in_parts(short)]
        self._long = _on(backend.device, long) if long else None

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        queries = queries.contiguous()
        output = torch.empty_like(queries)
        for part in self._short:
            self._backend.attend_short(layer, queries, output, self._block_tables, part, window)
        if self._long is not None:
            self._backend.attend_long(layer, queries, output, self._block_tables, self._long, window)
        return output


def _tiles(span: Span, sequence: int, tokens: int) -> list[Tile]:
    return [
        (span.first_row + offset, min(tokens, span.num_rows - offset), span.start + offset, sequence)
        for offset in range(0, span.num_rows, tokens)
    ]


def _on(device: torch.device, tiles: Sequence[tuple[int, ...]]) -> torch.Tensor:
    return to_device(np.array(tiles, dtype=np.int32), device)
