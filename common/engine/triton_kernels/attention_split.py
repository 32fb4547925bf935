"""Attention of few query rows over long KV: the KV of a sequence is split, and the parts are put together in order.

    program (tile, KV head, split)    some tokens of a sequence with the query heads that share a KV head, over a part of its KV
                                      -> scratch: highest score, sum of weights, weighted values, in fp32
    program (slot, head)              a slot is a token of a tile: its parts, from the first to the last -> output

Two ways to split. `split_tokens` > 0: split i is the positions [i, i + 1) * split_tokens of any sequence. Together with one shape
of tile this is the order of exact mode: which parts a row has, and what is added to what in each, depends on its position alone.
A decode step, a chunk of a prompt and a guess all go through this very kernel there. `split_tokens` = 0: each sequence in equal
parts, so that all programs have the same to do; how many parts is then a matter of the batch.

The grid depends on shapes alone, and lengths are read on the device: a captured launch serves every step that fits. A tile of no
tokens, or with a position below 0, sees nothing; its rows come out as 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.attention import Span
from common.engine.attention.reference import ReferenceAttention
from common.engine.kv_pool import KVPool
from common.engine.triton_kernels.attention_walk import (
    begin_of_window,
    keys_of_head,
    nothing_seen,
    tile_rows,
    walk,
    walk_constants,
)
from common.engine.triton_kernels.configurations import Tiling
from common.engine.triton_kernels.launch import padded_width, softmax_scale

MERGED_AT_ONCE = 16
"""Parts that are summed side by side; more go in groups, one after the other."""


@triton.jit(do_not_specialize=["layer", "split_tokens", "window", "table_width", "most_tokens"])
def split_kernel(
    queries,
    pool,
    tables,
    tiles,
    parts,
    states,
    layer,
    split_tokens,
    window,
    table_width,
    most_tokens,
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
    kv_head, split = tl.program_id(1), tl.program_id(2)
    query, _, there, positions, first_position, end, sequence = tile_rows(
        tiles, queries, kv_head, HEADS, GROUP, ROWS, DIM, DIM_PADDED
    )
    low = 0
    if WINDOWED:
        low = begin_of_window(first_position, window, TILE)
    if split_tokens > 0:
        begin = tl.maximum(split * split_tokens, low)
        stop = tl.minimum((split + 1) * split_tokens, end)
    else:
        kv_tiles = (tl.maximum(end - low, 0) + TILE - 1) // TILE
        share = (kv_tiles + tl.num_programs(2) - 1) // tl.num_programs(2) * TILE
        begin = low + split * share
        stop = tl.minimum(begin + share, end)
    highest, total, weighted = nothing_seen(ROWS, DIM_PADDED)
    head_keys = keys_of_head(pool, layer, kv_head, LAYER_STRIDE, HEAD_STRIDE)
    highest, total, weighted = walk(
        query,
        positions,
        highest,
        total,
        weighted,
        tables + sequence.to(tl.int64) * table_width,
        head_keys,
        begin,
        stop,
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
    row = tl.arange(0, ROWS)
    slot = (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * most_tokens + row // GROUP
    part = slot * HEADS + kv_head * GROUP + row % GROUP
    dims = tl.arange(0, DIM_PADDED)
    tl.store(states + part * 2, highest, mask=there)
    tl.store(states + part * 2 + 1, total, mask=there)
    if begin < stop:
        tl.store(parts + part[:, None] * DIM_PADDED + dims[None, :], weighted, mask=there[:, None])


@triton.jit(do_not_specialize=["num_parts", "most_tokens"])
def merge_kernel(
    parts,
    states,
    tiles,
    output,
    num_parts,
    most_tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    tile, token = slot // most_tokens, slot % most_tokens
    # Nothing is read or written for a slot without a token.
    there = token < tl.load(tiles + tile * 4 + 1)
    num_parts = tl.where(there, num_parts, 0)
    num_dims = tl.where(there, DIM, 0)
    row = (tl.load(tiles + tile * 4) + token).to(tl.int64) * HEADS + head
    own = slot.to(tl.int64) * HEADS + head
    stride = tl.num_programs(0).to(tl.int64) * HEADS
    dims = tl.arange(0, DIM_PADDED)
    highest = float("-inf")
    total = 0.0
    weighted = tl.full([DIM_PADDED], 0.0, tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part * stride + own
        heights = tl.load(states + at * 2, mask=part < num_parts, other=float("-inf"))
        # What saw nothing has nothing to say, and is not read.
        saw = heights != float("-inf")
        totals = tl.load(states + at * 2 + 1, mask=saw, other=0.0)
        values = tl.load(parts + at[:, None] * DIM_PADDED + dims[None, :], mask=saw[:, None], other=0.0)
        new_highest = tl.maximum(highest, tl.max(heights, 0))
        anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        fade = tl.exp2(highest - anchor)
        shares = tl.exp2(heights - anchor)
        total = total * fade + tl.sum(totals * shares, 0)
        weighted = weighted * fade + tl.sum(values * shares[:, None], 0)
        highest = new_highest
    attended = weighted / tl.where(total > 0, total, 1.0)
    tl.store(output + row * DIM + dims, attended.to(output.dtype.element_ty), mask=dims < num_dims)


def attend_split(
    queries: torch.Tensor,
    pool: KVPool,
    layer: int,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    tiling: Tiling,
    most_tokens: int,
    num_splits: int,
    split_tokens: int,
    window: int,
) -> None:
    """`tiles` [n, 4] int32: first row of `queries` [rows, heads, head_dim], tokens (at most `most_tokens`, which is at most
    `tiling.tokens`), position of the first, row of `tables`. Rows of `output` that are in no tile stay as they are.
    `split_tokens`, if not 0, is a multiple of `tiling.kv_tile`, and `num_splits` of them hold every sequence."""
    (_, num_heads, head_dim), layout = queries.shape, pool.layout
    width, slots = padded_width(head_dim), len(tiles) * most_tokens
    parts = torch.empty(num_splits, slots, num_heads, width, dtype=torch.float32, device=queries.device)
    states = torch.empty(num_splits, slots, num_heads, 2, dtype=torch.float32, device=queries.device)
    split_kernel[(len(tiles), layout.num_kv_heads, num_splits)](
        queries,
        pool.tensor,
        tables,
        tiles,
        parts,
        states,
        layer,
        split_tokens,
        window,
        tables.stride(0),
        most_tokens,
        softmax_scale(head_dim),
        **walk_constants(queries, pool, tiling, window),
    )
    merge_kernel[(slots, num_heads)](
        parts,
        states,
        tiles,
        output,
        num_splits,
        most_tokens,
        HEADS=num_heads,
        DIM=head_dim,
        DIM_PADDED=width,
        PARTS=MERGED_AT_ONCE,
        num_warps=1 if width <= 64 else 2,
    )


def attend_split_reference(
    queries: torch.Tensor,
    pool: KVPool,
    layer: int,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    tiling: Tiling,
    most_tokens: int,
    num_splits: int,
    split_tokens: int,
    window: int,
) -> None:
    """In fp64, token by token; how KV would be split makes no difference."""
    for first_row, num_tokens, position, sequence in tiles.tolist():
        rows = slice(first_row, first_row + num_tokens)
        if position < 0:
            output[rows] = 0
            continue
        plan = ReferenceAttention(pool, queries.shape[1]).plan(tables[sequence : sequence + 1], [Span(0, num_tokens, position)])
        output[rows] = plan.attend(layer, queries[rows], window)
