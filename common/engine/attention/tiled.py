"""Attention as a walk over fixed tiles: what a row gets depends on that row alone, bit by bit.

                 KV tile 0      KV tile 1      KV tile 2          tiles start at multiples of their width, whoever computes
    query tile | ############ | ############ | ####........ |      . = masked: exp(-inf) = 0 adds nothing, not a bit
    query tile | ############ | ############ | ########.... |

A query tile holds a few tokens of one sequence, with the query heads that share a KV head, as the rows of one matrix. Every
matrix product has the same shape, whether its tile holds one token of a decode step or many of a prompt; softmax is online, in
fp32, in KV order. So neither chunk borders, nor the batch, nor which part of the prefix was cached, change what is added to what.

Tiles are computed side by side as the entries of one batched product, which must not, and on the machines that we test does
not, depend on how many entries it has; `common.engine.exactness_check` shows that when an engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.blocks import exact_tile_blocks
from common.engine.attention import Span
from common.engine.kv_pool import KVPool

_QUERY_TILE_ROWS = 16
_WIDTH_MULTIPLE = 16
"""Matrix libraries have remainder kernels for narrow odd outputs, in which a row's place matters: heads are padded to this."""


class TiledAttention:
    def __init__(self, pool: KVPool, num_heads: int) -> None:
        self._pool = pool
        self._num_heads = num_heads

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> TiledPlan:
        """Sequences of one query tile each go together; a longer chunk goes alone, all its tiles read the same keys."""
        layout = self._pool.layout
        tile_tokens = query_tile_tokens(self._num_heads // layout.num_kv_heads)
        short = [sequence for sequence, span in enumerate(spans) if span.num_rows <= tile_tokens]
        long = [[sequence] for sequence, span in enumerate(spans) if span.num_rows > tile_tokens]
        groups = [
            TileGroup(self._pool, self._num_heads, tile_tokens, block_tables[members], [spans[i] for i in members])
            for members in ([short] if short else []) + long
        ]
        return TiledPlan(groups)


def query_tile_tokens(heads_per_kv_head: int) -> int:
    """Tokens of a query tile: as many as make 16 rows, or one."""
    return max(1, _QUERY_TILE_ROWS // heads_per_kv_head)


class TiledPlan:
    def __init__(self, groups: Sequence[TileGroup]) -> None:
        self._groups = groups

    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        output = torch.empty_like(queries)
        for group in self._groups:
            group.attend(layer, queries, output, window)
        return output


class TileGroup:
    """Query tiles that are walked over KV together: one tile of each of several sequences, or all tiles of one."""

    def __init__(self, pool: KVPool, num_heads: int, tile_tokens: int, block_tables: torch.Tensor, spans: Sequence[Span]) -> None:
        layout = pool.layout
        self._pool = pool
        self._kv_heads = layout.num_kv_heads
        self._heads_per_kv_head = num_heads // layout.num_kv_heads
        self._tile_tokens = tile_tokens
        self._scale = layout.head_dim**-0.5
        tile_blocks = exact_tile_blocks(layout.block_tokens)
        self._kv_tile_tokens = tile_blocks * layout.block_tokens

        tiles: list[tuple[int, int, int, int]] = []  # rows to see of KV, first row, rows, position of the first
        for sequence, span in enumerate(spans):
            for offset in range(0, span.num_rows, tile_tokens):
                count = min(tile_tokens, span.num_rows - offset)
                tiles.append((span.start + offset + count, span.first_row + offset, count, sequence))
        # Longest first: the tiles that still have KV ahead of them are always the first ones.
        tiles.sort(reverse=True)
        self._rows, self._positions, self._kept = self._index(tiles)
        self._num_active = [sum(1 for seen, *_ in tiles if seen > start) for start in range(0, tiles[0][0], self._kv_tile_tokens)]
        first_positions = [seen - count for seen, _, count, _ in tiles]
        self._first_position = min(first_positions)
        self._needs_mask = [
            min(first_positions[:active]) < (index + 1) * self._kv_tile_tokens - 1
            for index, active in enumerate(self._num_active)
        ]
        # One sequence's tables serve all of its tiles; several sequences have one tile each, in the order of `tiles`.
        self._shared = len(spans) == 1
        tables = block_tables if self._shared else block_tables[[sequence for *_, sequence in tiles]]
        self._gather_indexes = self._tile_gathers(tables, tile_blocks)

    def _index(self, tiles: Sequence[tuple[int, int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row and position of every token of every tile, and which of them are rows rather than padding."""
        rows: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for seen, first_row, count, _ in tiles:
            kept.extend(range(len(rows), len(rows) + count))
            # Padding repeats the first row: what it computes is thrown away, but it must be a row that sees something.
            padding = [0] * (self._tile_tokens - count)
            rows.extend(first_row + offset for offset in [*range(count), *padding])
            positions.extend(seen - count + offset for offset in [*range(count), *padding])
        device = self._pool.device
        return (
            torch.tensor(rows, device=device),
            torch.tensor(positions, device=device).view(len(tiles), 1, self._tile_tokens, 1, 1),
            torch.tensor(kept, device=device),
        )

    def _tile_gathers(self, tables: torch.Tensor, tile_blocks: int) -> list[torch.Tensor]:
        width = len(self._num_active) * tile_blocks
        padded = tables.new_zeros(len(tables), width)  # the null block
        present = min(width, tables.shape[1])
        padded[:, :present] = tables[:, :present]
        return [
            self._pool.gather_index(padded[: 1 if self._shared else active, index * tile_blocks : (index + 1) * tile_blocks])
            for index, active in enumerate(self._num_active)
        ]

    def attend(self, layer: int, queries: torch.Tensor, output: torch.Tensor, window: int) -> None:
        tiles, head_dim = len(self._rows) // self._tile_tokens, queries.shape[-1]
        matrix_rows = self._tile_tokens * self._heads_per_kv_head
        split = (tiles, self._tile_tokens, self._kv_heads, self._heads_per_kv_head, head_dim)
        tile_queries = queries.index_select(0, self._rows).view(split).transpose(1, 2).float().mul_(self._scale)
        tile_queries = tile_queries.reshape(tiles, self._kv_heads, matrix_rows, head_dim)
        # Finite: a row may meet tiles that lie wholly before its window, which then add 0 and leave it as it is.
        lowest = torch.finfo(tile_queries.dtype).min
        highest = tile_queries.new_full((tiles, self._kv_heads, matrix_rows, 1), lowest)
        total = torch.zeros_like(highest)
        padding = (0, -head_dim % _WIDTH_MULTIPLE)
        weighted = tile_queries.new_zeros((*tile_queries.shape[:-1], head_dim + padding[1]))
        first_tile = max(0, self._first_position - window + 1) // self._kv_tile_tokens if window else 0
        for index in range(first_tile, len(self._num_active)):
            active = self._num_active[index]
            keys, values = self._pool.gather(layer, self._gather_indexes[index])
            scores = self._product(tile_queries[:active], keys.float().transpose(2, 3))
            if window or self._needs_mask[index]:
                self._mask(scores, index, window)
            new_highest = torch.maximum(highest[:active], scores.amax(dim=-1, keepdim=True))
            scores.sub_(new_highest).exp_()
            fade = highest[:active].sub_(new_highest).exp_()
            total[:active].mul_(fade).add_(scores.sum(dim=-1, keepdim=True))
            weighted[:active].mul_(fade).add_(self._product(scores, F.pad(values.float(), padding)))
            highest[:active] = new_highest
        attended = weighted[..., :head_dim].div_(total)
        split = (tiles, self._kv_heads, self._tile_tokens, self._heads_per_kv_head, head_dim)
        flat = attended.reshape(split).transpose(1, 2).reshape(tiles * self._tile_tokens, -1, head_dim)
        output.index_copy_(0, self._rows[self._kept], flat[self._kept].to(output.dtype))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[tiles, kv_heads, rows, n] x [tiles or 1, kv_heads, n, m], always with the same rows, n and m."""
        tiles, heads, rows, _ = left.shape
        if not self._shared:
            product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
            return product.view(tiles, heads, rows, -1)
        per_head = [torch.bmm(left[:, head], right[:, head].expand(tiles, -1, -1)) for head in range(heads)]
        return torch.stack(per_head, dim=1)

    def _mask(self, scores: torch.Tensor, index: int, window: int) -> None:
        start = index * self._kv_tile_tokens
        kv_positions = torch.arange(start, start + self._kv_tile_tokens, device=scores.device)
        positions = self._positions[: len(scores)]
        hidden = kv_positions > positions  # [tiles, 1, tile_tokens, 1, kv_tile_tokens]
        if window:
            hidden |= kv_positions <= positions - window
        split = scores.view(len(scores), self._kv_heads, self._tile_tokens, self._heads_per_kv_head, -1)
        split.masked_fill_(hidden, -torch.inf)
