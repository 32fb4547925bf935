"""Rows times weights of 4 bits: what a decode step reads of a matrix shrinks to a quarter.

    packed   64 bytes hold 128 inputs of an output: the low halves of the bytes the first 64, the high halves the last 64
    scales   one for each `group` (64 or 128) inputs of an output

Both halves of a run of bytes are tiles of neighbouring inputs, so nothing is interleaved: two products per run. The weights enter
the product as the whole numbers that they are, which every 16-bit type holds exactly; sums are multiplied by their scale, in
fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.quantisation import PACKED_INPUTS, dequantise_int4
from common.engine.triton_kernels.split_sums import num_splits, sum_partials

RUN_BYTES = PACKED_INPUTS // 2
OUTPUTS = 64  # of a program
MAX_ROWS = 64  # beyond it a product with the weights as floats is faster


@triton.jit
def w4a16_kernel(
    rows,
    packed,
    scales,
    partial,
    num_rows,
    num_outputs,
    num_inputs,
    num_runs,
    runs_per_split,
    GROUPS_PER_RUN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUN_BYTES: tl.constexpr,
):
    own_rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    inside = tl.arange(0, RUN_BYTES)
    row_there, output_there = own_rows < num_rows, outputs < num_outputs
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for run in range(split * runs_per_split, tl.minimum((split + 1) * runs_per_split, num_runs)):
        both = tl.load(
            packed + outputs[None, :].to(tl.int64) * (num_runs * RUN_BYTES) + run * RUN_BYTES + inside[:, None],
            mask=output_there[None, :],
            other=136,
        )
        first = run * 2 * RUN_BYTES + inside
        source = rows + own_rows[:, None].to(tl.int64) * num_inputs
        low_rows = tl.load(source + first[None, :], mask=row_there[:, None] & (first < num_inputs)[None, :], other=0.0)
        second = first + RUN_BYTES
        high_rows = tl.load(source + second[None, :], mask=row_there[:, None] & (second < num_inputs)[None, :], other=0.0)
        low = ((both & 15).to(tl.int32) - 8).to(low_rows.dtype)
        high = ((both >> 4).to(tl.int32) - 8).to(low_rows.dtype)
        scale = scales + outputs.to(tl.int64) * (num_runs * GROUPS_PER_RUN) + run * GROUPS_PER_RUN
        low_scale = tl.load(scale, mask=output_there, other=0.0)
        high_scale = tl.load(scale + GROUPS_PER_RUN - 1, mask=output_there, other=0.0)
        total += tl.dot(low_rows, low, out_dtype=tl.float32) * low_scale[None, :]
        total += tl.dot(high_rows, high, out_dtype=tl.float32) * high_scale[None, :]
    place = (split.to(tl.int64) * num_rows + own_rows[:, None]) * num_outputs + outputs[None, :]
    tl.store(partial + place, total, mask=row_there[:, None] & output_there[None, :])


def w4a16(rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows [n, inputs]` times the matrix that `quantise_int4` made; [n, outputs]."""
    rows = rows.contiguous()
    (num_rows, num_inputs), (num_outputs, run_bytes) = rows.shape, packed.shape
    num_runs = run_bytes // RUN_BYTES
    tile_rows = tile_of(num_rows)
    programs = triton.cdiv(num_outputs, OUTPUTS) * triton.cdiv(num_rows, tile_rows)
    splits = num_splits(programs, num_runs)
    partial = torch.empty(splits, num_rows, num_outputs, dtype=torch.float32, device=rows.device)
    w4a16_kernel[(triton.cdiv(num_outputs, OUTPUTS), splits, triton.cdiv(num_rows, tile_rows))](
        rows,
        packed,
        scales,
        partial,
        num_rows,
        num_outputs,
        num_inputs,
        num_runs,
        triton.cdiv(num_runs, splits),
        scales.shape[1] // num_runs,
        tile_rows,
        OUTPUTS,
        RUN_BYTES,
        num_warps=4,
        num_stages=4,
    )
    return sum_partials(partial, bias, rows.dtype)


def w4a16_reference(rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = rows.float() @ dequantise_int4(packed, scales, rows.shape[1]).T
    return (product if bias is None else product + bias.float()).to(rows.dtype)


def tile_of(num_rows: int) -> int:
    """Rows of a tile: tensor cores take 16 at least."""
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
