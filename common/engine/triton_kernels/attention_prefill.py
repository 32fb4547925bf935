"""Attention of a chunk of a prompt over its own keys and over the prefix that was there before, computed or found in a cache.

    program (tile, KV head)    as many tokens of a sequence as make 64 or 128 rows with the query heads that share a KV head

          prefix and own keys before the tile | the diagonal          KV before the window is not walked;
    tile  ####################################|##########....         tiles that every row sees whole need no mask

Nothing leaves the program but the output: there is no scratch, and no second launch. The order of what is added depends on where
the tile begins, so a row's last bits depend on the borders of its chunk: exact mode uses `attention_split`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.kv_pool import KVPool
from common.engine.triton_kernels.attention_split import attend_split_reference
from common.engine.triton_kernels.attention_walk import (
    begin_of_window,
    keys_of_head,
    nothing_seen,
    tile_rows,
    walk,
    walk_constants,
)
from common.engine.triton_kernels.configurations import Tiling
from common.engine.triton_kernels.launch import softmax_scale


@triton.jit(do_not_specialize=["layer", "window", "table_width"])
def prefill_kernel(
    queries,
    pool,
    tables,
    tiles,
    output,
    layer,
    window,
    table_width,
    scale,
    WINDOWED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    kv_head = tl.program_id(1)
    query, rows_at, there, positions, first_position, end, sequence = tile_rows(
        tiles, queries, kv_head, HEADS, GROUP, ROWS, DIM, DIM_PADDED
    )
    highest, total, weighted = nothing_seen(ROWS, DIM_PADDED)
    table = tables + sequence.to(tl.int64) * table_width
    head_keys = keys_of_head(pool, layer, kv_head, LAYER_STRIDE, HEAD_STRIDE)
    begin = 0
    if WINDOWED:
        begin = begin_of_window(first_position, window, TILE)
    else:
        seen_by_all = tl.maximum(first_position + 1, 0) // TILE * TILE
        highest, total, weighted = walk(
            query,
            positions,
            highest,
            total,
            weighted,
            table,
            head_keys,
            begin,
            seen_by_all,
            end,
            window,
            scale,
            False,
            False,
            BLOCK_STRIDE,
            BLOCK_TOKENS,
            DIM,
            DIM_PADDED,
            TILE,
        )
        begin = seen_by_all
    highest, total, weighted = walk(
        query,
        positions,
        highest,
        total,
        weighted,
        table,
        head_keys,
        begin,
        end,
        end,
        window,
        scale,
        True,
        WINDOWED,
        BLOCK_STRIDE,
        BLOCK_TOKENS,
        DIM,
        DIM_PADDED,
        TILE,
    )
    attended = weighted / tl.where(total > 0, total, 1.0)[:, None]
    dims = tl.arange(0, DIM_PADDED)
    tl.store(
        output + rows_at[:, None] * DIM + dims[None, :],
        attended.to(output.dtype.element_ty),
        mask=there[:, None] & (dims < DIM)[None, :],
    )


def attend_prefill(
    queries: torch.Tensor,
    pool: KVPool,
    layer: int,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    tiling: Tiling,
    window: int,
) -> None:
    """`tiles` as those of `attend_split`; rows of `output` that are in no tile stay as they are."""
    prefill_kernel[(len(tiles), pool.layout.num_kv_heads)](
        queries,
        pool.tensor,
        tables,
        tiles,
        output,
        layer,
        window,
        tables.stride(0),
        softmax_scale(queries.shape[2]),
        **walk_constants(queries, pool, tiling, window),
    )


def attend_prefill_reference(
    queries: torch.Tensor,
    pool: KVPool,
    layer: int,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    tiling: Tiling,
    window: int,
) -> None:
    attend_split_reference(
        queries, pool, layer, tables, tiles, output, tiling=tiling, most_tokens=0, num_splits=1, split_tokens=0, window=window
    )
