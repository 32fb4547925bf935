"""The walk of some query rows over the KV of one sequence, tile by tile, in order of position: what all attention kernels share.

             KV tile 0    KV tile 1    KV tile 2           tiles start at multiples of their width
    rows   | ########## | ########## | ####...... |        . = masked: adds 0, and changes no bit

KV is read where it lies in the pool, `[block][layer][kv_head][K,V][token][head_dim]`: the width of a tile and the tokens of a
block have nothing to do with each other. Softmax is online, in fp32, with powers of 2; a row that has seen nothing yet has a
highest score of -inf, and what it meets then counts for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from common.engine.kv_pool import KVPool
from common.engine.triton_kernels.configurations import Tiling
from common.engine.triton_kernels.launch import padded_width


@triton.jit
def tile_rows(
    tiles,
    queries,
    kv_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Of the program's query tile: its queries [ROWS, DIM_PADDED], where they lie in `queries` (in rows of a head), which of them
    there are, their positions, its first position, the end of what it sees, and its sequence.

    A row of the tile is a token and one of the heads that share a KV head, token by token."""
    place = tiles + tl.program_id(0) * 4
    first_row, num_tokens = tl.load(place), tl.load(place + 1)
    first_position, sequence = tl.load(place + 2), tl.load(place + 3)
    row = tl.arange(0, ROWS)
    token = row // GROUP
    there = token < num_tokens
    rows_at = (first_row + token).to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP
    dims = tl.arange(0, DIM_PADDED)
    values = tl.load(queries + rows_at[:, None] * DIM + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    positions = tl.where(there, first_position + token, -1)
    return values, rows_at, there, positions, first_position, first_position + num_tokens, sequence


@triton.jit
def nothing_seen(ROWS: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Highest, total and weighted of rows before their walk."""
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    return highest, tl.full([ROWS], 0.0, tl.float32), tl.full([ROWS, DIM_PADDED], 0.0, tl.float32)


@triton.jit
def keys_of_head(pool, layer, kv_head, LAYER_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr):
    """Where the keys of a layer and head begin in block 0. By constants: only if it knows the address for a multiple of 16 bytes
    can the compiler read so many at once."""
    return pool + layer.to(tl.int64) * LAYER_STRIDE + kv_head.to(tl.int64) * HEAD_STRIDE


@triton.jit
def begin_of_window(first_position, window, TILE: tl.constexpr):
    """The beginning of the KV tile with the first token that the first row sees."""
    return tl.maximum(first_position - window + 1, 0) // TILE * TILE


@triton.jit
def walk(
    query,
    positions,
    highest,
    total,
    weighted,
    table,
    pool,
    first,
    end,
    limit,
    window,
    scale,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """From position `first`, a multiple of TILE, to before `end`; nothing at or after `limit` is read. Not MASKED: every row sees
    every key. `pool` points to the keys of this layer and head in block 0. Returns highest, total and weighted."""
    dims = tl.arange(0, DIM_PADDED)
    for start in tl.range(first, end, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < limit
        if MASKED:
            block = tl.load(table + at // BLOCK_TOKENS, mask=inside, other=0)
        else:
            block = tl.load(table + at // BLOCK_TOKENS)
        tokens = pool + block.to(tl.int64) * BLOCK_STRIDE + (at % BLOCK_TOKENS) * DIM
        keys_at = tokens[None, :] + dims[:, None]
        values_at = tokens[:, None] + BLOCK_TOKENS * DIM + dims[None, :]
        if DIM != DIM_PADDED:
            known = dims < DIM
            keys = tl.load(keys_at, mask=inside[None, :] & known[:, None], other=0.0)
            values = tl.load(values_at, mask=inside[:, None] & known[None, :], other=0.0)
        elif MASKED:
            keys = tl.load(keys_at, mask=inside[None, :], other=0.0)
            values = tl.load(values_at, mask=inside[:, None], other=0.0)
        else:
            keys = tl.load(keys_at)
            values = tl.load(values_at)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        if MASKED:
            seen = at[None, :] <= positions[:, None]
            if WINDOWED:
                seen = seen & (at[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        fade = tl.exp2(highest - anchor)
        weights = tl.exp2(scores - anchor[:, None])
        total = total * fade + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, weighted * fade[:, None], input_precision="ieee")
        highest = new_highest
    return highest, total, weighted


def walk_constants(queries: torch.Tensor, pool: KVPool, tiling: Tiling, window: int) -> dict[str, Any]:
    """What a kernel that walks is compiled for, by the names of its parameters, and how it is launched."""
    (_, num_heads, head_dim), layout = queries.shape, pool.layout
    block_stride, layer_stride, head_stride = pool.tensor.stride()[:3]
    return {
        "WINDOWED": window > 0,
        "HEADS": num_heads,
        "GROUP": num_heads // layout.num_kv_heads,
        "LAYER_STRIDE": layer_stride,
        "HEAD_STRIDE": head_stride,
        "BLOCK_STRIDE": block_stride,
        "BLOCK_TOKENS": layout.block_tokens,
        "DIM": head_dim,
        "DIM_PADDED": padded_width(head_dim),
        "ROWS": tiling.rows,
        "TILE": tiling.kv_tile,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
