"""Rows times weights in fp8 (e4m3, one scale for each output): half the bytes of a decode step, with floats' way of rounding.

A byte of e4m3 becomes a float of 16 bits by two shifts: sign, four bits of exponent and three of fraction are moved to where fp16
has them, and the number that comes out is 256 times too small, exactly. So it needs no conversion of the hardware's, and the 256
is in the scale. Rows stay as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.quantisation import dequantise_fp8
from common.engine.triton_kernels.gemm_w4a16 import tile_of
from common.engine.triton_kernels.split_sums import num_splits, sum_partials

OUTPUTS, INPUTS = 64, 64
EXPONENT_OFFSET = 256.0  # fp16's bias of 15 against e4m3's of 7


@triton.jit
def fp8_kernel(
    rows,
    weights,
    scales,
    partial,
    num_rows,
    num_outputs,
    num_inputs,
    num_steps,
    steps_per_split,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    own_rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    row_there, output_there = own_rows < num_rows, outputs < num_outputs
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for step in range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, num_steps)):
        places = step * INPUTS + tl.arange(0, INPUTS)
        there = places < num_inputs
        left = tl.load(
            rows + own_rows[:, None].to(tl.int64) * num_inputs + places[None, :],
            mask=row_there[:, None] & there[None, :],
            other=0.0,
        )
        bits = tl.load(
            weights + outputs[None, :].to(tl.int64) * num_inputs + places[:, None],
            mask=output_there[None, :] & there[:, None],
            other=0,
        ).to(tl.uint16)
        moved = ((bits & 128) << 8) | ((bits & 127) << 7)
        right = moved.to(tl.float16, bitcast=True).to(tl.float32).to(left.dtype)
        total += tl.dot(left, right, out_dtype=tl.float32)
    scale = tl.load(scales + outputs, mask=output_there, other=0.0) * OFFSET
    place = (split.to(tl.int64) * num_rows + own_rows[:, None]) * num_outputs + outputs[None, :]
    tl.store(partial + place, total * scale[None, :], mask=row_there[:, None] & output_there[None, :])


def fp8(rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows [n, inputs]` times the matrix that `quantise_fp8` made; [n, outputs]."""
    rows = rows.contiguous()
    (num_rows, num_inputs), num_outputs = rows.shape, len(weights)
    tile_rows = tile_of(num_rows)
    num_steps = triton.cdiv(num_inputs, INPUTS)
    programs = triton.cdiv(num_outputs, OUTPUTS) * triton.cdiv(num_rows, tile_rows)
    splits = num_splits(programs, num_steps)
    partial = torch.empty(splits, num_rows, num_outputs, dtype=torch.float32, device=rows.device)
    fp8_kernel[(triton.cdiv(num_outputs, OUTPUTS), splits, triton.cdiv(num_rows, tile_rows))](
        rows,
        weights.view(torch.uint8),
        scales,
        partial,
        num_rows,
        num_outputs,
        num_inputs,
        num_steps,
        triton.cdiv(num_steps, splits),
        EXPONENT_OFFSET,
        tile_rows,
        OUTPUTS,
        INPUTS,
        num_warps=4,
        num_stages=4,
    )
    return sum_partials(partial, bias, rows.dtype)


def fp8_reference(rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = rows.float() @ dequantise_fp8(weights, scales).T
    return (product if bias is None else product + bias.float()).to(rows.dtype)
