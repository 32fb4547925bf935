"""Between the product that makes queries, keys and values and attention: norms heads (if the model does), turns queries and keys
by their positions, and puts keys and values into the paged pool. One launch instead of about fifteen.

    program (row, 0)   queries              -> norm -> turn -> output
    program (row, 1)   keys, values         -> norm -> turn -> pool, `[block][layer][kv_head][K,V][token][head_dim]`

Dimension i turns with dimension i + head_dim / 2, in fp32. Every row is by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.kv_pool import KVPool
from common.engine.layers.norm import OffsetRMSNorm, RMSNorm
from common.engine.layers.rotary import Angles
from common.engine.layers.rotary import turn_and_store as in_torch
from common.engine.triton_kernels.add_norm import TritonNorm


@triton.jit
def normed_halves(low, high, weight, half, known, epsilon, HALF: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """As `add_norm.normed`, for heads [heads, half] x 2."""
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
    low_weight = tl.load(weight + half, mask=known, other=0.0).to(tl.float32)[None, :]
    high_weight = tl.load(weight + HALF + half, mask=known, other=0.0).to(tl.float32)[None, :]
    low, high = low * scale, high * scale
    if not OFFSET:
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    return (low * low_weight).to(dtype).to(tl.float32), (high * high_weight).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["row_stride", "layer_rows"])
def turn_and_store_kernel(
    heads,
    cosines,
    sines,
    query_weight,
    key_weight,
    write_index,
    pool_rows,
    queries,
    row_stride,
    layer_rows,
    query_epsilon,
    key_epsilon,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)
    known = half < HALF
    cosine = tl.load(cosines + row * HALF + half, mask=known, other=0.0)[None, :]
    sine = tl.load(sines + row * HALF + half, mask=known, other=0.0)[None, :]
    dtype: tl.constexpr = heads.dtype.element_ty
    own = heads + row * row_stride
    if tl.program_id(1) == 0:
        head = tl.arange(0, HEADS_PADDED)
        there = (head < NUM_HEADS)[:, None] & known[None, :]
        at = head[:, None] * (2 * HALF) + half[None, :]
        low = tl.load(own + at, mask=there, other=0.0).to(tl.float32)
        high = tl.load(own + at + HALF, mask=there, other=0.0).to(tl.float32)
        if NORMED:
            low, high = normed_halves(low, high, query_weight, half, known, query_epsilon, HALF, OFFSET, dtype)
        out = queries + row * (NUM_HEADS * 2 * HALF) + at
        tl.store(out, (low * cosine - high * sine).to(dtype), mask=there)
        tl.store(out + HALF, (high * cosine + low * sine).to(dtype), mask=there)
    else:
        kv_head = tl.arange(0, KV_HEADS_PADDED)
        kv_there = (kv_head < KV_HEADS)[:, None] & known[None, :]
        kv_at = (NUM_HEADS + kv_head)[:, None] * (2 * HALF) + half[None, :]
        key_low = tl.load(own + kv_at, mask=kv_there, other=0.0).to(tl.float32)
        key_high = tl.load(own + kv_at + HALF, mask=kv_there, other=0.0).to(tl.float32)
        if NORMED:
            key_low, key_high = normed_halves(key_low, key_high, key_weight, half, known, key_epsilon, HALF, OFFSET, dtype)
        index = write_index + (row * KV_HEADS + kv_head) * 2
        key_row = tl.load(index, mask=kv_head < KV_HEADS, other=0) + layer_rows
        value_row = tl.load(index + 1, mask=kv_head < KV_HEADS, other=0) + layer_rows
        key_at = pool_rows + key_row[:, None] * (2 * HALF) + half[None, :]
        tl.store(key_at, (key_low * cosine - key_high * sine).to(dtype), mask=kv_there)
        tl.store(key_at + HALF, (key_high * cosine + key_low * sine).to(dtype), mask=kv_there)
        values = own + kv_at + KV_HEADS * (2 * HALF)
        value_at = pool_rows + value_row[:, None] * (2 * HALF) + half[None, :]
        tl.store(value_at, tl.load(values, mask=kv_there, other=0.0), mask=kv_there)
        tl.store(value_at + HALF, tl.load(values + HALF, mask=kv_there, other=0.0), mask=kv_there)


def turn_and_store(
    heads: torch.Tensor,
    num_heads: int,
    angles: Angles,
    pool: KVPool,
    layer: int,
    write_index: torch.Tensor,
    norms: tuple[TritonNorm, TritonNorm] | None = None,
) -> torch.Tensor:
    """As `layers.rotary.turn_and_store`, in the pool's dtype."""
    num_rows, all_heads, head_dim = heads.shape
    num_kv_heads = (all_heads - num_heads) // 2
    queries = torch.empty(num_rows, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    cosines, sines = angles
    query_norm, key_norm = norms if norms is not None else (None, None)
    turn_and_store_kernel[(num_rows, 2)](
        heads,
        cosines,
        sines,
        cosines if query_norm is None else query_norm.weight,
        sines if key_norm is None else key_norm.weight,
        write_index,
        pool.rows,
        queries,
        heads.stride(0),
        layer * pool.rows_per_layer,
        0.0 if query_norm is None else query_norm.epsilon,
        0.0 if key_norm is None else key_norm.epsilon,
        NORMED=norms is not None,
        OFFSET=query_norm is not None and query_norm.offset,
        NUM_HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        KV_HEADS=num_kv_heads,
        KV_HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        num_warps=4 if num_heads * head_dim >= 2048 else 1,
    )
    return queries


def turn_and_store_reference(
    heads: torch.Tensor,
    num_heads: int,
    angles: Angles,
    pool: KVPool,
    layer: int,
    write_index: torch.Tensor,
    norms: tuple[TritonNorm, TritonNorm] | None = None,
) -> torch.Tensor:
    if norms is None:
        return in_torch(heads, num_heads, angles, pool, layer, write_index)
    first, second = (
        OffsetRMSNorm(norm.weight - 1.0, norm.epsilon) if norm.offset else RMSNorm(norm.weight, norm.epsilon) for norm in norms
    )
    return in_torch(heads, num_heads, angles, pool, layer, write_index, (first, second))
