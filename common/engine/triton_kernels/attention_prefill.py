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
from common.engine.triton_kernels.attention_walk import tile_rows, walk
from common.engine.triton_kernels.configurations import Tiling
from common.engine.triton_kernels.launch import padded_width, softmax_scale


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
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    weighted = tl.full([ROWS, DIM_PADDED], 0.0, tl.float32)
    table = tables + sequence.to(tl.int64) * table_width
    # By constants: only if it knows the address for a multiple of 16 bytes can the compiler read so many at once.
    head_keys = pool + layer.to(tl.int64) * LAYER_STRIDE + kv_head.to(tl.int64) * HEAD_STRIDE
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE
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
    (_, num_heads, head_dim), layout = queries.shape, pool.layout
    block_stride, layer_stride, head_stride = pool.tensor.stride()[:3]
    prefill_kernel[(len(tiles), layout.num_kv_heads)](
        queries,
        pool.tensor,
        tables,
        tiles,
        output,
        layer,
        window,
        tables.stride(0),
        softmax_scale(head_dim),
        WINDOWED=window > 0,
        HEADS=num_heads,
        GROUP=num_heads // layout.num_kv_heads,
        LAYER_STRIDE=layer_stride,
        HEAD_STRIDE=head_stride,
        BLOCK_STRIDE=block_stride,
        BLOCK_TOKENS=layout.block_tokens,
        DIM=head_dim,
        DIM_PADDED=padded_width(head_dim),
        ROWS=tiling.rows,
        TILE=tiling.kv_tile,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
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
